"""One thread owns the model and answers what waits, in batches.

Batches are static: those who wait together are answered together, and who comes later waits for the next batch. Rows
have their own settings and ends; a batch ends with its last row. Joining a batch that runs would need the caches of
every family of models taken apart and put together, which `generate` hides.

Shapes: B rows, T columns, V vocabulary.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from llava_train.inference import Prompt, batch_inputs, stop_ids
from llava_train.model.assemble import Assembly
from llava_train.model.families.table import family_of
from llava_train.serving.decoding import Event, Failure, Row, Sampling

_GATHER_S = 0.02
"""How long the first of a batch waits for others that were sent with it."""
_STOPPING = Failure("the server is shutting down", 503)


@dataclass(eq=False)
class Job:
    """A prompt that waits for an answer of up to `limit` tokens.

    `emit` is called in the model's thread; set `cancelled`, and the answer ends without another word.
    """

    prompt: Prompt
    sampling: Sampling
    limit: int
    emit: Callable[[Event], None]
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)


class Engine:
    """Answers jobs until it is closed.

    >>> engine = Engine(assembly, max_batch=8)  # doctest: +SKIP
    >>> engine.submit(Job(prompt, Sampling(), 32, print))  # doctest: +SKIP
    Piece(text='It is red', logprobs=())
    """

    def __init__(self, assembly: Assembly, max_batch: int, debug: bool = False) -> None:
        self.assembly, self.max_batch = assembly, max_batch
        self.running = 0
        self.batch_s = 1.0
        self._debug = debug
        self._stop_ids = frozenset(stop_ids(assembly))
        self._waiting: deque[Job] = deque()
        self._changed = Condition()
        self._deadline: float | None = None
        self._thread = Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._deadline is None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs that no batch has yet."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        with self._changed:
            if self.alive:
                self._waiting.append(job)
                self._changed.notify_all()
                return
        job.emit(_STOPPING)

    def cancel(self, job: Job) -> None:
        """End a job that nobody waits for any more; nothing if it has ended."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def drain(self, grace_s: float) -> None:
        """Take no more, refuse those who wait, and cut after `grace_s` those who are being answered."""
        with self._changed:
            self._deadline = time.monotonic() + grace_s
            refused, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for job in refused:
            job.emit(_STOPPING)

    def close(self, wait_s: float = 5.0) -> None:
        """Cut everything, and wait for the thread so long at most."""
        self.drain(0.0)
        self._thread.join(wait_s)

    def _work(self) -> None:
        while batch := self._next():
            begun = time.monotonic()
            self.running = len(batch)
            self._answer(batch)
            self.running = 0
            self.batch_s = time.monotonic() - begun

    def _next(self) -> list[Job]:
        """The jobs of the next batch: the one that waits longest, and those behind it that go with it. Empty at the
        end."""
        with self._changed:
            while self._deadline is None:
                left = self._waiting[0].arrived + _GATHER_S - time.monotonic() if self._waiting else None
                if self._waiting and (len(self._waiting) >= self.max_batch or (left or 0.0) <= 0):
                    break
                self._changed.wait(left)
            if not self._waiting:
                return []
            kind = self._kind(self._waiting[0])
            batch = [job for job in self._waiting if self._kind(job) == kind][: self.max_batch]
            self._waiting = deque(job for job in self._waiting if job not in batch)
            return batch

    def _kind(self, job: Job) -> int:
        """Jobs of one kind can be answered together."""
        return 0 if family_of(self.assembly.model).mixes else len(job.prompt.pictures)

    def _answer(self, batch: Sequence[Job]) -> None:
        tokenizer = self.assembly.tokenizer
        rows = [Row(job.sampling, job.limit, self._stop_ids, tokenizer, job.emit) for job in batch]
        try:
            self._generate(batch, rows)
        except torch.OutOfMemoryError:
            _fail(rows, f"no memory for {len(rows)} answers at once; a smaller --max-batch or --max-length helps")
        except Exception as error:  # whatever goes wrong with one batch, the next one has its chance
            if self._debug:
                traceback.print_exc()
            _fail(rows, f"the model failed: {type(error).__name__}")
            print(f"serve: the model failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _generate(self, batch: Sequence[Job], rows: Sequence[Row]) -> None:
        inputs = batch_inputs(self.assembly, [job.prompt for job in batch])
        with torch.inference_mode():
            self.assembly.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max(row.limit for row in rows),
                eos_token_id=sorted(self._stop_ids),
                pad_token_id=self.assembly.tokenizer.pad_token_id,
                logits_processor=[_Choose(rows)],
                stopping_criteria=[_Ended(rows, lambda: self._end(batch, rows))],
            )

    def _end(self, batch: Sequence[Job], rows: Sequence[Row]) -> None:
        """End the rows that nobody waits for, and all when time is up."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        for job, row in zip(batch, rows):
            if late:
                row.finish(_STOPPING)
            row.done = row.done or job.cancelled


def _fail(rows: Sequence[Row], message: str) -> None:
    for row in rows:
        row.finish(Failure(message))


class _Choose(LogitsProcessor):
    """Each row's next token by its own settings: all other scores become minus infinity."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        """Scores (B, V) in float32 -> the same shape."""
        tokens = scores.argmax(-1)
        for number, row in enumerate(self._rows):
            if row.sampling.temperature > 0 and not row.done:
                tokens[number] = row.choose(scores[number])
        for token, row, scores_V in zip(tokens.tolist(), self._rows, scores):
            if not row.done:
                row.take(token, scores_V)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)


class _Ended(StoppingCriteria):
    """Which rows have ended."""

    def __init__(self, rows: Sequence[Row], look: Callable[[], None]) -> None:
        self._rows, self._look = rows, look

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> Any:
        """(B,) of bool."""
        self._look()
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)
