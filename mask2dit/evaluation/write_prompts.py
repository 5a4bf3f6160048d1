"""A set of stories for an evaluation, written by a language model: `python -m mask2dit.evaluation.write_prompts [CONFIG.yaml]
[key=value …]`, the same as `mask2dit write` without an idea."""

import sys

from mask2dit import cli

if __name__ == "__main__":
    sys.exit(cli.run("write", sys.argv[1:]))
