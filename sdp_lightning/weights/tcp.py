"""Weights over the network from CPU to CPU: one keyed connection of each worker of a server.

:class:`TcpTransport` is the trainer's side, :func:`receive` runs in the server's workers, which
connect to the trainer. Every transfer to every server has a port and a secret of its own; nothing
listens between two transfers. The secret goes to the server with the instruction to receive. A
worker gets weights only after it has proved that it knows the secret, and a transfer has succeeded
only when every worker has proved that it received all of it, unchanged. Weights are not encrypted.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load
from torch import Tensor

from sdp_lightning.distributed.event_loop import settle
from sdp_lightning.distributed.listener import Listener, connect
from sdp_lightning.distributed.messaging import authenticate
from sdp_lightning.errors import EngineError, RankError
from sdp_lightning.weights.files import WeightFolder, readable
from sdp_lightning.weights.protocol import Receive, ServedType, Target, Use, Weights

_CHUNK_BYTES = 2**20
_SIZE_BYTES, _TAG_BYTES = 8, 32


class TcpTransport:
    """Stages weights in a :class:`WeightFolder` of this host, and sends its files.

    Args:
        host: this host's name or address for the servers; it listens there only.
        timeout_s: timeout of each step of a transfer, in seconds.
        root: parent folder of staged weights; None is shared memory.

    Raises:
        EngineError: if it cannot listen on ``host``.
    """

    is_live = False

    def __init__(self, host: str, *, timeout_s: float = 120.0, root: Path | None = None) -> None:
        self._sender = FolderSender(host, timeout_s=timeout_s)
        self._files = WeightFolder(root)
        self._staged: list[Path] = []
        self._latest: list[Path] = []

    def stage(self, weights: Weights, *, full: bool, dtype: ServedType | None = None) -> int:
        folder, num_bytes = self._files.stage(weights, full=full, dtype=dtype)
        self._staged = [folder] if num_bytes else []
        return num_bytes

    def activate(self) -> None:
        self._files.activate()
        self._latest = self._staged

    async def deliver(self, target: Target, *, whole: bool) -> None:
        folders = self._files.folders if whole else readable(self._latest)
        await self._sender.send(folders, target)

    def close(self) -> None:
        self._files.close()


class FolderSender:
    """Sends the files of folders to one server after another, each transfer on its own connections.

    Arguments and errors are those of :class:`TcpTransport`.
    """

    def __init__(self, host: str, *, timeout_s: float) -> None:
        self._host, self._timeout_s = host, timeout_s
        self._listen().close()

    async def send(self, folders: Sequence[Path], target: Target, use: Use = "load") -> None:
        """Send the files of ``folders`` to all workers of ``target``, for ``use``."""
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        if not files:
            return
        listener, timeout_s = self._listen(), self._timeout_s
        port, secret = listener.address
        transfer = Receive(self._host, int(port), secret.hex(), target.num_workers, timeout_s, use)
        sending = _Sending(files, listener, transfer)
        try:
            await target.tell(transfer)
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(sending.done)
        except TimeoutError as error:
            raise EngineError(
                f"{target.url} confirmed the weights, but they were not all sent within "
                f"{timeout_s:g} s."
            ) from error
        finally:
            sending.cancelled.set()

    def _listen(self) -> Listener:
        try:
            return Listener(self._host, needs_port=True)
        except OSError as error:
            raise EngineError(
                f"cannot listen on {self._host}, where servers are to fetch weights: {error}. Set "
                "trainer_host to an address of this host that they reach."
            ) from error


class _Sending:
    """Sends ``files`` in its own thread, which does not keep the process alive."""

    def __init__(self, files: Sequence[Path], listener: Listener, transfer: Receive) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_mark_seen)
        self.cancelled = threading.Event()
        self._arguments = files, listener, transfer
        threading.Thread(target=self._run, name="sdp-tcp", daemon=True).start()

    def _run(self) -> None:
        error: EngineError | None = None
        try:
            send(*self._arguments, self.cancelled.is_set)
        except (OSError, EngineError) as cause:
            error = EngineError(f"weights could not be sent by TCP: {cause}")
            error.__cause__ = cause
        settle(self.done, error)


def _mark_seen(done: asyncio.Future[None]) -> None:
    """Retrieve the exception: if the server's own error is raised instead, nobody awaits it."""
    if not done.cancelled():
        done.exception()


