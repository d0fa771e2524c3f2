"""Strangers at a transfer of weights: they get nothing, and a disturbed transfer is an error."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdp_lightning.distributed.listener import connect
from sdp_lightning.errors import EngineError
from sdp_lightning.weights.protocol import Instruction, Receive, Target
from sdp_lightning.weights.tcp import TcpTransport, receive
from support.listening import listening
from support.network_page import check, places
from support.weight_transports import stage

DEADLINE_S = 60.0
SECRET = torch.arange(2_000_000.0)
Tell = Callable[[Receive], Awaitable[None]]


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[TcpTransport]:
    made = TcpTransport("127.0.0.1", timeout_s=DEADLINE_S, root=tmp_path)
    stage(made, [("secret", SECRET), ("b", torch.ones(3))], full=True)
    yield made
    made.close()
    assert not [t for t in threading.enumerate() if t.name == "sdp-tcp" and t.join(DEADLINE_S)]


def deliver(transport: TcpTransport, num_workers: int, tell: Tell) -> None:
    async def told(instruction: Instruction) -> None:
        assert isinstance(instruction, Receive)
        await tell(instruction)

    asyncio.run(transport.deliver(Target("http://one", num_workers, told), whole=True))


def take(instruction: Receive, worker: int = 0) -> dict[str, torch.Tensor]:
    return dict(receive(instruction, worker))


def as_thief(instruction: Receive, worker: int) -> dict[str, torch.Tensor]:
    """One who knows the port and all that is said but the key."""
    return take(replace(instruction, key="00" * 32), worker)


@pytest.mark.fault("exception", "stranger")
@pytest.mark.fault("hang", "stranger")
def test_a_port_gives_a_stranger_neither_a_place_nor_weights(
    transport: TcpTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """The second worker is late, and one who says nothing stays for the whole transfer."""

    async def tell(instruction: Receive) -> None:
        silent = socket.create_connection((instruction.host, instruction.port))
        first = asyncio.create_task(asyncio.to_thread(take, instruction, 0))
        for worker in (0, 1, 1, 7):
            with pytest.raises(EngineError, match=r"could not be received from 127.0.0.1:\d+: who"):
                await asyncio.to_thread(as_thief, instruction, worker)
        second = await asyncio.to_thread(take, instruction, 1)
        for found in (await first, second):
            assert torch.equal(found["secret"], SECRET) and found["b"].tolist() == [1.0] * 3
        silent.close()

    deliver(transport, 2, tell)
    assert "4 connections to a port of this run did not know its secret" in caplog.text


def test_the_trainer_listens_on_its_own_address_and_only_during_a_transfer(
    transport: TcpTransport,
) -> None:
    before = listening()

    async def tell(instruction: Receive) -> None:
        [place] = listening() - before
        assert place == ("127.0.0.1", instruction.port)
        check([place], places("tcp", "rank 0", "during a transfer"), trainer_host="127.0.0.1")
        await asyncio.to_thread(take, instruction)

    deliver(transport, 1, tell)
    assert listening() == before


def test_an_instruction_does_not_show_its_key(transport: TcpTransport) -> None:
    async def tell(instruction: Receive) -> None:
        assert len(instruction.key) == 64 and instruction.key not in repr(instruction)
        await asyncio.to_thread(take, instruction)

    deliver(transport, 1, tell)


class Tap:
    """One between the trainer and a worker, who changes a byte of what the trainer sends."""

    def __init__(self, place: tuple[str, int], *, change: int) -> None:
        self._place, self._change = place, change
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._pool = ThreadPoolExecutor(3)
        self._pool.submit(self._run)

    def _run(self) -> None:
        near, _ = self._server.accept()
        with self._server, near, socket.create_connection(self._place) as far:
            back = self._pool.submit(self._pass_on, near, far, -1)
            self._pass_on(far, near, self._change)
            back.result()

    def _pass_on(self, source: socket.socket, sink: socket.socket, change: int) -> None:
        count = 0
        try:
            while data := bytearray(source.recv(2**16)):
                if count <= change < count + len(data):
                    data[change - count] ^= 1
                count += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other end has gone

    def close(self) -> None:
        self._pool.shutdown()


GREETING = 64  # bytes of the trainer's part


@pytest.mark.fault("corrupted data", "stranger")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (GREETING - 1, "does not know the secret of this run"),
        (GREETING + 5_000_000, "the weights from .* were changed on their way"),
        (GREETING + 8_000_100, "the weights from .* were changed on their way"),
    ],
    ids=["proof", "weight", "later"],
)
def test_weights_that_are_changed_on_their_way_are_an_error_on_both_sides(
    transport: TcpTransport, change: int, said: str
) -> None:
    failed: list[EngineError] = []

    async def tell(instruction: Receive) -> None:
        tap = Tap((instruction.host, instruction.port), change=change)
        with pytest.raises(EngineError, match=said) as found:
            await asyncio.to_thread(take, replace(instruction, port=tap.port))
        failed.append(found.value)
        await asyncio.to_thread(tap.close)
        if change < GREETING:  # it has proved itself, and the trainer sends
            raise found.value

    with pytest.raises(EngineError, match=rf"{said}|could not be sent by TCP: "):
        deliver(transport, 1, tell)
    assert failed


def test_a_worker_that_proves_nothing_of_what_it_received_is_not_believed(
    transport: TcpTransport,
) -> None:
    async def tell(instruction: Receive) -> None:
        key = bytes.fromhex(instruction.key)
        link = await asyncio.to_thread(
            connect, instruction.host, (instruction.port, key), 1, DEADLINE_S
        )
        with link:
            link.sendall(bytes(32))
            while await asyncio.to_thread(link.recv, 2**20):
                pass

    with pytest.raises(EngineError, match="worker 0 did not prove that it received them unchanged"):
        deliver(transport, 1, tell)


def test_a_worker_that_does_not_come_is_named(tmp_path: Path) -> None:
    transport = TcpTransport("127.0.0.1", timeout_s=0.2, root=tmp_path)
    stage(transport, [("a", torch.ones(2))], full=True)

    async def tell(instruction: Receive) -> None:
        patient = replace(instruction, timeout_s=DEADLINE_S)
        with pytest.raises(EngineError, match="the other end has closed the connection"):
            await asyncio.to_thread(take, patient, 0)

    with pytest.raises(EngineError, match="by TCP: worker 1 did not come for them"):
        deliver(transport, 2, tell)
    transport.close()
