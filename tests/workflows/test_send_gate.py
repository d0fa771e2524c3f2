"""No request leaves while weights are published, and none is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from sdp_lightning.errors import RolloutTimeout
from sdp_lightning.rollout.task_runner import AsyncTaskRunner
from sdp_lightning.types import FinishReason
from sdp_lightning.workflows.send_gate import SendGate

DEADLINE_S = 60.0


class Request:
    """One send: says when it left, ends when told."""

    def __init__(self, gate: SendGate, *, stubborn: bool = False) -> None:
        self.gate, self.stubborn = gate, stubborn
        self.left, self.release = threading.Event(), threading.Event()

    async def ask(self) -> FinishReason:
        self.left.set()
        while not self.release.is_set():
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
        return "stop"

    async def send(self) -> FinishReason:
        return await self.gate.send(self.ask())


@pytest.fixture
def runner() -> Iterator[AsyncTaskRunner]:
    runner = AsyncTaskRunner(name="gate-test")
    yield runner
    runner.close(DEADLINE_S)


def test_a_closed_gate_holds_requests_back_until_it_opens(runner: AsyncTaskRunner) -> None:
    gate = SendGate()
    request = Request(gate)
    gate.close()
    runner.submit(request.send)
    runner.submit(asyncio.sleep, 0)
    runner.wait(1, DEADLINE_S)
    assert not request.left.is_set() and gate.num_outstanding == 0
    request.release.set()
    gate.open()
    assert runner.wait(1, DEADLINE_S) == ["stop"] and request.left.is_set()


@pytest.mark.fault("slow", "publish")
def test_a_drain_waits_for_what_is_out(runner: AsyncTaskRunner) -> None:
    gate = SendGate()
    request, late = Request(gate), Request(gate)
    runner.submit(request.send)
    assert request.left.wait(DEADLINE_S)
    gate.close()
    runner.submit(late.send)
    threading.Timer(0, request.release.set).start()
    assert gate.drain(DEADLINE_S) == 0 and gate.num_outstanding == 0
    assert runner.wait(1, DEADLINE_S) == ["stop"] and not late.left.is_set()


@pytest.mark.fault("slow", "publish")
def test_a_straggler_is_cancelled_and_comes_back_as_aborted(runner: AsyncTaskRunner) -> None:
    gate = SendGate()
    request = Request(gate)
    runner.submit(request.send)
    assert request.left.wait(DEADLINE_S)
    gate.close()
    assert gate.drain(0.01) == 1
    assert runner.wait(1, DEADLINE_S) == ["abort"]


@pytest.mark.fault("hang", "publish")
def test_one_that_cannot_be_cancelled_is_an_error_not_a_hang(
    runner: AsyncTaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdp_lightning.workflows.send_gate.CANCEL_S", 0.05)
    gate = SendGate()
    request = Request(gate, stubborn=True)
    runner.submit(request.send)
    assert request.left.wait(DEADLINE_S)
    gate.close()
    with pytest.raises(RolloutTimeout, match=r"within 0.01 s nor ended within 0.05 s"):
        gate.drain(0.01)
    request.release.set()
    runner.wait(1, DEADLINE_S)


@pytest.mark.parametrize("is_open", [True, False], ids=["out", "held back"])
def test_a_cancelled_sender_leaves_nothing_behind(runner: AsyncTaskRunner, is_open: bool) -> None:
    gate, request, waits = SendGate(), None, threading.Event()
    request = Request(gate)
    if not is_open:
        gate.close()

    async def send() -> None:
        waits.set()
        await request.send()

    task_id = runner.submit(send)
    assert (request.left if is_open else waits).wait(DEADLINE_S)
    runner.cancel(task_id)
    runner.submit(asyncio.sleep, 0)
    runner.wait(1, DEADLINE_S)
    gate.open()
    assert gate.drain(DEADLINE_S) == 0
    assert runner.num_outstanding == 0 and request.left.is_set() is is_open


def test_a_sender_cancelled_together_with_its_straggling_request_ends() -> None:
    """Fault: the drain's cancellation hides the sender's, which then sends again and never ends."""

    async def main() -> None:
        gate = SendGate()
        request = Request(gate)
        sender = asyncio.ensure_future(request.send())
        while not request.left.is_set():
            await asyncio.sleep(0)
        gate.close()
        draining = asyncio.ensure_future(asyncio.to_thread(gate.drain, 0.01))
        while not gate._cancelled:
            await asyncio.sleep(0)
        sender.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sender
        await draining

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_an_engine_error_passes_through(runner: AsyncTaskRunner) -> None:
    gate = SendGate()

    async def fail() -> FinishReason:
        raise ConnectionError("gone")

    async def send() -> str:
        try:
            return await gate.send(fail())
        except ConnectionError as error:
            return str(error)

    runner.submit(send)
    assert runner.wait(1, DEADLINE_S) == ["gone"] and gate.num_outstanding == 0


def test_a_gate_outlives_the_loop_of_a_held_request() -> None:
    gate = SendGate()
    gate.close()
    runner = AsyncTaskRunner(name="gate-test")
    runner.submit(Request(gate).send)
    runner.submit(asyncio.sleep, 0)
    runner.wait(1, DEADLINE_S)
    runner.close(DEADLINE_S)
    gate.open()
    assert gate.drain(DEADLINE_S) == 0
