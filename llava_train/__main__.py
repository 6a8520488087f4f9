"""`python -m llava_train` is `llava-train`."""

import sys

from llava_train.cli import main

sys.exit(main())
