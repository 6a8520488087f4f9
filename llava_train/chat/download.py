"""One picture from the web, within limits, and only from where it may come from."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing, suppress
from threading import Thread
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from llava_train.data.sample import shown
from llava_train.errors import DataError

_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_HEADERS = {"User-Agent": "llava-train", "Accept": "image/*", "Connection": "close"}


def download(url: str, name: str, max_bytes: int, timeout_s: float, private: bool = False) -> bytes:
    """The picture behind an http(s) URL.

    Each hop's host is resolved once, all its addresses are looked at, and the connection goes to one of these: a second
    answer of the name server changes nothing. Proxies of the environment are not used, which could not be looked at.

    The time is that of everything together. Names, TLS and headers know no common clock, so all of it happens in a
    thread, whose connection is closed when the time is up.

    Raises DataError, which calls it `name`.
    """
    fetch = _Fetch(name, max_bytes, time.monotonic() + timeout_s, private)
    outcome: Future[bytes] = Future()

    def work() -> None:
        try:
            outcome.set_result(fetch.follow(url))
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=work, daemon=True).start()
    late = f"{name}: took more than {timeout_s:g} seconds; send the picture itself"
    try:
        return outcome.result(timeout_s)
    except (FutureTimeoutError, TimeoutError) as error:
        raise DataError(late) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = shown(str(error) or type(error).__name__)
        raise DataError(f"{name}: cannot be fetched ({why}); check the address, or send the picture itself") from error
    finally:
        fetch.end()


class _Fetch:
    """A download on its way, with the connection that it has open."""

    def __init__(self, name: str, max_bytes: int, deadline: float, private: bool) -> None:
        self.name, self.max_bytes, self.deadline, self.private = name, max_bytes, deadline, private
        self._open: socket.socket | None = None

    def end(self) -> None:
        """Wake the thread that waits for this connection, if it still does."""
        if self._open is not None:
            with suppress(OSError, ValueError):
                self._open.shutdown(socket.SHUT_RDWR)

    def follow(self, url: str) -> bytes:
        """The bytes behind a URL and at most three redirects."""
        for _ in range(_MOST_REDIRECTS + 1):
            parts = urlsplit(url)
            if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
                raise DataError(f"{self.name}: leads to {shown(url)!r}; only http and https with a host are read")
            connection = self._connected(parts)
            with closing(connection):
                connection.request("GET", _target(parts), headers=_HEADERS)
                response = connection.getresponse()
                location = response.getheader("Location")
                if response.status not in _REDIRECTS or not location:
                    return self._body(response)
                url = urljoin(url, location)
        raise DataError(f"{self.name}: more than {_MOST_REDIRECTS} redirects; give the address they lead to")

    def _connected(self, parts: SplitResult) -> http.client.HTTPConnection:
        """A connection to an address of the host that may be asked."""
        host, secure = str(parts.hostname), parts.scheme.lower() == "https"
        port = parts.port or (443 if secure else 80)
        # Without a class's own way to connect, it takes the socket that it finds.
        connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
        self._open = self._socket(host, port)
        if secure:
            context = ssl.create_default_context()
            self._open = context.wrap_socket(self._open, server_hostname=host, do_handshake_on_connect=False)
            self._open.do_handshake()
        connection.sock = self._open
        return connection

    def _socket(self, host: str, port: int) -> socket.socket:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        if not self.private and not all(map(is_public, addresses)):
            raise DataError(f"{self.name}: {shown(host)} is an address that is not public; send the picture itself")
        failure: OSError = OSError(f"{host} has no address")
        for address in addresses:
            try:
                return socket.create_connection((address, port), self._left())
            except OSError as error:
                failure = error
        raise failure

    def _left(self) -> float:
        """Seconds that are left; TimeoutError for none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise DataError(f"{self.name}: the server says {response.status} {shown(response.reason)}")
        kind = response.headers.get_content_type() if "Content-Type" in response.headers else "image/"
        if not kind.startswith("image/") and not kind.endswith("/octet-stream"):
            raise DataError(f"{self.name}: is {shown(kind)}, not a picture; give the address of the picture itself")
        if (response.length or 0) > self.max_bytes:
            self._too_large()
        content = bytearray()
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > self.max_bytes:
                self._too_large()
            self._left()
        if response.length:
            raise DataError(f"{self.name}: broke off, {response.length:,} bytes are missing; try again")
        return bytes(content)

    def _too_large(self) -> None:
        raise DataError(f"{self.name}: more than the {self.max_bytes:,} bytes allowed; make it smaller")


def is_public(address: str) -> bool:
    """Whether an IP address may be anybody's: not loopback, private, link-local, reserved or for groups."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if inner := found.ipv4_mapped or found.sixtofour:
            return is_public(str(inner))
        if found.is_site_local:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved)


def _target(parts: SplitResult) -> str:
    """What is asked of the server: path and query, with what may not stand there escaped."""
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    return f"{path}?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else path
