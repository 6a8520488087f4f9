"""What cannot be used: counted by cause, listed whole in a file, and judged by each source's policy."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_train.data.preparing.pieces import Outcome
from llava_train.data.preparing.prepared import PreparedSet
from llava_train.data.preparing.rows import Fault
from llava_train.data.preparing.source import Source
from llava_train.errors import DataError

_SHOWN = 100
"""Faults of one cause that an error shows; the file has all."""


class FaultLog:
    """Faults of all sources, in the order of their records. Only counts and the first of each cause stay in memory."""

    def __init__(self, sources: Sequence[Source], path: Path) -> None:
        self.sources, self.path = sources, path
        self.kept = [0] * len(sources)
        self.causes: list[Counter[str]] = [Counter() for _ in sources]
        self.hostile = 0
        self._shown: list[dict[str, list[str]]] = [defaultdict(list) for _ in sources]

    @property
    def faulty(self) -> int:
        """Faults so far."""
        return sum(sum(causes.values()) for causes in self.causes)

    @property
    def read(self) -> int:
        """Records so far: kept and faulty."""
        return sum(self.kept) + self.faulty

    def add(self, source: int, path: str, outcome: Outcome) -> None:
        """Count a piece and write its faults down."""
        self.kept[source] += outcome.kept
        self._add(source, path, outcome.faults)

    def add_double(self, source: int, path: str, fault: Fault) -> None:
        """A record that was kept until it was found to be a double."""
        self.kept[source] -= 1
        self._add(source, path, [fault])

    def _add(self, source: int, path: str, faults: Sequence[Fault]) -> None:
        if not faults:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            for fault in faults:
                self.causes[source][fault.cause] += 1
                self.hostile += fault.hostile
                shown = self._shown[source][fault.cause]
                if len(shown) < _SHOWN:
                    shown.append(fault.message)
                row = {
                    "source": self.sources[source].name,
                    "file": path,
                    "at": fault.at,
                    "place": f"{path}{fault.at}",
                    "id": fault.id,
                    "cause": fault.cause,
                    "message": fault.message,
                }
                stream.write(json.dumps(row) + "\n")  # escapes: a message may quote half of a character

    def counts(self, source: int) -> dict[str, Any]:
        """`read`, `kept` and `skipped` (by cause); read = kept + skipped."""
        skipped = dict(self.causes[source].most_common())
        return {"read": self.kept[source] + sum(skipped.values()), "kept": self.kept[source], "skipped": skipped}

    def judge(self, copy: Path) -> None:
        """Raise DataError where a policy does not let a source pass; the list then lies at `copy`."""
        copy.unlink(missing_ok=True)
        verdicts = [self._verdict(number) for number in range(len(self.sources))]
        if not self.hostile and not any(verdicts):
            return
        shutil.copyfile(self.path, copy)
        lines = [f"{self.faulty:,} of {self.read:,} records cannot be used"]
        for number, source in enumerate(self.sources):
            if self.causes[number]:
                lines.append(f"{source.name}: {verdicts[number] or 'policy skip'}")
                lines += self._listed(number)
        if self.hostile:
            lines.append(f"{self.hostile:,} of them lead outside their root or to the web, which no policy may skip")
        lines.append(f"all of them: {copy}; mend the data, or leave bad records out with policy: skip on their source")
        raise DataError("\n".join(lines))

    def _verdict(self, number: int) -> str:
        source, bad = self.sources[number], sum(self.causes[number].values())
        if not bad:
            return ""
        if source.policy == "error":
            return f"{bad:,} bad records, policy error"
        if not self.kept[number]:
            return "not one record of it can be used"
        share = bad / (bad + self.kept[number])
        if share > source.max_skipped:
            return f"{bad:,} bad records are {share:.2%} of it, more than max_skipped {source.max_skipped:.2%}"
        return ""

    def _listed(self, number: int) -> list[str]:
        lines = []
        for cause, count in self.causes[number].most_common():
            shown = self._shown[number][cause]
            lines.append(f"  {cause}: {count:,}")
            lines += [f"    {message}" for message in shown]
            if count > len(shown):
                lines.append(f"    ... and {count - len(shown):,} more")
        return lines


def find_doubles(prepared: PreparedSet, sources: Sequence[Source], log: FaultLog) -> list[int]:
    """Rows that repeat an earlier one of their source, by id or by content as the source asks; logged as faults."""
    columns = {"id": "identity", "content": "content"}
    doubles: list[int] = []
    for number, source in enumerate(sources):
        if source.duplicates == "allow":
            continue
        rows = prepared.rows_of_source(number)
        hashes = prepared.column(columns[source.duplicates])[rows]
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        found = np.flatnonzero(first[inverse] != np.arange(len(rows)))
        for index in tqdm(found, desc=f"doubles in {source.name}", delay=2):
            row, earlier = int(rows[index]), int(rows[first[inverse[index]]])
            log.add_double(number, *_double(prepared, row, earlier, source.duplicates))
            doubles.append(row)
    return doubles


def _double(prepared: PreparedSet, row: int, earlier: int, by: str) -> tuple[str, Fault]:
    place, other, values = prepared.place(row), prepared.place(earlier), prepared.values(row)
    identity, at = values["id"], values["at"]
    hint = "; if ids name pictures here, set duplicates: content or allow" if by == "id" else ""
    message = f"{place} (id {identity}): the same {by} as {other}{hint}"
    return place.removesuffix(at), Fault(at, identity, f"duplicate_{by}", message)
