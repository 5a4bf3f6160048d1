"""`python -m mask2dit.training CONFIG.yaml [key=value …]`; scripts/train.sh starts it on several processes."""

import sys

from mask2dit.command import run_command
from mask2dit.training.config import TrainConfig

if __name__ == "__main__":
    sys.exit(run_command(TrainConfig, "mask2dit.training.run:train", "configs/train/pretrain.yaml", sys.argv[1:]))
