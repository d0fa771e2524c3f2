"""The order of a publish: gate, pause, drain, transfer, verify, commit, resume. On all ranks."""

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

    Where the engines of all ranks share servers, rank 0 pauses, loads and resumes them for all. If
    it raises, gate and engine stay closed, on every rank: nothing is sampled by weights of which
    nobody knows the version.

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
    shared = engine if isinstance(engine, SharedServerEngine) else None
    phases = _Publish(
        engine, shared, gate, version, drain_s, leads=ranks.rank == 0 or shared is None
    )
    start = time.monotonic()
    if shared is None:  # each rank's engine is its own
        paused = time.monotonic()
        work, what = (lambda: phases.swap(weights, reset=reset)), f"publishing version {version}"
        report, _ = ranks.run_on_all_ranks(what, work)
        phases.verify(())
        commit()
        phases.resume_servers()
    else:
        report, paused = _to_shared_servers(
            phases, shared, ranks, version, lambda: phases.transfer(weights, reset=reset), commit
        )
        if not phases.leads:
            engine.resume()
    resumed = time.monotonic()
    gate.open()
    return replace(report, paused_s=resumed - paused, exposed_s=time.monotonic() - start)


def _to_shared_servers(
    phases: _Publish,
    servers: SharedServerEngine,
    ranks: RankGroup,
    version: int,
    transfer: Callable[[], PublishReport],
    commit: Callable[[], None],
) -> tuple[PublishReport, float]:
    """Every phase on all ranks, one after another; the report, and when the servers were paused."""
    ranks.run_on_all_ranks(f"closing the gates for version {version}", phases.close_gate)
    paused = time.monotonic()
    ranks.run_on_all_ranks(f"pausing for version {version}", phases.pause_servers)
    ranks.run_on_all_ranks(f"draining for version {version}", phases.drain)
    report, serving = ranks.run_on_all_ranks(
        f"transferring version {version}", transfer, lambda _: list(servers.server_urls)
    )
    ranks.run_on_all_ranks(f"verifying version {version}", lambda: phases.verify(serving[0]))
    commit()
    ranks.run_on_all_ranks(f"resuming at version {version}", phases.resume_servers)
    return report, paused


class _Publish:
    """One rank's part in each phase. ``leads``: whether its engine changes the servers."""

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
        self.leads = leads
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

    def transfer(self, weights: NamedWeights, *, reset: bool) -> PublishReport:
        source = iter(weights)
        try:
            if self.leads:
                return self._engine.update_weights(source, self._version, reset=reset)
            return PublishReport(self._version, 0)
        finally:
            _exhaust(source)

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


def _exhaust(source: Iterator[object]) -> None:
    """Finish a collective that failed here: the other ranks go through it, too."""
    for _ in source:
        pass
