"""The servers behind one engine: which of them serves, and which one a request goes to.

Used in one event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from sdp_lightning.engines.backend import ServerInfo
from sdp_lightning.errors import EngineError

_REMEMBERED_GROUPS = 4096


@dataclass(eq=False)
class Replica:
    """One server.

    Attributes:
        info: what it said of itself; None before it was asked.
        serving: whether requests are sent to it.
        num_outstanding: requests that are out.
        last_sent_s: when the latest of them was sent, on the monotonic clock.
        why_out: the error that took it out.
        lost: set when it is taken out; what is out there is then sent elsewhere.
    """

    url: str
    info: ServerInfo | None = None
    serving: bool = False
    num_outstanding: int = 0
    last_sent_s: float = 0.0
    why_out: str = "it was never reached"
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class ReplicaSet:
    """Routes to the least loaded server; a group goes where its first request went.

    Args:
        urls: one for each server.

    Attributes:
        taken_back: set while requests that are out must return, with nothing.
    """

    def __init__(self, urls: list[str]) -> None:
        self.replicas = [Replica(url) for url in urls]
        self._home: OrderedDict[str, Replica] = OrderedDict()
        self._changed = asyncio.Condition()
        self.taken_back = asyncio.Event()

    @property
    def serving(self) -> list[Replica]:
        """Those that take requests."""
        return [replica for replica in self.replicas if replica.serving]

    async def settle(self, settle_s: float) -> None:
        """Wait until the latest request is ``settle_s`` old."""
        latest = max((replica.last_sent_s for replica in self.replicas), default=0.0)
        await asyncio.sleep(max(0.0, latest + settle_s - time.monotonic()))

    async def drain(self, grace_s: float) -> None:
        """Wait until no request is out; after ``grace_s`` take back those that still are."""
        deadline = time.monotonic() + grace_s
        while any(replica.num_outstanding for replica in self.replicas):
            if time.monotonic() > deadline:
                self.taken_back.set()
            await asyncio.sleep(0.005)
        self.taken_back.clear()

    def describe_lost(self) -> str:
        """Which servers are out, and why."""
        return "; ".join(f"{r.url}: {r.why_out}" for r in self.replicas if not r.serving)

    async def choose(self, group_key: str, timeout_s: float) -> Replica:
        """A serving replica; waits for one to come back.

        Raises:
            EngineError: if none does by the deadline (seconds), with the reason of each.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: bool(self.serving))
        except TimeoutError as error:
            raise EngineError(
                f"no server has been left for {timeout_s:.0f} s. {self.describe_lost()}"
            ) from error
        home = self._home.get(group_key)
        if home is None or not home.serving:
            home = min(self.serving, key=lambda replica: replica.num_outstanding)
        if group_key:
            self._home[group_key] = home
            self._home.move_to_end(group_key)
            if len(self._home) > _REMEMBERED_GROUPS:
                self._home.popitem(last=False)
        return home

    def take_out(self, replica: Replica, error: Exception) -> None:
        """Send nothing more to ``replica``; wake what waits for its answers."""
        if replica.serving:
            replica.serving, replica.why_out = False, str(error)
            replica.lost.set()

    async def bring_in(self, replica: Replica) -> None:
        """Send requests to ``replica`` from now on."""
        async with self._changed:
            replica.serving, replica.lost = True, asyncio.Event()
            self._changed.notify_all()
