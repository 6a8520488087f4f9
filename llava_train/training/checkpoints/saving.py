"""Writing checkpoints: every rank its shard, rank 0 the manifest and the rename that makes them one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_train.errors import StorageError
from llava_train.files import ensure_space, flush, sha256_file, storage_faults, sweep, write_json
from llava_train.recipe import CheckpointSettings
from llava_train.tensorfile import Entry, write_tensors
from llava_train.training.checkpoints.manifest import place_of, seal, steps_of
from llava_train.training.checkpoints.mirror import Mirror
from llava_train.training.checkpoints.retention import superfluous
from llava_train.training.checkpoints.shards import shard_bytes, shard_entries, shard_name
from llava_train.training.engines.base import Engine
from llava_train.training.state import RunState

STATE = "state.json"
_DIGEST_BYTES = 32


class Saver:
    """Writes the checkpoints of a run and removes those that no rule keeps.

    With `settings.asynchronous` the tensors are copied in `save`, a thread writes them beside the next steps, and the
    loop calls `commit` on every rank once all have `written`.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        settings: CheckpointSettings,
        facts: Callable[[], dict[str, Any]],
        mirror: Mirror,
    ) -> None:
        """`facts` go into state.json; rank 0 gives each checkpoint to `mirror`."""
        self.folder, self.engine, self.settings = folder, engine, settings
        self.facts, self.mirror = facts, mirror
        self._writing: _Writing | None = None
        self._state = RunState()
        self._said: dict[str, Any] = {}
        self._needed = 0

    def save(self, state: RunState) -> None:
        """Write `checkpoints/step-<n>`. Every rank calls it. Raises StorageError; the former ones are then intact."""
        self.finish()
        ranks = self.engine.ranks
        self._state, self._said = RunState(**vars(state)), self.facts()
        fragments = self.engine.fragments() if self.engine.saves else []
        held = sum(fragment.count for fragment in fragments)
        self._needed = shard_bytes(int(ranks.total([float(held)])[0]))
        self._check(self._make_room, ranks.is_main)
        entries = shard_entries(fragments, self.engine.stepped, self.settings.asynchronous)
        path = self._temporary / shard_name(ranks.rank, ranks.world_size)
        self._writing = _Writing(path, entries)
        if self.settings.asynchronous:
            self._writing.start()
        else:
            self._writing.run()
            self.commit()

    @property
    def written(self) -> bool:
        """Whether this rank's share of a checkpoint waits for `commit`."""
        return self._writing is not None and not self._writing.is_alive()

    def finish(self) -> None:
        """Wait for a checkpoint that is being written, and commit it. Every rank calls it."""
        if self._writing is not None:
            self.commit()

    def commit(self) -> None:
        """Turn what all ranks have written into a checkpoint. Every rank calls it."""
        assert self._writing is not None
        writing, self._writing = self._writing, None
        if writing.ident is not None:
            writing.join()
        digests = self._gather(writing)
        self._check(lambda: self._seal(digests), self.engine.ranks.is_main)

    @property
    def _temporary(self) -> Path:
        target = place_of(self.folder, self._state.step)
        return target.with_name(f".{target.name}.tmp")

    def _make_room(self) -> None:
        ensure_space(self.folder, self._needed, "a checkpoint")
        with storage_faults(self._temporary, self._needed):
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)

    def _check(self, work: Callable[[], None], mine: bool) -> None:
        """Do `work` where it is `mine`; if it fails there, every rank raises, so that none waits for another."""
        fault: Exception | None = None
        if mine:
            try:
                work()
            except Exception as error:
                fault = error
        self._raise_together(fault)

    def _raise_together(self, fault: Exception | None) -> None:
        """Raise on every rank where one has a `fault`; what it has written makes room again."""
        failed = self.engine.ranks.total([float(fault is not None)])[0]
        if failed and self.engine.ranks.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if fault is not None:
            raise fault
        if failed:
            raise StorageError(f"{self._temporary}: another rank could not write its share; its message says why")

    def _gather(self, writing: _Writing) -> dict[str, str]:
        """sha256 of every rank's file, by name: sent as numbers, for a pickle would be the alternative."""
        ranks = self.engine.ranks
        self._raise_together(writing.fault)
        slots = [0.0] * (ranks.world_size * (_DIGEST_BYTES + 1))
        if writing.digest:
            first = ranks.rank * (_DIGEST_BYTES + 1)
            slots[first : first + _DIGEST_BYTES + 1] = [1.0, *map(float, bytes.fromhex(writing.digest))]
        slots = ranks.total(slots)
        found = {}
        for rank in range(ranks.world_size):
            wrote, *numbers = slots[rank * (_DIGEST_BYTES + 1) : (rank + 1) * (_DIGEST_BYTES + 1)]
            if wrote:
                found[shard_name(rank, ranks.world_size)] = bytes(map(int, numbers)).hex()
        return found

    def _seal(self, digests: dict[str, str]) -> None:
        temporary, target = self._temporary, place_of(self.folder, self._state.step)
        with storage_faults(temporary, self._needed):
            write_json(temporary / STATE, {**vars(self._state), **self._said})
            seal(temporary, {**digests, STATE: sha256_file(temporary / STATE)})
            if target.exists():  # a damaged one: the run went back behind it
                _remove(target)
            temporary.rename(target)
            flush(target.parent)
            self.mirror.submit(target, self._state.best_step)
            self._retain()

    def _retain(self) -> None:
        """Checkpoints beyond this one are damaged (the run went back behind them) and no rule counts them."""
        steps = [step for step in steps_of(self.folder) if step <= self._state.step]
        for step in superfluous(steps, self._state.best_step, self.settings):
            if place_of(self.folder, step) not in self.mirror.busy():
                _remove(place_of(self.folder, step))


class _Writing(threading.Thread):
    """The writing of one rank's file; reads it back, since older checkpoints are removed on the strength of it."""

    def __init__(self, path: Path, entries: list[Entry]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.path, self.entries = path, entries
        self.digest = ""
        self.fault: Exception | None = None

    def run(self) -> None:
        entries, self.entries = self.entries, []
        try:
            if entries:
                self.digest = write_tensors(self.path, entries)
                with storage_faults(self.path, 0):
                    if sha256_file(self.path) != self.digest:
                        raise StorageError(f"{self.path}: does not read back as it was written; check the disk")
        except Exception as error:  # whatever it is, no checkpoint may be made without this file
            self.fault = error


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a crash in the middle leaves none that looks whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep_unfinished(folder: Path) -> None:
    """Remove what a crash left of files being written or removed in a run folder, which must be ours alone."""
    for place in (folder, folder / "checkpoints"):
        sweep(place, untouched_s=0)
