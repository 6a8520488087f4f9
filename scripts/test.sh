#!/usr/bin/env bash
# The test suite: makes .venv, installs the test extra, runs pytest. Arguments go to pytest, e.g. -m "not slow".
# Can be run again; nothing is installed twice.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
ensure_environment test
# The models are tiny: more threads only wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$VENV/bin/python" -m pytest "$@"
echo "next: bash scripts/demo.sh trains, exports and checks a model on this machine"
