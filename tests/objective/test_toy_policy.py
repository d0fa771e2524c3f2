"""Bias and variance of every estimator's gradient on a policy small enough to enumerate.

Three tokens, two steps: nine sequences; a softmax for the first token and one for the second after
each first: twelve parameters. Expectations are sums over nine sequences, and sampling must agree.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.objective import (
    loglinear_proximal,
    loglinear_segment,
    second_moment_bound,
    second_moment_set,
    segment_wise_ppo_loss,
    within_second_moment,
)
from support.loss_cases import CENTRES, ESTIMATORS

torch.set_num_threads(1)
SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=2)))  # [9, 2]
UNBOUND = LossConfig(surrogate="unclipped", trust_region="behavior", behavior_weight_cap=None)
# The same by its weight: the centre matters, but for a bound that nothing reaches.
BY_WEIGHT = replace(
    UNBOUND, correction="truncate", rejection_on="weight", behavior_weight_cap=1e30,
    trust_region="proximal",
)  # fmt: skip
# With what the module prepares of them: policies on the log-linear way, and M2PO's own mask.
ALL = ESTIMATORS | {
    "log-linear segments": LossConfig(segment_proximal="loglinear"),
    "log-linear proximal": LossConfig(trust_region="proximal", proximal="loglinear"),
    "both log-linear": LossConfig(proximal="loglinear", segment_proximal="loglinear"),
    "M2PO": replace(UNBOUND, second_moment_cap=0.2),
}
SHARE_DONE = 0.5


def token_logprobs(parameters: Tensor) -> Tensor:
    """[9, 2] of every sequence, from [4, 3] logits."""
    table = parameters.log_softmax(-1)
    first, second = SEQUENCES[:, 0], SEQUENCES[:, 1]
    return torch.stack([table[0, first], table[1 + first, second]], -1)


@dataclass
class Toy:
    """Parameters [4, 3] of the four policies, float64, and the advantage of every sequence, [9].

    M2PO bounds a whole optimizer step; here each step has one sequence.
    """

    behavior: Tensor
    segment: Tensor
    proximal: Tensor
    target: Tensor
    advantages: Tensor
    lag: int = 0

    @classmethod
    def at_lag(cls, lag: int, step: float = 0.5, seed: int = 0) -> Toy:
        """Policies of a walk: b, then one version later q, ``lag`` later x, half a step on n."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        walk = 0.7 * draw(1, 4, 3) + torch.cumsum(step * draw(lag + 2, 4, 3), 0)
        target = walk[lag] + 0.5 * (walk[lag + 1] - walk[lag])
        rewards = draw(9)
        return cls(walk[0], walk[min(lag, 1)], walk[lag], target, rewards - rewards.mean(), lag)

    @property
    def probabilities(self) -> Tensor:
        """[9] of the sequences under the behavior policy."""
        return token_logprobs(self.behavior).sum(-1).exp()

    def gradients(self, config: LossConfig, rows: Tensor | None = None) -> Tensor:
        """[R, 12]: the gradient of the objective (minus the loss) on each sequence alone."""
        rows = torch.arange(9) if rows is None else rows
        target = token_logprobs(self.target).requires_grad_()
        inputs = [policy[rows] for policy in self.policies(config)]
        advantages = self.advantages[rows, None].expand(-1, 2)
        result = segment_wise_ppo_loss(
            target[rows], *inputs, advantages, self.kept(config)[rows],
            config=config, num_tokens=1.0, lags=torch.full((len(rows), 2), self.lag),
        )  # fmt: skip
        leaf = self.target.clone().requires_grad_()
        per_token = torch.autograd.grad(-result.loss, target)[0]  # [9, 2], summed over equal rows
        if len(rows) == 9:
            logprobs = token_logprobs(leaf)
            each = [
                torch.autograd.grad((per_token[i] * logprobs[i]).sum(), leaf, retain_graph=True)[0]
                for i in range(9)
            ]
            return torch.stack(each).flatten(1)
        total = torch.autograd.grad((per_token * token_logprobs(leaf)).sum(), leaf)[0]
        return total.flatten()[None]

    def policies(self, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
        """x, q and b of every sequence, [9, 2] each, as the module makes them."""
        n, x, q, b = map(token_logprobs, (self.target, self.proximal, self.segment, self.behavior))
        lags = torch.full((9, 2), self.lag)
        if config.proximal == "loglinear":
            x = loglinear_proximal(n, b, lags, SHARE_DONE)
        if config.segment_proximal == "loglinear":
            q = loglinear_segment(x, b, lags)
        return x, q, b

    def kept(self, config: LossConfig) -> Tensor:
        """[9, 2] bool: what M2PO leaves of every sequence; without it all."""
        whole, cap = torch.ones(9, 2, dtype=torch.bool), config.second_moment_cap
        if cap is None:
            return whole
        x, _, b = self.policies(config)
        rows: list[Tensor] = []
        for drift, advantage in zip(x - b, self.advantages, strict=True):
            both = advantage.expand(2)
            inside = second_moment_set(drift, both, whole[0])
            bound = second_moment_bound(drift[inside], cap)
            rows.append(within_second_moment(drift, both, whole[0], bound))
        return torch.stack(rows)

    def moments(self, config: LossConfig) -> tuple[Tensor, Tensor]:
        """Mean and variance of each component under the behavior policy, [12] each, exact."""
        gradients, weights = self.gradients(config), self.probabilities[:, None]
        mean = (weights * gradients).sum(0)
        return mean, (weights * (gradients - mean).square()).sum(0)

    def surrogate_gradient(self) -> Tensor:
        """[12] of the objective that PPO linearises: one token by n, all others by b."""
        leaf = self.target.clone().requires_grad_()
        ours, theirs = token_logprobs(leaf), token_logprobs(self.behavior)
        one_by_ours = [ours[:, t] + theirs[:, 1 - t] for t in range(2)]
        objective = sum((one.exp() * self.advantages).sum() for one in one_by_ours)
        assert isinstance(objective, Tensor)
        return torch.autograd.grad(objective, leaf)[0].flatten()

    def true_gradient(self) -> Tensor:
        """[12] of the expected advantage under the target policy."""
        leaf = self.target.clone().requires_grad_()
        objective = (token_logprobs(leaf).sum(-1).exp() * self.advantages).sum()
        return torch.autograd.grad(objective, leaf)[0].flatten()


def bias(toy: Toy, config: LossConfig) -> float:
    """Distance of the mean from the gradient of the surrogate objective."""
    return float((toy.moments(config)[0] - toy.surrogate_gradient()).norm())


def spread(toy: Toy, config: LossConfig) -> float:
    """Total variance."""
    return float(toy.moments(config)[1].sum())


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_sampled_gradients_have_the_enumerated_mean_and_variance(config: LossConfig) -> None:
    toy = Toy.at_lag(3)
    mean, variance = toy.moments(config)
    number = 20_000
    generator = torch.Generator().manual_seed(7)
    rows = torch.multinomial(toy.probabilities, number, replacement=True, generator=generator)
    # One batch, as a trainer has it: the loss's own sum over rows is the sum of their gradients.
    sampled = toy.gradients(config, rows)[0] / number
    assert ((sampled - mean).abs() <= 5 * (variance / number).sqrt() + 1e-12).all()
    each = toy.gradients(config)[rows]
    assert torch.allclose(each.mean(0), sampled, atol=1e-12)
    fourth = (toy.probabilities[:, None] * (toy.gradients(config) - mean) ** 4).sum(0)
    error = ((fourth - variance.square()) / number).sqrt()
    assert ((each.var(0) - variance).abs() <= 5 * error + 1e-3 * variance + 1e-12).all()


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_on_policy_no_estimator_has_a_bias(config: LossConfig) -> None:
    toy = Toy.at_lag(0)
    toy = replace(toy, segment=toy.behavior, proximal=toy.behavior, target=toy.behavior)
    scale = 2.0 if config.aggregation == "sequence" else 1.0  # tokens of a sequence
    assert torch.allclose(scale * toy.moments(config)[0], toy.true_gradient(), atol=1e-12)


@pytest.mark.parametrize("lag", [0, 1, 2, 4, 8])
def test_importance_weights_alone_have_no_bias_at_any_lag(lag: int) -> None:
    toy = Toy.at_lag(lag)
    assert bias(toy, UNBOUND) < 1e-12
    # Weights of tokens correct a token, not what came before it: that is PPO's own approximation.
    assert (toy.surrogate_gradient() - toy.true_gradient()).norm() > 0.01


def test_unclipped_has_the_same_moments_around_every_centre() -> None:
    toy = Toy.at_lag(4)
    plain = toy.moments(UNBOUND)
    for centre in CENTRES[:2]:
        found = toy.moments(replace(BY_WEIGHT, trust_region=centre))
        for mine, other in zip(plain, found, strict=True):
            assert torch.allclose(mine, other, rtol=1e-9)


def test_the_origins_estimator_is_biased_from_lag_two_on_and_only_there() -> None:
    origin = replace(ESTIMATORS["origin, no clip"], behavior_weight_cap=None)
    found = {lag: bias(Toy.at_lag(lag), origin) for lag in (0, 1, 2, 4, 8)}
    assert max(found[0], found[1]) < 1e-12
    assert min(found[lag] for lag in (2, 4, 8)) > 0.05
    # The missing factor is the bridge: E[(exp(q - x) - 1) exp(n - b) A dn].
    toy = Toy.at_lag(4)
    bridge = (token_logprobs(toy.segment) - token_logprobs(toy.proximal)).exp()
    leaf = toy.target.clone().requires_grad_()
    ours, theirs = token_logprobs(leaf), token_logprobs(toy.behavior)
    weights = toy.probabilities[:, None] * (ours - theirs).detach().exp() * (bridge - 1)
    objective = (weights * toy.advantages[:, None] * ours).sum()
    expected = torch.autograd.grad(objective, leaf)[0].flatten()
    error = toy.moments(origin)[0] - toy.surrogate_gradient()
    assert torch.allclose(error, expected, atol=1e-12)


@pytest.mark.parametrize("lag", [2, 4])
def test_a_lower_cap_trades_variance_for_bias(lag: int) -> None:
    toy = Toy.at_lag(lag)
    caps = [1e30, 4.0, 2.0, 1.2]
    configs = [replace(BY_WEIGHT, behavior_weight_cap=cap) for cap in caps]
    biases = [bias(toy, config) for config in configs]
    second_moments = [
        float((toy.moments(c)[1] + toy.moments(c)[0].square()).sum()) for c in configs
    ]
    assert biases[0] < 1e-12 and biases[-1] > 0.01
    assert biases == sorted(biases)
    assert second_moments == sorted(second_moments, reverse=True)
    assert second_moments[-1] < second_moments[0]


@pytest.mark.parametrize("lag", [2, 4])
def test_here_a_clamp_has_less_bias_than_a_mask_at_the_same_cap(lag: int) -> None:
    toy = Toy.at_lag(lag)
    clamp = replace(BY_WEIGHT, behavior_weight_cap=1.5)
    mask = replace(clamp, correction="mask")
    assert 0 < bias(toy, clamp) < bias(toy, mask)
    assert spread(toy, clamp) < spread(toy, UNBOUND)


def test_every_bounded_estimator_has_a_bias_and_less_variance_at_a_large_lag() -> None:
    toy = Toy.at_lag(8)
    free = spread(toy, UNBOUND)
    for name in (
        "segment",
        "behavior",
        "TIS",
        "CISPO",
        "behavior mask",
        "unclipped",
        "sequence mask",
    ):
        config = ESTIMATORS[name]
        assert bias(toy, config) > 1e-3, name
        assert spread(toy, config) < free, name


def test_m2po_masks_some_tokens_here_and_pays_with_bias() -> None:
    toy, config = Toy.at_lag(4), ALL["M2PO"]
    kept = toy.kept(config)
    assert 0 < int((~kept).sum()) < kept.numel()
    assert bias(toy, config) > 1e-3 and spread(toy, config) < spread(toy, UNBOUND)


def test_loglinear_segments_are_exact_on_a_straight_walk_of_logits() -> None:
    # Softmaxes are normalised, so a line in logits is one in log-probs up to the normaliser: the
    # error of the approximation falls with the square of the step.
    errors = []
    for step in (0.2, 0.1, 0.05):
        toy = Toy.at_lag(1, step=step, seed=3)
        move = toy.proximal - toy.behavior
        far = toy.behavior + 4 * move
        exact = token_logprobs(toy.behavior + move)
        found = loglinear_segment(
            token_logprobs(far), token_logprobs(toy.behavior), torch.full((9, 2), 4)
        )
        errors.append(float((found - exact).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)
