"""What takes the place, in a modelling file, of definitions that a finished model has no use for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class OpenClipTrunk:
    """An encoder in open_clip's own code, which no modelling file holds: no encoder is one."""


def read_sizes(folder: Path) -> tuple[dict[str, Any], int]:
    """Of a BLIP-2 folder that a Q-Former begins with; a finished one has its sizes in config.json."""
    raise ValueError(f"init_from: {folder}: is for a model that is yet to be trained")
