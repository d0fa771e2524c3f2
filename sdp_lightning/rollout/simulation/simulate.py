"""Runs the real executor with a modelled engine and a modelled trainer, on a virtual clock.

Real are the executor with its ledger, staleness, registry, queue, clock and concurrency tuner, the
episodes, and the order of a publish, also of one beside the trainer's step. Modelled are the engine
(:class:`EngineModel`), the trainer's time (:class:`TrainerModel`), lengths and rewards. There is no
scoring (its time is the trainer's), and no rank but one: its groups are those of all ranks.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sdp_lightning.config import RolloutConfig
from sdp_lightning.config.validation import at_least
from sdp_lightning.errors import ConfigError, RolloutTimeout
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.factory import create_workflow_executor
from sdp_lightning.rollout.groups.in_flight import InFlightGroup, Parts
from sdp_lightning.rollout.simulation.modelled_engine import ModelledEngine
from sdp_lightning.rollout.simulation.models import EngineModel, Lengths, TrainerModel
from sdp_lightning.rollout.simulation.virtual_loop import VirtualLoop
from sdp_lightning.types import Row, SamplingParams, Trajectory, TrajectoryGroup
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow


@dataclass(frozen=True)
class SimulatedStep:
    """One training step, from the end of a publish to the end of the next, and totals by then.

    Attributes:
        wait_s: seconds that the trainer waited for the batch.
        train_s: seconds that it trained.
        publish_s: seconds that it waited for the publish.
        tokens: tokens of the batch by their lag in versions.
        concurrency: most groups at once in this step.
        pending: most finished groups that waited so far, those of the batch included.
        end_s: time at the end.
        busy_s: seconds in which replicas had rows, added up over replicas.
        row_seconds: rows times seconds, added up over replicas.
        generated: tokens that were sampled.
        dropped: tokens of groups that were dropped.
        dropped_groups: these groups.
    """

    wait_s: float
    train_s: float
    publish_s: float
    tokens: dict[int, int]
    concurrency: int
    pending: int
    end_s: float
    busy_s: float
    row_seconds: float
    generated: int
    dropped: int
    dropped_groups: int

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of the batch."""
        return sum(self.tokens.values())

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return self.wait_s + self.train_s + self.publish_s


def simulate(
    rollout: RolloutConfig,
    engines: EngineModel,
    trainer: TrainerModel,
    lengths: Lengths,
    *,
    num_steps: int,
    reward_s: float = 0.0,
) -> list[SimulatedStep]:
    """Train ``num_steps`` steps from version 0; the same arguments give the same steps.

    Args:
        rollout: settings of the rollouts, in groups of all ranks.
        engines: the replicas that sample.
        trainer: how long the trainer takes.
        lengths: sampled tokens of the groups.
        num_steps: batches to train on.
        reward_s: seconds from the last token of a group until its reward is there.

    Raises:
        ConfigError: if a setting is refused, or needs rows that end.
        RolloutError: what the executor raises.
    """
    at_least("num_steps", num_steps, 1)
    if not 0 <= reward_s < math.inf:
        raise ConfigError(f"reward_s must be a number of 0 or more, got {reward_s!r}.")
    if rollout.num_epochs is not None:
        raise ConfigError("a simulated run has no rows that could end: leave num_epochs out.")
    if rollout.missing_proximal == "drop":
        raise ConfigError(
            "segments are not scored in a simulated run: missing_proximal='drop' "
            "would drop all of lag 2. Use another one."
        )
    rollout = replace(rollout, shuffle=False)  # its one row begins an epoch with every group
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(
            SimulatedRun(rollout, engines, trainer, lengths, reward_s).train(num_steps)
        )


class _NoText:
    """A tokenizer of no text: a prompt is the number of its group."""

    eos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return []

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return ""

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str:
        return ""


class _Workflow(RolloutWorkflow):
    """One episode a group, which the modelled engine samples for all of its trajectories."""

    def __init__(self, reward_s: float, on_end: Callable[[], None]) -> None:
        self._reward_s, self._on_end = reward_s, on_end
        self._numbers = itertools.count()

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_new_tokens=2**31)

    async def run(self, row: Row, session: RolloutSession) -> list[Trajectory]:
        episode = session.open()
        episode.add_context([next(self._numbers)])
        await episode.generate(self.sampling)
        if self._reward_s:
            await asyncio.sleep(self._reward_s)
        asyncio.get_running_loop().call_soon(self._on_end)  # after the executor has the group
        return [episode.finish(0.0)]


