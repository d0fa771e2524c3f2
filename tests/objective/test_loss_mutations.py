"""Would the oracles notice? Each estimator's source is changed in one place, and must be caught.

A mutant is the modules of the loss, loaded once more with one expression changed. It must fail the
oracle of ``loss_cases`` or a few numbers, which takes a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from sdp_lightning.config import LossConfig
from support.loss_cases import ESTIMATORS, FREE, Case, reference
from support.mutated_modules import Mutation, load

torch.set_num_threads(1)
# In the order of their imports.
MODULES = (
    *("precision", "aggregation", "segment_proximal", "trust_region", "rejection", "surrogates"),
    "loss",
)
LOSS, CENTRE = "loss._policy_loss", "trust_region.centre_and_log_weight"
MUTATIONS = [
    # swap min and max
    Mutation("surrogates.ppo", "(A < 0) & (B > C)", "(A < 0) & (B < C)"),
    Mutation("surrogates.cispo", "A.clamp(max=B)", "A.clamp(min=B)"),
    Mutation("surrogates.ppo", "A + torch.where(B, C, D)", "A + torch.where(B, D, C)"),
    Mutation("surrogates.ppo", "torch.where(A, B, torch.full_like(C, D))",
             "torch.where(~A, B, torch.full_like(C, D))"),
    Mutation("surrogates.ppo", "A | B", "A & B", 0),
    Mutation("surrogates.ppo", "A | B", "A & ~B", 1),
    Mutation("surrogates.cispo", "A > B", "A < B"),
    Mutation(CENTRE, "A.clamp(max=B)", "A.clamp(min=B)"),
    Mutation("rejection.outside_region", "(A > 0) & (B > C)", "(A < 0) & (B > C)"),
    Mutation("rejection.outside_region", "(A < 0) & (B < C)", "(A > 0) & (B < C)"),
    Mutation("segment_proximal.loglinear_proximal", "A / (A + B)", "B / (A + B)"),
    Mutation("rejection.second_moment_bound", "torch.where(A, B, 0.0).max()",
             "torch.where(A, B, math.inf).min()"),
    # swap a ratio
    Mutation(LOSS, "A - B", "B - A", 0),
    Mutation(LOSS, "correct(A - B, C, D, E, F)", "correct(B - A, C, D, E, F)"),
    Mutation(LOSS, "correct(A - B, C, D, E, F)", "correct(C, C, D, E, F)"),
    Mutation(CENTRE, "return A, A - B", "return B, A - B", 0),
    Mutation(CENTRE, "return A, A - B", "return A, B - A", 0),
    Mutation(CENTRE, "return A, A - B", "return A, proximal - B", 0),
    Mutation(CENTRE, "return A, A - B", "return proximal, A - B", 0),
    Mutation(CENTRE, "return A, A - B", "return A, segment - B", 2),
    Mutation(CENTRE, "proximal - segment", "segment - proximal"),
    Mutation(CENTRE, "config.bridge_exponent * A", "A"),
    Mutation(CENTRE, "torch.zeros_like(behavior)", "proximal - behavior"),
    Mutation("rejection.correct", "log_drift if A else log_weight",
             "log_weight if A else log_weight"),
    Mutation("segment_proximal.loglinear_proximal", "torch.lerp(A, B, C)", "torch.lerp(B, A, C)"),
    Mutation("segment_proximal.loglinear_segment", "torch.lerp(A, B, C)", "torch.lerp(B, A, C)"),
    Mutation("surrogates.surrogate", "cispo(A, B + C, D, E, F)", "cispo(A, B, D, E, F)"),
    Mutation("surrogates.surrogate", "unclipped(A + B, C, D)", "unclipped(B, C, D)"),
    Mutation("surrogates.ppo", "log_weight + A", "-log_weight + A"),
    Mutation("surrogates.cispo", "torch.where(A, target, 0.0)", "torch.where(A, -target, 0.0)"),
    Mutation("surrogates.of_sequences", "sequence_mean(log_weight, A)",
             "sequence_mean(-log_weight, A)"),
    Mutation(CENTRE, "A == 1", "A <= 1"),
    Mutation(CENTRE, "A == 1", "A >= 1"),
    Mutation(CENTRE, "A == 1", "A != 1"),
    Mutation(CENTRE, 'A == "past"', "False"),
    # a gradient where none belongs, or none where one does
    Mutation("surrogates.cispo", "A.detach()", "A"),
    Mutation("surrogates.of_sequences", "A - B", "A - A"),
    Mutation("segment_proximal.loglinear_proximal", "A.detach()", "A"),
    Mutation("segment_proximal.loglinear_segment", "A.detach()", "A"),
    # mask after exp
    Mutation("surrogates._times_advantage", "torch.where(A, log_value, 0.0)", "log_value"),
    Mutation("surrogates._times_advantage", "A & (B != 0)", "A"),
    Mutation("surrogates.cispo", "A * torch.where(B, target, 0.0)", "A * target"),
    Mutation("aggregation.sequence_sum", "torch.where(loss_mask, values, 0.0)",
             "loss_mask * values"),
    Mutation(LOSS, "torch.where(loss_mask, A, 0.0)", "A * loss_mask", 0),
    Mutation(LOSS, "torch.where(loss_mask, A, 0.0)", "A", 1),
    Mutation(LOSS, "A & B", "B"),
    # the bound of every exponent
    Mutation("surrogates._times_advantage", "bounded_log(A)", "A"),
    Mutation("precision.bounded_log", "torch.where(A, B, C)", "torch.where(A, C, B)"),
    Mutation("precision.bounded_log", "torch.where(A, B, C)", "C.clamp(max=LARGEST_LOG)"),
    Mutation("precision.bounded_log", "A.log1p()", "A"),
    Mutation("precision.bounded_log", "A.clamp(min=0)", "A"),
    Mutation("precision.bounded_log", "A - LARGEST_LOG", "A"),
    # reverse the cap
    Mutation("rejection.within_bounds", "A <= math.log(B)", "A >= math.log(B)"),
    Mutation("rejection.within_bounds", "A <= math.log(B)", "A < math.log(B)"),
    Mutation("rejection.within_bounds", "A >= math.log(B)", "A <= math.log(B)"),
    Mutation("rejection.within_bounds", "A >= math.log(B)", "A > math.log(B)"),
    Mutation("rejection.clamped_to_bounds", "A.clamp(max=B)", "A.clamp(min=B)"),
    Mutation("rejection.clamped_to_bounds", "A.clamp(min=B)", "A.clamp(max=B)"),
    Mutation("rejection.correct", "A & within_bounds(B, C)", "A & ~within_bounds(B, C)"),
    Mutation("rejection.correct", "A & within_bounds(B, C)", "within_bounds(B, C)"),
    Mutation("rejection.correct", "A & ~(B | C)", "A & (B | C)"),
    Mutation("rejection.second_moment_bound", "A <= cap", "A >= cap"),
    Mutation("rejection.within_second_moment", "A.abs() > bound", "A.abs() < bound"),
    Mutation("rejection.second_moment_set", "A * B > 0", "A * B < 0"),
    Mutation("rejection.second_moment_bound", "A[1:] > A[:-1]", "A[1:] < A[:-1]"),
    # sequences
    Mutation("rejection.correct", "sequence_sum(A, B)", "sequence_mean(A, B)"),
    Mutation("rejection.correct", "sequence_mean(A, B)", "sequence_sum(A, B)"),
    Mutation("surrogates.of_sequences", "sequence_mean(A, B) + C", "A + C"),
    Mutation(LOSS, "of_sequences(A, B, C)", "(A, B)"),
    # change the denominator
    Mutation("loss._mean", "loss_denominator(A, B) if C else D", "A.numel() if C else D"),
    Mutation("loss._mean", "A if B is None else B", "A if B is None else loss_mask.sum()"),
    Mutation("loss.loss_of_rows", "_mean(A, B, C, D, E)", "_mean(A, B, made.kept, D, None)"),
    Mutation("loss._mean", "A * B", "A"),
    Mutation("loss._mean", "-A / B", "A / B"),
    Mutation("aggregation.loss_denominator", "return loss_mask.sum()",
             "return loss_mask.any(-1).sum()"),
    Mutation("aggregation.loss_denominator", "loss_mask.any(-1).sum()", "loss_mask.shape[0]"),
    Mutation("aggregation.loss_denominator", "A * (B.aggregation_length or 1)", "A"),
    Mutation("aggregation.token_shares", "A.reciprocal()", "A"),
    Mutation("aggregation.sequence_mean", "A / B.clamp(min=1)", "A / loss_mask.shape[-1]"),
]  # fmt: skip


class Mutant:
    """The modules of the loss, with one expression changed."""

    def __init__(self, patch: pytest.MonkeyPatch, mutation: Mutation | None = None) -> None:
        modules = {name: load(patch, name, mutation) for name in MODULES}
        self.loss = modules["loss"].segment_wise_ppo_loss
        self.aggregation = modules["aggregation"]
        self.rejection = modules["rejection"]
        self.segment_proximal = modules["segment_proximal"]


def check(mutant: Mutant) -> None:
    """Raise AssertionError unless the modules do what they should."""
    for number, config in enumerate(ESTIMATORS.values()):
        wide, near = Case.random(number), Case.random(number + 100, spread=0.2)
        near.mask[1] = False
        check_case(mutant, wide, config)
        check_case(mutant, near, config)
    check_bounds(mutant)
    check_overflow(mutant)
    check_large(mutant)
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
    near = torch.full((1, 2), -0.1, dtype=torch.float64)
    far, nowhere = torch.full_like(near, -2000.0), torch.full_like(near, -math.inf)
    mask = torch.ones(1, 2, dtype=torch.bool)
    rejected = Case(near, near, far / 2, far, torch.tensor([[1.0, -1.0]]), mask)
    idle = Case(near, near, nowhere, nowhere, torch.zeros(1, 2), mask)
    for case, config in ((rejected, LossConfig()), (idle, FREE)):
        assert not case.gradient(config, function=mutant.loss).any()


def check_large(mutant: Mutant) -> None:
    """A bad token whose ratio is e^50 counts as e^20 (1 + 30), with the slope e^20."""
    b = torch.full((1, 2), -60.0, dtype=torch.float64)
    n = torch.tensor([[-10.0, -41.0]], dtype=torch.float64)
    case = Case(n, b, b, b, torch.full_like(b, -1.0), b < 0)
    slopes = torch.tensor([[20.0, 19.0]], dtype=torch.float64).exp()
    loss = case.loss(LossConfig(), function=mutant.loss).loss.item()
    assert loss == pytest.approx(float(31 * slopes[0, 0] + slopes[0, 1]) / 2)
    assert torch.allclose(case.gradient(LossConfig(), function=mutant.loss), slopes / 2)


def check_policies(mutant: Mutant) -> None:
    target, behavior = torch.tensor([-1.0] * 3, requires_grad=True), torch.tensor([-3.0] * 3)
    lags = torch.tensor([0, 1, 3])
    found = mutant.segment_proximal.loglinear_proximal(target, behavior, lags, 0.5)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([-3.0, -3 + 4 / 3, -3 + 12 / 7])
    found = mutant.segment_proximal.loglinear_segment(target, behavior, lags)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([-1.0, -1.0, -3 + 2 / 3])


def check_second_moment(mutant: Mutant) -> None:
    drift = torch.tensor([[0.1, -0.2, 0.4, 0.9, 0.3, 0.3]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = torch.ones_like(drift, dtype=torch.bool)
    inside = mutant.rejection.second_moment_set(drift, advantages, mask)
    # Means of .01, .04, .09, .09, .16: .01, .025, (.0467,) .0575, .078; the equals go together.
    bound = mutant.rejection.second_moment_bound(drift[inside], 0.05)
    assert bound.item() == pytest.approx(0.2)
    left = mutant.rejection.within_second_moment(drift, advantages, mask, bound)
    assert left.tolist() == [[True, True, False, True, False, False]]
    assert float(mutant.rejection.second_moment_bound(drift[inside], 1e-9)) == 0.0


def test_the_code_as_it_is_passes_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    check(Mutant(monkeypatch))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutant_is_caught(monkeypatch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    mutant = Mutant(monkeypatch, mutation)
    with pytest.raises(AssertionError):
        check(mutant)


# One mutant of each of five kinds, and the estimators in which it stays unseen because they have no
# such part; every other one must catch it by its own numbers.
KINDS: dict[str, tuple[tuple[Mutation, ...], Callable[[LossConfig], bool]]] = {
    "swap min and max": (
        (
            Mutation("surrogates.ppo", "A + torch.where(B, C, D)", "A + torch.where(B, D, C)"),
            Mutation("surrogates.cispo", "A.clamp(max=B)", "A.clamp(min=B)"),
            Mutation("rejection.clamped_to_bounds", "A.clamp(max=B)", "A.clamp(min=B)"),
        ),
        lambda config: config.surrogate == "unclipped" and config.correction == "mask",
    ),
    "swap a ratio": ((Mutation(LOSS, "A - B", "B - A", 0),), lambda _: False),
    "mask after exp": (
        (
            Mutation("surrogates._times_advantage", "torch.where(A, log_value, 0.0)", "log_value"),
            # CISPO follows no exponential; what it masks is what it multiplies with.
            Mutation("surrogates.cispo", "A * torch.where(B, target, 0.0)", "A * target"),
        ),
        lambda _: False,
    ),
    "reverse the cap": (
        (
            Mutation("rejection.within_bounds", "A <= math.log(B)", "A >= math.log(B)"),
            Mutation("rejection.clamped_to_bounds", "A.clamp(max=B)", "A.clamp(min=B)"),
        ),
        lambda config: config.behavior_weight_cap is None,
    ),
    "change the denominator": (
        (Mutation("loss._mean", "loss_denominator(A, B) if C else D", "A.numel() if C else D"),),
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
            mutants.append(Mutant(patch, mutation))

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
