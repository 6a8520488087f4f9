#!/usr/bin/env python3
"""Hold a demo's report against what the demo promises: `python scripts/check_demo.py runs/demo/report.json`.

Prints one JSON with each promise and whether it is kept; exits 1 if one is not. Time is checked against ten
minutes, the most that a slow machine may take.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

LEAST_ACCURACY = 0.97
MOST_WITHOUT_PICTURE = 0.03
TEST_QUESTIONS = 9673
MOST_SECONDS = 600


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of a demo")
    report = json.loads(parser.parse_args(arguments).report.read_text(encoding="utf-8"))
    kept = {
        "test_accuracy": report["test_accuracy"] >= LEAST_ACCURACY,
        "shuffled_accuracy": report["shuffled_accuracy"] <= report["constant_accuracy"] + MOST_WITHOUT_PICTURE,
        "test_questions": report["test_questions"] == TEST_QUESTIONS,
        "seconds": report["seconds"]["total"] <= MOST_SECONDS,
    }
    print(json.dumps({"kept": kept, **{name: report[name] for name in kept}}))
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
