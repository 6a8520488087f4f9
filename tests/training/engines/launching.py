"""Starting several processes as a launcher does, with a time limit: what hangs is a failure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def run(command: list[str], limit_s: float = 600) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=REPOSITORY, check=False, timeout=limit_s
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def run_jobs(jobs: list[dict[str, Any]], ranks: int, folder: Path) -> list[str]:
    """Outcomes of jobs (see tests/training/engines/jobs.py), all in one launch."""
    path = folder / f"jobs-{ranks}.json"
    path.write_text(json.dumps(jobs))
    printed = run([*torchrun(ranks), "-m", "tests.training.engines.jobs", str(path)])
    return [line for line in printed.splitlines() if line in ("done", "stopped")]  # DeepSpeed prints as well
