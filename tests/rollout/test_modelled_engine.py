"""The modelled engine by itself, on a virtual clock: pauses, cancellations, routing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from sdp_lightning.config import RolloutConfig
from sdp_lightning.engines.protocol import GenerationRequest, SharedServerEngine
from sdp_lightning.errors import VersionError
from sdp_lightning.rollout.simulation.modelled_engine import ModelledEngine
from sdp_lightning.rollout.simulation.models import EngineModel, Lengths, TrainerModel
from sdp_lightning.rollout.simulation.simulate import SimulatedRun
from sdp_lightning.rollout.simulation.virtual_loop import VirtualLoop
from sdp_lightning.types import SamplingParams, Segment

ENGINE: SharedServerEngine = ModelledEngine(EngineModel(1, 1.0), Lengths.recorded([[1]]))


def on_virtual_clock(main: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())  # type: ignore[arg-type]


def make_engine(model: EngineModel, *lengths: int) -> ModelledEngine:
    engine = ModelledEngine(model, Lengths.recorded([lengths]))
    engine.update_weights((), 0, reset=True)
    return engine


class Requests:
    """Groups that an engine samples, the versions of their segments, and when they ended."""

    def __init__(self, engine: ModelledEngine) -> None:
        self.engine = engine
        self.versions: dict[int, list[int]] = {}
        self.ends: dict[int, float] = {}

    def send(self, number: int) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._generate(number))

    async def _generate(self, number: int) -> None:
        versions = self.versions.setdefault(number, [])
        request = GenerationRequest(np.array([number]), SamplingParams(), group_key=f"{number}/0")

        def sink(segment: Segment) -> None:
            versions.append(segment.version)

        await self.engine.generate(request, sink)
        self.ends[number] = asyncio.get_running_loop().time()

    async def publish(self, version: int, load_s: float) -> None:
        self.engine.pause()
        await asyncio.sleep(load_s)
        self.engine.update_weights((), version)
        self.engine.resume()


def test_tokens_are_of_the_version_that_sampled_them_over_several_pauses() -> None:
    """10 passes of 1 s: 2.5 s, a pause of 10 s, 3 s, a pause of 5 s, 4.5 s."""

    async def main() -> None:
        engine = make_engine(EngineModel(1, 1.0), 10)
        requests = Requests(engine)
        task = requests.send(0)
        await asyncio.sleep(2.5)
        await requests.publish(1, load_s=10.0)
        await asyncio.sleep(3.0)
        await requests.publish(2, load_s=5.0)
        await task
        assert requests.ends == {0: pytest.approx(25.0)}
        assert requests.versions == {0: [0, 1, 2]} and engine.sampled == {0: {0: 2, 1: 3, 2: 5}}
        engine.pause()
        assert engine.num_generated == 10
        assert engine.busy_s == engine.row_seconds == pytest.approx(10.0)

    on_virtual_clock(main)


def test_a_request_that_comes_in_a_pause_waits_for_its_end() -> None:
    async def main() -> None:
        requests = Requests(make_engine(EngineModel(1, 1.0), 3))
        requests.engine.pause()
        task = requests.send(0)
        await asyncio.sleep(4.0)
        requests.engine.resume()
        await task
        assert requests.ends == {0: pytest.approx(7.0)}

    on_virtual_clock(main)


def test_the_rows_of_a_cancelled_group_end_and_their_tokens_are_counted() -> None:
    """Two rows in passes of 3 s until 6 s, 2 tokens each; then one in passes of 2 s, 8 more."""

    async def main() -> None:
        engine = make_engine(EngineModel(1, 1.0, 1.0), 10)
        requests = Requests(engine)
        kept, cancelled = requests.send(0), requests.send(1)
        await asyncio.sleep(6.0)
        cancelled.cancel()
        await kept
        assert requests.ends == {0: pytest.approx(6.0 + 8 * 2.0)}
        assert engine.sampled == {0: {0: 10}, 1: {0: 2}} and engine.num_generated == 12
        assert requests.versions[1] == []  # a segment that was not closed is lost

    on_virtual_clock(main)


def test_a_group_goes_to_the_replica_with_the_fewest_rows() -> None:
    """Passes of 1 s a row: alone a group of two rows takes 20 s, two groups together 40 s."""

    async def main() -> None:
        requests = Requests(make_engine(EngineModel(2, 0.0, 1.0), 10, 10))
        tasks = [requests.send(number) for number in range(2)]
        await asyncio.sleep(5.0)
        tasks += [requests.send(number) for number in range(2, 4)]
        await asyncio.gather(*tasks)
        # 5 s alone, 7.5 tokens each are left for 30 s; of the later ones 2.5, alone again, for 5 s
        assert requests.ends == {n: pytest.approx(35.0 if n < 2 else 40.0) for n in range(4)}

    on_virtual_clock(main)


def test_versions_advance_by_one() -> None:
    engine = make_engine(EngineModel(1, 1.0), 1)
    with pytest.raises(VersionError, match="cannot commit 2"):
        engine.load_weights(2)


def test_the_telemetry_of_the_executor_has_the_true_number_of_tokens() -> None:
    """The tuner of the concurrency compares tokens a second, and segments have one token each."""

    async def main() -> None:
        config = RolloutConfig(batch_size=2, max_head_lag=1)
        lengths = Lengths.recorded([[30, 50]])
        run = SimulatedRun(config, EngineModel(1, 1.0), TrainerModel(0.5), lengths, 0.0)
        await run.train(3)
        assert run.executor.telemetry.trained_tokens == 3 * 2 * 80

    on_virtual_clock(main)
