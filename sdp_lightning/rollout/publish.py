"""The order of a publish: stage, gate, pause, drain, load, verify, commit, resume. On all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.engines.protocol import (
    InferenceEngine,
    NamedWeights,
    PublishReport,
    SharedServerEngine,
)
from sdp_lightning.errors import VersionError
from sdp_lightning.workflows.send_gate import SendGate

Load = Callable[[Callable[[], None]], PublishReport]


def publish(
    engine: InferenceEngine,
    gate: SendGate,
    ranks: RankGroup,
    weights: NamedWeights,
    version: int,
    *,
    reset: bool,
    drain_s: float,
    commit: Callable[[], None],
) -> PublishReport:
    """Give ``engine`` the weights of ``version`` while no request is under way to it.

    Where the engines of all ranks share servers, rank 0 stages the weights while they sample, and
    then pauses, loads and resumes them for all. If it raises after that, gate and engine stay
    closed, on every rank: nothing is sampled by weights of which nobody knows the version. If the
    staging fails, the version before is still sampled.

    Args:
        engine: samples, and gets the weights.
        gate: closed during the publish, unless the engine updates weights in flight.
        ranks: the processes that train and publish together.
        weights: all of them with ``reset``, else those that changed. Iterating over them may be a
            collective, so every rank iterates to the end.
        version: policy version of the weights.
        reset: a start, fresh or resumed.
        drain_s: seconds that outstanding requests may take to return; then they are cancelled.
        commit: moves the clock and the ledger, once the engine reports the version.
    """
    if isinstance(engine, SharedServerEngine):
        return stage(engine, gate, ranks, weights, version, reset=reset, drain_s=drain_s)(commit)
    phases = _Publish(engine, None, gate, version, drain_s, leads=True)
    start = time.monotonic()  # each rank's engine is its own
    work, what = (lambda: phases.swap(weights, reset=reset)), f"publishing version {version}"
    report, _ = ranks.run_on_all_ranks(what, work)
    phases.verify(())
    commit()
    phases.resume_servers()
    return phases.report(report, since=start, paused=start)


def stage(
    servers: SharedServerEngine,
    gate: SendGate,
    ranks: RankGroup,
    weights: NamedWeights,
    version: int,
    *,
    reset: bool,
    drain_s: float,
) -> Load:
    """Do what servers need not stand still for; returns a function that does the rest.

    Arguments are those of :func:`publish`, and the function's is its ``commit``. Both are
    collectives; the weights may change as soon as this returns, unless ``servers`` send them live.
    """
    start = time.monotonic()
    phases = _Publish(servers, servers, gate, version, drain_s, leads=ranks.rank == 0)
    what = f"staging version {version}"
    ranks.run_on_all_ranks(what, lambda: phases.stage(servers, weights, reset=reset))
    staged_s = time.monotonic() - start

    def load(commit: Callable[[], None]) -> PublishReport:
        ranks.run_on_all_ranks(f"closing the gates for version {version}", phases.close_gate)
        paused = time.monotonic()
        ranks.run_on_all_ranks(f"pausing for version {version}", phases.pause_servers)
        ranks.run_on_all_ranks(f"draining for version {version}", phases.drain)
        report, serving = ranks.run_on_all_ranks(
            f"transferring version {version}",
            lambda: phases.load(servers, reset=reset),
            lambda _: list(servers.server_urls),
        )
        what = f"verifying version {version}"
        ranks.run_on_all_ranks(what, lambda: phases.verify(serving[0]))
        commit()
        ranks.run_on_all_ranks(f"resuming at version {version}", phases.resume_servers)
        if not phases.leads:
            servers.resume()
        return phases.report(report, since=paused - staged_s, paused=paused)

    return load


class _Publish:
    """One rank's part in each phase. ``leads``: whether its engine changes the servers.

    ``drained`` is the time at which no request was under way any more.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        shared: SharedServerEngine | None,
        gate: SendGate,
        version: int,
        drain_s: float,
        *,
        leads: bool,
    ) -> None:
        self.leads, self.drained = leads, 0.0
        self._engine, self._shared, self._gate = engine, shared, gate
        self._version, self._drain_s = version, drain_s

    def close_gate(self) -> None:
        if not self._engine.updates_in_flight:
            self._gate.close()
        if not self.leads:
            self._engine.pause()

    def pause_servers(self) -> None:
        if self.leads:
            self._engine.pause()

    def drain(self) -> None:
        if self._shared is not None:
            self._shared.drain()
        if not self._engine.updates_in_flight:
            self._gate.drain(self._drain_s)
        self.drained = time.monotonic()

    def swap(self, weights: NamedWeights, *, reset: bool) -> PublishReport:
        """All phases up to the transfer, for an engine that no other rank shares."""
        source = iter(weights)
        try:
            self.close_gate()
            self.pause_servers()
            self.drain()
            return self._engine.update_weights(source, self._version, reset=reset)
        finally:
            _exhaust(source)

    def stage(self, servers: SharedServerEngine, weights: NamedWeights, *, reset: bool) -> None:
        source = iter(weights)
        try:
            if self.leads:
                servers.stage_weights(source, self._version, reset=reset)
        finally:
            _exhaust(source)

    def load(self, servers: SharedServerEngine, *, reset: bool) -> PublishReport:
        if self.leads:
            return servers.load_weights(self._version, reset=reset)
        return PublishReport(self._version, 0)

    def verify(self, server_urls: Sequence[str]) -> None:
        if self._shared is not None and not self.leads:
            self._shared.follow(self._version, server_urls)
        if self._engine.version != self._version:
            raise VersionError(
                f"version {self._version} was published, but the engine reports "
                f"{self._engine.version}."
            )

    def resume_servers(self) -> None:
        if self.leads:
            self._engine.resume()

    def report(self, report: PublishReport, *, since: float, paused: float) -> PublishReport:
        """Open the gate, and complete ``report``: the trainer waited since time ``since``."""
        resumed = time.monotonic()
        self._gate.open()
        return replace(
            report,
            paused_s=resumed - paused,
            exposed_s=time.monotonic() - since,
            drain_s=self.drained - paused,
            resume_s=max(0.0, resumed - self.drained - report.load_s),
        )


def _exhaust(source: Iterator[object]) -> None:
    """Finish a collective that failed here: the other ranks go through it, too."""
    for _ in source:
        pass
