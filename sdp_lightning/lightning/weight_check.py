"""Whether engine and trainer hold the same weights: log-probs of one text under both.

An engine may report the new version and still compute with an old tensor: a packed copy of the
head, a cache. Rewards then rise for a while and stop for no visible reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

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
_ASIDE = 4.0  # the side that is so many times as far from the model's own logits is wrong


class WeightCheck:
    """Compares the log-probs of a text under the trainer's weights and under each engine's.

    Where they differ, the model's own logits in eval mode tell which of the two is wrong.

    Args:
        tolerance: largest mean absolute difference in nats. Between bfloat16 kernels it is about
            0.03, between float32 ones below 1e-4.
        num_tokens: length of the text, which is random tokens; less for a model of fewer positions.
        seed: seed of the text.
        keep_weights: keep a copy of the trained weights on the CPU from the last time that engine
            and trainer agreed. With it an error can name the parameter of which the engine still
            has the old value.

    Raises:
        ConfigError: if ``tolerance`` is not positive.
    """

    def __init__(
        self,
        *,
        tolerance: float = 0.1,
        num_tokens: int = 64,
        seed: int = 0,
        keep_weights: bool = True,
    ) -> None:
        if not tolerance > 0:
            raise ConfigError(f"weight_check_tolerance must be positive, got {tolerance}.")
        self._tolerance, self._num_tokens, self._seed = tolerance, num_tokens, seed
        self._keep_weights, self._said = keep_weights, False
        self._agreed: dict[str, dict[str, Tensor]] = {}  # by the name that the engine uses

    def check(
        self,
        policy: nn.Module,
        *,
        num_embeddings: int,
        score: TrainerLogprobs,
        ask: EngineLogprobs,
        own: TrainerLogprobs | None = None,
    ) -> float | None:
        """The largest mean difference of any engine, in nats; None if none scores a text.

        A collective for a sharded policy, whose ranks all check, by the model's own logits only.

        Args:
            policy: the trainer's model.
            num_embeddings: size of its vocabulary.
            score: the trainer's log-probs of a trajectory's one segment, as training scores it.
            ask: each engine's log-probs of all tokens of a text but the first, or of as many of
                them as it has room for.
            own: the same as ``score``, by the model's own logits in eval mode. None: a forward of
                ``policy``, which is not sharded.

        Raises:
            EngineError: naming the engine, the difference, which side is wrong, and the parameter
                at fault if one is.
        """
        sharded = any(isinstance(parameter, DTensor) for parameter in policy.parameters())
        tokens = self._text(policy, num_embeddings)
        answers = self._ask(ask, tokens)
        if not answers and not sharded:
            return None
        blank = np.zeros(tokens.size - 1, dtype=np.float32)
        text = Trajectory((Context(tokens[:1]), Segment(0, tokens[1:], blank)), reward=0.0)
        # What training scores of a sharded policy is tried once, on rows of the run's own length.
        judge = own(text) if sharded and own is not None else None
        scores = score(text) if judge is None else judge
        if not answers:
            return None
        differences = {name: _mean_difference(value, scores) for name, value in answers.items()}
        worst = max(differences, key=lambda name: differences[name])
        if differences[worst] > self._tolerance:
            if judge is None:
                judge = own(text) if own is not None else _logprobs(policy, {}, tokens)
            said = answers[worst]
            raise EngineError(
                f"{worst} answers a text of {said.size + 1} tokens with log-probs that differ from "
                f"the trainer's by {differences[worst]:.3g} nats in the mean (allowed is "
                f"{self._tolerance:g}): {self._judge(policy, tokens, said, scores, judge)}"
            )
        if self._keep_weights and not sharded:  # else no rank has whole weights to keep
            self._keep(policy)
        return differences[worst]

    def _text(self, policy: nn.Module, num_embeddings: int) -> IntArray:
        config: Any = policy.config
        # foreign: configurations differ, and a model may have no limit
        room = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        size = min(self._num_tokens, room or self._num_tokens)
        # Some models cut off the logits of the last tokens.
        return np.random.default_rng(self._seed).integers(max(1, num_embeddings // 2), size=size)

    def _ask(self, ask: EngineLogprobs, tokens: IntArray) -> dict[str, FloatArray]:
        """What each engine answers; a run goes on with engines that cannot, and the log says so."""
        why, level = "it scores no text.", logging.INFO
        try:
            answers = {name: value for name, value in ask(tokens).items() if value.size}
        except (EngineError, NotImplementedError) as error:
            answers, why, level = {}, str(error) or type(error).__name__, logging.WARNING
        if not answers and not self._said:
            self._said = True
            logger.log(level, "the engine is not checked against the trainer: %s", why)
        return answers

    def _judge(
        self,
        policy: nn.Module,
        tokens: IntArray,
        said: FloatArray,
        scores: FloatArray,
        own: FloatArray,
    ) -> str:
        """The side that is wrong by the model's ``own`` log-probs, and the remedy, in words."""
        engine, trainer = _mean_difference(said, own), _mean_difference(scores[: said.size], own)
        third = "The model's own logits in eval mode are"
        if not np.isfinite(own).all():
            return f"the weights are wrong. {third} not finite: training has diverged."
        if trainer * _ASIDE <= engine:
            return (
                f"the engine is wrong. {third} {engine:.3g} from the engine's log-probs and "
                f"{trainer:.3g} from the trainer's: it does not compute with the weights that it "
                f"was sent. {self._find_fault(policy, tokens, said)} A quantized engine needs a "
                "larger weight_check_tolerance."
            )
        if engine * _ASIDE <= trainer:
            return (
                f"the trainer is wrong. {third} {trainer:.3g} from the log-probs that training "
                f"computes and {engine:.3g} from the engine's. Something changes what training "
                "scores: dropout that is on, a hook, another precision, or its attention kernel."
            )
        return (
            f"both are off. {third} {engine:.3g} from the engine's log-probs and {trainer:.3g} "
            "from the trainer's: use one precision and one attention kernel on both sides, or a "
            "larger weight_check_tolerance."
        )

    def _keep(self, policy: nn.Module) -> None:
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        self._agreed = {}
        adapted = adapted_weights(policy).items()
        merged = {part: name for name, adapter in adapted for part in (adapter.a, adapter.b)}
        for name, tensor in policy.named_parameters(remove_duplicate=False):
            if name in trained or _is_tied(policy, name, trained):
                copy = tensor.detach().to("cpu", copy=True)
                self._agreed.setdefault(merged.get(name, name), {})[name] = copy

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


def _mean_difference(said: FloatArray, scores: FloatArray) -> float:
    """The mean difference in nats of what an engine says and the scores of the same tokens."""
    if said.size > scores.size or not np.isfinite(said).all():
        return float("inf")
    difference = float(np.abs(said - scores[: said.size]).mean())
    return difference if np.isfinite(difference) else float("inf")
