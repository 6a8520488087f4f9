"""One answer among those of a batch: its next token by its own settings, its text piece by piece, and its end.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

_GREEDY = 1e-4
"""Temperatures below it are 0: scores divided by them would not be finite."""
Logprob = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: the smallest set of tokens that has this probability is drawn from.
        seed: the same one gives the same draws.
        stops: texts that end the answer, and are not part of it.
        logprobs: how many of the likeliest tokens are told with each, None for no log-probabilities at all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """More of an answer: text, and what is told of its tokens. Text may be empty."""

    text: str
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class End:
    """The end of an answer of so many tokens, the stop token among them."""

    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Failure:
    """An answer that will not come, or broke off."""

    message: str
    status: int = 500


Event = Piece | End | Failure


class Detokenizer:
    """Ids -> text as they come: nothing is given out before it is certain.

    Some ids before the new ones are decoded with them, since tokens write differently at the beginning of a text. A
    character of several tokens comes when it is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        before, text = self._decoded()
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return text[len(before) :]

    def rest(self) -> str:
        """What a whole character was missing."""
        before, text = self._decoded()
        return text[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        return self._text(self._ids[: self._known]), self._text(self._ids)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Stops:
    """Cuts a text that comes in pieces before the first of some texts, and strips it of space around.

    What may be the beginning of a stop is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._space = ""
        self._begun = False
        self.hit = False

    def push(self, text: str) -> str:
        """What can be given out."""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.hit, self._held = True, ""
            return self._stripped(text[: min(places)])
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return self._stripped(text[: len(text) - held])

    def rest(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
        text = self._space + text
        shown = text.rstrip()
        self._begun = self._begun or bool(shown)
        self._space = text[len(shown) :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that a stop begins with, but for the whole stop.

    >>> _overlap("yes##", "###")
    2
    """
    most = min(len(text), len(stop) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(stop[:length])), 0)


class Row:
    """An answer on its way.

    Args:
        sampling: its settings.
        limit: tokens after which it ends.
        stop_ids: tokens that end it.
        emit: takes each event, in the thread of the model; the last one is an End or a Failure.
    """

    def __init__(
        self,
        sampling: Sampling,
        limit: int,
        stop_ids: Collection[int],
        tokenizer: PreTrainedTokenizerBase,
        emit: Callable[[Event], None],
    ) -> None:
        self.sampling, self.limit = sampling, limit
        self.done = False
        self._stop_ids, self._tokenizer, self._emit = stop_ids, tokenizer, emit
        self._text, self._stops = Detokenizer(tokenizer), Stops(sampling.stops)
        self._tokens = 0
        self._generator: torch.Generator | None = None

    def choose(self, scores_V: torch.Tensor) -> int:
        """The next token by the model's scores in float32."""
        if self._generator is None:
            self._generator = torch.Generator(scores_V.device)
            self._generator.seed() if self.sampling.seed is None else self._generator.manual_seed(self.sampling.seed)
        return draw(scores_V, self.sampling, self._generator)

    def take(self, token: int, scores_V: torch.Tensor) -> None:
        """Go on with a token; `scores_V` are those it was chosen by."""
        self._tokens += 1
        stopped = token in self._stop_ids
        pushed = "" if stopped else self._stops.push(self._text.push(token))
        told = self.sampling.logprobs is not None and not stopped
        logprobs = (logprob(self._tokenizer, token, scores_V, self.sampling.logprobs or 0),) if told else ()
        ends = stopped or self._stops.hit or self._tokens >= self.limit
        if ends and not self._stops.hit:
            pushed += self._stops.push(self._text.rest())
        if ends and not self._stops.hit:
            pushed += self._stops.rest()
        if pushed or logprobs:
            self._emit(Piece(pushed, logprobs))
        if ends:
            self.finish(End("stop" if stopped or self._stops.hit else "length", self._tokens))

    def finish(self, event: End | Failure) -> None:
        """The last event, unless there was one."""
        if not self.done:
            self.done = True
            self._emit(event)


def draw(scores_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by temperature and nucleus (top-p, arXiv 1904.09751); the likeliest one at temperature 0."""
    if sampling.temperature < _GREEDY:
        return int(scores_V.argmax())
    chances, tokens = (scores_V / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    chances = chances.masked_fill(chances.cumsum(-1) - chances >= sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


def logprob(tokenizer: PreTrainedTokenizerBase, token: int, scores_V: torch.Tensor, most: int) -> Logprob:
    """What OpenAI's API tells of a token: its log-probability before temperature, and those of the likeliest."""
    logs_V = scores_V.log_softmax(-1)
    likeliest = logs_V.topk(most)
    rows = zip(likeliest.indices.tolist(), likeliest.values.tolist())
    own = _entry(tokenizer, token, float(logs_V[token]))
    return {**own, "top_logprobs": [_entry(tokenizer, each, value) for each, value in rows]}


def _entry(tokenizer: PreTrainedTokenizerBase, token: int, value: float) -> Logprob:
    text = str(tokenizer.decode([token]))
    whole = "\ufffd" not in text  # a piece of a character has no text of its own
    return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode()) if whole else None}
