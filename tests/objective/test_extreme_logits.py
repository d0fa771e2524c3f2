"""Chunked log-probs at extreme logits, and the numbers that they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdp_lightning.errors import ConfigError
from sdp_lightning.objective import token_logprobs
from sdp_lightning.objective.token_logprobs import LogitTransform

torch.set_num_threads(1)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden [11, 6], weight [13, 6], bias [13], targets [11], temperature [11]."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((11, 6), (13, 6), (13,))
    )
    targets = torch.randint(10, (11,), generator=generator)
    return hidden, weight, bias, targets, 0.5 + torch.rand(11, generator=generator)


def logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the whole table of logits, in float64."""
    table = logits.double().log_softmax(-1)
    return table.gather(-1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1]), 0.5)
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, -4e4]
    assert entropy.tolist() == [0.0, 0.0]
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("frozen_head", [False, True])
def test_entropy_near_logits_of_1000_is_that_of_float64_and_never_negative(
    frozen_head: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=generator).requires_grad_()
    weight = torch.randn(500, 8, generator=generator)
    targets = torch.zeros(64, dtype=torch.long)
    shift = torch.full((500,), 1000.0)
    shift[0] = 1060.0  # for most tokens the only one that is possible
    for bias in (torch.full((500,), 1000.0), shift):
        head = weight if frozen_head else weight.clone().requires_grad_()
        _, entropy = token_logprobs(hidden, head, targets, 1.0, bias=bias)
        logits = hidden.detach() @ weight.t() + bias  # in float32: the same rounded ones
        _, expected = logprobs_and_entropy(logits, targets)
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6)
        assert entropy.min() >= 0


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_a_logit_of_minus_infinity_is_a_token_of_probability_0(
    frozen_head: bool, softcap: float | None
) -> None:
    hidden, weight, bias, targets, temperature = inputs()
    bias[10:] = -math.inf  # as of a vocabulary that is padded
    if softcap is not None:
        weight[10:] = 0
    transform = LogitTransform(1.0, softcap)
    hidden.requires_grad_()
    leaves = [hidden] if frozen_head else [hidden, weight, bias]
    found = token_logprobs(
        *(hidden, weight.requires_grad_(not frozen_head), targets, temperature),
        bias=bias.requires_grad_(not frozen_head),
        transform=transform,
    )
    grads = torch.autograd.grad(found[0].sum(), leaves)
    assert all(tensor.isfinite().all() for tensor in (*found, *grads))
    if softcap is None:  # with a cap it is a logit of -30
        logits = (hidden @ weight[:10].t() + bias[:10]).detach() / temperature.double()[:, None]
        torch.testing.assert_close(found, logprobs_and_entropy(logits, targets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0; it and its inverse"),
        ({"temperature": math.inf}, "temperature must be positive, got inf"),
        ({"temperature": torch.tensor([1.0] * 10 + [0.0])}, "got 0 for token 10"),
        ({"temperature": torch.tensor([1.0, -0.5] + [1.0] * 9)}, "got -0.5 for token 1"),
        ({"temperature": torch.tensor([math.nan] * 11)}, "got nan for token 0"),
        ({"temperature": torch.tensor([1.0] * 5 + [math.inf] * 6)}, "got inf for token 5"),
        ({"temperature": torch.full((11,), 1e-310, dtype=torch.float64)}, "got 1e-310 for token 0"),
        ({"temperature": torch.ones(3)}, r"a number or \(11,\), got \(3,\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, "must agree on N and D"),
        ({"weight": torch.zeros(13, 5)}, "must agree on N and D"),
        ({"hidden": torch.zeros(1, 11, 6)}, r"must be \[N, D\], \[V, D\], \[N\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    hidden, weight, _, targets, _ = inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0, 0.0), "softcap of logits must be positive and finite, got 0.0; None is no cap"),
        ((1.0, -3.0), "softcap .* got -3.0"),
        ((1.0, math.inf), "softcap .* got inf"),
        ((1.0, math.nan), "softcap .* got nan"),
        ((0.0, None), r"scale of logits must be positive and finite, got 0.0\."),
        ((math.nan, 5.0), "scale .* got nan"),
    ],
)
def test_a_transform_of_a_wrong_number_is_refused(
    values: tuple[float, float | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LogitTransform(*values)
