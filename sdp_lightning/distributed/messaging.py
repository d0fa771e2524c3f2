"""Signed messages between two processes over one connection, without blocking.

Callers wait in :func:`wait_for_any`, and check between two calls what else may end the wait.
"""

from __future__ import annotations

import hmac
import pickle
import select
import socket
from collections.abc import Iterable
from typing import Any

from sdp_lightning.errors import RankError

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_LENGTH, _TAG = 8, 32  # bytes of the length, and of the HMAC, before each message
_HEADER = _LENGTH + _TAG
_CHUNK = 2**16


class Link:
    """One end of a connection. It buffers what is not sent and messages that came in part.

    Messages are pickled, and unpickled only if they are signed with ``key``.

    Args:
        connection: socket that the link takes over; ``close`` closes it.
        key: secret that the processes of this training share.

    Attributes:
        is_gone: whether the other end has closed it, or its process has ended.
    """

    def __init__(self, connection: socket.socket, key: bytes = b"") -> None:
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_gone = False
        self._connection, self._key = connection, key
        self._unsent, self._received = bytearray(), bytearray()
        self._chunk = memoryview(bytearray(_CHUNK))  # allocated once

    @property
    def is_sending(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._unsent) and not self.is_gone

    def fileno(self) -> int:
        """File descriptor of the connection, for a selector."""
        return self._connection.fileno()

    def send(self, data: bytes) -> None:
        """Send a message of :func:`pack`: what fits now, and the rest with later calls."""
        self._unsent += data
        self.push()

    def push(self) -> None:
        """Send as much of the buffer as fits now."""
        try:
            while self._unsent and not self.is_gone:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.is_gone = True

    def receive(self) -> list[Any]:
        """Messages that have come whole since the last call, in order.

        Raises:
            RankError: if one is not signed with the key; the link is then closed.
        """
        try:
            while not self.is_gone:
                size = self._connection.recv_into(self._chunk)
                self._received += self._chunk[:size]
                self.is_gone = not size
                if size < _CHUNK:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.is_gone = True
        values: list[Any] = []
        while len(self._received) >= _HEADER:
            end = _HEADER + int.from_bytes(self._received[:_LENGTH])
            if len(self._received) < end:
                break
            tag, data = self._received[_LENGTH:_HEADER], self._received[_HEADER:end]
            if not hmac.compare_digest(tag, authenticate(self._key, data)):
                self.close()
                raise RankError("a message between two ranks was not signed with the run's secret.")
            values.append(pickle.loads(data))
            del self._received[:end]
        return values

    def close(self) -> None:
        """Close the connection. Safe to call twice."""
        self.is_gone = True
        self._connection.close()


def pack(value: object, key: bytes = b"") -> bytes:
    """A message for :meth:`Link.send` that holds ``value``, signed with ``key``."""
    data = pickle.dumps(value)
    return b"".join((len(data).to_bytes(_LENGTH), authenticate(key, data), data))


def authenticate(key: bytes, *parts: bytes | bytearray) -> bytes:
    """The HMAC (SHA-256, 32 bytes) of ``parts``, one after the other, under ``key``."""
    return hmac.digest(key, parts[0] if len(parts) == 1 else b"".join(parts), "sha256")


def wait_for_any(links: Iterable[Link], timeout_s: float) -> None:
    """Wait until a link can be read, or can send what it still has to send."""
    poll = select.poll()  # cheaper than a selector, by a third of a collective
    for link in links:
        if link.fileno() >= 0:  # else closed here
            poll.register(link, select.POLLIN | (select.POLLOUT if link.is_sending else 0))
    poll.poll(1000 * timeout_s)
