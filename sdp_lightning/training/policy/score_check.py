"""Whether a policy's scores are those of its own logits, tried on a few rows before the first step.

The rows are of unlike length, the longest as long as the run's. Their scores in the layout
``"padded"`` are compared with the model's own logits of each row alone, under eager attention, and
those of the other layouts with padded ones. A model whose scores are wrong is refused, and the
refusal says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdp_lightning.config.model_limits import attention_spans, max_positions
from sdp_lightning.config.model_source import quiet_transformers
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.batch import Batch, Layout, trial_batch
from sdp_lightning.training.policy.forward import LogprobForward, check_model
from sdp_lightning.training.policy.layers import is_compiled
from sdp_lightning.training.policy.lora import adapted_weights, merged_name
from sdp_lightning.training.policy.sharding import is_sharded

logger = logging.getLogger(__name__)

Refusals = Mapping[Layout, ConfigError | None]

_SHORTEST, _LONGEST = 20, 2048  # tokens of the longest row of a trial
_COMMON = slice(4, 9)  # sampled tokens that start rows 0 and 1; see trial_batch()
# Largest error in nats: of a token in float32; on average where products are rounded to halves.
_EXACT, _ROUNDED = 1e-3, 0.05
# Largest error of a layout, as a share of the change that another prefix makes. Rows that attend to
# each other are off by half of it and more.
_SHARE = 0.1


class ScoreCheck:
    """Tries layouts before their first use, and again before rows twice as long as tried.

    Args:
        forward: the policy.
        layouts: those to try beside ``"padded"``.
        over_ranks: gathers values from every rank, in order of rank.
        precision: context of passes without gradient.
    """

    def __init__(
        self,
        forward: LogprobForward,
        layouts: Sequence[Layout],
        *,
        over_ranks: Callable[..., list[tuple[float, ...]]],
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._forward, self._layouts = forward, layouts
        self._over_ranks, self._precision = over_ranks, precision
        self._sharded = is_sharded(forward)
        self._tried = (0, 0)
        self._refusals: Refusals = {}
        self._rounds = False  # products, to halves

    def refusals(self, *, longest: int, together: int) -> Refusals:
        """Why the policy cannot be scored in each layout, or None; without others if none can.

        A sharded policy is tried once, on four times as much as any rank has: it is a collective.

        Args:
            longest: number of tokens of the longest row.
            together: largest number of tokens in one pass.
        """
        if self._sharded and self._refusals:
            return self._refusals
        if self._sharded:
            ranks = self._over_ranks(longest, together)
            longest, together = (int(4 * max(values)) for values in zip(*ranks, strict=True))
        length, total = self._trial_size(longest, together)
        if length > self._tried[0] or total > self._tried[1]:
            self._tried = max(length, self._tried[0]), max(total, self._tried[1])
            self._refusals = self._try(*self._tried)
        return self._refusals

    @property
    def _config(self) -> Any:
        return self._forward.policy.config.get_text_config(decoder=True)

    def _trial_size(self, longest: int, together: int) -> tuple[int, int]:
        """Tokens of the long row, and of all copies of it in one pass.

        There are copies only where more tokens are in one pass than the model has positions, or
        than a window has.
        """
        positions = max_positions(self._config) or _LONGEST
        length = min(_next_power(longest), _LONGEST, positions)
        limits = (positions, *attention_spans(self._config))
        passed = max((limit for limit in limits if limit < together), default=0)
        return length, min(_next_power(together), passed + length)

    def _try(self, length: int, total: int) -> Refusals:
        size: int = self._config.vocab_size
        rows = trial_batch(min(size, self._forward.num_tokens or size), length)
        rows = rows.to(self._forward.policy.device)
        copies = [0] * max(1, total // length) + [1, 2]
        with torch.no_grad(), self._precision():
            try:
                check_model(self._forward.policy, "padded")
                scores = self._forward(rows, "padded")[0]
                refusal = self._compare_with_own_logits(rows, scores)
            except Exception as error:  # a foreign model may raise anything
                return {"padded": self._refusal_after(error, "padded")}
            result: dict[Layout, ConfigError | None] = {"padded": refusal}
            for layout in self._layouts if refusal is None else ():
                try:
                    check_model(self._forward.policy, layout)
                    found = self._forward(rows.select(copies), layout)[0]
                    result[layout] = self._compare_with_padded(found, scores, copies, layout)
                except Exception as error:
                    result[layout] = self._refusal_after(error, layout)
                if result[layout] is not None:
                    logger.debug("layout %r is not used: %s", layout, result[layout])
        return result

    def _refusal_after(self, error: Exception, layout: Layout) -> ConfigError:
        if isinstance(error, ConfigError):
            return error
        remedy = "another model" if layout == "padded" else "layout='padded'"
        if layout == "padded" and is_compiled(self._forward.policy):
            remedy = "it without torch.compile, which needs a C++ compiler on a CPU"
        reason = " ".join(str(error).partition("\n\n")[0].split())
        refusal = self._refusal_of(
            f"cannot be scored in the layout {layout!r} ({type(error).__name__}: {reason})", remedy
        )
        refusal.__cause__ = error
        return refusal

    def _compare_with_padded(
        self, found: Tensor, scores: Tensor, copies: list[int], layout: Layout
    ) -> ConfigError | None:
        gap, change = _largest(found - scores[copies]), _largest(scores[1] - scores[2])
        if self._agree(found, scores[copies]) and gap < _SHARE * change:
            return None
        return self._refusal_of(
            f"does not keep rows apart in the layout {layout!r}: log-probs differ by {gap:.3g} "
            "nats from those of padded rows",
            "layout='padded'",
        )

    def _compare_with_own_logits(self, rows: Batch, scores: Tensor) -> ConfigError | None:
        policy = self._forward.policy
        wrapped = {name for name, a in adapted_weights(policy).items() if a.is_stack}
        watched = [  # peft sets experts' weights to themselves while they have an adapter
            weight for n, weight in policy.named_parameters() if merged_name(n) not in wrapped
        ]
        versions = [weight._version for weight in watched]
        with eager_attention(policy), torch.compiler.set_stance("force_eager"):
            own = self._own_logprobs(rows)
        without_long = self._forward(rows.select([1, 2]), "padded")[0]
        if not self._sharded and versions != [w._version for w in watched]:
            return self._refusal_of("changes its weights in a forward pass", "another model")
        causal = self._agree(own[0, _COMMON], own[1, _COMMON])
        if causal and self._agree(scores, own) and self._agree(without_long, scores[1:]):
            return None
        return self._cause(rows, scores, own)

    def _cause(self, rows: Batch, scores: Tensor, own: Tensor) -> ConfigError:
        """Why padded scores are not those of the model's own logits."""
        again = self._forward(rows, "padded")[0]
        if not self._agree(again, scores):
            gap = _largest(again - scores)
            return self._refusal_of(
                f"draws random numbers in eval mode: the same rows differ by {gap:.3g} nats in two "
                "passes",
                "a model without them",
            )
        if not self._agree(own[0, _COMMON], own[1, _COMMON]):
            return self._refusal_of(
                "lets tokens see later ones",
                "a causal LM; an encoder needs is_decoder=True in its config",
            )
        gap = f"log-probs differ by {_largest(scores - own):.3g} nats"
        if not self._agree(self._own_logprobs(rows), own):
            attention = self._config._attn_implementation
            return self._refusal_of(
                f"has other logits under attention {attention!r} than under eager attention: {gap}",
                "model_kwargs={'attn_implementation': 'eager'}",
            )
        alone = torch.zeros_like(scores)
        for row in range(len(rows)):
            alone[row] = self._forward(rows.select([row]), "padded")[0][0]
        if self._agree(alone, own):
            return self._refusal_of(
                f"lets rows of a batch see their neighbors: {gap}", "another model"
            )
        return self._refusal_of(
            f"has other logits than those that its head gives: {gap}", "another model"
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
        return ConfigError(f"model type {self._config.model_type!r} {fault}. Use {remedy}.")


@contextmanager
def eager_attention(policy: PreTrainedModel) -> Generator[None]:
    """Context in which ``policy`` runs with eager attention, which leaves nothing out."""
    config: Any = policy.config.get_text_config(decoder=True)
    own = config._attn_implementation
    with quiet_transformers():  # it warns of models that keep their own attention
        policy.set_attn_implementation("eager")
    try:
        yield
    finally:
        with quiet_transformers():
            policy.set_attn_implementation(own)


def _next_power(number: int) -> int:
    """The next power of two."""
    return max(_SHORTEST, 1 << (number - 1).bit_length())


def _largest(gap: Tensor) -> float:
    return gap.abs().max().item()
