"""`python -m mask2dit.curation [CONFIG.yaml] [key=value …]`."""

import sys

from mask2dit.command import run_command
from mask2dit.curation.config import CurationConfig

if __name__ == "__main__":
    sys.exit(run_command(CurationConfig, "mask2dit.curation.run:curate", "configs/curation/films.yaml", sys.argv[1:]))
