"""Messages between the trainer, the keeper of a worker and the process that runs the reward.

Every message is a tag, its length and its bytes. Between the trainer and the keeper the tag is the
number of the call. Between the keeper and the reward process it is a nonce: random bytes that
the keeper chose for that one message, so bytes that anything else wrote into the connection are
told from an answer. Imports neither asyncio nor torch nor numpy.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable

TAG = 16  # bytes of a tag
# The tag with which the trainer gives up the call that runs, and of the keeper's answer to that.
GIVE_UP = b"\xff" * TAG
# First byte of what the trainer gets for a call. The others tell how the process of the call ended:
# so does the worker, or it goes on.
ANSWERED, ENDED, GOES_ON = b"=", b"!", b"~"
_HEADER = struct.Struct(f"!{TAG}sQ")
_CHUNK = 2**20
LONGEST_ANSWER = 2**18  # bytes: an error and its traceback in JSON, and more than that
WROTE = "wrote into the connection of its process"  # the end of a sentence about a reward

Wait = Callable[[int], None]  # returns when the connection is ready for POLLIN or POLLOUT


class ForgedError(Exception):
    """A message has another tag than the one that was expected, or is too long."""


def number_tag(number: int) -> bytes:
    """The tag of call ``number``, between the trainer and the keeper."""
    return number.to_bytes(TAG, "big")


def until(connection: socket.socket, deadline: float) -> Wait:
    """A wait for ``connection`` that raises ``TimeoutError`` at ``deadline`` (monotonic s)."""
    poll = select.poll()

    def wait(event: int) -> None:
        poll.register(connection, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError("past the deadline")

    return wait


def send(connection: socket.socket, tag: bytes, data: bytes, wait: Wait | None = None) -> None:
    """Send one message; ``wait`` is called before each part."""
    left = memoryview(_HEADER.pack(tag, len(data)) + data)
    while left:
        if wait is not None:
            wait(select.POLLOUT)
        flags = 0 if wait is None else socket.MSG_DONTWAIT
        try:
            left = left[connection.send(left, flags) :]
        except BlockingIOError:
            continue


def receive(
    connection: socket.socket,
    tag: bytes | None = None,
    *,
    wait: Wait | None = None,
    longest: int | None = None,
) -> tuple[bytes, bytes]:
    """Receive one message: its tag and its bytes.

    Args:
        connection: connection to the other process.
        tag: tag that the message must have; None accepts any.
        wait: called before each part.
        longest: largest number of bytes; None is no bound.

    Raises:
        EOFError: if the other end is closed.
        ForgedError: if the message has another tag, or is longer.
    """
    head = _read(connection, TAG, wait)
    if tag is not None and head != tag:
        raise ForgedError("a message with another tag")
    (size,) = struct.unpack("!Q", _read(connection, _HEADER.size - TAG, wait))
    if longest is not None and size > longest:
        raise ForgedError(f"a message of {size} bytes")
    return head, _read(connection, size, wait)


def has_bytes(connection: socket.socket) -> bool:
    """Whether something was written that nobody has read; the end of the connection is nothing."""
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except (BlockingIOError, ConnectionError):
        return False


def _read(connection: socket.socket, size: int, wait: Wait | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if wait is not None:
            wait(select.POLLIN)
        part = connection.recv(min(size - len(data), _CHUNK))
        if not part:
            raise EOFError("the other end is closed")
        data += part
    return bytes(data)
