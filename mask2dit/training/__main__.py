"""`python -m mask2dit.training [CONFIG.yaml] [key=value …]`; scripts/train.sh starts it on several processes."""

import os
import sys

from mask2dit import cli

if __name__ == "__main__":
    status = cli.run("train", sys.argv[1:])
    if "RANK" in os.environ:  # started by torchrun
        # Everything is written by now. DeepSpeed keeps references to the process groups, so gloo's threads outlive them, and
        # one that still has a tensor to release while Python shuts down aborts the process. Hence no regular exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
