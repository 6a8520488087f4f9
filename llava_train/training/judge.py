"""Which rank ends a run, judged from what is heard of all of them. Pure: a time is seconds on any clock.

What is held against a rank:

* silence: no heartbeat for `silence_s`. Killed, stopped, its machine gone, or its interpreter held by a call into C
  for that long.
* standing behind: no rank moves for `behind_s`, or for three usual steps if that is longer, and this one has not
  come as far as others: they wait for it. A rank that is merely slower ends no run.
* standing still: no rank moves for `still_s` though all have come equally far. Nothing tells ranks that wait in
  different collectives from a very slow step, hence the long limit.
* leaving: it failed, and the others did not follow.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

# How a rank left. An error of its own ("failed") is told apart from one that another's end may have brought about.
DONE, STOPPED, FAILED, BROKEN, ENDED = "done", "stopped", "failed", "broken", "ended"
FAULTS = (FAILED, BROKEN)


@dataclass(frozen=True)
class Limits:
    """Seconds. A heartbeat comes every `beat_s`; `leave_s` is what the others have to follow one that failed."""

    beat_s: float = 1.0
    silence_s: float = 45.0
    behind_s: float = 52.0
    still_s: float = 1800.0
    leave_s: float = 4.0


@dataclass(frozen=True)
class Beat:
    """What a rank tells. `mark` counts places within a step; `left` says how it left, if it did."""

    rank: int
    process: int = 0
    host: str = ""
    identity: str = ""
    count: int = 0
    step: int = 0
    mark: int = 0
    place: str = "the start"
    patient: bool = False
    left: str = ""

    @property
    def stand(self) -> tuple[int, int, bool, str]:
        """What changes when the rank moves."""
        return self.step, self.mark, self.patient, self.left

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, and through which ranks. `kill` are processes that can no longer end themselves."""

    text: str
    blamed: list[int]
    stacks: bool = False
    kill: list[dict[str, Any]] = field(default_factory=list)


class Judge:
    """Says which rank ends the run, from what was heard of them; times are seconds on any clock."""

    def __init__(self, world_size: int, limits: Limits) -> None:
        self.world_size, self.limits = world_size, limits
        self.beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._moved = self._stepped = 0.0
        self._left: dict[int, float] = {}
        self._steps: deque[float] = deque([0.0], maxlen=8)

    def hear(self, beats: list[Beat], now: float) -> None:
        """Take in the newest beat of each rank that is seen."""
        for beat in beats:
            before = self.beats.get(beat.rank) or Beat(beat.rank, count=-1)
            self.beats[beat.rank] = beat
            if beat.count != before.count:
                self._heard[beat.rank] = now
            if beat.stand != before.stand:
                self._moved = now
            if beat.left and not before.left:
                self._left[beat.rank] = now
            if beat.rank == 0 and beat.step != before.step:
                if before.step:
                    self._steps.append(now - self._stepped)
                self._stepped = now

    def silent(self, now: float, limit: float) -> Verdict | None:
        """The ranks, of those that did not leave, that have not been heard of for `limit`."""
        gone = [beat for rank, beat in self.beats.items() if not beat.left and now - self._heard[rank] > limit]
        if not gone:
            return None
        told = [
            f"{b} has not been heard of for {now - self._heard[b.rank]:.0f} s, last seen at {b.place}" for b in gone
        ]
        kill = [asdict(beat) for beat in gone] if limit == self.limits.silence_s else []
        return Verdict("; ".join(told), [beat.rank for beat in gone], kill=kill)

    def verdict(self, now: float) -> Verdict | None:
        """Any fault, where all ranks are seen."""
        if len(self.beats) < self.world_size:
            return None
        if self.over:
            return self._abandoned(sorted(self._left, key=self._left.__getitem__), [])
        failed = self._overdue(self.limits.leave_s, now)
        broken = any(self.beats[rank].left in FAULTS for rank in failed)
        limit = self.limits.leave_s if broken else self.limits.silence_s  # an error brought about by who is silent
        stopped = self._overdue(3 * self.limits.leave_s, now)  # all were, as a rule, but not all can leave
        return self.silent(now, limit) or self._abandoned(failed, stopped) or self._standing(now)

    @property
    def over(self) -> bool:
        """Whether all have left."""
        return len(self._left) == self.world_size

    def _overdue(self, limit: float, now: float) -> list[int]:
        """Who left longer ago than that, first to leave first."""
        return sorted((rank for rank, at in self._left.items() if now - at > limit), key=self._left.__getitem__)

    def _abandoned(self, failed: list[int], stopped: list[int]) -> Verdict | None:
        for manner, ranks in ((FAILED, failed), (BROKEN, failed), (STOPPED, stopped)):
            for beat in (self.beats[rank] for rank in ranks):
                if beat.left == manner:
                    how = "was stopped" if manner == STOPPED else "failed; its own message tells why"
                    return Verdict(f"{beat} left at {beat.place}: it {how}", [beat.rank])
        return None

    def _standing(self, now: float) -> Verdict | None:
        present = [beat for beat in self.beats.values() if not beat.left]
        reached = min((beat.step, beat.mark) for beat in present)
        behind = [beat for beat in present if (beat.step, beat.mark) == reached]
        still = now - self._moved
        if any(beat.patient for beat in behind):
            return None
        blamed = [beat.rank for beat in behind]
        if len(behind) == self.world_size and still > self.limits.still_s:
            text = f"no rank has moved for {still:.0f} s; all stand at {behind[0].place}, and show below where"
            return Verdict(text, blamed, stacks=True)
        if len(behind) < self.world_size and still > max(self.limits.behind_s, 3 * statistics.median(self._steps)):
            who = ", ".join(map(str, behind))
            text = f"{who} stood still for {still:.0f} s at {behind[0].place}, and the other ranks waited for it"
            return Verdict(text, blamed, stacks=True)
        return None
