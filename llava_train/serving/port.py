"""The address that `serve` and `web` listen on: this machine's own, unless whoever asks is known."""

from __future__ import annotations

import ipaddress
import socket

from llava_train.errors import LlavaTrainError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def bind(host: str, port: int, guarded: bool, advice: str) -> socket.socket:
    """A socket bound to an address, not listening yet.

    Args:
        host: name or address.
        port: 0 takes a free one.
        guarded: whether visitors must say who they are; without it an address of others is refused, because what many
            could use nobody should open by accident.
        advice: what a refusal says to do.

    Raises LlavaTrainError: an address that others reach, or one that cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not guarded and not ipaddress.ip_address(address[0]).is_loopback:
            raise LlavaTrainError(f"--host {host}: others could use the model {advice}")
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        raise LlavaTrainError(f"--host {host} --port {port}: {error}") from error
    return bound


def address_of(port: socket.socket) -> str:
    """`http://host:port` by which a browser on this machine reaches a bound socket."""
    host, number = port.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{number}"
