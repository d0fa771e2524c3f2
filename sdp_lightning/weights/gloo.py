"""Weights over the network from CPU to CPU: gloo broadcasts between the trainer and one server.

:class:`GlooTransport` is the trainer's side, :func:`receive` runs in the server's workers. Every
transfer to every server has its own process group, so a server that dies fails only its own.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor
from torch._C._distributed_c10d import (  # torch.distributed imports them from here
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from sdp_lightning.distributed.event_loop import settle
from sdp_lightning.errors import EngineError
from sdp_lightning.weights.files import WeightFolder, readable
from sdp_lightning.weights.protocol import Receive, Target, Weights

_STEP_S = 0.02  # interval at which a sender checks for the workers


class GlooTransport:
    """Stages weights in a :class:`WeightFolder` of this host, and broadcasts its files.

    Args:
        host: this host's name or address for the servers.
        timeout_s: timeout of each step of a transfer, in seconds.
        root: parent folder of staged weights; None is shared memory.
    """

    is_live = False

    def __init__(self, host: str, *, timeout_s: float = 120.0, root: Path | None = None) -> None:
        self._files = WeightFolder(root)
        self._host, self._timeout_s = host, timeout_s
        self._latest: list[Path] = []
        limit = timedelta(seconds=timeout_s)
        try:
            listener = socket.create_server((host, 0))  # torch's own listens on every address
        except OSError as error:
            self._files.close()
            raise EngineError(
                f"cannot listen on {host}, where servers are to fetch weights: {error}. Set "
                "trainer_host to an address of this host that they reach."
            ) from error
        self._store: TCPStore | None = TCPStore(
            host,
            int(listener.getsockname()[1]),
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def stage(self, weights: Weights, *, full: bool) -> int:
        try:
            folder, num_bytes = self._files.write(weights, full=full)
        except EngineError as error:
            if self._store is None:  # close removed the folder
                raise EngineError("the engine was closed while weights were written.") from error
            raise
        self._latest = [folder] if num_bytes else []
        return num_bytes

    async def deliver(self, target: Target, *, whole: bool) -> None:
        folders = self._files.folders if whole else readable(self._latest)
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        if not files:
            return
        assert self._store is not None, "closed"
        key, port = uuid.uuid4().hex, self._store.port
        instruction = Receive(self._host, port, key, target.num_workers, self._timeout_s)
        sending = _Sending(files, self._store, instruction)
        try:
            await target.tell(instruction)
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(sending.done)
        except TimeoutError as error:
            raise EngineError(
                f"{target.url} confirmed the weights, but they were not all sent within "
                f"{self._timeout_s:g} s."
            ) from error
        finally:
            sending.cancelled.set()

    def close(self) -> None:
        self._store = None  # stops listening
        self._files.close()


class _Sending:
    """Sends ``files`` in its own thread, which does not keep the process alive."""

    def __init__(self, files: Sequence[Path], store: Store, transfer: Receive) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_mark_seen)
        self.cancelled = threading.Event()
        self._arguments = files, store, transfer
        threading.Thread(target=self._run, name="sdp-gloo", daemon=True).start()

    def _run(self) -> None:
        files, store, transfer = self._arguments
        error: EngineError | None = None
        try:
            send(files, store, transfer, self.cancelled)
        except (OSError, RuntimeError) as cause:  # torch's DistError is a RuntimeError
            error = EngineError(f"weights could not be sent by gloo: {cause}")
            error.__cause__ = cause
        settle(self.done, error)


def _mark_seen(done: asyncio.Future[None]) -> None:
    """Retrieve the exception: if the server's own error is raised instead, nobody awaits it."""
    if not done.cancelled():
        done.exception()


def send(
    files: Sequence[Path], store: Store, transfer: Receive, cancelled: threading.Event
) -> None:
    """Broadcast ``files`` to the workers of ``transfer.key``, as soon as all have joined.

    Nothing is sent if ``cancelled`` is set before that.
    """
    prefixed = PrefixStore(transfer.key, store)
    while not prefixed.check([f"worker-{worker}" for worker in range(transfer.num_workers)]):
        if cancelled.wait(_STEP_S):
            return
    group = _join(prefixed, 0, transfer, transfer.host)
    for file in files:
        content = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c"))
        _broadcast(group, torch.tensor([content.numel()]))
        _broadcast(group, content)
    _broadcast(group, torch.tensor([0]))


def receive(transfer: Receive, worker: int) -> Iterator[tuple[str, Tensor]]:
    """Receive the weights that the trainer broadcasts, as worker number ``worker``.

    Raises:
        RuntimeError: if the trainer cannot be reached, or disconnects.
    """
    limit = timedelta(seconds=transfer.timeout_s)
    store = TCPStore(
        transfer.host, transfer.port, is_master=False, wait_for_workers=False, timeout=limit
    )
    prefixed = PrefixStore(transfer.key, store)
    prefixed.set(f"worker-{worker}", "here")
    group = _join(prefixed, worker + 1, transfer, address_towards(transfer.host, transfer.port))
    while True:
        size = torch.zeros(1, dtype=torch.int64)
        _broadcast(group, size)
        if not int(size):
            return
        content = torch.empty(int(size), dtype=torch.uint8)
        _broadcast(group, content)
        yield from load(content.numpy().tobytes()).items()


def address_towards(host: str, port: int) -> str:
    """This host's source address for packets to ``host``. Sends none.

    Raises:
        EngineError: if there is no route.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(f"there is no route from this host to {host}: {error}.") from error


def _join(store: Store, rank: int, transfer: Receive, address: str) -> Any:
    kind: Any = ProcessGroupGloo  # its options are not in torch's stubs
    options = kind._Options()
    options._devices = [kind.create_device(hostname=address)]
    options._timeout = timedelta(seconds=transfer.timeout_s)
    return kind(store, rank, transfer.num_workers + 1, options)


def _broadcast(group: Any, tensor: Tensor) -> None:
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()
