"""Would the oracles notice? Each estimator's source is changed in one place, and must be caught.

A mutant is the four modules of the loss, loaded once more from text. The checks that it has to fail
are the oracle of ``loss_cases`` and a few numbers, so that one takes a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from sdp_lightning.config import LossConfig
from support.loss_cases import ESTIMATORS, FREE, Case, reference
from support.mutated_modules import load

torch.set_num_threads(1)
MODULES = ("aggregation", "corrections", "surrogates", "losses")  # in the order of their imports
MUTATIONS = [
    # swap min and max
    ("surrogates", "(advantages < 0) & (measured > most)", "(advantages < 0) & (measured < most)"),
    ("surrogates", "measured.clamp(max=upper)", "measured.clamp(min=upper)"),
    ("surrogates", "where(clipped, bound, log_ratio)", "where(clipped, log_ratio, bound)"),
    ("surrogates", "torch.where(above, upper,", "torch.where(below, upper,"),
    ("surrogates", "above | below", "above & below"),
    ("surrogates", "clipped | dual", "clipped & ~dual"),
    ("surrogates", "measured > upper", "measured < upper"),
    ("corrections", "bridge.clamp(max=", "bridge.clamp(min="),
    ("corrections", "(advantages > 0) & (log_ratio >", "(advantages < 0) & (log_ratio >"),
    ("corrections", "(advantages < 0) & (log_ratio <", "(advantages > 0) & (log_ratio <"),
    ("corrections", "steps / (steps + share_done)", "share_done / (steps + share_done)"),
    ("corrections", "0.0).max()", "math.inf).min()"),
    # swap a ratio
    ("losses", "target - centre", "centre - target"),
    ("losses", "target - centre", "target - behavior"),
    ("losses", "proximal - behavior,", "behavior - proximal,"),
    ("losses", "proximal - behavior,", "segment - behavior,"),
    ("corrections", "return segment, segment - behavior", "return segment, behavior - segment"),
    ("corrections", "return segment, segment - behavior", "return segment, proximal - behavior"),
    ("corrections", "return segment, segment - behavior", "return proximal, segment - behavior"),
    ("corrections", "return proximal, proximal - behavior", "return proximal, segment - behavior"),
    ("corrections", "bridge = proximal - segment", "bridge = segment - proximal"),
    ("corrections", "config.bridge_exponent * bridge", "bridge"),
    ("corrections", "torch.zeros_like(behavior)", "proximal - behavior"),
    ("corrections", "tested = log_drift if", "tested = log_weight if"),
    ("corrections", "torch.lerp(behavior, target,", "torch.lerp(target, behavior,"),
    ("corrections", "torch.lerp(behavior, proximal,", "torch.lerp(proximal, behavior,"),
    ("surrogates", "cispo(target, log_weight + log_ratio,", "cispo(target, log_weight,"),
    ("surrogates", "unclipped(log_weight + log_ratio,", "unclipped(log_ratio,"),
    ("surrogates", "log_value = log_weight + torch", "log_value = -log_weight + torch"),
    ("surrogates", "torch.where(acting, target, 0.0)", "torch.where(acting, -target, 0.0)"),
    ("surrogates", "weight = sequence_mean(log_weight", "weight = sequence_mean(-log_weight"),
    ("corrections", "torch.where(lags == 1, behavior,", "torch.where(lags <= 1, behavior,"),
    ("corrections", "torch.where(lags == 1, behavior,", "torch.where(lags >= 1, behavior,"),
    ("corrections", "torch.where(lags == 1, behavior,", "torch.where(lags != 1, behavior,"),
    ("corrections", 'in ("segment", "past")', '== "segment"'),
    # a gradient where none belongs, or none where one does
    ("surrogates", "measured = log_importance.detach()", "measured = log_importance"),
    ("surrogates", "log_ratio - measured", "log_ratio - log_ratio"),
    ("corrections", "(t.detach()) for t in (target,", "(t) for t in (target,"),
    ("corrections", "(t.detach()) for t in (segment, b", "(t) for t in (segment, b"),
    # mask after exp
    (
        "surrogates",
        "torch.where(acting, log_value, 0.0).exp() * torch.where(acting, advantages, 0.0)",
        "torch.where(acting, log_value.exp() * advantages, 0.0)",
    ),
    (
        "surrogates",
        "acting = kept & (advantages != 0)\n    return torch.where(acting, log",
        "acting = kept\n    return torch.where(acting, log",
    ),
    ("surrogates", "weighted * torch.where(acting, target, 0.0)", "weighted * target"),
    ("aggregation", "torch.where(loss_mask, values, 0.0).sum(", "(loss_mask * values).sum("),
    ("losses", "torch.where(loss_mask, log_weight, 0.0)", "log_weight * loss_mask"),
    ("losses", "torch.where(loss_mask, log_ratio.detach(), 0.0)", "log_ratio.detach()"),
    ("losses", "clipped=kept & bounded", "clipped=bounded"),
    # reverse the cap
    ("corrections", "log_value <= math.log(cap)", "log_value >= math.log(cap)"),
    ("corrections", "log_value <= math.log(cap)", "log_value < math.log(cap)"),
    ("corrections", "log_value >= math.log(floor)", "log_value <= math.log(floor)"),
    ("corrections", "log_value >= math.log(floor)", "log_value > math.log(floor)"),
    ("corrections", "log_value.clamp(max=math.log(cap))", "log_value.clamp(min=math.log(cap))"),
    ("corrections", "log_value.clamp(min=math.log(floor))", "log_value.clamp(max=math.log(floor))"),
    ("corrections", "loss_mask & within_bounds", "loss_mask & ~within_bounds"),
    ("corrections", "loss_mask & within_bounds", "within_bounds"),
    ("corrections", "kept & ~(above | below)", "kept & (above | below)"),
    ("corrections", "mean <= cap", "mean >= cap"),
    ("corrections", "log_drift.abs() > bound", "log_drift.abs() < bound"),
    ("corrections", "torch.sign(advantages) > 0", "torch.sign(advantages) < 0"),
    ("corrections", "distance[1:] > distance[:-1]", "distance[1:] < distance[:-1]"),
    # sequences
    ("corrections", "tested = sequence_sum(", "tested = sequence_mean("),
    ("corrections", "tested = sequence_mean(", "tested = sequence_sum("),
    ("surrogates", "sequence_mean(measured, loss_mask)", "measured"),
    ("losses", "of_sequences(log_weight, log_ratio, loss_mask)", "(log_weight, log_ratio)"),
    # change the denominator
    ("losses", "loss_denominator(loss_mask, config) if", "loss_mask.numel() if"),
    ("losses", "num_tokens is None else num_tokens", "num_tokens is None else loss_mask.sum()"),
    ("losses", "_mean(value, loss_mask, config", "_mean(value, kept, config"),
    ("losses", "value * shares", "value"),
    ("losses", "return -(value", "return (value"),
    ("aggregation", "return loss_mask.sum()", "return loss_mask.any(-1).sum()"),
    ("aggregation", "loss_mask.any(-1).sum()\n", "loss_mask.shape[0]\n"),
    ("aggregation", "sequences * (config.aggregation_length or 1)", "sequences"),
    ("aggregation", "tokens.clamp(min=1).to(dtype).reciprocal()", "tokens.clamp(min=1).to(dtype)"),
    ("aggregation", "/ loss_mask.sum(-1, keepdim=True).clamp(min=1)", "/ loss_mask.shape[-1]"),
]  # fmt: skip


class Mutant:
    """The modules of the loss, from changed text."""

    def __init__(self, patch: pytest.MonkeyPatch, module: str, old: str, new: str) -> None:
        modules = {
            name: load(patch, name, *((old, new) if name == module else ())) for name in MODULES
        }
        self.loss = modules["losses"].segment_wise_ppo_loss
        self.corrections = modules["corrections"]
        self.aggregation = modules["aggregation"]


def check(mutant: Mutant) -> None:
    """Raise AssertionError unless the modules do what they should."""
    for number, config in enumerate(ESTIMATORS.values()):
        wide, near = Case.random(number), Case.random(number + 100, spread=0.2)
        near.mask[1] = False
        check_case(mutant, wide, config)
        check_case(mutant, near, config)
    check_bounds(mutant)
    check_overflow(mutant)
    check_policies(mutant)
    check_second_moment(mutant)


def check_case(mutant: Mutant, case: Case, config: LossConfig) -> None:
    expected = reference(case, config)
    result = case.loss(config, function=mutant.loss)
    gradient = case.gradient(config, function=mutant.loss)
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-9, abs=1e-12)
    assert torch.equal(result.kept, expected.kept)
    assert torch.allclose(gradient, expected.gradient, rtol=1e-9, atol=1e-14)
    assert not (result.clipped & ~result.kept).any()
    if config.surrogate == "ppo":
        flat = expected.kept & (case.advantages != 0) & (expected.gradient == 0)
        assert torch.equal(result.clipped, flat)
    elif config.surrogate == "cispo":
        whole = (result.log_weight + result.log_ratio).exp()
        assert torch.equal(result.clipped, expected.kept & (whole > 1 + config.upper_epsilon))
    dirty = case.with_junk(math.nan)
    assert torch.equal(dirty.gradient(config, function=mutant.loss), gradient)
    again = dirty.loss(config, function=mutant.loss)
    assert torch.equal(again.loss, result.loss)
    assert torch.equal(again.log_weight, result.log_weight)
    assert torch.equal(again.log_ratio, result.log_ratio)
    half = case.loss(config, 2 * float(mutant.aggregation.loss_denominator(case.mask, config)),
                     function=mutant.loss)  # fmt: skip
    assert 2 * half.loss.item() == pytest.approx(result.loss.item(), rel=1e-9, abs=1e-12)


def check_bounds(mutant: Mutant) -> None:
    """Both are inclusive."""
    edge = torch.tensor([[math.log(5.0), math.log(0.25)]], dtype=torch.float64)
    zero = torch.zeros_like(edge)
    case = Case(edge, edge, edge, zero, zero + 1, zero == 0)
    config = LossConfig(behavior_weight_cap=5.0, behavior_weight_floor=0.25)
    assert case.loss(config, function=mutant.loss).kept.all()


def check_overflow(mutant: Mutant) -> None:
    """Where a token does not act, what overflows there reaches nothing."""
    far = torch.full((1, 2), -2000.0, dtype=torch.float64)
    near = torch.full((1, 2), -0.1, dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    rejected = Case(near, near, far / 2, far, torch.tensor([[1.0, -1.0]]), mask)
    idle = Case(near, near, far / 2, far, torch.zeros(1, 2), mask)
    for case, config in ((rejected, LossConfig()), (idle, FREE)):
        assert not case.gradient(config, function=mutant.loss).any()


def check_policies(mutant: Mutant) -> None:
    target, behavior = torch.tensor([-1.0] * 3, requires_grad=True), torch.tensor([-3.0] * 3)
    lags = torch.tensor([0, 1, 3])
    found = mutant.corrections.loglinear_proximal(target, behavior, lags, 0.5)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([-3.0, -3 + 4 / 3, -3 + 12 / 7])
    found = mutant.corrections.loglinear_segment(target, behavior, lags)
    assert found.tolist() == pytest.approx([-1.0, -1.0, -3 + 2 / 3])
    found = mutant.corrections.past_centre(target, behavior, lags)
    assert not found.requires_grad
    assert found.tolist() == [-1.0, -3.0, -1.0]


def check_second_moment(mutant: Mutant) -> None:
    drift = torch.tensor([[0.1, -0.2, 0.4, 0.9, 0.3, 0.3]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = torch.ones_like(drift, dtype=torch.bool)
    inside = mutant.corrections.second_moment_set(drift, advantages, mask)
    # Means of .01, .04, .09, .09, .16: .01, .025, (.0467,) .0575, .078; the equals go together.
    bound = mutant.corrections.second_moment_bound(drift[inside], 0.05)
    assert bound.item() == pytest.approx(0.2)
    left = mutant.corrections.within_second_moment(drift, advantages, mask, bound)
    assert left.tolist() == [[True, True, False, True, False, False]]
    assert float(mutant.corrections.second_moment_bound(drift[inside], 1e-9)) == 0.0


def test_the_code_as_it_is_passes_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    check(Mutant(monkeypatch, "losses", "", ""))


@pytest.mark.parametrize(
    ("module", "old", "new"), MUTATIONS, ids=[f"{m}: {old} -> {new}" for m, old, new in MUTATIONS]
)
def test_a_mutant_is_caught(
    monkeypatch: pytest.MonkeyPatch, module: str, old: str, new: str
) -> None:
    mutant = Mutant(monkeypatch, module, old, new)
    with pytest.raises(AssertionError):
        check(mutant)


# One mutant of each of five kinds, and the estimators in which it stays unseen because they have no
# such part; every other one must catch it by its own numbers.
KINDS: dict[str, tuple[tuple[tuple[str, str, str], ...], Callable[[LossConfig], bool]]] = {
    "swap min and max": (
        (
            ("surrogates", "where(clipped, bound, log_ratio)", "where(clipped, log_ratio, bound)"),
            ("surrogates", "measured.clamp(max=upper)", "measured.clamp(min=upper)"),
            ("corrections", "log_value.clamp(max=", "log_value.clamp(min="),
        ),
        lambda config: config.surrogate == "unclipped" and config.correction == "mask",
    ),
    "swap a ratio": ((("losses", "target - centre", "centre - target"),), lambda _: False),
    "mask after exp": (
        (
            (
                "surrogates",
                "torch.where(acting, log_value, 0.0).exp() * torch.where(acting, advantages, 0.0)",
                "torch.where(acting, log_value.exp() * advantages, 0.0)",
            ),
            # CISPO follows no exponential; what it masks is what it multiplies with.
            ("surrogates", "weighted * torch.where(acting, target, 0.0)", "weighted * target"),
        ),
        lambda _: False,
    ),
    "reverse the cap": (
        (
            ("corrections", "log_value <= math.log(cap)", "log_value >= math.log(cap)"),
            ("corrections", "log_value.clamp(max=", "log_value.clamp(min="),
        ),
        lambda config: config.behavior_weight_cap is None,
    ),
    "change the denominator": (
        (("losses", "loss_denominator(loss_mask, config) if", "loss_mask.numel() if"),),
        lambda _: False,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_estimator_catches_each_kind_of_mutant_that_it_can_see(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    mutations, is_blind = KINDS[kind]
    mutants: list[Mutant] = []
    for mutation in mutations:
        with monkeypatch.context() as patch:
            mutants.append(Mutant(patch, *mutation))

    def catches(config: LossConfig) -> bool:
        for mutant in mutants:
            try:
                for seed in (3, 4):
                    check_case(mutant, Case.random(seed), config)
            except AssertionError:
                return True
        return False

    unseen = {name for name, config in ESTIMATORS.items() if not catches(config)}
    assert unseen == {name for name, config in ESTIMATORS.items() if is_blind(config)}
