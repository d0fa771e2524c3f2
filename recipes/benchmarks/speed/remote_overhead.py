"""What the remote engine costs: ``python recipes/benchmarks/speed/remote_overhead.py``.

256 requests are kept in flight against a fake server that answers each after a fixed time. The rate
is compared with the ideal, and with what a bare aiohttp client reaches in the same run. Server and
client share this machine: with ``--cores`` the client keeps to core 0 and the server to core 1.
Where other programs run too, the rates swing; the client's CPU time for one answer does so less.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np

from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.types import SamplingParams, Segment

TESTS = Path(__file__).parents[3] / "tests"
FAKE = TESTS / "support" / "fake_vllm.py"
PROMPT, NUM_TOKENS = list(range(64)), 64


@dataclass(frozen=True)
class Load:
    """The load: requests in flight, seconds of a reply, rounds of requests."""

    in_flight: int
    reply_s: float
    rounds: int


@dataclass(frozen=True)
class Cost:
    """What a load took.

    Attributes:
        rate: answers a second.
        cpu_ms: CPU time of this process for one answer, all threads.
    """

    rate: float
    cpu_ms: float


async def keep_in_flight(send: Callable[[], Awaitable[object]], load: Load) -> Cost:
    """The cost of workers that start evenly spread, each after one request to warm up."""

    async def worker(number: int) -> float:
        await asyncio.sleep(number / load.in_flight * load.reply_s)
        await send()
        start = time.perf_counter()
        for _ in range(load.rounds):
            await send()
        return load.rounds / (time.perf_counter() - start)

    start_s = time.process_time()
    rates = await asyncio.gather(*(worker(number) for number in range(load.in_flight)))
    answers = load.in_flight * (load.rounds + 1)
    return Cost(sum(rates), (time.process_time() - start_s) * 1000 / answers)


async def bare(url: str, load: Load) -> Cost:
    """The cost of aiohttp alone, reading the same answers."""
    sampling = {"max_tokens": NUM_TOKENS, "temperature": 1.0, "logprobs": 0, "seed": 1}
    body = {"model": "m", "token_ids": PROMPT, "sampling_params": sampling}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def send() -> None:
            async with session.post(f"{url}/inference/v1/generate", json=body) as answer:
                await answer.json()

        return await keep_in_flight(send, load)


def through_engine(url: str, load: Load) -> Cost:
    """The cost of the engine, called from an event loop of another thread, as rollouts do."""
    engine = connect_engine(f"vllm://{url.removeprefix('http://')}")
    engine.start()
    try:
        engine.pause()
        engine.update_weights([], 0, reset=True)
        engine.resume()
        params = SamplingParams(max_new_tokens=NUM_TOKENS)
        request = GenerationRequest(np.array(PROMPT), params)
        got: list[Segment] = []

        async def send() -> None:
            await engine.generate(request, got.append)

        return asyncio.run(keep_in_flight(send, load))
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--reply-s", type=float, default=1.0, help="time of one answer")
    parser.add_argument("--rounds", type=int, default=6, help="answers that each one waits for")
    parser.add_argument("--cores", action="store_true", help="client and server on one core each")
    options = parser.parse_args()
    load = Load(options.in_flight, options.reply_s, options.rounds)
    command = [
        sys.executable,
        str(FAKE),
        "--reply-s",
        str(options.reply_s),
    ]
    if options.cores:
        command = ["taskset", "-c", "1", *command]
        os.sched_setaffinity(0, {0})
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert server.stdout is not None
    url = f"http://127.0.0.1:{server.stdout.readline().split()[1]}"
    try:
        alone = asyncio.run(bare(url, load))
        ours = through_engine(url, load)
    finally:
        server.kill()
        server.wait()
    ideal = options.in_flight / options.reply_s
    print(f"{options.in_flight} in flight, {options.reply_s} s each: at best {ideal:.0f}/s")
    for name, cost in (("bare aiohttp client", alone), ("remote engine", ours)):
        share = f"{cost.rate:.1f}/s, {cost.rate / ideal:.1%} of the ideal"
        print(f"{name}: {share}, {cost.cpu_ms:.2f} ms of CPU an answer")
    print(f"the engine reaches {ours.rate / alone.rate:.1%} of bare aiohttp (goal: 95 %)")


if __name__ == "__main__":
    main()
