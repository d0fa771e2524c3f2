"""What the processes of one training agree on, and what they say when one of them does not come.

Values travel through a key-value store of their own, never through the collectives that gradients
use, so that a rank that is late, has failed or has died is named.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from socket import socket
from typing import TYPE_CHECKING, Any, TypeVar

from sdp_lightning.errors import RankError
from sdp_lightning.lifeline import Lifeline, Listener, RankFailure, connect

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
U = TypeVar("U")
_FIRST_S, _LONGEST_S = 1e-4, 1e-2  # between two looks at what others have written
_AFTER_S = 10.0  # that others wait longer than rank 0
_CAUSE_S = 1.0
_PIECE = 4 * 2**20  # characters


class Ranks:
    """The processes that train together; alone, it asks nobody.

    Every method that exchanges values must be called by all ranks, in the same order.

    Args:
        store: shared by all; None for one process.
        rank: of this process.
        size: how many there are.
        timeout_s: longest wait for the others, unless told otherwise.
        interrupted: looked at while waiting; True ends the wait with ``RankError``.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        rank: int = 0,
        size: int = 1,
        timeout_s: float = 600.0,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._timeout_s, self._interrupted = store, timeout_s, interrupted
        self._lifeline: Lifeline | None = None
        self._number, self._old_keys = 0, list[str]()
        self._latest = "nothing yet"

    def gather(self, what: str, value: T, *, timeout_s: float | None = None) -> list[T]:
        """Every rank's ``value``, in order of rank, on every rank.

        Args:
            what: names the meeting in errors, and must be the same everywhere.
            value: anything that can be pickled.
            timeout_s: longest wait; None is the usual one.

        Raises:
            RankError: if a rank does not come in time, is at another meeting, or has failed.
        """
        if self._store is None:
            return [value]
        self._number += 1
        limit = self._timeout_s if timeout_s is None else timeout_s
        mine, answer = f"{self._number}/{self.rank}", f"{self._number}/all"
        with self._at(what):
            if self.rank == 0:
                found = self._collect(what, value, limit)
                keys = self._put(answer, found)
            else:  # longer than rank 0 waits: its error names the one that is missing
                keys = self._put(mine, (what, value))
                self._await({0: answer}, what, limit + _AFTER_S)
                found = self._get(answer)
            for key in self._old_keys:  # all have read them: they came to this meeting
                self._store.delete_key(key)
            self._old_keys = keys
        if isinstance(found, str):
            raise RankError(found)
        self._latest = what
        return found

    def together(
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
                self.gather(what, told, timeout_s=timeout_s)
            raise
        brought = self.gather(what, ("", tell(result)), timeout_s=timeout_s)
        for rank, (message, _) in enumerate(brought):
            if message:
                raise RankError(f"rank {rank} failed while {what}: {message}")
        return result, [value for _, value in brought]

    def first(self, what: str, value: T, *, timeout_s: float | None = None) -> T:
        """Rank 0's ``value``, on every rank."""
        return self.gather(what, value if self.rank == 0 else None, timeout_s=timeout_s)[0]  # type: ignore

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank has failed: their next wait ends with its error.

        If another one failed before, which may be why this one did, that is noted on ``error``.
        """
        if self._store is None:
            return
        # The thread that listens may hear of the cause a little later than its effect is felt.
        late = isinstance(error, RankError | RuntimeError)
        deadline = time.monotonic() + (_CAUSE_S if late else 0.0)
        while (cause := self._failure) is None and time.monotonic() < deadline:
            time.sleep(_LONGEST_S)
        if cause is None:
            self._tell(f"{type(error).__name__}: {error}")
        elif cause.message not in str(error):
            error.add_note(f"Before that, {cause}")

    def watch(self, links: Mapping[int, socket]) -> None:
        """Hear of failures, until ``close``, also while this rank is in none of these methods.

        Args:
            links: of the :class:`~sdp_lightning.lifeline.Lifeline`.
        """
        self._lifeline = Lifeline(self.rank, links)

    def close(self) -> None:
        """Part from the others: that this process ends is no failure from now on."""
        if self._lifeline is not None:
            self._lifeline.close()

    @property
    def _failure(self) -> RankFailure | None:
        return None if self._lifeline is None else self._lifeline.failure

    def _tell(self, message: str) -> None:
        if self._lifeline is not None:
            self._lifeline.tell(message)

    def _collect(self, what: str, value: T, limit_s: float) -> list[T] | str:
        """What all ranks brought, ``value`` first; or, in words, why not."""
        keys = {rank: f"{self._number}/{rank}" for rank in range(1, self.size)}
        try:
            self._await(keys, what, limit_s)
        except RankError as error:
            return str(error)
        brought = [(what, value), *map(self._get, keys.values())]
        for rank, (place, _) in enumerate(brought):
            if place != what:
                return f"rank {rank} is at {place!r} while rank 0 is at {what!r}."
        return [value for _, value in brought]

    def _await(self, keys: Mapping[int, str], what: str, limit_s: float) -> None:
        """Until the keys of all these ranks are there."""
        assert self._store is not None
        start, pause_s = time.monotonic(), _FIRST_S
        while not self._store.check(list(keys.values())):
            waited_s = time.monotonic() - start
            if self._interrupted():
                raise RankError(f"interrupted while {what}.")
            if self._failure is not None:
                raise RankError(f"{self._failure} It was waited for while {what}.")
            if waited_s > limit_s:
                late = [rank for rank, key in keys.items() if not self._store.check([key])]
                message = (
                    f"waited {limit_s:.1f} s for rank {', '.join(map(str, late))} while {what}; "
                    f"the last that all ranks did together was: {self._latest}."
                )
                self._tell(message)  # the late ones may be stuck for good
                raise RankError(message)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_S, max(_FIRST_S, waited_s / 10))

    @contextlib.contextmanager
    def _at(self, what: str) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:  # of torch: the store is rank 0's
            raise RankError(
                f"{self._failure or 'rank 0 is gone.'} It was waited for while {what}."
            ) from error

    def _put(self, key: str, value: object) -> list[str]:
        """In pieces, whose keys come back: over more than 8 MiB the store drops the connection."""
        assert self._store is not None
        data = pickle.dumps(value).hex()
        pieces = [data[i : i + _PIECE] for i in range(0, len(data), _PIECE)]
        keys = [f"{key}/{number}" for number in range(1, len(pieces))]
        for name, piece in zip(keys, pieces[1:], strict=True):
            self._store.set(name, piece)
        self._store.set(key, f"{len(pieces)} {pieces[0]}")  # last: it tells that all are there
        return [key, *keys]

    def _get(self, key: str) -> Any:
        assert self._store is not None
        count, first = self._store.get(key).decode().split()
        rest = [self._store.get(f"{key}/{number}").decode() for number in range(1, int(count))]
        return pickle.loads(bytes.fromhex("".join([first, *rest])))


def make_ranks(*, timeout_s: float, interrupted: Callable[[], bool] = lambda: False) -> Ranks:
    """The ranks of the default group of torch.distributed, or this process alone.

    A store of their own is opened; rank 0 holds it.
    """
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return Ranks(timeout_s=timeout_s)
    from torch._C._distributed_c10d import TCPStore

    rank, size = distributed.get_rank(), distributed.get_world_size()
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    limit = timedelta(seconds=timeout_s)
    place: list[Any] = [None]
    listener = store = None
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        listener = Listener(host)
        place = [(store.port, listener.place)]
    distributed.broadcast_object_list(place, src=0)
    port, meeting = place[0]
    if store is None:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    ranks = Ranks(store, rank=rank, size=size, timeout_s=timeout_s, interrupted=interrupted)
    ranks.watch(
        {0: connect(host, meeting, rank, timeout_s)}
        if listener is None
        else listener.accept(size, timeout_s)
    )
    return ranks
