"""A fake of servers: weights are staged, and their load waits until a test lets it go on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from sdp_lightning.engines.protocol import NamedWeights, PublishReport
from sdp_lightning.errors import EngineError
from sdp_lightning.testing import FakeEngine
from support.rollouts import DEADLINE_S


class StagingEngine(FakeEngine):
    """Shared servers here; ``held``: loads wait for ``let_load``; ``fails``: why, or by what."""

    stages_copies = True
    server_urls: Sequence[str] = ()
    lora_alpha: float | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, updates_in_flight=False, **settings)
        self.held = False
        self.fails: str | BaseException = ""
        self.events: list[str] = []
        self._staged: list[tuple[str, Any]] = []
        self._may_load = threading.Semaphore(0)

    def stage_weights(self, weights: NamedWeights, version: int, *, reset: bool = False) -> None:
        self._staged = [(name, tensor.clone()) for name, tensor in weights]
        self.events.append(f"stage {version}")

    def load_weights(self, version: int, *, reset: bool = False) -> PublishReport:
        if self.held and not reset and not self._may_load.acquire(timeout=DEADLINE_S):
            raise EngineError("the test never let it load")
        if self.fails and not reset:
            raise EngineError(self.fails) if isinstance(self.fails, str) else self.fails
        self.events.append(f"load {version}")
        return self.update_weights(self._staged, version, reset=reset)

    def let_load(self) -> None:
        self._may_load.release()

    def join(self, urls: Sequence[str]) -> None:
        raise AssertionError("one rank")

    def drain(self) -> None:
        pass

    def follow(self, version: int, urls: Sequence[str]) -> None:
        raise AssertionError("one rank")
