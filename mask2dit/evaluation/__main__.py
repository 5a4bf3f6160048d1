"""`python -m mask2dit.evaluation CONFIG.yaml [key=value …]`."""

import sys

from mask2dit.command import run_command
from mask2dit.evaluation.config import EvaluationConfig

if __name__ == "__main__":
    sys.exit(
        run_command(
            EvaluationConfig, "mask2dit.evaluation.run:evaluate", "configs/evaluation/mask2dit.yaml", sys.argv[1:]
        )
    )
