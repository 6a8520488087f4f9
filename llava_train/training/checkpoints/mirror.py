"""A run's checkpoints in an object store: sent beside the training, fetched where the local folder lacks them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from llava_train.errors import StorageError
from llava_train.recipe import CheckpointSettings
from llava_train.training.checkpoints.manifest import faults, place_of, steps_of
from llava_train.training.checkpoints.remote import Remote, told
from llava_train.training.checkpoints.retention import superfluous
from llava_train.training.monitor import METRICS, say

_Job = tuple[Path, tuple[Path, ...]]


class Mirror:
    """What rank 0 of a run does with `checkpoint.remote`; nothing where the recipe names none."""

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self.folder, self.settings = folder, settings
        self.best_step: int | None = None
        self._remote = Remote(settings.remote) if settings.remote else None
        self._uploader = Uploader(self._remote, self._superfluous) if self._remote else None

    def open(self, fresh: bool) -> None:
        """Find out, before anything is computed, that the store can be used; then fetch what is newer there.

        `fresh` removes what it holds instead. Raises StorageError.
        """
        if self._remote is None:
            return
        self._remote.probe()
        if fresh:
            for step in self._remote.steps():
                self._remote.remove(step)
            return
        fetched = self._remote.pull_newest(self.folder / "checkpoints", self._newest_local())
        if fetched is not None and not (self.folder / METRICS).exists():
            self._remote.pull_file(METRICS, self.folder / METRICS)

    def _newest_local(self) -> int:
        for step in reversed(steps_of(self.folder)):
            if next(faults(place_of(self.folder, step)), None) is None:
                return step
        return -1

    def _superfluous(self, steps: list[int]) -> list[int]:
        return superfluous(steps, self.best_step, self.settings)

    def submit(self, checkpoint: Path, best_step: int | None) -> None:
        """Have a checkpoint sent."""
        self.best_step = best_step
        if self._uploader:
            self._uploader.submit(checkpoint, [self.folder / METRICS])

    def busy(self) -> set[Path]:
        """Local checkpoints that must stay for now."""
        return self._uploader.busy() if self._uploader else set()

    def wait(self) -> None:
        """Return when the newest checkpoint is in the store. Raises StorageError."""
        if self._uploader:
            self._uploader.wait()

    def send_model(self, folder: Path) -> None:
        """Send the finished model, too. Raises StorageError."""
        if self._remote:
            self._remote.push_tree(folder, folder.name)


class Uploader:
    """Sends checkpoints to a store beside the training, one after the other.

    A checkpoint still waiting when the next one comes is passed over, so that a slow store never holds more than two
    folders on the local disk.
    """

    def __init__(self, remote: Remote, superfluous: Callable[[list[int]], Iterable[int]]) -> None:
        """`superfluous`: the steps that the store need not keep, see `Remote.retain`; called by another thread."""
        self._remote, self._superfluous = remote, superfluous
        self._state = threading.Condition()
        self._waiting: _Job | None = None
        self._sending: _Job | None = None
        self._failed: _Job | None = None
        self._failure: StorageError | None = None
        self._running = False

    def submit(self, folder: Path, beside: Iterable[Path] = ()) -> None:
        """Have `.../step-<n>` sent, and before it the small files `beside` (metrics.jsonl, ...) by their names.

        Returns at once. A failure is said when it happens and ends nothing: the next checkpoint is tried again.
        """
        with self._state:
            if self._waiting:
                say(f"{self._waiting[0].name} is not uploaded: {folder.name} came before {self._remote.url} was ready")
            self._waiting = (folder, tuple(beside))
            if not self._running:
                self._running = True
                # A daemon: a run that fails must not hang on its upload, and half of one is not listed.
                threading.Thread(target=self._work, name="checkpoint-upload", daemon=True).start()

    def busy(self) -> set[Path]:
        """The folders that must stay: the one being sent and the one waiting."""
        with self._state:
            return {job[0] for job in (self._sending, self._waiting) if job}

    def wait(self) -> None:
        """Return when the newest checkpoint is in the store; one that failed is tried once more. Else StorageError."""
        self._idle()
        if self._failed:
            self.submit(*self._failed)
            self._idle()
        if self._failure:
            raise self._failure

    def _idle(self) -> None:
        with self._state:
            self._state.wait_for(lambda: not self._running)

    def _work(self) -> None:
        while True:
            with self._state:
                self._sending, self._waiting = self._waiting, None
                if self._sending is None:
                    self._running = False
                    self._state.notify_all()
                    return
                job = self._sending
            failure = self._upload(*job)
            self._failed, self._failure = (job, failure) if failure else (None, None)

    def _upload(self, folder: Path, beside: tuple[Path, ...]) -> StorageError | None:
        started = time.monotonic()
        try:
            for path in beside:  # first: rows of later steps are dropped on resume, missing ones are lost
                self._remote.push_file(path, path.name)
            size = self._remote.push(folder)
            say(f"uploaded {told(folder.name, size, started)}")
        except Exception as error:  # whatever it is, `wait` must tell it
            say(f"warning: {folder.name} is not uploaded: {error}; the next checkpoint is tried again")
            return error if isinstance(error, StorageError) else StorageError(f"{folder}: not uploaded: {error!r}")
        try:
            self._remote.retain(int(folder.name.removeprefix("step-")), self._superfluous)
        except Exception as error:  # the checkpoint is there all the same
            say(f"warning: old checkpoints stay in the store: {error}")
        return None
