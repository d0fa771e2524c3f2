"""Collectives of Python values among the processes of one training, with errors that name a rank.

Values travel over separate connections to rank 0, never through the collectives of gradients, so
an error can name a rank that is late, has failed or has died.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from socket import socket
from typing import Any, TypeVar

from sdp_lightning.distributed.failure_detector import FailureDetector, RankFailure
from sdp_lightning.distributed.listener import address_of, connect, listen_at
from sdp_lightning.distributed.messaging import Link, pack, wait_for_any
from sdp_lightning.distributed.stopped_ranks import go_on_without_parent
from sdp_lightning.errors import RankError, message_of

T = TypeVar("T")
U = TypeVar("U")
_POLL_S = 1e-2  # between two checks of what may end a wait
_AFTER_S = 10.0  # other ranks wait longer than rank 0, whose error names the late rank
_CAUSE_S = 1.0  # longest wait for the failure behind an error


class RankGroup:
    """The processes that train together. A group of one exchanges nothing.

    Every method that exchanges values is a collective: all ranks call it, in the same order.

    Args:
        links: connection to rank 0; on rank 0 the connections to all others.
        rank: rank of this process.
        size: number of ranks.
        timeout_s: default timeout of a collective in seconds.
        interrupted: polled while waiting; True ends the wait with ``RankError``.
        key: secret of the ranks, which signs what they exchange.
    """

    def __init__(
        self,
        links: Mapping[int, socket] | None = None,
        *,
        rank: int = 0,
        size: int = 1,
        timeout_s: float = 600.0,
        interrupted: Callable[[], bool] = lambda: False,
        key: bytes = b"",
    ) -> None:
        self.rank, self.size = rank, size
        self._timeout_s, self._interrupted, self._key = timeout_s, interrupted, key
        self._links = {rank: Link(end, key) for rank, end in sorted((links or {}).items())}
        self._failure_detector: FailureDetector | None = None
        self._number, self._latest = 0, "nothing yet"  # of collectives
        self._inbox: dict[tuple[int, int], tuple[str, Any]] = {}  # by rank and collective

    def all_gather(self, what: str, value: T, *, timeout_s: float | None = None) -> list[T]:
        """Every rank's ``value``, in order of rank, on every rank.

        Args:
            what: name of the collective in errors, the same on all ranks.
            value: picklable value of this rank.
            timeout_s: longest wait in seconds; None is the group's timeout.

        Raises:
            RankError: if a rank is late, is at another collective, or has failed.
        """
        if self.size == 1:
            return [value]
        return self._meet(what, value, lambda values: values, timeout_s)

    def gather(self, what: str, value: T, *, timeout_s: float | None = None) -> list[T] | None:
        """Every rank's ``value``, in order of rank, on rank 0; None on the others.

        All ranks wait until rank 0 has them all. Arguments and errors are as in ``all_gather``.
        """
        if self.size == 1:
            return [value]
        kept: list[T] = []
        self._meet(what, value, kept.extend, timeout_s)
        return kept if self.rank == 0 else None

    def run_on_all_ranks(
        self,
        what: str,
        work: Callable[[], T],
        tell: Callable[[T], U] = lambda _: None,
        *,
        timeout_s: float | None = None,
    ) -> tuple[T, list[U]]:
        """Do ``work`` on every rank; if it raises on one, every rank raises.

        Returns:
            The result of this rank's ``work``, and ``tell(result)`` of every rank.

        Raises:
            RankError: naming the rank and its error; that rank raises the error itself.
        """
        try:
            result = work()
        except Exception as error:
            with contextlib.suppress(RankError):
                report = (f"{type(error).__name__}: {message_of(error)}", None)
                self.all_gather(what, report, timeout_s=timeout_s)
            raise
        reports = self.all_gather(what, ("", tell(result)), timeout_s=timeout_s)
        for rank, (message, _) in enumerate(reports):
            if message:
                raise RankError(f"rank {rank} failed while {what}: {message}")
        return result, [value for _, value in reports]

    def broadcast(self, what: str, value: T, *, timeout_s: float | None = None) -> T:
        """Rank 0's ``value``, on every rank."""
        return self.all_gather(what, value if self.rank == 0 else None, timeout_s=timeout_s)[0]  # type: ignore

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank has failed: their next wait ends with its error.

        If another rank failed first, a note on ``error`` says so: it may be the cause. A rank that
        is stopped (SIGSTOP) hears nothing: it is killed, and named in a note.
        """
        if self.size == 1:
            return
        if isinstance(error, RankError | RuntimeError):
            self._await_cause()
        cause = self.failure
        if cause is None:
            self._tell(f"{type(error).__name__}: {message_of(error)}")
        elif cause.message not in message_of(error):
            error.add_note(f"Before that, {cause}")
        if self._failure_detector is not None:
            for sentence in self._failure_detector.kill_stopped():
                error.add_note(sentence)

    def watch(self, links: Mapping[int, socket]) -> None:
        """Listen for failures on ``links`` until ``close``, also between two collectives."""
        self._failure_detector = FailureDetector(self.rank, links, stopped_s=self._timeout_s)

    def close(self) -> None:
        """Leave the group: from now on the end of this process is no failure."""
        if self._failure_detector is not None:
            self._failure_detector.close()
        for link in self._links.values():
            link.close()

    @property
    def failure(self) -> RankFailure | None:
        """The first failure of another rank that this one heard of."""
        return None if self._failure_detector is None else self._failure_detector.failure

    def _tell(self, message: str) -> None:
        if self._failure_detector is not None:
            self._failure_detector.tell(message)

    def _meet(
        self, what: str, value: T, answer: Callable[[list[T]], U], timeout_s: float | None
    ) -> U:
        """Send all values to rank 0, and its ``answer(values)`` to every rank."""
        self._number += 1
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if self.rank > 0:  # waits longer than rank 0, whose error names the late rank
            self._send(what, value)
            [(error, reply)] = self._receive(what, limit_s + _AFTER_S)
            if error:
                raise RankError(error)
        else:
            try:
                reply = answer(self._receive_all(what, value, limit_s))
            except RankError as error:
                self._send(str(error), None)  # not awaited: a rank may never read it
                raise
            self._send("", reply)
            if any(link.is_sending for link in self._links.values()):
                self._await(lambda rank: not self._links[rank].is_sending, what, limit_s)
        self._latest = what
        return reply

    def _receive_all(self, what: str, value: T, limit_s: float) -> list[T]:
        """Values of all ranks at this collective, rank 0's ``value`` first."""
        values = [value]
        for rank, (name, received) in enumerate(self._receive(what, limit_s), 1):
            if name != what:
                raise RankError(f"rank {rank} is at {name!r} while rank 0 is at {what!r}.")
            values.append(received)
        return values

    def _send(self, text: str, value: object) -> None:
        data = pack((self._number, text, value), self._key)
        for link in self._links.values():
            link.send(data)

    def _receive(self, what: str, limit_s: float) -> list[tuple[str, Any]]:
        """Messages of the linked ranks for this collective. Older ones are dropped."""

        def has_come(rank: int) -> bool:
            for number, text, value in self._links[rank].receive():
                if number >= self._number:
                    self._inbox[rank, number] = text, value
            return (rank, self._number) in self._inbox

        wait_for_any(self._links.values(), _POLL_S)  # a check right away mostly finds nothing
        self._await(has_come, what, limit_s)
        return [self._inbox.pop((rank, self._number)) for rank in self._links]

    def _await(self, is_done: Callable[[int], bool], what: str, limit_s: float) -> None:
        """Wait until ``is_done`` holds for every linked rank."""
        start, late = time.monotonic(), list(self._links)
        while late := [rank for rank in late if not is_done(rank)]:
            links = {rank: self._links[rank] for rank in late}
            if self._interrupted():
                raise RankError(f"interrupted while {what}.")
            if gone := [rank for rank, link in links.items() if link.is_gone]:
                self._await_cause()  # it may have sent its error before it went
            if gone or self.failure is not None:
                failure = self.failure or f"rank {gone[0]} is gone."
                raise RankError(f"{failure} It was waited for while {what}.")
            if time.monotonic() - start > limit_s:
                message = (
                    f"waited {limit_s:.1f} s for rank {', '.join(map(str, late))} while {what}; "
                    f"the last that all ranks did together was: {self._latest}."
                )
                self._tell(message)  # a late rank may be stuck for good
                raise RankError(message)
            wait_for_any(links.values(), _POLL_S)
            for link in links.values():
                link.push()

    def _await_cause(self) -> None:
        """Wait a moment for the failure: its effects may come before its message."""
        deadline = time.monotonic() + _CAUSE_S
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def make_rank_group(
    *, timeout_s: float, interrupted: Callable[[], bool] = lambda: False
) -> RankGroup:
    """The ranks of the default group of torch.distributed, or this process alone.

    Opens two connections between rank 0 and every other rank. Their secrets come from rank 0 by
    torch.distributed, which has to be kept from strangers by other means.
    """
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return RankGroup(timeout_s=timeout_s)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    seen = [""] * size
    distributed.all_gather_object(seen, address_of(host))
    listeners = [listen_at(seen) for _ in range(2)] if rank == 0 else []
    told: list[Any] = [[(listener.host or host, listener.address) for listener in listeners]]
    distributed.broadcast_object_list(told, src=0)
    places: list[tuple[str, tuple[int | bytes, bytes]]] = told[0]
    try:
        links, lines = [listener.accept(size, timeout_s) for listener in listeners] or [
            {0: connect(where, address, rank, timeout_s)} for where, address in places
        ]
    finally:
        for listener in listeners:
            listener.close()
    (_, (_, key)), _ = places
    ranks = RankGroup(
        links, rank=rank, size=size, timeout_s=timeout_s, interrupted=interrupted, key=key
    )
    ranks.watch(lines)
    if rank > 0:  # Lightning starts these from rank 0
        go_on_without_parent()
    return ranks
