"""What comes of a request: events of the model -> OpenAI's JSON, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from llava_train.serving.batching import Job
from llava_train.serving.decoding import Event, Failure, Logprob, Piece
from llava_train.serving.protocol import RefusedError, error_body

GONE = 499
"""Status in the log of a request whose client went away; nobody reads it."""


@dataclass
class Call:
    """A request for an answer, from its first byte to its last.

    Attributes:
        job: what the model was given.
        events: what comes of it.
        facts: for the log.
    """

    stream: bool = False
    include_usage: bool = False

    begun: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    job: Job | None = None
    prompt_tokens: int = 0
    status: int = GONE
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    facts: dict[str, Any] = field(default_factory=dict)

    def usage(self, tokens: int) -> dict[str, int]:
        """OpenAI's count."""
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


async def disconnected(request: Request) -> None:
    """Ends when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def next_event(call: Call, gone: asyncio.Task[None]) -> Event | None:
    """The next event; None where the client has gone."""
    event = asyncio.ensure_future(call.events.get())
    await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
    if event.done():
        return event.result()
    event.cancel()
    return None


async def whole(call: Call, event: Event | None, model: str, gone: asyncio.Task[None]) -> Response:
    """All of an answer that begins with `event`, as JSON. Raises RefusedError."""
    texts: list[str] = []
    logprobs: list[Logprob] = []
    while isinstance(event, Piece):
        texts.append(event.text)
        logprobs += event.logprobs
        event = await next_event(call, gone)
    if event is None:
        return Response(status_code=GONE)
    if isinstance(event, Failure):
        raise RefusedError(event.message, event.status)
    call.facts |= {"answer": event.tokens, "finish": event.reason}
    assert call.job is not None
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
        "logprobs": None if call.job.sampling.logprobs is None else {"content": logprobs},
        "finish_reason": event.reason,
    }
    body = {**_head(call, model, "chat.completion"), "choices": [choice], "usage": call.usage(event.tokens)}
    return JSONResponse(body)


async def streamed(call: Call, event: Event, model: str) -> AsyncIterator[str]:
    """Server-sent events: the role, the text in pieces, why it ended, the usage if asked for, `[DONE]`."""
    head = _head(call, model, "chat.completion.chunk")
    if call.include_usage:
        head["usage"] = None

    def chunk(delta: dict[str, str], logprobs: Any = None, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return _data({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    while isinstance(event, Piece):
        yield chunk({"content": event.text}, {"content": event.logprobs} if event.logprobs else None)
        event = await call.events.get()
    if isinstance(event, Failure):
        call.facts["failed"] = event.status
        yield _data(error_body(event.message, event.status))
        return
    call.facts |= {"answer": event.tokens, "finish": event.reason}
    yield chunk({}, reason=event.reason)
    if call.include_usage:
        yield _data({**head, "choices": [], "usage": call.usage(event.tokens)})
    yield "data: [DONE]\n\n"


def _head(call: Call, model: str, kind: str) -> dict[str, Any]:
    return {"id": call.name, "object": kind, "created": call.created, "model": model}


def _data(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
