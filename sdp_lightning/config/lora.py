"""Settings of a LoRA adapter."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

from sdp_lightning.config.validation import at_least, check_types
from sdp_lightning.errors import ConfigError


@dataclass(frozen=True)
class LoRAConfig:
    """A LoRA adapter: ``W + alpha / rank * B A`` in place of a layer's W; only B and A train.

    There is no dropout: it would make every log-prob a random number.

    Args:
        rank: rank of A and B.
        alpha: factor of the adapter's output, times rank.
        target_modules: ends of the names of linear layers, such as ``("q_proj", "v_proj")``, or of
            experts, such as ``("experts.down_proj",)``; None is every linear layer but the head,
            routers and routed experts.

    Raises:
        ConfigError: naming the value.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        targets = self.target_modules
        if targets is not None and (isinstance(targets, str) or not targets):
            raise ConfigError(
                f"target_modules={reprlib.repr(targets)} must be a sequence of names, such as "
                "('q_proj', 'v_proj'), or None for every linear layer but the head."
            )
        check_types(self)
        at_least("rank", self.rank, 1)
        if not self.alpha > 0:
            raise ConfigError(f"alpha must be positive, got {self.alpha}.")
