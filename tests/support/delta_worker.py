"""The worker extension on a model runner that keeps what it is told to load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sdp_lightning.engines.servers.vllm_worker import WorkerExtension


class DeltaWorker(WorkerExtension):
    """``held``: the weights of the model; ``fails``: the next load raises half way."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.fails = False
        self.model_runner: Any = self

    def get_model(self) -> nn.Module:
        return nn.Module()

    def reload_weights(self, *, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights_iterator:
            self.held[name] = tensor.clone()
            if self.fails:
                raise ValueError("no room")

    def _sdp_end_reload(self) -> None:
        pass

    def _sdp_pack_heads(self) -> None:
        pass
