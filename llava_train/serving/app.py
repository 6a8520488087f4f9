"""The HTTP side: who may ask, how much at once, and answers as JSON or as server-sent events.

Nothing here blocks the event loop: bodies are parsed and pictures read in threads, and the model has its own.
"""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_train.serving.answers import GONE, Call, disconnected, next_event, streamed, whole
from llava_train.serving.batching import Engine, Job
from llava_train.serving.decoding import Event, Failure
from llava_train.serving.prompting import Bounds, check_count, picture, prepare
from llava_train.serving.protocol import Asked, RefusedError, error_body, parse

_COMPLETIONS = "/v1/chat/completions"
_BODY_S = 60.0
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Service:
    """What is served to whom.

    Attributes:
        name: of the model, as requests call it.
        api_key: what they must bring, None for none.
        hosts: names that they may call the server by, None for any: a web page that a browser was led to by a name of
            its own must not reach a server that trusts its machine.
        max_queue: requests beyond one batch that may be there at once.
        bounds: what one request may take.
        temperature: where a request does not say.
    """

    name: str
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    max_queue: int = 64
    bounds: Bounds = field(default_factory=Bounds)
    temperature: float = 0.0

    @property
    def max_body(self) -> int:
        """Bytes of a body: all pictures in base64, and a megabyte of text."""
        return self.bounds.images * (self.bounds.pictures.max_bytes * 4 // 3 + 1024) + 1_000_000


def build_app(engine: Engine, service: Service) -> FastAPI:
    """The application. The caller closes the engine, and the threads of `app.state.pool`."""
    app = FastAPI(title="llava-train", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Counted, engine=engine, service=service)
    pool = app.state.pool = ThreadPoolExecutor(max(4, engine.max_batch), thread_name_prefix="pictures")
    handlers = {RefusedError: _refused, HTTPException: _http, ClientDisconnect: _left, Exception: _bug}
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]

    async def known_host(request: Request) -> None:
        _check_host(request, service)

    async def known_key(request: Request) -> None:
        _check_host(request, service)
        _check_key(request, service)

    @app.get("/health", dependencies=[Depends(known_host)])
    async def health() -> Response:
        status = {"status": "ok" if engine.alive else "stopping", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(status, 200 if engine.alive else 503)

    @app.get("/v1/models", dependencies=[Depends(known_key)])
    async def models() -> Any:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(known_key)])
    async def model(name: str) -> Any:
        _check_model(name, service)
        return _model(service)

    @app.post(_COMPLETIONS, dependencies=[Depends(known_key)])
    async def completions(request: Request) -> Response:
        call: Call = request.scope["llava_train.call"]
        await _submit(call, await _read(request, service), engine, service, pool)
        gone = asyncio.create_task(disconnected(request))
        try:
            first = await next_event(call, gone)
            if first is None:
                return Response(status_code=GONE)
            if isinstance(first, Failure):
                raise RefusedError(first.message, first.status)
            if not call.stream:
                return await whole(call, first, service.name, gone)
        finally:
            gone.cancel()
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(streamed(call, first, service.name), media_type="text/event-stream", headers=headers)

    return app


class _Counted:
    """Around the application: no more requests for answers at once than may wait, a line in the log for each, and a
    row that is freed however the request ends."""

    def __init__(self, app: ASGIApp, engine: Engine, service: Service) -> None:
        self._app, self._engine, self._service = app, engine, service
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("POST", _COMPLETIONS):
            await self._app(scope, receive, send)
            return
        call = scope["llava_train.call"] = Call()

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            await send(message)

        full = self._inside >= self._engine.max_batch + self._service.max_queue
        app = _full(self._engine) if full else self._app
        self._inside += 1
        try:
            await app(scope, receive, noted)
        except Exception:
            call.status = 500
            raise
        finally:
            self._inside -= 1
            if call.job is not None:
                self._engine.cancel(call.job)
            facts = "".join(f" {name}={value}" for name, value in call.facts.items())
            print(f"chat {call.status} {time.monotonic() - call.begun:.2f}s{facts}", file=sys.stderr, flush=True)


def _full(engine: Engine) -> ASGIApp:
    wait = min(60, max(1, math.ceil(engine.batch_s)))
    fault = RefusedError("the server is busy; try again later", 429, code="queue_full", retry_after=wait)
    return _error(fault)


def _error(fault: RefusedError) -> JSONResponse:
    headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after else {}
    if fault.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(fault.body(), fault.status, headers)


async def _refused(request: Request, error: RefusedError) -> Response:
    return _error(error)


async def _http(request: Request, error: HTTPException) -> Response:
    return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, error.headers)


async def _left(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=GONE)


async def _bug(request: Request, error: Exception) -> Response:
    print(f"serve: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return JSONResponse(error_body("the server failed", 500), 500)


def _check_host(request: Request, service: Service) -> None:
    found = _HOST.fullmatch(request.headers.get("host", ""))
    if service.hosts is not None and (found is None or found.group(1).strip("[]") not in service.hosts):
        raise RefusedError("this server answers to names of its own machine only", 403)


def _check_key(request: Request, service: Service) -> None:
    if service.api_key is None:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    right = secrets.compare_digest(key.strip().encode("latin-1", "replace"), service.api_key.encode())
    if scheme.lower() != "bearer" or not right:
        message = "no API key, or a wrong one: send `Authorization: Bearer KEY`"
        raise RefusedError(message, 401, code="invalid_api_key")


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name != service.name:
        message = f"there is no model {name[:100]!r} here, only {service.name!r}"
        raise RefusedError(message, 404, "model", "model_not_found")


def _model(service: Service) -> dict[str, Any]:
    length = {} if service.bounds.length is None else {"max_model_len": service.bounds.length}
    return {"id": service.name, "object": "model", "created": 0, "owned_by": "llava-train", **length}


async def _read(request: Request, service: Service) -> Asked:
    """The request in its body, of a limited size, that comes in a limited time."""
    # Pages of other sites can send what they like from a browser, but JSON only where a server allows it.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError("the body must be sent as Content-Type: application/json", 415)

    async def whole() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > service.max_body:
                raise RefusedError(f"the body is larger than {service.max_body:,} bytes", 413)
        return bytes(body)

    try:
        body = await asyncio.wait_for(whole(), _BODY_S)
    except asyncio.TimeoutError as error:
        raise RefusedError(f"the body took more than {_BODY_S:g} seconds", 408) from error
    asked = await asyncio.get_running_loop().run_in_executor(None, parse, body, service.temperature)
    _check_model(asked.model, service)
    return asked


async def _submit(call: Call, asked: Asked, engine: Engine, service: Service, pool: ThreadPoolExecutor) -> None:
    """Give the model what was asked. What a request sent is dropped here; its answer may take long."""
    loop, images, bounds, assembly = asyncio.get_running_loop(), asked.images, service.bounds, engine.assembly
    call.stream, call.include_usage, call.facts["images"] = asked.stream, asked.include_usage, len(images)
    check_count(asked, bounds)
    one = len(images) == 1
    pictures = await asyncio.gather(
        *(loop.run_in_executor(pool, picture, assembly, each, one, bounds) for each in images)
    )
    prompt, tokens, limit = await loop.run_in_executor(None, prepare, assembly, asked, pictures, bounds)
    call.prompt_tokens = call.facts["prompt"] = tokens

    def emit(event: Event) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(call.events.put_nowait, event)

    call.job = Job(prompt, asked.sampling, limit, emit)
    engine.submit(call.job)
