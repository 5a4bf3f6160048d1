"""`python -m mask2dit.training [CONFIG.yaml] [key=value …]`; scripts/train.sh starts it on several processes."""

import os
import sys

from mask2dit import cli

if __name__ == "__main__":
    status = cli.run("train", sys.argv[1:])
    if "RANK" in os.environ:  # started by torchrun
        # Everything is written, and the groups are destroyed as far as they can be: DeepSpeed keeps references to them, so
        # gloo's threads live on, and one that still has a tensor to release while Python shuts down aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
