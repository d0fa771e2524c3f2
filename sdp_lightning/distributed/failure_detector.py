"""Notices at once that another process of the training has failed, whatever this one is doing.

Every process holds a connection to rank 0, and the kernel closes it when the process ends, however
it ends. A thread listens, because the main one may sit in a collective that will never return.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import selectors
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdp_lightning.distributed.stopped_ranks import LOOK_S, StoppedRanks

logger = logging.getLogger(__name__)

STOPPED_S = 600.0
GRACE_S = 10.0  # for the main thread to come back and end the training in order
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
            failure = RankFailure(*message) if message else None
        except (ValueError, TypeError):  # this thread must live on
            message = [rank, f"its message is not valid: {line[:80]!r}."]
            failure = RankFailure(*message)
        if failure is not None:
            self._fail(failure)

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
