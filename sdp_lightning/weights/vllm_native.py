"""Weights from GPU to GPU by vLLM's own transfer engines: NCCL, or CUDA IPC on a shared GPU.

The trainer's environment needs vLLM, too. CUDA IPC was tested on a GPU between two processes with
vLLM's own engines; NCCL, which needs two GPUs, and a whole server on a GPU were not tested.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from sdp_lightning.distributed.event_loop import settle
from sdp_lightning.distributed.listener import family_of
from sdp_lightning.errors import ConfigError, EngineError, SDPError
from sdp_lightning.weights.protocol import EngineTransfer, ServedType, Target, Weights

NativeName = Literal["nccl", "ipc"]
_IPV4_ONLY = ". vLLM 0.32 listens on IPv4 only: set trainer_host to such an address, or use 'tcp'."


class NativeTransport:
    """Sends the staged tensors themselves: they are kept until the next update, not copied.

    Every server has its own process group, so a server that dies fails only its own transfer.

    Args:
        kind: ``"nccl"`` or ``"ipc"``.
        host: this host's address for the servers.
        timeout_s: timeout of one transfer, in seconds.
    """

    is_live = True

    def __init__(self, kind: NativeName, host: str, *, timeout_s: float = 120.0) -> None:
        if kind == "ipc" and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ConfigError(
                "transport='ipc' needs all ranks of a distributed trainer in its transfer, but "
                "rank 0 publishes alone: use transport='nccl' or 'files'."
            )
        self._kind: NativeName = kind
        self._host, self._timeout_s = host, timeout_s
        self._staged: tuple[dict[str, Tensor], bool] | None = None  # are they all?
        self._base: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._senders: dict[str, _Sender] = {}

    def stage(self, weights: Weights, *, full: bool, dtype: ServedType | None = None) -> int:
        staged = {name: tensor.detach() for name, tensor in weights}
        on_cpu = [name for name, tensor in staged.items() if not tensor.is_cuda]
        if on_cpu:
            raise EngineError(
                f"{on_cpu[0]} is on the CPU, and transport={self._kind!r} moves weights between "
                "GPUs. Use transport='files' or 'tcp'."
            )
        self._staged = staged, full
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in staged.values()}.values())

    def activate(self) -> None:
        if self._staged is not None:
            (self._latest, full), self._staged = self._staged, None
            self._base = self._latest if full else self._base | self._latest

    async def deliver(self, target: Target, *, whole: bool) -> None:
        weights = self._base if whole else self._latest
        if not weights:
            return
        if whole:
            self._senders.pop(target.url, None)  # it may have been restarted
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        arguments = target, weights, loop, done
        # A transfer that hangs must not keep the process alive.
        threading.Thread(target=self._run, args=arguments, name="sdp-weights", daemon=True).start()
        try:
            async with asyncio.timeout(self._timeout_s):
                await done
        except TimeoutError as error:
            self._senders.pop(target.url, None)
            raise EngineError(
                f"{target.url}: weights were not transferred by {self._kind} within "
                f"{self._timeout_s:g} s (control_timeout_s)."
            ) from error
        except SDPError:
            self._senders.pop(target.url, None)
            raise

    def close(self) -> None:
        self._senders.clear()
        self._base, self._latest, self._staged = {}, {}, None

    def _run(
        self,
        target: Target,
        weights: dict[str, Tensor],
        loop: asyncio.AbstractEventLoop,
        done: asyncio.Future[None],
    ) -> None:
        """Send in a thread; ``done`` gets any error, as NCCL, CUDA and vLLM may raise anything."""
        failure: SDPError | None = None
        try:
            self._send(target, weights, loop)
        except SDPError as error:
            failure = error
        except Exception as error:  # raised where the transfer is awaited
            hint = _IPV4_ONLY if family_of(self._host) == socket.AF_INET6 else ""
            text = f"{target.url}: transferring by {self._kind} failed: {error!r}{hint}"
            failure = EngineError(text)
            failure.__cause__ = error
        settle(done, failure)

    def _send(
        self, target: Target, weights: dict[str, Tensor], loop: asyncio.AbstractEventLoop
    ) -> None:
        device = next(iter(weights.values())).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # per thread
        if target.url not in self._senders:
            client = _Client(target, loop, self._timeout_s)
            self._senders[target.url] = _open(self._kind, self._host, target.num_workers, client)
        sender = self._senders[target.url]
        sender.source.weights = weights
        sender.engine.send_weights()


@dataclass(eq=False)
class _Sender:
    engine: Any
    source: Any


@dataclass(eq=False)
class _Client:
    """Replaces vLLM's ``VLLMWeightSyncClient``: four calls, made in the engine's event loop."""

    target: Target
    loop: asyncio.AbstractEventLoop
    timeout_s: float

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._tell(EngineTransfer("init", init_info))

    def start_weight_update(self) -> None:
        self._tell(EngineTransfer("start", {}))

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        info = dict(update_info)
        if (handles := info.pop("ipc_handles", None)) is not None:  # not JSON
            info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self._tell(EngineTransfer("update", info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._tell(EngineTransfer("finish", {}))

    def _tell(self, instruction: EngineTransfer) -> None:
        work: Any = self.target.tell(instruction)
        asyncio.run_coroutine_threadsafe(work, self.loop).result(self.timeout_s)


def _open(kind: NativeName, host: str, num_workers: int, client: _Client) -> _Sender:
    try:
        from vllm.distributed.weight_transfer import (  # type: ignore
            base as contract,  # type: ignore
            ipc_engine,
            nccl_engine,
        )
    except ImportError as error:
        raise ConfigError(
            f"transport={kind!r} uses vLLM's transfer engine in the trainer too: install vllm in "
            "this environment, or use transport='files'."
        ) from error

    class Source(contract.WeightSource):  # type: ignore[misc]
        weights: dict[str, Tensor] = {}  # noqa: RUF012 # set before each transfer

        def metadata(self) -> list[Any]:
            return [
                contract.ParamMeta(name, tensor.dtype, tuple(tensor.shape))
                for name, tensor in self.weights.items()
            ]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self.weights.items())

    source = Source()
    if kind == "ipc":
        ipc = ipc_engine.IPCTrainerInitInfo(packed=True, rank=0)
        engine = ipc_engine.IPCTrainerWeightTransferEngine.trainer_init(
            ipc, client=client, source=source
        )
    else:
        with socket.create_server((host, 0), family=family_of(host)) as free:
            port = int(free.getsockname()[1])
        nccl = nccl_engine.NCCLTrainerInitInfo(
            master_address=host, master_port=port, world_size=num_workers + 1, rank=0
        )
        engine = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl, client=client, source=source
        )
    return _Sender(engine, source)
