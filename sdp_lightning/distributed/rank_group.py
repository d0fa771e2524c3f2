"""What the processes of one training agree on, and what they say when one of them does not come.

Values travel over connections of their own to rank 0, never through the collectives that gradients
use, so that a rank that is late, has failed or has died is named.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from socket import socket
from typing import Any, TypeVar

from sdp_lightning.distributed.failure_detector import (
    FailureDetector,
    Listener,
    RankFailure,
    connect,
)
from sdp_lightning.distributed.messaging import Link, pack, wait_for_any
from sdp_lightning.errors import RankError

T = TypeVar("T")
U = TypeVar("U")
_LOOK_S = 1e-2  # between two looks at what may end a wait for the others
_AFTER_S = 10.0  # that others wait longer than rank 0
_CAUSE_S = 1.0


class RankGroup:
    """The processes that train together; alone, it asks nobody.

    Every method that exchanges values must be called by all ranks, in the same order.

    Args:
        links: a connection to rank 0; rank 0's to every other one; none for one process.
        rank: of this process.
        size: how many there are.
        timeout_s: longest wait for the others, unless told otherwise.
        interrupted: looked at while waiting; True ends the wait with ``RankError``.
    """

    def __init__(
        self,
        links: Mapping[int, socket] | None = None,
        *,
        rank: int = 0,
        size: int = 1,
        timeout_s: float = 600.0,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.size = rank, size
        self._timeout_s, self._interrupted = timeout_s, interrupted
        self._links = {rank: Link(end) for rank, end in sorted((links or {}).items())}
        self._failure_detector: FailureDetector | None = None
        self._number, self._latest = 0, "nothing yet"  # of meetings
        self._inbox: dict[tuple[int, int], tuple[str, Any]] = {}  # by rank and meeting

    def all_gather(self, what: str, value: T, *, timeout_s: float | None = None) -> list[T]:
        """Every rank's ``value``, in order of rank, on every rank.

        Args:
            what: names the meeting in errors, and must be the same everywhere.
            value: anything that can be pickled.
            timeout_s: longest wait; None is the usual one.

        Raises:
            RankError: if a rank does not come in time, is at another meeting, or has failed.
        """
        if self.size == 1:
            return [value]
        return self._meet(what, value, lambda values: values, timeout_s)

    def gather(self, what: str, value: T, *, timeout_s: float | None = None) -> list[T] | None:
        """Every rank's ``value``, in order of rank, on rank 0; None on the others.

        They wait, too, until it has them all. Arguments and errors are those of ``all_gather``.
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
            What this rank's work returned, and what every rank tells of its own.

        Raises:
            RankError: naming the rank and its error; on that rank the error itself.
        """
        try:
            result = work()
        except Exception as error:
            with contextlib.suppress(RankError):
                told = (f"{type(error).__name__}: {error}", None)
                self.all_gather(what, told, timeout_s=timeout_s)
            raise
        brought = self.all_gather(what, ("", tell(result)), timeout_s=timeout_s)
        for rank, (message, _) in enumerate(brought):
            if message:
                raise RankError(f"rank {rank} failed while {what}: {message}")
        return result, [value for _, value in brought]

    def broadcast(self, what: str, value: T, *, timeout_s: float | None = None) -> T:
        """Rank 0's ``value``, on every rank."""
        return self.all_gather(what, value if self.rank == 0 else None, timeout_s=timeout_s)[0]  # type: ignore

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank has failed: their next wait ends with its error.

        If another one failed before, which may be why this one did, that is noted on ``error``.
        """
        if self.size == 1:
            return
        if isinstance(error, RankError | RuntimeError):
            self._await_cause()
        cause = self.failure
        if cause is None:
            self._tell(f"{type(error).__name__}: {error}")
        elif cause.message not in str(error):
            error.add_note(f"Before that, {cause}")

    def watch(self, links: Mapping[int, socket]) -> None:
        """Hear of failures, until ``close``, also while this rank is in none of these methods.

        Args:
            links: of the :class:`~sdp_lightning.distributed.failure_detector.FailureDetector`.
        """
        self._failure_detector = FailureDetector(self.rank, links)

    def close(self) -> None:
        """Part from the others: that this process ends is no failure from now on."""
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
        """On every rank, what ``answer`` makes of the values of all on rank 0."""
        self._number += 1
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if self.rank > 0:  # it waits longer than rank 0, whose error names the one that is missing
            self._send(what, value)
            [(error, reply)] = self._receive(what, limit_s + _AFTER_S)
            if error:
                raise RankError(error)
        else:
            try:
                reply = answer(self._receive_all(what, value, limit_s))
            except RankError as error:
                self._send(str(error), None)  # one of them may never listen: not waited for
                raise
            self._send("", reply)
            if any(link.is_sending for link in self._links.values()):
                self._await(lambda rank: not self._links[rank].is_sending, what, limit_s)
        self._latest = what
        return reply

    def _receive_all(self, what: str, value: T, limit_s: float) -> list[T]:
        """What all ranks brought to this meeting, rank 0's ``value`` first."""
        values = [value]
        for rank, (place, brought) in enumerate(self._receive(what, limit_s), 1):
            if place != what:
                raise RankError(f"rank {rank} is at {place!r} while rank 0 is at {what!r}.")
            values.append(brought)
        return values

    def _send(self, text: str, value: object) -> None:
        data = pack((self._number, text, value))
        for link in self._links.values():
            link.send(data)

    def _receive(self, what: str, limit_s: float) -> list[tuple[str, Any]]:
        """What the other ends say at this meeting; what came too late for an earlier one goes."""

        def has_come(rank: int) -> bool:
            for number, text, value in self._links[rank].receive():
                if number >= self._number:
                    self._inbox[rank, number] = text, value
            return (rank, self._number) in self._inbox

        wait_for_any(self._links.values(), _LOOK_S)  # to look at once is mostly in vain
        self._await(has_come, what, limit_s)
        return [self._inbox.pop((rank, self._number)) for rank in self._links]

    def _await(self, is_done: Callable[[int], bool], what: str, limit_s: float) -> None:
        """Until it ``is_done`` with every rank at the other ends."""
        start, late = time.monotonic(), list(self._links)
        while late := [rank for rank in late if not is_done(rank)]:
            links = {rank: self._links[rank] for rank in late}
            if self._interrupted():
                raise RankError(f"interrupted while {what}.")
            if gone := [rank for rank, link in links.items() if link.is_gone]:
                self._await_cause()  # it may have said why before it went
            if gone or self.failure is not None:
                failure = self.failure or f"rank {gone[0]} is gone."
                raise RankError(f"{failure} It was waited for while {what}.")
            if time.monotonic() - start > limit_s:
                message = (
                    f"waited {limit_s:.1f} s for rank {', '.join(map(str, late))} while {what}; "
                    f"the last that all ranks did together was: {self._latest}."
                )
                self._tell(message)  # the late ones may be stuck for good
                raise RankError(message)
            wait_for_any(links.values(), _LOOK_S)
            for link in links.values():
                link.push()

    def _await_cause(self) -> None:
        """The thread that listens may hear of a failure a little later than its effect is felt."""
        deadline = time.monotonic() + _CAUSE_S
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(_LOOK_S)


def make_rank_group(
    *, timeout_s: float, interrupted: Callable[[], bool] = lambda: False
) -> RankGroup:
    """The ranks of the default group of torch.distributed, or this process alone.

    Connections of their own are opened between rank 0 and every other one.
    """
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return RankGroup(timeout_s=timeout_s)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    listeners = [Listener(host) for _ in range(2)] if rank == 0 else []
    places: list[Any] = [[listener.place for listener in listeners]]
    distributed.broadcast_object_list(places, src=0)
    links, lines = [listener.accept(size, timeout_s) for listener in listeners] or [
        {0: connect(host, place, rank, timeout_s)} for place in places[0]
    ]
    ranks = RankGroup(links, rank=rank, size=size, timeout_s=timeout_s, interrupted=interrupted)
    ranks.watch(lines)
    return ranks