class SimulatedRun:
    """One run, to be trained in a :class:`VirtualLoop`. Arguments are those of :func:`simulate`."""

    def __init__(
        self,
        rollout: RolloutConfig,
        engines: EngineModel,
        trainer: TrainerModel,
        lengths: Lengths,
        reward_s: float,
    ) -> None:
        self._rollout, self._trainer = rollout, trainer
        self._engine = ModelledEngine(engines, lengths)
        self.executor: WorkflowExecutor = create_workflow_executor(
            config=rollout,
            engine=self._engine,
            workflow=_Workflow(reward_s, self._on_group),
            prompts=[{}],
            tokenizer=_NoText(),
        )
        self._more, self._loaded = asyncio.Event(), asyncio.Event()
        self._loaded.set()
        self._most_pending = self._dropped = self._num_swept = 0

    async def train(self, num_steps: int) -> list[SimulatedStep]:
        """Train so many steps from version 0, and close the executor."""
        executor = self.executor
        executor.runner.run_in(asyncio.get_running_loop())
        executor.publisher.start_beside = self._start_beside
        executor.publish((), 0, reset=True)
        executor.resume()
        try:
            return [await self._step() for _ in range(num_steps)]
        finally:
            await self._loaded.wait()
            executor.close()

    async def _step(self) -> SimulatedStep:
        executor, trainer, begin = self.executor, self._trainer, _now()
        concurrency = executor.manager.max_concurrent
        tokens = self._tokens_by_lag(await self._take())
        taken = _now()
        await asyncio.sleep(trainer.train_s(sum(tokens.values())))
        trained = _now()
        await self._publish()
        self._sweep()
        step = SimulatedStep(
            wait_s=taken - begin,
            train_s=trained - taken,
            publish_s=_now() - trained,
            tokens=tokens,
            concurrency=concurrency,
            pending=self._most_pending,
            end_s=_now(),
            busy_s=self._engine.busy_s,
            row_seconds=self._engine.row_seconds,
            generated=self._engine.num_generated,
            dropped=self._dropped,
            dropped_groups=executor.stat.dropped,
        )
        executor.concurrency.on_step(
            {"time/step_s": step.step_s, "time/evaluate_s": 0.0, "time/wait_s": step.wait_s}
        )
        return step

    async def _take(self) -> list[TrajectoryGroup]:
        while True:
            self._more.clear()
            if self.executor.stat.pending >= self._rollout.batch_size:
                try:
                    return self.executor.take(0.0) or []
                except RolloutTimeout:  # it waits for an older group
                    pass
            await self._more.wait()

    async def _publish(self) -> None:
        """Publish the next version; the engine stands still while it loads."""
        executor, trainer = self.executor, self._trainer
        await self._loaded.wait()
        await asyncio.sleep(trainer.stage_s)
        if not self._rollout.overlap_publish:
            self._engine.pause()
            await asyncio.sleep(trainer.load_s)
        executor.publish((), executor.version + 1)

    def _start_beside(self, load: Callable[[], None]) -> None:
        def end() -> None:
            load()
            self._loaded.set()

        self._engine.pause()
        self._loaded.clear()
        asyncio.get_running_loop().call_later(self._trainer.load_s, end)

    def _on_group(self) -> None:
        self._most_pending = max(self._most_pending, self.executor.stat.pending)
        self._more.set()

    def _tokens_by_lag(self, batch: Sequence[TrajectoryGroup]) -> dict[int, int]:
        """Tokens of ``batch`` by their lag; the telemetry gets their true number."""
        tokens: dict[int, int] = {}
        for group in batch:
            sampled = self._engine.sampled.pop(_number_of(group.trajectories[0].parts))
            for version, count in sampled.items():
                lag = self.executor.version - version
                tokens[lag] = tokens.get(lag, 0) + count
            self.executor.telemetry.trained_tokens += sum(sampled.values()) - group.num_sampled
        return dict(sorted(tokens.items()))

    def _sweep(self) -> None:
        """Count the tokens of groups that were dropped since the last time."""
        dropped = self.executor.stat.dropped
        if dropped == self._num_swept:
            return
        self._num_swept = dropped
        alive = {_number_in(group) for group in self.executor.registry.snapshot()}
        for number in [n for n in self._engine.sampled if n not in alive]:
            self._dropped += sum(self._engine.sampled.pop(number).values())


def _number_in(group: InFlightGroup) -> int | None:
    return next((_number_of(parts) for parts in group.parts if parts), None)


def _number_of(parts: Parts) -> int:
    return int(parts[0].token_ids[0])


def _now() -> float:
    return asyncio.get_running_loop().time()
