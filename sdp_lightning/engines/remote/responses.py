"""What a server sends is data: bounded in size, unpacked in pieces, never obeyed.

Whatever reading it raises becomes a ``ServerError``, so that it costs that server and no run.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from reprlib import Repr
from typing import Any

import aiohttp

from sdp_lightning.engines.remote.open_files import OpenFilesError
from sdp_lightning.errors import EngineError, SDPError

MAX_BYTES = 2**20  # largest answer whose size does not depend on a request
MAX_RETRY_S = 60.0  # longest rest that a server is given, whatever it asks for
_MIN_RETRY_S = 0.1
_SHOWN = 300  # characters of an answer that an error quotes
_PACKED = ("gzip", "x-gzip", "deflate")
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _SHOWN
_KEY_REMEDY = "If it wants a key, pass the one that it was started with as api_key, or SDP_API_KEY."


class ServerError(EngineError):
    """A server answered with an error, in an unexpected form, or not at all.

    Attributes:
        status: HTTP status of the answer; None without one: no connection, a timeout, or an
            answer that broke off.
        retry_after_s: seconds after which the server can be asked again, if it is only busy.
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s

    @property
    def is_refusal(self) -> bool:
        """Whether the request is at fault, so that another server would refuse it too."""
        return self.status in (400, 413, 422)

    @property
    def wants_key(self) -> bool:
        """Whether the server refuses who asks, and not what is asked."""
        return self.status in (401, 403)


class ServerLost(ServerError):
    """A server was taken out while it worked on a request, which is not at fault."""


@contextmanager
def reading_answer(where: str) -> Generator[None]:
    """Context in which whatever reading an answer raises becomes an error of that server."""
    try:
        yield
    except (ServerError, OpenFilesError):
        raise
    except Exception as error:
        text = printable(str(error))
        cause = text if isinstance(error, SDPError) else f"{type(error).__name__}: {text}"
        raise ServerError(f"{where}: {cause}") from error


def printable(text: str) -> str:
    """The first characters of a server's text, without those that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text[:_SHOWN])


async def read_pieces(
    where: str, answer: aiohttp.ClientResponse, max_bytes: int
) -> AsyncGenerator[bytes]:
    """Pieces of an answer's body, unpacked.

    Raises:
        ServerError: if it has more than ``max_bytes``, packed or unpacked.
    """
    packing = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in ("identity", *_PACKED):
        raise ServerError(f"{where} answered in an unknown encoding: {printable(packing)}")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32) if packing in _PACKED else None
    num_packed = num_bytes = 0
    async for piece in answer.content.iter_any():
        num_packed += len(piece)
        data = piece if unpacker is None else unpacker.decompress(piece, max_bytes - num_bytes + 1)
        num_bytes += len(data)
        if max(num_bytes, num_packed) > max_bytes:
            raise ServerError(f"{where} answered more than {max_bytes:,} bytes, the most it needs.")
        yield data
    if unpacker is not None and (not unpacker.eof or unpacker.unused_data):
        raise ServerError(f"{where} answered {packing} that ends too early or too late.")


async def read_whole(
    where: str, answer: aiohttp.ClientResponse, max_bytes: int, *, as_text: bool
) -> Any:
    """The answer's JSON, None if it is empty, or its text."""
    data = b"".join([piece async for piece in read_pieces(where, answer, max_bytes)])
    return data.decode(errors="replace") if as_text else parse_json(where, data)


async def read_events(
    where: str, answer: aiohttp.ClientResponse, max_bytes: int
) -> AsyncGenerator[Any]:
    """The JSON of each server-sent event before the final ``[DONE]``.

    Raises:
        ServerError: if an event is an error, or the stream breaks off.
    """
    rest = bytearray()
    async for piece in read_pieces(where, answer, max_bytes):
        lines, newline, tail = piece.rpartition(b"\n")
        if not newline:
            rest += piece
            continue
        for line in bytes(rest + lines).split(b"\n"):
            event = line.strip().removeprefix(b"data:").strip()
            if event == b"[DONE]":
                return
            if event:
                yield _refuse_error(where, parse_json(where, event))
        rest = bytearray(tail)
    raise ServerError(f"{where} broke off its answer.")


def parse_json(where: str, data: bytes) -> Any:
    """The value of ``data``, which is JSON in UTF-8; None of nothing.

    Raises:
        ServerError: if it is not, or nests or counts further than Python reads.
    """
    try:
        return json.loads(data.decode()) if data else None
    except (ValueError, RecursionError) as error:
        shown = printable(data[:_SHOWN].decode(errors="replace"))
        cause = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ServerError(f"{where} answered no JSON ({cause}): {shown!r}") from error


async def read_refusal(where: str, answer: aiohttp.ClientResponse) -> ServerError:
    """The error for an answer whose status is not 200."""
    data = b""
    async for piece in answer.content.iter_any():
        data += piece
        if len(data) >= _SHOWN:
            break
    told = printable(data[: 4 * _SHOWN].decode(errors="replace"))
    status = answer.status
    error = ServerError(f"{where} answered {status}: {told}", status)
    if 300 <= status < 400:
        target = printable(answer.headers.get("Location", "nowhere"))
        text = f"{where} answered {status}, and redirects are not followed: {target}"
        return ServerError(text, status)
    if error.wants_key:
        return ServerError(f"{error} {_KEY_REMEDY}", status)
    if status in (429, 503):
        asked = retry_after_s(answer.headers.get("Retry-After"), time.time())
        error.retry_after_s = 1.0 if asked is None and status == 429 else asked
    return error


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """Seconds that a ``Retry-After`` asks for, at most ``MAX_RETRY_S``; None if it asks nothing.

    Args:
        header: seconds, or an HTTP date.
        now_s: seconds since the epoch.

    >>> retry_after_s("7", 0.0), retry_after_s("Thu, 01 Jan 1970 00:00:30 GMT", 10.0)
    (7.0, 20.0)
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        asked = float(text[:10])
    else:
        try:
            asked = parsedate_to_datetime(text).timestamp() - now_s
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(asked, _MIN_RETRY_S), MAX_RETRY_S)


def _refuse_error(where: str, event: Any) -> Any:
    """Raise the error of an event: a stream that began with status 200 reports errors so."""
    error = event.get("error") if isinstance(event, dict) else None  # type: ignore[union-attr]
    if error is None:
        return event  # type: ignore[return-value]
    code = error.get("code") if isinstance(error, dict) else None  # type: ignore[union-attr]
    status = code if type(code) is int else None
    raise ServerError(f"{where} answered an error: {describe(error)}", status)


def describe(value: Any) -> str:
    """The beginning of a value that a server sent, for an error, however large or deep it is."""
    return printable(_REPR.repr(value))
