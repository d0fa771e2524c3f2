"""What a step costs with many groups alive: ``python recipes/benchmarks/speed/many_groups.py``.

A registry is filled with groups of 8 trajectories, their versions spread evenly over the bound,
some finished, the others still running. Then steps are made: a batch is taken and a version
published (to a fake engine, so this is commit and purge: some finished and some running groups go
stale), and a checkpoint notes what there is, under the lock, and copies it while rollouts go on.
Each number is the median of all steps, in milliseconds of CPU time of the thread that steps. A cost
that grows too fast shows with twice the groups, or with more tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sdp_lightning.config import RolloutConfig
from sdp_lightning.prompts.stream import PromptRow
from sdp_lightning.rollout.factory import create_workflow_executor
from sdp_lightning.rollout.groups.in_flight import InFlightGroup
from sdp_lightning.testing import FakeEngine, tiny_tokenizer
from sdp_lightning.types import Context, SamplingParams, Segment
from sdp_lightning.workflows.rlvr import RLVRWorkflow

GROUP_SIZE = 8


@dataclass(frozen=True)
class Load:
    """Groups alive, sampled tokens of each trajectory, and groups of a batch.

    Of each version ``2 * batch`` groups are alive; the oldest are as old as they may be.
    """

    groups: int
    tokens: int
    batch: int = 32

    @property
    def max_head_lag(self) -> int:
        return self.groups // (2 * self.batch) - 1


@dataclass
class Stopwatch:
    """CPU milliseconds of what was timed, by name, in order."""

    times: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.thread_time()
        result = work()
        self.times.setdefault(name, []).append((time.thread_time() - start) * 1000)
        return result

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.times.items()}


def no_reward(completion: str) -> float:
    return 0.0


class FilledExecutor:
    """An executor whose registry is filled by hand: its engine samples nothing."""

    def __init__(self, load: Load) -> None:
        self.batch = load.batch
        sampling = SamplingParams(max_new_tokens=load.tokens)
        self.executor = create_workflow_executor(
            config=RolloutConfig(
                batch_size=load.batch,
                max_head_lag=load.max_head_lag,
                max_concurrent=load.groups,
            ),
            engine=FakeEngine(),
            workflow=RLVRWorkflow(no_reward, group_size=GROUP_SIZE, sampling=sampling),
            prompts=[{"prompt": "1", "id": "0"}],
            tokenizer=tiny_tokenizer(),
        )
        # Segments of a version share their arrays: 10,000 groups of 8 x 4,096 would take 4 GB.
        self._tokens, self._logprobs = [3] * load.tokens, [-1.0] * load.tokens
        self._num_added = 0
        self.executor.publish([], 0, reset=True)
        self.add_version()
        for _ in range(load.max_head_lag):
            self.publish()
            self.add_version()

    def add_version(self) -> None:
        """Groups of the present version: more than a batch finish, the others go on."""
        segment = Segment(self.executor.version, self._tokens, self._logprobs)
        for number in range(2 * self.batch):
            self._add((Context([1, 2, 3]), segment), finished=number < self.batch * 5 // 4)

    def _add(self, parts: tuple[Context, Segment], *, finished: bool) -> None:
        row = PromptRow(0, self._num_added, {"id": str(self._num_added), "prompt": "1"})
        session = self.executor._source.new_session(row)
        group = InFlightGroup(self._num_added, row, self.executor.version, session)
        self._num_added += 1
        self.executor.registry.add(group)
        episodes = [session.open() for _ in range(GROUP_SIZE)]
        for episode in episodes:
            for part in parts:
                episode._append(part)
        if finished:
            done = group.make_group([episode.finish(0.0) for episode in episodes])
            self.executor.registry.finish(group, done)

    def publish(self) -> None:
        self.executor.publish([], self.executor.version + 1)

    def step(self, watch: Stopwatch, *, copies: bool) -> None:
        """One step of the trainer; as many groups are alive after it as before."""
        registry, source = self.executor.registry, self.executor._source
        watch.time("take", lambda: self.executor.take(timeout_s=0))
        watch.time("publish", self.publish)
        self.add_version()
        watch.time("snapshot", registry.snapshot)
        position = watch.time("checkpoint", lambda: source.position(registry.snapshot()))
        if copies:
            watch.time("its copy", position.state_dict)


def measure(load: Load, *, steps: int, copies: bool) -> dict[str, float]:
    """Milliseconds of each operation of a step, medians of ``steps``."""
    filled, watch = FilledExecutor(load), Stopwatch()
    try:
        for _ in range(steps):
            filled.step(watch, copies=copies)
    finally:
        filled.executor.close()
    return watch.medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[1280, 2560, 5120, 10240])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 4096])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    for tokens in options.tokens:
        for groups in options.groups:
            copies = groups * tokens * GROUP_SIZE < 2**25  # 400 MB
            medians = measure(Load(groups, tokens), steps=options.steps, copies=copies)
            text = ", ".join(f"{name} {ms:.2f}" for name, ms in medians.items())
            print(f"{groups} groups of {GROUP_SIZE} x {tokens} tokens, ms: {text}", flush=True)


if __name__ == "__main__":
    main()
