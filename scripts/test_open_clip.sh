#!/usr/bin/env bash
# The tests of open_clip's models, which need the package: installs it into a folder of its own below .venv, where no
# other test sees it (it brings torchvision, whose newest release wants another torch), and runs them.
# Can be run again; nothing is installed twice. OPEN_CLIP_FOLDER: where it lies, or is to lie.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
ensure_environment test
folder=$(realpath -m "${OPEN_CLIP_FOLDER:-$VENV/open_clip}")
[ -d "$folder/open_clip" ] || "$VENV/bin/pip" install -q --target "$folder" --no-deps \
  open_clip_torch==3.3.0 timm==1.0.31 torchvision==0.28.0 ftfy wcwidth
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} LLAVA_TRAIN_OPEN_CLIP=$folder
"$VENV/bin/python" -m pytest tests/model/towers/test_open_clip.py "$@"
echo "next: bash scripts/test.sh runs everything else"
