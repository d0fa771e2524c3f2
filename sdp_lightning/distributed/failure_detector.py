"""Notices at once that another process of the training has failed, whatever this one is doing.

Every process holds a connection to rank 0, and the kernel closes it when the process ends, however
it ends. A thread listens, because the main one may sit in a collective that will never return.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdp_lightning.distributed.messaging import LOOPBACK_HOSTS
from sdp_lightning.distributed.stopped_ranks import LOOK_S, StoppedRanks
from sdp_lightning.errors import RankError

logger = logging.getLogger(__name__)

STOPPED_S = 600.0
GRACE_S = 10.0  # for the main thread to come back and end the training in order
_TOKEN_BYTES = 16
_LONGEST = 4000  # characters of a message


@dataclass(frozen=True)
class RankFailure:
    """Rank and error of a process that failed."""

    rank: int
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.message}"


class FailureDetector:
    """Listens to the ranks at the other ends of ``links`` until ``close``. Rank 0 relays failures.

    Args:
        rank: rank of this process.
        links: connection to rank 0; on rank 0 the connections to all others.
        grace_s: seconds from a failure to the end of this process, unless ``close`` comes first.
        stopped_s: seconds that a rank of this machine may be stopped (SIGSTOP) before it is killed.
        look_s: seconds between two looks at that.
    """

    def __init__(
        self,
        rank: int,
        links: Mapping[int, socket.socket],
        *,
        grace_s: float = GRACE_S,
        stopped_s: float = STOPPED_S,
        look_s: float = LOOK_S,
    ) -> None:
        self._rank, self._links, self._grace_s = rank, dict(links), grace_s
        self._stopped_ranks, self._look_s = StoppedRanks(links, stopped_s), look_s
        self._failure: RankFailure | None = None
        self._closed = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(
            target=self._listen, name="sdp-failure-detector", daemon=True
        )
        self._thread.start()

    @property
    def failure(self) -> RankFailure | None:
        """The first failure of another rank that this one heard of."""
        return self._failure

    def tell(self, message: str) -> None:
        """Tell the others that this rank has failed."""
        self._send([self._rank, message[:_LONGEST]])

    def kill_stopped(self) -> list[str]:
        """Kill the ranks that are stopped now and so cannot be told; a sentence about each."""
        return self._stopped_ranks.kill()

    def close(self) -> None:
        """Leave: from now on the end of this process is no failure. Safe to call twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.close()
        self._thread.join()
        self._send([])
        for link in (*self._links.values(), self._woken):
            link.close()

    def _send(self, message: list[Any]) -> None:
        for link in self._links.values():
            try:
                link.sendall(json.dumps(message).encode() + b"\n")
            except OSError as error:
                logger.debug("a rank is gone and could not be told %s: %r", message, error)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            selector.register(self._woken, selectors.EVENT_READ)
            look_s = self._look_s if self._stopped_ranks.can_look else None
            while self._failure is None and not self._closed.is_set():
                for key, _ in selector.select(look_s):
                    if key.data is not None:
                        selector.unregister(key.fileobj)
                        self._hear(key.data)
                if (found := self._stopped_ranks.look()) is not None:
                    self._fail(RankFailure(*found))
                    self.kill_stopped()  # it answers no more, and collectives wait for it
        if self._failure is not None:
            self._await_end(self._failure)

    def _hear(self, rank: int) -> None:
        """Read the only message that ``rank`` ever sends, or the end of its connection."""
        try:
            with self._links[rank].makefile("rb") as stream:
                line = stream.readline()
        except OSError:  # reset: it ended with something unread
            line = b""
        try:
            message: list[Any] = json.loads(line) if line else [rank, "its process has ended."]
        except ValueError:  # this thread must live on
            message = [rank, f"its message is not valid: {line[:80]!r}."]
        if message:
            self._fail(RankFailure(*message))

    def _fail(self, failure: RankFailure) -> None:
        if self._failure is None:
            self._failure = failure
            if self._rank == 0:
                self._send([failure.rank, failure.message])

    def _await_end(self, failure: RankFailure) -> None:
        logger.error("%s", failure)
        if self._closed.wait(self._grace_s):
            return
        logger.critical(
            "still running %.0f s after the failure: exiting with status 1.",
            self._grace_s,
        )
        self.kill_stopped()
        faulthandler.dump_traceback()
        os._exit(1)


class Listener:
    """Rank 0's end: accepts one connection from every other rank and closes.

    Args:
        host: address by which the others reach this process.
    """

    def __init__(self, host: str) -> None:
        near, dual = host in LOOPBACK_HOSTS, socket.has_dualstack_ipv6()
        if near and sys.platform == "linux":  # 10 % faster, and leaves no file
            self._server = socket.socket(socket.AF_UNIX)
            self._server.bind(f"\0sdp-{secrets.token_hex(8)}")
            self._server.listen()
        else:
            family = socket.AF_INET6 if ":" in host or (dual and not near) else socket.AF_INET
            self._server = socket.create_server(
                (host if near else "", 0), family=family, dualstack_ipv6=dual and not near
            )
        self._token = secrets.token_bytes(_TOKEN_BYTES)

    @property
    def address(self) -> tuple[int | bytes, bytes]:
        """Port, or socket name on this machine, and the token that a rank must send."""
        name = self._server.getsockname()
        return name if isinstance(name, bytes) else name[1], self._token

    def accept(self, size: int, timeout_s: float) -> dict[int, socket.socket]:
        """A connection for each rank from 1 to ``size - 1``.

        Raises:
            RankError: naming the ranks that did not connect within ``timeout_s``.
        """
        links: dict[int, socket.socket] = {}
        deadline = time.monotonic() + timeout_s
        with self._server:
            while len(links) < size - 1:
                self._server.settimeout(max(1e-3, deadline - time.monotonic()))
                try:
                    link, _ = self._server.accept()
                except TimeoutError as error:
                    for link in links.values():
                        link.close()
                    late = ", ".join(str(rank) for rank in range(1, size) if rank not in links)
                    raise RankError(
                        f"waited {timeout_s:.1f} s for rank {late} to connect to rank 0."
                    ) from error
                greeting = _receive(link, _TOKEN_BYTES + 4)
                if secrets.compare_digest(greeting[:_TOKEN_BYTES], self._token):
                    links[int.from_bytes(greeting[_TOKEN_BYTES:])] = _keep_alive(link)
                else:
                    link.close()  # a stranger
        return links


def connect(
    host: str, address: tuple[int | bytes, bytes], rank: int, timeout_s: float
) -> socket.socket:
    """A connection of ``rank`` to the :class:`Listener` at ``address``."""
    port, token = address
    if isinstance(port, bytes):
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(timeout_s)
        try:
            link.connect(port)
        except OSError:
            link.close()
            raise
    else:
        link = socket.create_connection((host, port), timeout_s)
    link.sendall(token + rank.to_bytes(4))
    return _keep_alive(link)


def _receive(link: socket.socket, count: int) -> bytes:
    link.settimeout(5.0)
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < count and (more := link.recv(count - len(data))):
            data += more
    return data


def _keep_alive(link: socket.socket) -> socket.socket:
    """Let the kernel notice when the other machine is gone."""
    link.settimeout(None)
    if link.family not in (socket.AF_INET, socket.AF_INET6):
        return link  # on this machine
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if name in vars(socket):  # Linux; elsewhere the system's hours
            link.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
    return link