def send(
    files: Sequence[Path], listener: Listener, transfer: Receive, is_cancelled: Callable[[], bool]
) -> None:
    """Send ``files`` to the workers of ``transfer``, as soon as all have joined.

    Nothing is sent if ``is_cancelled`` becomes true before that.

    Raises:
        OSError: if a worker disconnects, or takes nothing within the transfer's timeout.
        EngineError: naming the workers that did not join, or did not prove what they received.
    """
    # A server may take one timeout to answer its instruction, and another one after that.
    links, _ = listener.collect(transfer.num_workers + 1, 2 * transfer.timeout_s, is_cancelled)
    try:
        missing = [str(n - 1) for n in range(1, transfer.num_workers + 1) if n not in links]
        if missing and not is_cancelled():
            raise EngineError(f"worker {', '.join(missing)} did not come for them.")
        if not missing:
            _send(files, links, transfer)
    finally:
        for link in links.values():
            link.close()


def _send(files: Sequence[Path], links: Mapping[int, socket.socket], transfer: Receive) -> None:
    key = bytes.fromhex(transfer.key)
    signature = hmac.new(key, digestmod="sha256")
    for link in links.values():
        link.settimeout(transfer.timeout_s)

    def send_all(data: memoryview | bytes) -> None:
        signature.update(data)
        for link in links.values():
            link.sendall(data)

    for file in files:
        content = np.memmap(file, dtype=np.uint8, mode="r").data
        send_all(len(content).to_bytes(_SIZE_BYTES))
        for start in range(0, len(content), _CHUNK_BYTES):
            send_all(content[start : start + _CHUNK_BYTES])
    send_all(bytes(_SIZE_BYTES))
    tag = signature.digest()
    for link in links.values():
        link.sendall(tag)
    for number, link in links.items():
        proof = _read(link, _TAG_BYTES)
        if not hmac.compare_digest(proof, _proof_of(key, number, tag)):
            raise EngineError(f"worker {number - 1} did not prove that it received them unchanged.")


def receive(transfer: Receive, worker: int) -> Iterator[tuple[str, Tensor]]:
    """Receive the weights that the trainer sends, as worker number ``worker``.

    They are known to be the trainer's only when the iteration has ended: use none before that.

    Raises:
        EngineError: if the trainer cannot be reached, disconnects, or does not know the transfer's
            key; or if the weights were changed on the way.
    """
    where, key = f"{transfer.host}:{transfer.port}", bytes.fromhex(transfer.key)
    try:
        link = connect(transfer.host, (transfer.port, key), worker + 1, transfer.timeout_s)
        with link:
            link.settimeout(transfer.timeout_s)
            signature = hmac.new(key, digestmod="sha256")
            while size := int.from_bytes(_read(link, _SIZE_BYTES, signature.update)):
                yield from load(_read(link, size, signature.update)).items()
            tag = _read(link, _TAG_BYTES)
            if not hmac.compare_digest(tag, signature.digest()):
                raise EngineError(f"the weights from {where} were changed on their way.")
            link.sendall(_proof_of(key, worker + 1, tag))
    except (OSError, RankError) as error:
        raise EngineError(f"weights could not be received from {where}: {error}") from error


def _read(
    link: socket.socket, size: int, note: Callable[[memoryview], None] = lambda _: None
) -> bytes:
    """The next ``size`` bytes; ``note`` sees them as they come."""
    data = np.empty(size, dtype=np.uint8)
    rest = data.data
    while rest:
        count = link.recv_into(rest[:_CHUNK_BYTES])
        if not count:
            raise ConnectionError("the other end has closed the connection")
        note(rest[:count])
        rest = rest[count:]
    return data.tobytes()


def _proof_of(key: bytes, number: int, tag: bytes) -> bytes:
    return authenticate(key, b"received", number.to_bytes(_SIZE_BYTES), tag)


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
