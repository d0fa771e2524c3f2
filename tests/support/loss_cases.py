"""Inputs of the loss, one configuration of each estimator, and an oracle in plain floats."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings, strategies as st
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.objective import PolicyLoss, segment_wise_ppo_loss

Loss = Callable[..., PolicyLoss]
FREE = LossConfig(clip_epsilon=0.999, clip_epsilon_high=1e9, behavior_weight_cap=None)
CENTRES = ("segment", "proximal", "behavior", "past")
untimed = settings(deadline=None, max_examples=50)
few = settings(deadline=None, max_examples=15)  # of a seed, for each of many configs
SEEDS = st.integers(0, 2**32 - 1)

_WEIGHED = LossConfig(trust_region="proximal", rejection_on="weight", behavior_weight_cap=1.5)
_BEHAVIOR = LossConfig(trust_region="behavior", behavior_weight_cap=None)


def _but(config: LossConfig, **changes: object) -> LossConfig:
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]


ESTIMATORS = {
    "segment": LossConfig(),
    "clip-higher": LossConfig(clip_epsilon=0.1, clip_epsilon_high=0.3),
    "dual clip": LossConfig(dual_clip=1.5),
    "decoupled": LossConfig(trust_region="proximal", behavior_weight_floor=0.5),
    "origin": LossConfig(trust_region="proximal", bridge_exponent=0.0),
    "bent bridge": LossConfig(
        trust_region="proximal", bridge_exponent=0.5, bridge_cap=1.2, dual_clip=2.0
    ),
    "weight capped": _WEIGHED,
    "segment weight": LossConfig(
        rejection_on="weight", behavior_weight_cap=2.0, behavior_weight_floor=0.8
    ),
    "behavior": LossConfig(trust_region="behavior", behavior_weight_cap=1.3),
    "past": LossConfig(trust_region="past", behavior_weight_floor=0.4),
    "IcePop": _but(_WEIGHED, behavior_weight_floor=0.7),
    "TIS": _but(_WEIGHED, correction="truncate"),
    "TIS from both sides, no clip": _but(
        _WEIGHED, correction="truncate", behavior_weight_floor=0.7, surrogate="unclipped"
    ),
    "TIS of segments": _but(_WEIGHED, correction="truncate", trust_region="segment"),
    "origin, no clip": LossConfig(
        surrogate="unclipped", trust_region="proximal", bridge_exponent=0.0
    ),
    "sequence mask": _but(_WEIGHED, rejection_level="sequence", behavior_weight_floor=0.3),
    "geometric": _but(
        LossConfig(), rejection_level="geometric", behavior_weight_cap=1.15,
        behavior_weight_floor=0.85,
    ),
    "CISPO": _but(_BEHAVIOR, surrogate="cispo"),
    "CISPO masked": _but(
        _BEHAVIOR, surrogate="cispo", behavior_weight_cap=1.5, clip_epsilon_high=0.4
    ),
    "unclipped": _but(_BEHAVIOR, surrogate="unclipped", behavior_weight_cap=2.0),
    "GSPO": _but(_BEHAVIOR, ratio_level="sequence", aggregation="sequence", clip_epsilon=0.05),
    "GSPO of segments": LossConfig(ratio_level="sequence", clip_epsilon=0.05, dual_clip=1.1),
    "GSPO truncated": _but(
        _WEIGHED, ratio_level="sequence", correction="truncate", behavior_weight_cap=1.05,
        surrogate="unclipped",
    ),
    "GSPO with CISPO": _but(
        _BEHAVIOR, ratio_level="sequence", surrogate="cispo", clip_epsilon_high=0.03
    ),
    "behavior mask": LossConfig(trust_region="proximal", behavior_mask=True),
    "behavior mask, no clip": LossConfig(
        trust_region="proximal", behavior_mask=True, surrogate="unclipped", clip_epsilon_high=0.3
    ),
    "GRPO": _but(_BEHAVIOR, aggregation="sequence"),
    "Dr. GRPO": LossConfig(aggregation="constant", aggregation_length=10),
}  # fmt: skip
each_estimator = pytest.mark.parametrize("config", ESTIMATORS.values(), ids=ESTIMATORS)


_CHOICES: dict[str, tuple[object, ...]] = {
    "ratio_level": ("token", "sequence"),
    "correction": ("mask", "truncate"),
    "rejection_level": ("token", "sequence", "geometric"),
    "trust_region": CENTRES,
    "rejection_on": ("drift", "weight"),
    "behavior_mask": (False, True),
    "aggregation": ("token", "sequence", "constant"),
    "bridge_exponent": (1.0, 0.5),
    "bridge_cap": (None, 1.2),
    "behavior_weight_cap": (None, 1.3),
    "behavior_weight_floor": (None, 0.8),
    "dual_clip": (None, 1.4),
}


def every_combination(surrogate: str) -> Iterator[LossConfig]:
    """All settings of a surrogate that are not refused."""
    for values in itertools.product(*_CHOICES.values()):
        chosen: dict[str, Any] = dict(zip(_CHOICES, values, strict=True), surrogate=surrogate)
        if chosen["aggregation"] == "constant":
            chosen["aggregation_length"] = 9
        with contextlib.suppress(ConfigError):
            yield LossConfig(**chosen)


@dataclasses.dataclass
class Case:
    """Inputs of the loss: n, x, q, b, A (float64), mask, and lags (int64, 0 unless given)."""

    target: Tensor
    proximal: Tensor
    segment: Tensor
    behavior: Tensor
    advantages: Tensor
    mask: Tensor
    lags: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.long))

    def __post_init__(self) -> None:
        self.lags = self.lags.expand_as(self.mask)

    @classmethod
    def random(cls, seed: int, spread: float = 0.5, shape: tuple[int, int] = (3, 7)) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(scale: float) -> Tensor:
            return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

        base = -1.5 + normal(0.5)
        policies = [base + normal(spread) for _ in range(4)]
        mask = torch.rand(shape, generator=generator) < 0.7
        mask[0, 0] = True
        advantages = normal(1.0)
        lags = torch.randint(4, shape, generator=generator)
        return cls(*policies, advantages=advantages, mask=mask, lags=lags)

    def loss(
        self,
        config: LossConfig,
        num_tokens: float | None = None,
        *,
        function: Loss = segment_wise_ppo_loss,
    ) -> PolicyLoss:
        *tensors, lags = self.tensors()
        return function(*tensors, config=config, num_tokens=num_tokens, lags=lags)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def gradient(
        self,
        config: LossConfig,
        num_tokens: float | None = None,
        *,
        function: Loss = segment_wise_ppo_loss,
    ) -> Tensor:
        """Of the loss, with respect to n; [B, T]."""
        target = self.target.clone().requires_grad_()
        result = dataclasses.replace(self, target=target).loss(
            config, num_tokens, function=function
        )
        return torch.autograd.grad(result.loss, target)[0]

    def rows(self, rows: list[int]) -> Case:
        return Case(*(tensor[rows] for tensor in self.tensors()))

    def but(self, **changes: Tensor) -> Case:
        return dataclasses.replace(self, **changes)

    def with_junk(self, junk: float) -> Case:
        """The same, with ``junk`` wherever the mask is False."""
        dirty = (torch.where(self.mask, t, junk) for t in self.tensors()[:5])
        return Case(*dirty, mask=self.mask, lags=self.lags)


@dataclasses.dataclass
class Reference:
    """What the loss must be: the number, the kept tokens, and dL/dn."""

    loss: float
    kept: Tensor
    gradient: Tensor


def reference(case: Case, config: LossConfig) -> Reference:
    """The formulas of DESIGN section 2 and of the papers, token by token, in plain floats."""
    kept = torch.zeros_like(case.mask)
    gradient = torch.zeros_like(case.target)
    total, denominator = 0.0, 0.0
    for row in range(case.mask.shape[0]):
        places = case.mask[row].nonzero().flatten().tolist()
        if not places:
            continue
        denominator += {
            "token": len(places), "sequence": 1, "constant": config.aggregation_length or 0,
        }[config.aggregation]  # fmt: skip
        share = 1 / len(places) if config.aggregation == "sequence" else 1.0
        for place, (value, slope) in zip(places, _row(case, config, row, places), strict=True):
            if value is None:
                continue
            kept[row, place] = True
            total -= share * value
            gradient[row, place] = -share * slope
    return Reference(total / denominator, kept, gradient / denominator)


def _row(
    case: Case, config: LossConfig, row: int, places: list[int]
) -> list[tuple[float | None, float]]:
    """(value, dvalue/dn) of the tokens of a row; no value for one that is masked."""
    tokens = [tuple(float(tensor[row, place]) for tensor in case.tensors()[:5]) for place in places]
    lags: list[int] = case.lags[row, places].tolist()
    weights, ratios, drifts = [], [], []
    for (n, x, q, b, _), lag in zip(tokens, lags, strict=True):
        past = b if lag == 1 else q
        m = {"segment": q, "past": past, "proximal": x, "behavior": b}[config.trust_region]
        weight = math.exp(m - b)
        if config.trust_region == "proximal":
            bridge = min(math.exp(x - q), config.bridge_cap or math.inf)
            weight = math.exp(q - b) * bridge**config.bridge_exponent
        weights.append(weight)
        ratios.append(math.exp(n - m))
        drifts.append(math.exp(x - b))
    if config.ratio_level == "sequence":
        weights = [math.prod(weights) ** (1 / len(weights))] * len(weights)
        ratios = [math.prod(ratios) ** (1 / len(ratios))] * len(ratios)
    cap = config.behavior_weight_cap or math.inf
    floor = config.behavior_weight_floor or 0.0
    tested = drifts if config.rejection_on == "drift" else weights
    if config.correction == "truncate":
        weights = [min(max(weight, floor), cap) for weight in weights]
        tested = [1.0] * len(tested)
    elif config.rejection_level == "sequence":
        tested = [math.prod(tested)] * len(tested)
    elif config.rejection_level == "geometric":
        tested = [math.prod(tested) ** (1 / len(tested))] * len(tested)
    low, high = 1 - config.clip_epsilon, 1 + config.upper_epsilon
    found: list[tuple[float | None, float]] = []
    for (n, _, _, _, a), w, r, drift, test in zip(
        tokens, weights, ratios, drifts, tested, strict=True
    ):
        gone = config.behavior_mask and ((a > 0 and drift > high) or (a < 0 and drift < low))
        if not floor <= test <= cap or gone:
            found.append((None, 0.0))
        elif config.surrogate == "unclipped":
            found.append((w * r * a, w * r * a))
        elif config.surrogate == "cispo":
            found.append((min(w * r, high) * a * n, min(w * r, high) * a))
        else:
            worst = min(r * a, min(max(r, low), high) * a)
            if config.dual_clip is not None and a < 0:
                worst = max(worst, config.dual_clip * a)
            found.append((w * worst, w * worst if worst == r * a else 0.0))
    return found
