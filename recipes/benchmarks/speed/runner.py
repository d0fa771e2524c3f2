"""What the task runner costs: ``python recipes/benchmarks/speed/runner.py``.

Round trip of one empty task, and the rate of tasks that sleep 50 ms with 64 of them in flight,
beside what an event loop alone reaches in the same run.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from sdp_lightning.rollout.task_runner import AsyncTaskRunner

IN_FLIGHT, TASK_S, NUM_TASKS = 64, 0.05, 1280


async def sleep() -> None:
    await asyncio.sleep(TASK_S)


async def empty() -> None:
    pass


async def bare_loop() -> float:
    """Tasks a second of asyncio with a semaphore."""
    places = asyncio.Semaphore(IN_FLIGHT)

    async def one() -> None:
        async with places:
            await sleep()

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(NUM_TASKS)))
    return NUM_TASKS / (time.perf_counter() - start)


def main() -> None:
    runner = AsyncTaskRunner(max_running=IN_FLIGHT)
    trips: list[float] = []
    for _ in range(200):
        start = time.perf_counter()
        runner.submit(empty)
        runner.wait(1, timeout=10)
        trips.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(NUM_TASKS):
        runner.submit(sleep)
    runner.wait(NUM_TASKS, timeout=60)
    rate = NUM_TASKS / (time.perf_counter() - start)
    runner.close()
    bare, ideal = asyncio.run(bare_loop()), IN_FLIGHT / TASK_S
    print(f"idle round trip: {1000 * statistics.median(trips):.2f} ms (goal: under 5)")
    print(f"64 in flight of 50 ms: {rate:.0f}/s, {rate / ideal:.0%} of the ideal (goal: 90 %),")
    print(f"{rate / bare:.0%} of a bare event loop with a semaphore")


if __name__ == "__main__":
    main()
