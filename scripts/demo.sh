#!/usr/bin/env bash
# The whole recipe on a CPU in minutes: makes .venv, installs the package, runs `llava-train demo`.
# Arguments go to the command, e.g. `bash scripts/demo.sh --out runs/mine`. Can be run again; nothing is installed twice.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
ensure_environment demo
"$VENV/bin/llava-train" demo "$@"
out=runs/demo
while [ $# -gt 0 ]; do case $1 in --out) out=$2; shift;; --out=*) out=${1#--out=};; esac; shift; done
echo "next: $VENV/bin/llava-train chat $out/hf --image PICTURE.png   (or open $out/report.html)"
