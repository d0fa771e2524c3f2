"""The order of a publish: gate, pause, drain, transfer, verify, commit, resume. On all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from sdp_lightning.engines.base import InferenceEngine, NamedWeights, PublishReport
from sdp_lightning.errors import VersionError
from sdp_lightning.ranks import Ranks
from sdp_lightning.workflows.gate import SendGate

Tell = Callable[[], object]  # to all ranks, by pickle


def publish(
    engine: InferenceEngine,
    gate: SendGate,
    ranks: Ranks,
    weights: NamedWeights,
    version: int,
    *,
    reset: bool,
    drain_s: float,
    commit: Tell,
) -> PublishReport:
    """Give ``engine`` the weights of ``version`` while no request is under way to it.

    Where the engines of all ranks share servers, rank 0 pauses, loads and resumes them for all. If
    it raises, gate and engine stay closed, on every rank: nothing is sampled by weights of which
    nobody knows the version.

    Args:
        engine: which requests pass ``gate`` to.
        gate: closed meanwhile, unless the engine takes weights under requests in flight.
        ranks: that train together, and publish together.
        weights: all of them with ``reset``, else those that changed. To iterate over them may be a
            collective, so every rank does, to the end.
        version: what they are.
        reset: a start, fresh or resumed.
        drain_s: how long outstanding requests may take to come back; then they are cancelled.
        commit: moves the clock and the ledger; what it returns is told without one more meeting.
    """
    one = _Publish(engine, gate, version, drain_s, leads=ranks.rank == 0 or not engine.is_shared)
    start = time.monotonic()
    to_all = _to_shared_servers if engine.is_shared else _to_own_engines
    report = to_all(one, ranks, weights, reset=reset, commit=commit)
    resumed = time.monotonic()
    gate.open()
    times = {"paused_s": resumed - one.paused_at, "exposed_s": time.monotonic() - start}
    return replace(report, **times)


def _to_own_engines(
    one: _Publish, ranks: Ranks, weights: NamedWeights, *, reset: bool, commit: Tell
) -> PublishReport:
    """Each rank does it all, then the others are heard."""

    def swap() -> tuple[PublishReport, object]:
        report = one.swap(weights, reset=reset)
        one.verify(())
        return report, commit()

    what = f"publishing version {one.version}"
    (report, _), told = ranks.together(what, swap, lambda done: done[1])
    one.resume_servers()
    return replace(report, told=told)


def _to_shared_servers(
    one: _Publish, ranks: Ranks, weights: NamedWeights, *, reset: bool, commit: Tell
) -> PublishReport:
    """No rank begins a phase before all have ended the one before it."""
    version = one.version
    ranks.together(f"closing the gates for version {version}", one.close_gate)
    ranks.together(f"pausing for version {version}", one.pause_servers)
    ranks.together(f"draining for version {version}", one.drain)
    report, serving = ranks.together(
        f"transferring version {version}",
        lambda: one.transfer(weights, reset=reset),
        lambda _: list(one.engine.servers),
    )
    ranks.together(f"verifying version {version}", lambda: one.verify(serving[0]))
    mine = commit()
    what = f"resuming at version {version}"
    _, told = ranks.together(what, one.resume_servers, lambda _: mine)
    one.resume_follower()
    return replace(report, told=told)


class _Publish:
    """One rank's part in each phase. ``leads``: its engine changes the servers."""

    def __init__(
        self,
        engine: InferenceEngine,
        gate: SendGate,
        version: int,
        drain_s: float,
        *,
        leads: bool,
    ) -> None:
        self.leads = leads
        self.engine, self._gate = engine, gate
        self.version, self._drain_s = version, drain_s
        self.paused_at = 0.0

    def close_gate(self) -> None:
        if not self.engine.in_process:
            self._gate.close()
        if not self.leads:
            self.engine.pause()

    def pause_servers(self) -> None:
        self.paused_at = time.monotonic()
        if self.leads:
            self.engine.pause()

    def drain(self) -> None:
        self.engine.drain()
        if not self.engine.in_process:
            self._gate.drain(self._drain_s)

    def swap(self, weights: NamedWeights, *, reset: bool) -> PublishReport:
        """All that an engine of this rank's own needs before the others are heard."""
        source = iter(weights)
        try:
            self.close_gate()
            self.pause_servers()
            self.drain()
            return self.engine.update_weights(source, self.version, reset=reset)
        finally:
            _exhaust(source)

    def transfer(self, weights: NamedWeights, *, reset: bool) -> PublishReport:
        source = iter(weights)
        try:
            if self.leads:
                return self.engine.update_weights(source, self.version, reset=reset)
            return PublishReport(self.version, 0)
        finally:
            _exhaust(source)

    def verify(self, servers: Sequence[str]) -> None:
        if not self.leads:
            self.engine.follow(self.version, servers)
        if self.engine.version != self.version:
            raise VersionError(
                f"version {self.version} was published, but the engine reports "
                f"{self.engine.version}."
            )

    def resume_servers(self) -> None:
        if self.leads:
            self.engine.resume()

    def resume_follower(self) -> None:
        if not self.leads:
            self.engine.resume()


def _exhaust(source: Iterator[object]) -> None:
    """What is left of a collective: the other ranks go through it, too."""
    for _ in source:
        pass
