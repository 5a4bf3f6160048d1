"""`python -m mask2dit COMMAND [CONFIG.yaml] [key=value …]`."""

import sys

from mask2dit.cli import main

if __name__ == "__main__":
    sys.exit(main())
