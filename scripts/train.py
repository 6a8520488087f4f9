#!/usr/bin/env python3
"""What a launcher starts: `torchrun --nproc_per_node 8 scripts/train.py RECIPE [key=value ...]`, or `deepspeed`.

The same as `llava-train train`; the `--local_rank` that some launchers add is read from the environment instead.
"""

import sys

from llava_train.cli import main

if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(main(["train", *arguments]))
