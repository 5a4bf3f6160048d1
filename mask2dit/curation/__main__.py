"""`python -m mask2dit.curation [CONFIG.yaml] [key=value …]`."""

import sys

from mask2dit import cli

if __name__ == "__main__":
    sys.exit(cli.run("curate", sys.argv[1:]))
