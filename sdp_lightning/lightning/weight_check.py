"""Whether engine and trainer hold the same weights: log-probs of one text under both.

An engine may report the new version and still compute with an old tensor: a packed copy of the
head, a cache. Rewards then rise for a while and stop for no visible reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.training.policy.lora import adapted_weights
from sdp_lightning.types import Context, FloatArray, IntArray, Segment, Trajectory

logger = logging.getLogger(__name__)

EngineLogprobs = Callable[[IntArray], Mapping[str, FloatArray]]
TrainerLogprobs = Callable[[Trajectory], FloatArray]
_EXPLAINED_SHARE = 0.5  # of the difference must vanish before a parameter is named


class WeightCheck:
    """Compares the log-probs of a text under the trainer's weights and under each engine's.

    Keeps a copy of the trained weights on the CPU from the last time that engine and trainer
    agreed. With it an error can name the parameter of which the engine still has the old value.

    Args:
        tolerance: largest mean absolute difference in nats. Between bfloat16 kernels it is about
            0.03, between float32 ones below 1e-4.
        num_tokens: length of the text, which is random tokens.
        seed: seed of the text.

    Raises:
        ConfigError: if ``tolerance`` is not positive.
    """

    def __init__(self, *, tolerance: float = 0.1, num_tokens: int = 64, seed: int = 0) -> None:
        if not tolerance > 0:
            raise ConfigError(f"weight_check_tolerance must be positive, got {tolerance}.")
        self._tolerance, self._num_tokens, self._seed = tolerance, num_tokens, seed
        self._agreed: dict[str, dict[str, Tensor]] = {}  # by the name that the engine uses

    def check(
        self, policy: nn.Module, *, num_embeddings: int, score: TrainerLogprobs, ask: EngineLogprobs
    ) -> float:
        """The largest mean difference of any engine, in nats.

        Args:
            policy: the trainer's model.
            num_embeddings: size of its vocabulary.
            score: the trainer's log-probs of a trajectory's one segment.
            ask: each engine's log-probs of all tokens of a text but the first.

        Raises:
            EngineError: naming the engine, the difference, and the parameter at fault if one is.
        """
        tokens = np.random.default_rng(self._seed).integers(num_embeddings, size=self._num_tokens)
        blank = np.zeros(tokens.size - 1, dtype=np.float32)
        own = score(Trajectory((Context(tokens[:1]), Segment(0, tokens[1:], blank)), reward=0.0))
        differences = {name: _mean_difference(value, own) for name, value in ask(tokens).items()}
        worst = max(differences, key=lambda name: differences[name])
        if differences[worst] > self._tolerance:
            engine_logprobs = ask(tokens)[worst]
            raise EngineError(
                f"{worst} answers a text of {tokens.size} tokens with log-probs that differ from "
                f"the trainer's by {differences[worst]:.3g} nats in the mean (allowed is "
                f"{self._tolerance:g}): it does not compute with the weights that it was sent. "
                f"{self._find_fault(policy, tokens, engine_logprobs)}"
            )
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        if any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
            return differences[worst]  # no rank has whole weights to keep
        self._agreed = {}
        adapted = adapted_weights(policy).items()
        merged = {part: name for name, adapter in adapted for part in (adapter.a, adapter.b)}
        for name, tensor in policy.named_parameters(remove_duplicate=False):
            if name in trained or _is_tied(policy, name, trained):
                copy = tensor.detach().to("cpu", copy=True)
                self._agreed.setdefault(merged.get(name, name), {})[name] = copy
        return differences[worst]

    def _find_fault(self, policy: nn.Module, tokens: IntArray, observed: FloatArray) -> str:
        """Name the parameter whose value of the last agreement gives the ``observed`` log-probs."""
        if any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
            return "The weights are sharded: check in one process to learn which is at fault."
        if not self._agreed:
            return "Do trainer and engine load the same model, tokenizer and dtype?"
        now = _mean_difference(observed, _logprobs(policy, {}, tokens))
        left = {
            name: _mean_difference(observed, _logprobs(policy, old, tokens))
            for name, old in self._agreed.items()
        }
        best = min(left, key=lambda name: left[name])
        if left[best] < _EXPLAINED_SHARE * now:
            return (
                f"Most at fault: {best}. With its value of the last agreement the difference would "
                f"be {left[best]:.3g}."
            )
        return "No single parameter that stayed as it was at the last agreement explains it."


def _is_tied(policy: nn.Module, name: str, trained: set[str]) -> bool:
    """Whether ``name`` is another name of a trained tensor."""
    tensor = policy.get_parameter(name)
    return any(policy.get_parameter(other) is tensor for other in trained)


@torch.no_grad()
def _logprobs(policy: nn.Module, replaced: dict[str, Tensor], tokens: IntArray) -> FloatArray:
    device = next(policy.parameters()).device
    ids = torch.from_numpy(tokens).to(device)[None]
    values = {name: tensor.to(device) for name, tensor in replaced.items()}
    inputs = {"input_ids": ids, "use_cache": False}
    output = functional_call(policy, values, (), inputs, tie_weights=False)
    chosen = output.logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return chosen.cpu().numpy()


def _mean_difference(first: FloatArray, second: FloatArray) -> float:
    if first.shape != second.shape or not np.isfinite(first).all():
        return float("inf")
    return float(np.abs(first - second).mean())
