"""Ask an inference server over HTTP, and trust nothing that it answers.

    server = Server.of("http://127.0.0.1:8000", timeout=600)
    server.models()                                    names that it serves
    server.post("/v1/chat/completions", body)          JSON; `command` where it answers in words

The standard library alone, and no torch. What goes there are images of patients, so a request goes
to the address that the user has written and nowhere else: redirects are not followed, and proxies
that the environment names (http_proxy) are not used. Certificates are verified, as Python does by
default (SSL_CERT_FILE names further ones). The key comes from the environment variable
VLLM_API_KEY, never from a flag, and is in no message and in no repr.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from data.json_rows import parse_json
from engine.server_address import KEY_VARIABLE, clean, cut, is_loopback, shown_url

PAUSES = (0.5, 2.0)  # seconds before the second and the third try
LONGEST_PAUSE = 60.0  # seconds that a server may ask for (Retry-After)
MOST_BYTES = 4 * 2**20  # of an answer, but for what a caller expects beyond
MOST_AROUND = 2**20  # bytes of an answer's headers and of the sizes of its chunks


class ServerError(RuntimeError):
    """Say in one line what a server was asked, what came, and what to do.

    status: the HTTP status, None where none came.
    """

    def __init__(self, text: str, status: int | None = None):
        super().__init__(text)
        self.status = status


class ServerGone(ServerError):
    """Report that no answer came in three tries, or in time: nothing is wrong with the request."""


# ---- what may be shown of a server's text --------------------------------------------------------
def words_of(document: Any) -> str | None:
    """Find what a server says of an error in its answer, in the forms of usual servers."""
    for _ in range(2):  # {"error": {"message": ...}}
        if isinstance(document, dict):
            names = (name for name in ("error", "message", "detail") if document.get(name))
            document = document.get(next(names, None))
    return document if isinstance(document, str) else None


# ---- leaving off ---------------------------------------------------------------------------------
class Cancel:
    """Break off the requests that hold it, whatever they wait for, by calling it."""

    def __init__(self) -> None:
        self._event, self._lock = threading.Event(), threading.Lock()
        self._open: set[socket.socket] = set()

    @property
    def is_set(self) -> bool:
        """Return whether it has been called."""
        return self._event.is_set()

    def __call__(self) -> None:
        """Break off what is open now, and what is opened later."""
        self._event.set()
        with self._lock:
            for opened in self._open:
                _break_off(opened)

    def wait(self, seconds: float) -> bool:
        """Wait for so long at most -> whether it has been called."""
        return self._event.wait(seconds)

    @contextmanager
    def holding(self, opened: socket.socket) -> Iterator[None]:
        """Break a connection off once it is called within the block, or has been before."""
        with self._lock:
            self._open.add(opened)
        if self.is_set:
            _break_off(opened)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(opened)


# what breaks off the requests of a thread, None where nothing does
CANCEL: ContextVar[Cancel | None] = ContextVar("CANCEL", default=None)


def _break_off(opened: socket.socket) -> None:
    """End what another thread waits for on a connection."""
    with suppress(OSError):
        # of TLS too: its own method would take the state away that the other thread uses
        socket.socket.shutdown(opened, socket.SHUT_RDWR)


# ---- requests ------------------------------------------------------------------------------------
class _Broken(Exception):
    """Report a request that can be tried again. pause: seconds that the server asks for."""

    def __init__(self, text: str, pause: float = 0.0, status: int | None = None):
        super().__init__(text)
        self.pause, self.status = pause, status


@dataclass(frozen=True)
class Server:
    """Hold where a server is and how long it is waited for.

    base_url: without a slash or /v1 at the end, which `of` takes away.
    timeout: seconds of one try of a request, from connecting to the last byte.
    api_key: sent as a bearer token, None for none.
    """

    base_url: str
    timeout: float
    api_key: str | None = field(repr=False)

    @classmethod
    def of(cls, base_url: str, timeout: float) -> Server:
        """Make one with the key of the environment variable VLLM_API_KEY.

        base_url: without `url_problems`. timeout: seconds. Raises ServerError for a key that cannot
        be sent.
        """
        key = os.environ.get(KEY_VARIABLE, "").strip() or None
        if key is not None and (not key.isascii() or not key.isprintable() or " " in key):
            raise ServerError(f"the key in {KEY_VARIABLE} holds blanks or letters beyond ASCII")
        parts = urlsplit(base_url)
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts._replace(path=path).geturl(), timeout, key)

    def get(self, path: str) -> Any:
        """Ask for a path -> the JSON value that came. Raises as `post` does."""
        return self._json("GET", path, self._ask("GET", path, None))

    def post(self, path: str, body: dict[str, Any], expected: int = 0) -> Any:
        """Send a JSON object to a path -> the JSON value that came.

        expected: bytes that the answer may have beyond MOST_BYTES.

        Refused and broken connections, 429 and statuses from 500 on are tried three times, with
        pauses. A request that takes too long is not sent again.

        Raises ServerGone where no answer came in three tries or in time, ServerError for every
        other status than one of success, for a redirect, an answer of more bytes, and one that is
        no JSON in UTF-8 (NaN, Infinity and keys that are there twice are none).
        """
        return self._json("POST", path, self._ask("POST", path, body, expected))

    def command(self, path: str, body: dict[str, Any]) -> str:
        """Send a JSON object to a path that answers in words, such as /v1/load_lora_adapter.

        Returns the words, cleaned and cut. Raises as `post` does.
        """
        return self._said(self._ask("POST", path, body))

    def models(self) -> list[str]:
        """List the names at /v1/models: of the base and of the adapters that are loaded.

        Raises ServerError as `get` does, and where no list of names came.
        """
        found = self.get("/v1/models")
        entries = found.get("data") if isinstance(found, dict) else None
        listed = entries if isinstance(entries, list) else [None]
        names = [one.get("id") if isinstance(one, dict) else None for one in listed]
        if not all(isinstance(name, str) for name in names):
            raise self.error("GET", "/v1/models", "no list of models came")
        return [str(name) for name in names]

    def version(self) -> str | None:
        """Return what /version says, as vLLM does, or None for a server that says nothing there.

        A gateway may say that this path is not available (503). Raises ServerGone where no answer
        comes.
        """
        try:
            found = self.get("/version")
        except ServerError as error:
            if isinstance(error, ServerGone) and error.status is None:
                raise
            return None
        version = found.get("version") if isinstance(found, dict) else None
        return cut(self.without_key(version), 100) if isinstance(version, str) else None

    def error(self, verb: str, path: str, came: str, status: int | None = None) -> ServerError:
        """Make the error of a request. came: what came instead, in words of our own."""
        return ServerError(f"{verb} {shown_url(self.base_url)}{path}: {came}", status)

    def shown(self, value: Any) -> str:
        """Write a value of an answer in few characters of one line, without the key."""
        if isinstance(value, (dict, list)):
            kind = "an object" if isinstance(value, dict) else "a list"
            return f"{kind} of {len(value)}"
        return cut(ascii(self.without_key(value) if isinstance(value, str) else value), 100)

    def without_key(self, text: str) -> str:
        """Mask the key in a server's text, also where quotes or JSON have escaped its letters."""
        if self.api_key is None:
            return text
        letters = (
            rf"(?:\\{{0,3}}{re.escape(sign)}|\\{{1,2}}u00(?i:{ord(sign):02x}))"
            for sign in self.api_key
        )
        return re.sub("".join(letters), "***", text)

    # ---- one request -----------------------------------------------------------------------------
    def _ask(self, verb: str, path: str, body: dict[str, Any] | None, expected: int = 0) -> bytes:
        """Send a request up to three times -> the answer's bytes. expected: see `post`."""
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        cancel = CANCEL.get() or Cancel()
        for pause in (*PAUSES, None):
            try:
                return self._once(verb, path, content, MOST_BYTES + expected, cancel)
            except _Broken as broken:
                if pause is None:
                    tries = len(PAUSES) + 1
                    raise ServerGone(
                        f"{verb} {shown_url(self.base_url)}{path}: {broken}, {tries} times in a"
                        " row; look whether the server runs, and at its log",
                        broken.status,
                    ) from None
                if cancel.wait(max(pause, broken.pause)):
                    raise self._left_off(verb, path) from None
        raise AssertionError("the last try returns or raises")

    def _once(
        self, verb: str, path: str, content: bytes | None, most: int, cancel: Cancel
    ) -> bytes:
        """Send a request once -> the answer's bytes. Raises _Broken where it can be tried again.

        most: bytes that are read.
        """
        late = Cancel()
        # A timeout of the socket would begin anew at every byte.
        timer = threading.Timer(self.timeout, late)
        timer.daemon = True
        timer.start()
        try:
            with closing(self._connected(most)) as connection:
                opened = connection.sock
                with cancel.holding(opened), late.holding(opened):
                    response = self._begun(connection, verb, path, content)
                    answer = _read(response, most)
            status, pause = response.status, _seconds(response.getheader("Retry-After"))
            if late.is_set or cancel.is_set:  # an answer without a length ends where it is cut
                raise TimeoutError
        except (OSError, http.client.HTTPException, ValueError, _Unwanted) as error:
            if cancel.is_set:
                raise self._left_off(verb, path) from None
            if late.is_set or isinstance(error, TimeoutError):
                raise ServerGone(
                    f"{verb} {shown_url(self.base_url)}{path}: no answer within {self.timeout:g} s;"
                    " look whether the server still computes, or give it longer"
                ) from None
            raise self._failed(verb, path, error) from None
        finally:
            timer.cancel()
        if status == 429 or status >= 500:
            raise _Broken(f"status {status}: {self._said(answer)}", pause, status)
        if not 200 <= status < 300:
            raise self._refused(verb, path, status, answer)
        return answer

    def _connected(self, most: int) -> http.client.HTTPConnection:
        """Connect, without the handshake of TLS yet, which can be broken off later.

        most: bytes of an answer that are read.
        """
        parts = urlsplit(self.base_url)
        host, tls = parts.hostname or "", parts.scheme == "https"
        kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        # Without a port http.client looks for one within an IPv6 address.
        connection = kind(host, parts.port or kind.default_port)
        connection.response_class = partial(_Response, most=most)  # type: ignore[assignment]
        opened = socket.create_connection((host, connection.port), self.timeout)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            opened = ssl.create_default_context().wrap_socket(
                opened, server_hostname=host, do_handshake_on_connect=False
            )
        connection.sock = opened
        return connection

    def _begun(
        self, connection: http.client.HTTPConnection, verb: str, path: str, content: bytes | None
    ) -> http.client.HTTPResponse:
        """Send a request -> its answer, of which the headers are read."""
        host, peer = connection.host, connection.sock.getpeername()[0]
        if is_loopback(host) and not is_loopback(peer):  # a name server may say anything
            raise _Unwanted(f"{host} is {peer} here, another machine; give 127.0.0.1 or ::1")
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        headers = {"Accept": "application/json", "Connection": "close"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.request(verb, urlsplit(self.base_url).path + path, content, headers)
        except (ConnectionError, ssl.SSLEOFError):
            # A request that is too large may be refused and hung up on before it is all sent.
            with suppress(OSError, http.client.HTTPException, ValueError):
                response = connection.getresponse()
                if response.status >= 400:
                    return response
            raise
        return connection.getresponse()

    def _failed(self, verb: str, path: str, error: Exception) -> Exception:
        """Turn what was raised on a connection into what is said of it."""
        if isinstance(error, _Unwanted):
            return self.error(verb, path, str(error))
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = cut(error.verify_message, 100)
            return self.error(verb, path, f"its certificate is not trusted ({reason})")
        if isinstance(error, ssl.SSLError) and "WRONG_VERSION" in str(error):
            return self.error(verb, path, "the server does not speak https")
        if isinstance(error, http.client.IncompleteRead):
            return _Broken("half an answer came, then the connection broke")
        if isinstance(error, OSError):  # http.client.RemoteDisconnected too
            return _Broken(f"no answer ({cut(error.strerror or str(error), 100) or 'broken off'})")
        return self.error(verb, path, f"what came is no HTTP ({type(error).__name__})")

    def _refused(self, verb: str, path: str, status: int, answer: bytes) -> ServerError:
        """Say what a status means that is neither a success nor worth another try."""
        what = f"status {status}: {self._said(answer)}"
        if 300 <= status < 400:
            what = f"status {status}, a redirect, which is not followed; give the address itself"
        elif status in (401, 403):
            had = "was sent" if self.api_key else "is not set"
            what += f"; the key of the environment variable {KEY_VARIABLE} {had}"
        elif status == 404:
            what += "; look at its /v1/models for the names that it serves"
        return self.error(verb, path, what, status)

    def _left_off(self, verb: str, path: str) -> ServerError:
        return ServerGone(f"{verb} {shown_url(self.base_url)}{path}: left off")

    def _said(self, answer: bytes) -> str:
        """Return the server's own words, in one line and without the key."""
        text = answer[: 2**16].decode(errors="replace")
        said = words_of(parse_json(text, strict=False)[0])
        return cut(self.without_key(clean(text if said is None else said))) or "no word"

    def _json(self, verb: str, path: str, answer: bytes) -> Any:
        """Parse an answer strictly."""
        try:
            text = answer.decode()
        except UnicodeDecodeError:
            raise self.error(verb, path, "what came is not UTF-8 text") from None
        value, problems = parse_json(text)
        if problems:
            reason = self.without_key(problems[0]).partition(";")[0]
            begins = cut(self._said(answer), 60)
            came = f"no JSON came: {cut(reason, 100)}; it begins with {begins!r}"
            raise self.error(verb, path, came)
        return value


class _Unwanted(Exception):  # no ValueError, which http.client takes for half a chunk
    """Say what came that no further try would change, in words of our own."""


class _Response(http.client.HTTPResponse):
    """Read no more than `most` bytes and what is around them, whatever lengths a server says."""

    def __init__(self, sock: socket.socket, *, method: str | None = None, most: int):
        super().__init__(sock, method=method)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach(), most))


class _Bounded(io.RawIOBase):
    """Hand on a stream of bytes until there are too many."""

    def __init__(self, stream: io.RawIOBase, most: int):
        self.stream, self.most, self.left = stream, most, most + MOST_AROUND

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self.stream.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise _oversized(self.most)
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    """Read a whole answer of so many bytes at most."""
    answer = response.read(most + 1)
    if len(answer) > most:
        raise _oversized(most)
    if response.length:  # read(n) does not say that fewer bytes came than were announced
        raise http.client.IncompleteRead(answer, response.length)
    return answer


def _oversized(most: int) -> _Unwanted:
    return _Unwanted(f"an answer of more than {most:,} bytes came")


def _seconds(header: str | None) -> float:
    """Read Retry-After, where it is a number of seconds."""
    if header is None or not re.fullmatch(r"[0-9]{1,6}", header.strip()):
        return 0.0
    return min(float(header), LONGEST_PAUSE)
