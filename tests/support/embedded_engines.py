"""Shared by the tests of the embedded engine: engines, requests, control over their threads."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.embedded.decode_loop import THREAD_NAME
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.testing import TINY_CHARACTERS, tiny_model
from sdp_lightning.types import SamplingParams, Segment

PATIENCE_S = 60
VOCABULARY = len(TINY_CHARACTERS) + 3
MakeEngine = Callable[..., EmbeddedEngine]


@contextmanager
def engine_maker() -> Iterator[MakeEngine]:
    """Engines that are started, at version 0 unless told otherwise, and closed in the end."""
    engines: list[EmbeddedEngine] = []
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(model=None, *, publish: bool = True, **options) -> EmbeddedEngine:
        model = tiny_model() if model is None else model
        engine = EmbeddedEngine(model, device="cpu", **options)
        engines.append(engine)
        engine.start()
        if publish:
            engine.update_weights(model.state_dict().items(), 0, reset=True)
        return engine

    try:
        yield make
    finally:
        for engine in engines:
            engine.close()
        torch.set_num_threads(num_threads)
    assert not engine_threads()


class Control:
    """Counts forwards of the engine's model once armed; pauses the engine, or fails, at one."""

    def __init__(self) -> None:
        self.engine: EmbeddedEngine | None = None
        self.num_forwards = 0
        self.pause_at = self.fail_at = -1
        self.reached = threading.Event()

    def arm(self, engine: EmbeddedEngine, *, pause_at: int = -1, fail_at: int = -1) -> None:
        self.engine, self.num_forwards = engine, 0
        self.pause_at, self.fail_at = pause_at, fail_at

    def watch(self, model):
        def before_forward(module, args) -> None:
            if self.engine is None:
                return
            self.num_forwards += 1
            if self.num_forwards == self.fail_at:
                raise RuntimeError("the GPU fell off the bus")
            if self.num_forwards == self.pause_at:
                self.engine.pause()  # from the decode thread: after this step
                self.reached.set()

        model.register_forward_pre_hook(before_forward)
        return model

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, PATIENCE_S)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def request(
    tokens, max_new_tokens: int = 8, *, seed: int = 0, **params: object
) -> GenerationRequest:
    if "top_p" in params or "top_k" in params:
        params["allow_truncated_sampling"] = True
    return GenerationRequest(
        np.asarray(tokens), SamplingParams(max_new_tokens=max_new_tokens, **params), seed=seed
    )


def prompts(num: int, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, size=rng.integers(1, 30)) for _ in range(num)]


async def launch(
    engine: EmbeddedEngine, requests: list[GenerationRequest]
) -> tuple[list[asyncio.Task[str]], list[list[Segment]]]:
    """Submit all of them before the first is decoded."""
    engine.pause()
    segments: list[list[Segment]] = [[] for _ in requests]
    tasks = [
        asyncio.create_task(engine.generate(one, sink.append))
        for one, sink in zip(requests, segments, strict=True)
    ]
    await asyncio.sleep(0)
    engine.resume()
    return tasks, segments


def run(scenario: Awaitable[object]) -> object:
    async def bounded() -> object:
        return await asyncio.wait_for(scenario, PATIENCE_S)

    return asyncio.run(bounded())


def generate(
    engine: EmbeddedEngine, requests: list[GenerationRequest]
) -> tuple[list[str], list[list[Segment]]]:
    async def scenario():
        tasks, segments = await launch(engine, requests)
        return await asyncio.gather(*tasks), segments

    return run(scenario())


def tokens_of(segments: list[Segment]) -> list[int]:
    return [int(token) for segment in segments for token in segment.token_ids]


@torch.no_grad()
def full_logits(model, tokens: np.ndarray) -> torch.Tensor:
    return model(torch.as_tensor(tokens)[None], use_cache=False).logits[0].double()


def full_logprobs(model, prompt, sampled, temperature: float = 1.0) -> np.ndarray:
    tokens = np.append(prompt, sampled)
    logprobs = (full_logits(model, tokens[:-1]) / temperature).log_softmax(-1)
    picked = logprobs.gather(1, torch.as_tensor(tokens[1:])[:, None])[:, 0]
    return picked[len(prompt) - 1 :].numpy()
