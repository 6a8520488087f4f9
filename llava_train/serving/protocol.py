"""OpenAI's chat completions: the body of a request -> what is asked, and errors in OpenAI's form.

Sources: the API reference of OpenAI (create chat completion, errors), and vLLM's server for fields that are not there.
A field that nobody knows is ignored, as vLLM does; one that would change the answer and cannot be had is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llava_train.data.sample import shown
from llava_train.errors import LlavaTrainError
from llava_train.serving.decoding import Sampling

MOST_STOPS = 4
MOST_TOP_LOGPROBS = 20
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}
"""Fields of OpenAI and vLLM that are not here -> values that ask for nothing (null is one everywhere)."""
_FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user",)}
"""Role -> the roles it may stand behind."""


class RefusedError(LlavaTrainError):
    """A request that gets no answer.

    Attributes:
        status: of HTTP.
        param: the field that is to blame.
        code: OpenAI's word for the fault.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's error."""
        return error_body(str(self), self.status, self.param, self.code)


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form.

    >>> error_body("no", 500)
    {'error': {'message': 'no', 'type': 'server_error', 'param': None, 'code': None}}
    """
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Sent:
    """A picture of a request: its URL, and where it stood."""

    url: str
    place: str


@dataclass(frozen=True)
class Turn:
    """A message: texts and pictures in their order."""

    role: str
    parts: tuple[str | Sent, ...]


@dataclass(frozen=True)
class Asked:
    """A request, checked for its form.

    Attributes:
        model: the name asked for, None for whichever is served.
        limit: tokens of the answer, None where the request does not say.
    """

    turns: tuple[Turn, ...]
    sampling: Sampling
    model: str | None
    limit: int | None
    stream: bool
    include_usage: bool

    @property
    def images(self) -> list[Sent]:
        """All pictures in reading order."""
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Sent)]


def parse(body: bytes, temperature: float) -> Asked:
    """What a request asks for; `temperature` where it does not say. Raises RefusedError."""
    values = _read_json(body)
    for name, neutral in _NEUTRAL.items():
        value = values.get(name)
        if value is not None and value not in neutral:
            raise RefusedError(f"{name}: {_brief(value)}: is not supported here; leave it out", param=name)
    stream = _boolean(values, "stream")
    options = values.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise RefusedError("stream_options: an object, and only with stream: true", param="stream_options")
    limits = [_integer(values, name, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
    return Asked(
        turns=_turns(values.get("messages")),
        sampling=_sampling(values, temperature),
        model=_text(values, "model"),
        limit=next((limit for limit in limits if limit is not None), None),
        stream=stream,
        include_usage=_boolean(options, "include_usage"),
    )


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is no JSON: {shown(str(error))}") from error
    if not isinstance(values, dict):
        raise RefusedError("the body must be a JSON object")
    return values


def _sampling(values: dict[str, Any], temperature: float) -> Sampling:
    stops = values.get("stop")
    stops = [stops] if isinstance(stops, str) else [] if stops is None else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RefusedError(f"stop: a text or up to {MOST_STOPS} texts, none of them empty", param="stop")
    asked, top = _number(values, "temperature", 0, 2), _number(values, "top_p", 0, 1)
    if top == 0:
        raise RefusedError("top_p: 0: must be more than 0, up to 1", param="top_p")
    logprobs, most = _boolean(values, "logprobs"), _integer(values, "top_logprobs", 0, MOST_TOP_LOGPROBS)
    if most and not logprobs:
        raise RefusedError("top_logprobs: needs logprobs: true", param="top_logprobs")
    return Sampling(
        temperature=temperature if asked is None else asked,
        top_p=1.0 if top is None else top,
        seed=_integer(values, "seed", -(2**63), 2**63 - 1),
        stops=tuple(stops),
        logprobs=(most or 0) if logprobs else None,
    )


def _turns(messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages: a list with at least one message", param="messages")
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RefusedError(f"{place}: must be an object with role and content", param=place)
        role = "system" if message.get("role") == "developer" else message.get("role")
        before = turns[-1].role if turns else None
        if not isinstance(role, str) or role not in _FOLLOWS:
            raise RefusedError(f"{place}.role: {_brief(role)}: system, user or assistant", param=f"{place}.role")
        if before not in _FOLLOWS[role]:
            where = f"behind {before!r}" if before else "at the beginning"
            raise RefusedError(
                f"{place}.role: {role!r} cannot stand {where}: at most one system message first, then user and "
                "assistant in turns, beginning and ending with user",
                param=f"{place}.role",
            )
        turns.append(Turn(role, _parts(message, role, place)))
    if turns[-1].role != "user":
        raise RefusedError("messages: the last one must be the user's", param="messages")
    return tuple(turns)


def _parts(message: dict[str, Any], role: str, place: str) -> tuple[str | Sent, ...]:
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise RefusedError(f"{place}.{name}: is not supported here", param=f"{place}.{name}")
    content = message.get("content")
    if isinstance(content, str):
        return (_checked(content, f"{place}.content"),)
    if not isinstance(content, list) or not content:
        raise RefusedError(f"{place}.content: a text, or a list of text and image_url parts", param=f"{place}.content")
    return tuple(_part(part, role, f"{place}.content[{number}]") for number, part in enumerate(content))


def _part(part: Any, role: str, place: str) -> str | Sent:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _checked(part["text"], place)
    if kind != "image_url":
        raise RefusedError(f"{place}: type {_brief(kind)}: must be text or image_url", param=place)
    if role != "user":
        raise RefusedError(f"{place}: pictures stand in messages of the user only", param=place)
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url:
        raise RefusedError(f'{place}: needs "image_url": {{"url": "data:image/png;base64,..."}}', param=place)
    return Sent(url, place)


def _checked(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedError(f"{place}: half of a surrogate pair is no character", param=place) from error
    return text


def _brief(value: Any) -> str:
    return shown(json.dumps(value)[:60])


def _boolean(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"{name}: {_brief(value)}: must be true or false", param=name)
    return bool(value)


def _text(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise RefusedError(f"{name}: {_brief(value)}: must be a text", param=name)
    return value


def _number(values: dict[str, Any], name: str, least: float, most: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RefusedError(f"{name}: {_brief(value)}: must be from {least:g} to {most:g}", param=name)
    return float(value)


def _integer(values: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RefusedError(f"{name}: {_brief(value)}: must be a whole number from {least:,} to {most:,}", param=name)
    return value
