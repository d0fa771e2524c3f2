"""The contract between a publish and whatever carries weights to servers.

A transport stages what it is given, in the trainer's process, and then tells each server how to
get it. It knows no HTTP: what it tells is an instruction, which the servers' backend writes as a
call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Weights = Iterable[tuple[str, "Tensor"]]
TransportName = Literal["files", "gloo", "nccl", "ipc", "lora"]


class WeightStream(Iterator[tuple[str, "Tensor"]]):
    """Weights that come one at a time, and whose names and shapes are known before the first.

    What has to be gathered or merged exists only while it is handled, so whoever reads the stream
    in order needs no room for all of it.

    Args:
        layout: what will come, in order: the tensors themselves, or, of those that are not made
            yet, their likes on the meta device.
        make: the tensor of a name. May be a collective.
    """

    def __init__(self, layout: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
        self.layout, self._make = layout, make
        self._names = iter(layout)

    @classmethod
    def of(cls, weights: Weights) -> WeightStream:
        """Of weights that are all there."""
        layout = dict(weights)
        return cls(layout, layout.__getitem__)

    def __next__(self) -> tuple[str, Tensor]:
        name = next(self._names)
        return name, self._make(name)


@dataclass(frozen=True)
class LoadFolder:
    """Load the safetensors files of a folder that the server can see; others stay as they are."""

    folder: str


@dataclass(frozen=True)
class LoadAdapter:
    """Sample with the adapter in ``folder`` (PEFT's form) from now on, under the name ``name``."""

    name: str
    folder: str


@dataclass(frozen=True)
class Receive:
    """Join the trainer's gloo group and load what it broadcasts.

    Attributes:
        host: where the trainer's store listens, and its ``port``.
        key: of this transfer, so that a late worker of an earlier one joins nothing.
        num_workers: of this server; the trainer is rank 0 and worker i rank i + 1.
        timeout_s: of each step.
    """

    host: str
    port: int
    key: str
    num_workers: int
    timeout_s: float


@dataclass(frozen=True)
class EngineTransfer:
    """One step of the server's own weight transfer (vLLM's NCCL and CUDA IPC engines)."""

    step: Literal["init", "start", "update", "finish"]
    info: Mapping[str, Any]


Instruction = LoadFolder | LoadAdapter | Receive | EngineTransfer


@dataclass(frozen=True)
class Target:
    """A server that gets weights.

    Attributes:
        url: names it.
        num_workers: processes that hold its weights.
        tell: has an instruction carried out; an error is raised here.
    """

    url: str
    num_workers: int
    tell: Callable[[Instruction], Awaitable[None]]


class WeightTransport(Protocol):
    """Carries weights from the trainer to servers that sample nothing meanwhile.

    ``stage`` is called in the trainer's thread, ``deliver`` in an event loop in another one, for
    several servers at once. Between a ``stage`` and the next one, what is delivered is the same.
    """

    @property
    def is_live(self) -> bool:
        """Whether it sends the trainer's own tensors, which are at rest in a publish only."""
        ...

    def stage(self, weights: Weights, *, full: bool) -> int:
        """Take in ``weights``; returns their bytes, a tied tensor counted once.

        Args:
            weights: names and tensors; with ``full`` all of them, else the same ones at each call.
            full: a start, fresh or resumed.

        Raises:
            EngineError: if they cannot be taken in; what was staged before is as it was.
        """
        ...

    async def deliver(self, target: Target, *, whole: bool) -> None:
        """Bring ``target`` to what is staged.

        Args:
            target: a server.
            whole: it may hold anything: give it all weights, not only what was staged last.

        Raises:
            EngineError: if it could not; what the server then holds is not known.
        """
        ...

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        ...
