# Sourced by demo.sh and test.sh: `ensure_environment EXTRA` makes .venv and installs the package once.
# Settings: PYTHON (default python3), VENV (default .venv), LLAVA_TRAIN_TORCH=any (take any build of torch).

fail() { echo "error: $*" >&2; exit 1; }

ensure_environment() {
  local extra=$1 python=${PYTHON:-python3}
  VENV=${VENV:-.venv}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "Python 3.10 or newer is needed (tried $python); set PYTHON=/path/to/python3"
  if [ ! -x "$VENV/bin/python" ]; then
    echo "== making the virtual environment $VENV" >&2
    "$python" -m venv "$VENV" || fail "cannot make $VENV (on Debian: apt install python3-venv)"
  fi
  local wanted stamp="$VENV/.installed-$extra"
  wanted=$(cat pyproject.toml constraints.txt | "$VENV/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "== $VENV has everything for '$extra' already" >&2
    return
  fi
  install_torch
  echo "== installing llava-train[$extra] (a minute or two)" >&2
  "$VENV/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[$extra]" ||
    fail "pip could not install llava-train[$extra]; its message stands above"
  echo "$wanted" > "$stamp"
}

# torch's plain build brings gigabytes of CUDA; a machine without an NVIDIA GPU gets the CPU build or a clear answer.
install_torch() {
  local pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
  "$VENV/bin/python" -c 'import torch' 2>/dev/null && return
  local version build
  version=$(sed -n 's/^torch==//p' constraints.txt)
  build="torch==$version+cpu"
  if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null || [ "${LLAVA_TRAIN_TORCH:-}" = any ]; then
    build="torch==$version"
  fi
  echo "== installing $build" >&2
  "${pip[@]}" install -q "$build" && return
  fail "pip finds no $build. Without an NVIDIA GPU a CPU build is wanted: set PIP_EXTRA_INDEX_URL to the CPU index" \
    "that pytorch.org names under 'Get started', or accept any build with LLAVA_TRAIN_TORCH=any, and run this again"
}
