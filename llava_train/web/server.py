"""The page on an address: who may see it, and that it takes nothing from anywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_train.model.assemble import Assembly
from llava_train.serving.port import LOOPBACK
from llava_train.web.page import STYLE, build_page
from llava_train.web.talk import DEFAULTS, Settings

_UPLOAD = "20mb"
_POLICY = (
    "default-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""For the browser: nothing is loaded from, or sent to, any other address. The scripts are Gradio's own."""


def build_app(
    models: Sequence[tuple[str, Assembly]],
    settings: Settings = DEFAULTS,
    auth: tuple[str, str] | None = None,
    hosts: tuple[str, ...] | None = LOOPBACK,
) -> FastAPI:
    """The application: `build_page` for those who give the name and password of `auth`, called by one of `hosts`.

    None for any host: a page of another site that a browser was led to by a name of its own must not reach what
    trusts its machine, so None is for servers that ask for a password.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guarded, hosts=hosts)
    page = build_page(models, settings)
    page.queue(api_open=False)
    return gr.mount_gradio_app(
        app, page, "/", auth=auth, max_file_size=_UPLOAD, ssr_mode=False, show_error=False, footer_links=[],
        run_history=False, pwa=False, mcp_server=False, enable_monitoring=False,
        css=STYLE,
    )  # fmt: skip


class _Guarded:
    """Around the application: known host names, no other site's pages, and `_POLICY` for whatever it sends."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        known = self._hosts is None or _name(host) in self._hosts
        foreign = origin is not None and origin.partition("://")[2] != host
        refused = PlainTextResponse("this page is for its own address, and not for pages of other sites", 403)
        await (self._app if known and not foreign else refused)(scope, receive, guarded)


def _name(host: str) -> str:
    """A Host header without its port."""
    return host[1 : host.find("]")] if host.startswith("[") else host.rpartition(":")[0] or host
