"""`python -m mask2dit.evaluation [CONFIG.yaml] [key=value …]`."""

import sys

from mask2dit import cli

if __name__ == "__main__":
    sys.exit(cli.run("evaluate", sys.argv[1:]))
