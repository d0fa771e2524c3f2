"""How tokens are sampled, and what ends a completion."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdp_lightning.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings.

    Args:
        max_new_tokens: budget of one ``generate``, over all its interruptions.
        temperature: divisor of the logits; 0 is greedy (evaluation only: its log-probs are 0).
        top_p: probability mass of nucleus sampling; 1 is off.
        top_k: number of tokens to sample from; None is off.
        stop_token_ids: tokens that end the completion; the sampled one is kept.
        stop_texts: texts that end the completion; the token that completes one is kept, whole.
        stop_at_model_eos: whether workflows add the end-of-sequence tokens of the model's folder.
        allow_truncated_sampling: whether to accept ``top_p < 1`` or ``top_k``. The behavior
            log-probs are then renormalized over the truncated support while the trainer's are not,
            so the behavior weight carries a bias that no estimator here removes.

    Raises:
        ConfigError: if a value is out of range, or sampling is truncated without
            ``allow_truncated_sampling``.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    allow_truncated_sampling: bool = False
    stop_texts: tuple[str, ...] = ()
    stop_at_model_eos: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        texts = (self.stop_texts,) if isinstance(self.stop_texts, str) else tuple(self.stop_texts)
        # A config's texts may be of a subclass, which a checkpoint would name.
        plain = tuple(str(text) if isinstance(text, str) else text for text in texts)
        object.__setattr__(self, "stop_texts", plain)
        if bad := [text for text in texts if not text or "\ufffd" in text]:
            raise ConfigError(f"a stop text must have characters, none U+FFFD, got {bad[0]!r}.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 or in [1e-6, inf), got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, or None for off, got {self.top_k}.")
        if (self.top_p < 1 or self.top_k is not None) and not self.allow_truncated_sampling:
            raise ConfigError(
                f"top_p={self.top_p} and top_k={self.top_k} truncate the sampled distribution: its "
                "log-probs are renormalized, the trainer's are not. Use top_p=1, top_k=None, or "
                "accept the bias with allow_truncated_sampling=True."
            )
