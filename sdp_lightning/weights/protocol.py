"""The contract between a publish and the transports that carry weights to servers.

A transport stages weights in the trainer's process, and then instructs each server how to get them.
It knows no HTTP: the servers' backend writes an instruction as a call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Weights = Iterable[tuple[str, "Tensor"]]
TransportName = Literal["files", "tcp", "nccl", "ipc", "lora", "delta"]
Use = Literal["load", "anchor", "delta"]  # load weights; keep a copy, too; or change that copy
ServedType = Literal["float32", "bfloat16", "float16"]


class WeightStream(Iterator[tuple[str, "Tensor"]]):
    """A stream of weights whose names and shapes are known in advance.

    Weights that have to be gathered or merged are made one at a time, so a reader never needs
    memory for all of them.

    Args:
        layout: all names in order, each with its tensor, or with a tensor on the meta device if it
            is not made yet.
        make: makes the tensor of a name. May be a collective.
    """

    def __init__(self, layout: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
        self.layout, self._make = layout, make
        self._names = iter(layout)

    @classmethod
    def of(cls, weights: Weights) -> WeightStream:
        """Make a stream of weights that all exist."""
        layout = dict(weights)
        return cls(layout, layout.__getitem__)

    def __next__(self) -> tuple[str, Tensor]:
        name = next(self._names)
        return name, self._make(name)


@dataclass(frozen=True)
class LoadFolder:
    """Load the safetensors files of a folder that the server sees; other weights stay.

    ``keep``: each worker keeps a copy of what it read, which :class:`ApplyDelta` changes.
    """

    folder: str
    keep: bool = False


@dataclass(frozen=True)
class ApplyDelta:
    """Change the copy that was kept by the delta in ``folder``, and load all of it."""

    folder: str


@dataclass(frozen=True)
class LoadAdapter:
    """Sample with the adapter in ``folder`` (PEFT's format) from now on, as model ``name``."""

    name: str
    folder: str


@dataclass(frozen=True)
class Receive:
    """Connect to the trainer and load the weights that it sends.

    Attributes:
        host, port: address where the trainer listens.
        key: secret of this transfer, in hexadecimal: who knows it may have the weights.
        num_workers: workers of this server.
        timeout_s: timeout of each step, in seconds.
        use: what to do with what it sends.
    """

    host: str
    port: int
    key: str = field(repr=False)
    num_workers: int
    timeout_s: float
    use: Use = "load"


@dataclass(frozen=True)
class EngineTransfer:
    """One step of the server's own weight transfer (vLLM's NCCL and CUDA IPC engines)."""

    step: Literal["init", "start", "update", "finish"]
    info: Mapping[str, Any]


Instruction = LoadFolder | ApplyDelta | LoadAdapter | Receive | EngineTransfer


@dataclass(frozen=True)
class Target:
    """A server that receives weights.

    Attributes:
        url: URL of the server.
        num_workers: number of its processes that hold weights.
        tell: makes the server carry out an instruction; raises its error.
    """

    url: str
    num_workers: int
    tell: Callable[[Instruction], Awaitable[None]]


class WeightTransport(Protocol):
    """Carries weights from the trainer to servers that sample nothing while they load.

    ``stage`` is called in the trainer's thread, while servers sample and one that returns is sent
    the weights in force; ``activate`` puts in force what was staged last. ``deliver`` is called in
    an event loop in another thread, for several servers at once. All deliveries between two calls
    of ``activate`` are the same.
    """

    @property
    def is_live(self) -> bool:
        """Whether it sends the trainer's own tensors, which change outside a publish."""
        ...

    def stage(self, weights: Weights, *, full: bool, dtype: ServedType | None = None) -> int:
        """Stage ``weights``; returns their bytes, a tied tensor counted once.

        Args:
            weights: names and tensors; with ``full`` all of them, else the same ones at each call.
            full: True at the start of a run, fresh or resumed.
            dtype: the one type in which servers hold them, if it is known. Transports that copy
                weights send them in it where it is smaller; adapters and live ones do not.

        Raises:
            EngineError: if they cannot be staged; the weights in force are unchanged.
        """
        ...

    def activate(self) -> None:
        """Deliver what was staged last from now on. Without a stage since, it does nothing.

        Raises:
            EngineError: if the staged weights are gone.
        """
        ...

    async def deliver(self, target: Target, *, whole: bool) -> None:
        """Load the weights in force into ``target``.

        Args:
            target: the server.
            whole: its state is unknown, so send all weights, not only those activated last.

        Raises:
            EngineError: if the transfer failed; the server's state is then unknown.
        """
        ...

    def close(self) -> None:
        """Free all resources. Safe to call twice."""
        ...
