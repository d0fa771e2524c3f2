"""Whether a policy's scores are those of its own logits, tried on a few rows before the first step.

The rows are of unlike length, the longest as long as the run's. In the layout ``"padded"`` scores
are compared with the model's own logits of each row alone, under eager attention; in the others,
where as many tokens are in one pass as in the run's, with padded ones. A model whose scores are
wrong is refused, and the refusal says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdp_lightning.errors import ConfigError
from sdp_lightning.training.batch import Batch, Layout, trial_batch
from sdp_lightning.training.policy.forward import LogprobForward, check_model
from sdp_lightning.training.policy.sharding import is_sharded

logger = logging.getLogger(__name__)

_SHORTEST, _LONGEST = 32, 2048  # tokens of the longest row of a trial
_POSITIONS = ("max_position_embeddings", "max_seq_len")  # of configurations
# Largest error in nats: of a token in float32; on average where products are rounded to halves.
_EXACT, _ROUNDED = 1e-3, 0.05
# Largest error of a layout, as a share of the change that another prefix makes. Rows that attend to
# each other are off by half of it and more.
_SHARE = 0.1


class ScoreCheck:
    """Tries each layout before its first use, and again before rows twice as long as tried.

    Args:
        forward: the policy.
        over_ranks: gathers values from every rank, in order of rank.
        precision: context of passes without gradient.
    """

    def __init__(
        self,
        forward: LogprobForward,
        over_ranks: Callable[..., list[tuple[float, ...]]],
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._forward, self._over_ranks, self._precision = forward, over_ranks, precision
        self._tried: dict[Layout, tuple[int, int]] = {}
        self._refusals: dict[Layout, ConfigError | None] = {}
        self._rounds = False  # products, to halves
        self._sharded: bool | None = None

    def refusal(self, layout: Layout, *, longest: int, together: int) -> ConfigError | None:
        """Why the policy cannot be scored in a layout, or None; ``"padded"`` is asked for first.

        A sharded policy is tried once, on four times as much as any rank has: it is a collective.

        Args:
            layout: how rows are laid out.
            longest: number of tokens of the longest row.
            together: largest number of tokens in one pass.
        """
        if self._sharded is None:
            self._sharded = is_sharded(self._forward)
        if self._sharded and layout in self._tried:
            return self._refusals[layout]
        if self._sharded:
            ranks = self._over_ranks(longest, together)
            longest, together = (int(4 * max(values)) for values in zip(*ranks, strict=True))
        size = self._row_length(longest), 0 if layout == "padded" else _next_power(together)
        before = self._tried.get(layout, (-1, -1))
        if size[0] > before[0] or size[1] > before[1]:
            self._tried[layout] = max(size[0], before[0]), max(size[1], before[1])
            self._refusals[layout] = self._try(layout, *self._tried[layout])
        refusal = self._refusals[layout]
        if refusal is not None:
            logger.debug("layout %r is not used: %s", layout, refusal)
        return refusal

    @property
    def _config(self) -> Any:
        return self._forward.policy.config.get_text_config(decoder=True)

    def _row_length(self, longest: int) -> int:
        # foreign: model configurations differ
        limits = [getattr(self._config, name, None) for name in _POSITIONS]
        return min(_next_power(longest), _LONGEST, *(n for n in limits if isinstance(n, int)))

    def _try(self, layout: Layout, length: int, together: int) -> ConfigError | None:
        policy, kind = self._forward.policy, self._config.model_type
        rows = trial_batch(self._config.vocab_size, length).to(policy.device)
        try:
            check_model(policy, layout)
            with torch.no_grad(), self._precision():
                if layout == "padded":
                    return self._compare_with_own_logits(rows)
                return self._compare_with_padded(rows, layout, together // length)
        except ConfigError as error:
            return error
        except Exception as error:  # a foreign model may raise anything
            remedy = "another model" if layout == "padded" else "layout='padded'"
            refusal = ConfigError(
                f"model type {kind!r} cannot be scored in the layout {layout!r} "
                f"({type(error).__name__}: {error}). Use {remedy}."
            )
            refusal.__cause__ = error
            return refusal

    def _compare_with_padded(self, rows: Batch, layout: Layout, times: int) -> ConfigError | None:
        """``times``: how often the long row comes, one after another."""
        order = [0] * max(times, 1) + [1, 2]
        found = self._forward(rows.select(order), layout)[0]
        expected = self._forward(rows, "padded")[0]
        change = _largest(expected[1] - expected[2])
        expected = expected[order]
        gap = _largest(found - expected)
        if self._agree(found, expected) and gap < _SHARE * change:
            return None
        return ConfigError(
            f"model type {self._config.model_type!r} does not keep rows apart in the layout "
            f"{layout!r}: log-probs differ by {gap:.3g} nats from those of padded rows. "
            "Use layout='padded'."
        )

    def _compare_with_own_logits(self, rows: Batch) -> ConfigError | None:
        policy = self._forward.policy
        versions = [parameter._version for parameter in policy.parameters()]
        scores, again = (self._forward(rows, "padded")[0] for _ in range(2))
        with eager_attention(policy):
            own = self._own_logprobs(rows)
        if not self._sharded and versions != [p._version for p in policy.parameters()]:
            return self._refusal_of("changes its weights in a forward pass", "Use another model")
        if not self._agree(again, scores):
            return self._refusal_of(
                f"draws random numbers in eval mode: two passes over the same rows differ by "
                f"{_largest(again - scores):.3g} nats",
                "Turn off what is random in its code",
            )
        if self._agree(scores, own):
            return None
        gap = f"{_largest(scores - own):.3g} nats"
        if not self._agree(self._own_logprobs(rows), own):
            return self._refusal_of(
                f"has other logits under attention {self._config._attn_implementation!r} than "
                f"under eager attention: log-probs differ by {gap}",
                "Use model_kwargs={'attn_implementation': 'eager'}",
            )
        alone = torch.zeros_like(scores)
        for row in range(len(rows)):
            alone[row] = self._forward(rows.select([row]), "padded")[0][0]
        if self._agree(alone, own):
            return self._refusal_of(
                f"lets rows of a batch see their neighbors: log-probs differ by {gap} from those "
                "of a row alone",
                "Use another model",
            )
        return self._refusal_of(
            f"has other logits than those that its head gives: log-probs differ by {gap}",
            "Use another model",
        )

    def _own_logprobs(self, rows: Batch) -> Tensor:
        logprobs, logits = self._forward(rows, "alone")
        on_tensor_cores = logits.is_cuda and torch.get_float32_matmul_precision() != "highest"
        self._rounds = on_tensor_cores or torch.finfo(logits.dtype).bits < 32
        return logprobs

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        """Whether the differences are those of rounding; NaN is none."""
        gap = (found - expected).abs()
        if self._rounds:
            return bool(gap.sum() <= _ROUNDED * (expected != 0).sum())
        return bool(gap.max() <= _EXACT)

    def _refusal_of(self, fault: str, remedy: str) -> ConfigError:
        kind = self._config.model_type
        return ConfigError(f"model type {kind!r} {fault}, so its scores are wrong. {remedy}.")


@contextmanager
def eager_attention(policy: PreTrainedModel) -> Generator[None]:
    """Context in which ``policy`` runs with eager attention, which leaves nothing out.

    A model that has none keeps its own.
    """
    config: Any = policy.config.get_text_config(decoder=True)
    own = config._attn_implementation
    try:
        policy.set_attn_implementation("eager")
    except ValueError as error:
        logger.debug("model type %r has no eager attention: %s", config.model_type, error)
    try:
        yield
    finally:
        policy.set_attn_implementation(own)


def _next_power(number: int) -> int:
    """The next power of two."""
    return max(_SHORTEST, 1 << (number - 1).bit_length())


def _largest(gap: Tensor) -> float:
    return gap.abs().max().item()
