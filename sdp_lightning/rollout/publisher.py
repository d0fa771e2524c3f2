"""The publishes of one executor, each after the one before; or beside the trainer's next step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Protocol

from sdp_lightning.config import RolloutConfig
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.engines.protocol import (
    InferenceEngine,
    NamedWeights,
    PublishReport,
    SharedServerEngine,
)
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.rollout.groups.registry import GroupRegistry
from sdp_lightning.rollout.publish import Load, publish, stage
from sdp_lightning.workflows.send_gate import SendGate

_CLOSE_S = 5.0  # a publish that is closed under way ends with its engine


class Commit(Protocol):
    """Moves clock and ledger to a version, which engines sample from now on, or not yet."""

    def __call__(self, version: int, *, reset: bool, served: bool) -> None: ...


class Publisher:
    """Publishes versions, each after the one before has ended.

    Attributes:
        start_beside: has the loading of staged weights done beside the trainer's step, by default
            in a thread. The simulation has it done after a virtual time.

    With ``overlap_publish``, ``publish`` returns once the weights are staged. The trainer goes on
    at version t, while engines sample t - 1 until their load has ended beside it. It holds that

    - the trainer is at most one version ahead: the next publish waits for the end of this one;
    - batches are taken, judged stale and scored at t, the version of the trainer's weights. Clock
      and ledger commit t with the staging: nothing that t makes stale is trained on;
    - new groups are submitted by the capacity of t - 1, the version that will sample them, so no
      group is older when it is trained on than one that was submitted before the commit. At most
      ``(max_head_lag + t) * batch_size`` groups fill the batches 0 to t: with ``max_head_lag >= 1``
      batch t never waits for this publish;
    - a token has the version that sampled it: the engine stamps it, not the clock, and every
      segment of version t - 1 is closed when the publish has ended;
    - segments of version t - 1 are scored after that end, and before the weights of t change
      (:class:`~sdp_lightning.lightning.score_window.ScoreWindow`): none misses its window.

    A publish that fails leaves gate and engine closed, as any does. Its error is raised by whatever
    comes next: taking a batch, scoring, an evaluation, the next publish, or the end of the run. A
    checkpoint waits for the end, however it comes: the state of version t is whole.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        gate: SendGate,
        ranks: RankGroup,
        registry: GroupRegistry,
        *,
        config: RolloutConfig,
        commit: Commit,
        on_served: Callable[[], None],
    ) -> None:
        self._engine, self._gate, self._ranks, self._registry = engine, gate, ranks, registry
        self._config, self._commit, self._on_served = config, commit, on_served
        self._beside: Future[PublishReport] | None = None
        self._latest = PublishReport(0, 0)
        self._waited_s = 0.0
        self.start_beside: Callable[[Callable[[], None]], None] = _start_thread

    @property
    def is_under_way(self) -> bool:
        """Whether a publish is beside the trainer's step."""
        return self._beside is not None and not self._beside.done()

    def publish(self, weights: NamedWeights, version: int, *, reset: bool) -> PublishReport:
        """See ``WorkflowExecutor.publish``; the report is of the publish that ended last."""
        if not reset:
            self._registry.clock.require_next(version)
        if self._config.overlap_publish:
            servers = self._overlapping_servers()
            self.finish()
            if not reset:
                return self._stage(servers, weights, version)
        self._latest = publish(
            self._engine,
            self._gate,
            self._ranks,
            weights,
            version,
            reset=reset,
            drain_s=self._config.drain_s,
            commit=lambda: self._commit(version, reset=reset, served=True),
        )
        return self._latest

    def finish(self) -> None:
        """Wait for the publish under way. Each of its phases has a deadline, so this has one.

        Raises:
            EngineError, RolloutTimeout, VersionError: what ``publish`` raises, if it failed.
        """
        beside = self._beside
        if beside is not None:
            self.wait()
            report = beside.result()
            self._beside = None
            self._latest = replace(report, exposed_s=report.stage_s + self._waited_s)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until no publish is under way. A failure is not raised here."""
        if self._beside is not None and not self._beside.done():
            start, ended = time.monotonic(), threading.Event()
            self._beside.add_done_callback(lambda _: ended.set())
            ended.wait(timeout_s)
            self._waited_s += time.monotonic() - start

    def close(self) -> None:
        """Give the publish under way some seconds to end; the engine's end ends it, too."""
        self.wait(_CLOSE_S)

    def _stage(
        self, servers: SharedServerEngine, weights: NamedWeights, version: int
    ) -> PublishReport:
        load = stage(
            servers,
            self._gate,
            self._ranks,
            weights,
            version,
            reset=False,
            drain_s=self._config.drain_s,
        )
        self._commit(version, reset=False, served=False)
        self._beside, self._waited_s = Future(), 0.0
        self.start_beside(partial(self._load, load, self._beside))
        return self._latest

    def _load(self, load: Load, done: Future[PublishReport]) -> None:
        try:
            report = load(self._registry.serve)
            self._on_served()
        except BaseException as error:  # raised where it is waited for, or a batch is
            ended = EngineError(f"the publish was ended by {error!r}.")
            failure = error if isinstance(error, Exception) else ended
            self._registry.fail(failure)
            done.set_exception(failure)
        else:
            done.set_result(report)

    def _overlapping_servers(self) -> SharedServerEngine:
        engine = self._engine
        if not isinstance(engine, SharedServerEngine):
            raise ConfigError(
                f"overlap_publish=True is for engines of servers; {type(engine).__name__} samples "
                "in this process, and its update is one copy between two decode steps. Leave it "
                "out."
            )
        if self._ranks.size > 1:
            raise ConfigError(
                f"overlap_publish=True works on one process so far, and {self._ranks.size} train "
                "here: leave it out. Weights are still staged while servers sample."
            )
        if not engine.stages_copies:
            raise ConfigError(
                "overlap_publish=True needs a transport that copies weights before the next step "
                "changes them: use transport='files', 'tcp', 'delta' or 'lora'."
            )
        return engine


def _start_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="sdp-publish", daemon=True).start()
