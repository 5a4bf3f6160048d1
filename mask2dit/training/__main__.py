"""`python -m mask2dit.training [CONFIG.yaml] [key=value …]`; scripts/train.sh starts it on several processes."""

import sys

from mask2dit import cli

if __name__ == "__main__":
    sys.exit(cli.run("train", sys.argv[1:]))
