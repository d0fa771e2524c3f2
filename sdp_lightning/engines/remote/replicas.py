"""The servers of one engine: which of them serve, and which server a request goes to.

Used in one event loop only. No I/O.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass, field, replace

from sdp_lightning.engines.remote.backend import Completion, ServerInfo
from sdp_lightning.errors import EngineError
from sdp_lightning.weights.protocol import ServedType

logger = logging.getLogger(__name__)

_REMEMBERED_GROUPS = 4096


@dataclass(eq=False)
class Replica:
    """One server.

    Attributes:
        info: the server's description; None before the handshake.
        adapter: name of the LoRA adapter that it samples with; None: the model without one.
        serving: whether requests are sent to it.
        outstanding: requests without an answer; a cancelled one is sent elsewhere, or later.
        heard_s: time of its latest sign of sampling: an answer, or progress of its count.
        num_sampled: its own count of tokens; None: it was not asked, or has none.
        counted_s: time at which it was last asked for the count; ``inf`` if it has none.
        silent: requests that got no token for too long since ``heard_s``.
        num_losses: number of times it was taken out of service.
        num_returns: number of attempts to bring it back since it last completed a request.
        tried_s: time of the last such attempt.
        handshake_done: whether its log-probs were checked since the connection was last lost.
        scores_prompts: whether it gave the log-probs of every prompt that it was asked for.
        waits_for_publish: it is reachable and paused, and the next publish includes it.
        busy_until_s: time until which it has asked to be left alone; ``why_busy`` is its answer.
        why_out: the latest error while it did not serve, or the one that took it out.
    """

    url: str
    info: ServerInfo | None = None
    adapter: str | None = None
    serving: bool = False
    outstanding: set[asyncio.Future[Completion]] = field(
        default_factory=set["asyncio.Future[Completion]"]
    )
    heard_s: float = 0.0
    num_sampled: float | None = None
    counted_s: float = 0.0
    silent: set[object] = field(default_factory=set[object])
    num_losses: int = 0
    num_returns: int = 0
    tried_s: float = 0.0
    handshake_done: bool = True
    scores_prompts: bool = True
    waits_for_publish: bool = False
    busy_until_s: float = 0.0
    why_busy: str = ""
    why_out: str = "it was never reached"

    def hear(self) -> None:
        """Note a sign of sampling."""
        self.heard_s = time.monotonic()
        self.silent.clear()

    @property
    def serves(self) -> ServerInfo:
        """The description with the name that requests must use: the adapter, if there is one."""
        assert self.info is not None
        return self.info if self.adapter is None else replace(self.info, model=self.adapter)


class ReplicaSet:
    """Routes to the least loaded server; all requests of a group go to the same server.

    Args:
        urls: URL of each server.
        explain: gives more details on the server at a URL, for errors.
    """

    def __init__(self, urls: list[str], explain: Callable[[str], str] = lambda _: "") -> None:
        self._explain = explain
        self.replicas = [Replica(url) for url in urls]
        self._home: OrderedDict[str, Replica] = OrderedDict()
        self._came_back = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_sent_s = 0.0

    @property
    def serving(self) -> list[Replica]:
        """Servers that accept requests now."""
        return [replica for replica in self.replicas if replica.serving]

    @contextlib.contextmanager
    def sending(self, replica: Replica, request: asyncio.Future[Completion]) -> Generator[None]:
        """Context in which ``request`` counts as outstanding at ``replica``."""
        replica.outstanding.add(request)
        self._last_sent_s = time.monotonic()
        self._idle.clear()
        try:
            yield
        finally:
            replica.outstanding.remove(request)
            if not any(other.outstanding for other in self.replicas):
                self._idle.set()

    async def settle(self, settle_s: float) -> None:
        """Wait until the latest request is ``settle_s`` old."""
        await asyncio.sleep(max(0.0, self._last_sent_s + settle_s - time.monotonic()))

    async def drain(self, grace_s: float) -> None:
        """Wait until no request is outstanding; after ``grace_s`` seconds cancel the others.

        It also waits for requests that are sent meanwhile.
        """
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            for replica in self.replicas:
                for request in replica.outstanding:
                    request.cancel()
            await self._idle.wait()

    async def rest(self, deadline: float, interrupted: asyncio.Event) -> None:
        """Wait while all serving servers are busy, or until ``interrupted``.

        Raises:
            EngineError: if all want more time than there is until ``deadline``.
        """
        while self.serving and not interrupted.is_set():
            first = min(self.serving, key=lambda replica: replica.busy_until_s)
            rest_s = first.busy_until_s - time.monotonic()
            if rest_s <= 0:
                return
            if first.busy_until_s > deadline:
                raise EngineError(
                    "every server wants more time (Retry-After) than is left of request_timeout_s: "
                    f"{first.why_busy}"
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(interrupted.wait(), rest_s)

    async def wait_for(self, count: int, timeout_s: float) -> None:
        """Wait until ``count`` servers serve.

        Raises:
            EngineError: if fewer serve after ``timeout_s`` seconds, with the reason for each.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while len(self.serving) < count:
                    self._came_back.clear()
                    await self._came_back.wait()
        except TimeoutError as error:
            num_left = len(self.serving)
            left = f"{num_left} servers have been left" if num_left else "no server has been left"
            raise EngineError(f"{left} for {timeout_s:.1f} s. {self.describe_lost()}") from error

    async def choose(
        self, group_key: str, timeout_s: float, avoid: Collection[Replica] = ()
    ) -> Replica:
        """Choose a serving replica, one that is neither busy nor to ``avoid`` if there is one.

        Waits for one to come back if none serves.

        Raises:
            EngineError: if none serves after ``timeout_s`` seconds, with the reason for each.
        """
        if not self.serving:
            await self.wait_for(1, timeout_s)
        now_s = time.monotonic()
        allowed = [r for r in self.serving if r not in avoid and r.busy_until_s <= now_s]
        home = self._home.get(group_key)
        if home is None or home not in (allowed or self.serving):
            home = min(allowed or self.serving, key=lambda replica: len(replica.outstanding))
        if group_key:
            self._home[group_key] = home
            self._home.move_to_end(group_key)
            if len(self._home) > _REMEMBERED_GROUPS:
                self._home.popitem(last=False)
        return home

    def take_out(self, replica: Replica, error: Exception, *, phase: str = "serving") -> None:
        """Send no more requests to ``replica``; cancel its outstanding ones."""
        replica.why_out = str(error)
        replica.silent.clear()
        replica.waits_for_publish = False
        if replica.serving:
            logger.warning("%s is taken out while %s: %s", replica.url, phase, error)
            replica.serving = False
            replica.num_losses += 1
            for request in replica.outstanding:
                request.cancel()

    def leave_out(self, replica: Replica, error: Exception) -> None:
        """Begin without ``replica``, which was never well."""
        logger.warning("%s is left out until it is well: %s", replica.url, error)
        replica.handshake_done = False
        self.take_out(replica, error)

    def add(self, urls: Collection[str]) -> None:
        """Know the servers at ``urls``, too, of which the new ones do not serve yet."""
        known = {replica.url for replica in self.replicas}
        new = [Replica(url, handshake_done=False) for url in urls if url not in known]
        self.replicas += new

    def leave_alone(self, replica: Replica, error: Exception, rest_s: float) -> None:
        """Send no requests to ``replica``, which serves, for ``rest_s`` seconds."""
        replica.busy_until_s, replica.why_busy = time.monotonic() + rest_s, str(error)

    def bring_in(self, replica: Replica) -> None:
        """Send requests to ``replica`` from now on."""
        replica.serving, replica.waits_for_publish = True, False
        self._home.clear()  # or existing groups would never move to it
        self._came_back.set()

    def describe_lost(self) -> str:
        """URL and reason for each server that does not serve."""
        lost = [replica for replica in self.replicas if not replica.serving]
        return "; ".join(f"{r.url}: {r.why_out} {self._explain(r.url)}".rstrip() for r in lost)


def served_type(replicas: Iterable[Replica]) -> ServedType | None:
    """The one type of the weights of all servers; None if they differ, or do not say."""
    kinds: set[ServedType | None] = set()
    kinds.update(replica.info.served_type for replica in replicas if replica.info is not None)
    return kinds.pop() if len(kinds) == 1 else None
