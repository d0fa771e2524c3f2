"""Chunked log-probs against log_softmax and gather."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdp_lightning.objective import token_logprobs
from sdp_lightning.objective.token_logprobs import LogitTransform

torch.set_num_threads(1)
untimed = settings(deadline=None, max_examples=50)


def inputs(
    count: int = 11, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden [N, 6], weight [13, 6], bias [13], targets [N], temperature [N]."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((count, 6), (13, 6), (13,))
    )
    targets = torch.randint(13, (count,), generator=generator)
    return hidden, weight, bias, targets, 0.5 + torch.rand(count, generator=generator)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """With the whole table of logits, in float64."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    table = (logits / temperature.double()[:, None]).log_softmax(-1)
    return table.gather(-1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


@untimed
@given(
    seed=st.integers(0, 999),
    count=st.integers(0, 12),
    chunk_size=st.integers(1, 14),
    with_bias=st.booleans(),
    trained=st.tuples(st.booleans(), st.booleans()),
    num_tokens=st.none() | st.integers(1, 15),
)
def test_values_and_gradients_equal_log_softmax_for_any_chunk(
    seed: int,
    count: int,
    chunk_size: int,
    with_bias: bool,
    trained: tuple[bool, bool],
    num_tokens: int | None,
) -> None:
    hidden, weight, bias, targets, temperature = inputs(count, seed=seed)
    targets %= num_tokens or 13
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    bias = bias.requires_grad_(trained[1]) if with_bias else None
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    slope = torch.linspace(-1, 1, count, dtype=torch.float64)

    logprobs, entropy = token_logprobs(
        *(hidden, weight, targets, temperature),
        bias=bias,
        chunk_size=chunk_size,
        num_tokens=num_tokens,
    )
    kept = None if bias is None else bias[:num_tokens]
    expected, expected_entropy = plain(hidden, weight[:num_tokens], kept, targets, temperature)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    assert not entropy.requires_grad
    assert logprobs.requires_grad == any(trained)
    if leaves:
        grads = torch.autograd.grad((logprobs * slope).sum(), leaves)
        wanted = torch.autograd.grad((expected * slope).sum(), leaves)
        for grad, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_gradient_matches_finite_differences(frozen_head: bool) -> None:
    hidden, weight, bias, targets, temperature = inputs(5)
    trained = (hidden,) if frozen_head else (hidden, weight, bias)
    for tensor in trained:
        tensor.requires_grad_()

    def logprobs(*_: Tensor) -> Tensor:
        return token_logprobs(hidden, weight, targets, temperature, bias=bias, chunk_size=2)[0]

    assert torch.autograd.gradcheck(logprobs, trained)


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_float32_and_accurate_whatever_comes_in_and_under_autocast(
    dtype: torch.dtype, autocast: bool, frozen_head: bool
) -> None:
    hidden, weight, bias, targets, temperature = inputs(40, dtype=dtype)
    trained = [hidden] if frozen_head else [hidden, weight, bias]
    for tensor in trained:
        tensor.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logprobs, entropy = token_logprobs(
            hidden, weight, targets, temperature, bias=bias, chunk_size=16
        )
        grads = torch.autograd.grad(logprobs.sum(), trained)
    expected, expected_entropy = plain(hidden, weight, bias, targets, temperature)
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy.detach(), rtol=1e-5, atol=1e-5)
    for grad, other in zip(grads, torch.autograd.grad(expected.sum(), trained), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, other)


def test_one_temperature_for_all_equals_one_for_each() -> None:
    hidden, weight, _, targets, _ = inputs()
    one = token_logprobs(hidden, weight, targets, 0.7)
    each = token_logprobs(hidden, weight, targets, torch.full((11,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(one, each)


def test_agrees_with_linear_cross_entropy_of_torch_in_values_and_gradients() -> None:
    functional = torch.nn.functional
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    hidden, weight, bias, targets, _ = inputs()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    slope = torch.linspace(-1, 1, 11, dtype=torch.float64)
    expected = -functional.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="none"
    )
    found = token_logprobs(hidden, weight, targets, 1.0, bias=bias)[0]
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad((expected * slope).sum(), leaves)
    for grad, other in zip(torch.autograd.grad((found * slope).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_float32_equals_the_dense_path_within_1e_5(softcap: float | None) -> None:
    """At a size where sums are long: 96 units, 2,000 words, 300 tokens in chunks of 128."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 96, generator=generator).requires_grad_()
    weight = (0.2 * torch.randn(2000, 96, generator=generator)).requires_grad_()
    targets = torch.randint(2000, (300,), generator=generator)
    temperature = 0.5 + torch.rand(300, generator=generator)
    transform = LogitTransform(1.0, softcap)
    found, _ = token_logprobs(
        hidden, weight, targets, temperature, chunk_size=128, transform=transform
    )
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    dense = (logits / temperature[:, None]).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-5)
    slope = torch.linspace(-1, 1, 300)
    wanted = torch.autograd.grad((dense * slope).sum(), (hidden, weight))
    grads = torch.autograd.grad((found * slope).sum(), (hidden, weight))
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_gradients_of_the_head_are_summed_in_float32() -> None:
    """512 equal steps of 1: a sum in bfloat16 would end at 256."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    token_logprobs(hidden, weight, targets, 0.5, chunk_size=1)[0].sum().backward()
    assert weight.grad is not None and weight.grad[:, 0].tolist() == [512.0, -512.0]


def test_a_head_tied_to_the_embedding_gets_both_gradients() -> None:
    table = torch.randn(13, 6, dtype=torch.float64).requires_grad_()
    ids = torch.arange(12)
    grads: list[Tensor] = []
    for chunked in (True, False):
        hidden = table[ids].tanh()
        values = (
            token_logprobs(hidden, table, ids + 1, 1.0, chunk_size=5)[0]
            if chunked
            else plain(hidden, table, None, ids + 1, torch.ones(12))[0]
        )
        grads.append(torch.autograd.grad(values.square().sum(), table)[0])
    torch.testing.assert_close(*grads)


class Tallest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_operation_returns_more_than_a_chunk_of_logits(
    softcap: float | None, frozen_head: bool
) -> None:
    hidden = torch.randn(200, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=not frozen_head)
    targets = torch.arange(200)
    with Tallest() as seen:
        logprobs, _ = token_logprobs(
            hidden, weight, targets, 1.0, chunk_size=16, transform=LogitTransform(1.0, softcap)
        )
        logprobs.sum().backward()
    assert seen.elements == 16 * 1000


def test_a_gradient_that_is_not_required_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    original = torch.Tensor.__matmul__

    def record(left: Tensor, right: Tensor) -> Tensor:
        shapes.append((*left.shape, right.shape[-1]))
        return original(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", record)
    hidden, weight, _, targets, _ = inputs()
    logprobs, _ = token_logprobs(hidden.requires_grad_(), weight, targets, 1.0)
    logprobs.sum().backward()
    assert shapes == [(11, 6, 13), (11, 13, 6)]  # logits and their pull-back; nothing twice
    shapes.clear()
    logprobs, _ = token_logprobs(hidden.detach(), weight.requires_grad_(), targets, 1.0)
    logprobs.sum().backward()
    assert shapes == [(11, 6, 13), (11, 6, 13), (13, 11, 6)]  # logits twice, the head's gradient
    shapes.clear()
    with torch.no_grad():
        token_logprobs(hidden, weight, targets, 1.0)
    assert shapes == [(11, 6, 13)]


def test_logits_exist_for_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tallest = 0
    original = torch.Tensor.__matmul__

    def record(left: Tensor, right: Tensor) -> Tensor:
        nonlocal tallest
        if right.shape[-1] == 13:
            tallest = max(tallest, left.shape[0])
        return original(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", record)
    hidden, weight, _, targets, _ = inputs()
    logprobs, _ = token_logprobs(
        hidden.requires_grad_(), weight.requires_grad_(), targets, 1.0, chunk_size=4
    )
    logprobs.sum().backward()
    assert tallest == 4


# Transformed logits -------------------------------------------------------------------------------


@untimed
@given(
    seed=st.integers(0, 999),
    chunk_size=st.integers(1, 14),
    softcap=st.none() | st.floats(0.3, 20),
    scale=st.floats(0.05, 4),
    trained=st.booleans(),
)
def test_transformed_logits_equal_the_dense_ones_with_gradients(
    seed: int, chunk_size: int, softcap: float | None, scale: float, trained: bool
) -> None:
    hidden, weight, bias, targets, temperature = inputs(seed=seed)
    results: list[tuple[Tensor, ...]] = []
    for chunked in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone(), bias.clone()]
        for leaf in leaves[1:]:
            leaf.requires_grad_(trained)
        h, w, b = leaves
        if chunked:
            transform = LogitTransform(scale, softcap)
            logprobs, entropy = token_logprobs(
                h, w, targets, temperature, bias=b, chunk_size=chunk_size, transform=transform
            )
        else:
            logits = scale * (h @ w.t() + b)
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            table = (logits / temperature.double()[:, None]).log_softmax(-1)
            logprobs = table.gather(-1, targets[:, None])[:, 0]
            entropy = -(table.exp() * table).sum(-1).detach()
        slopes = torch.linspace(-1, 2, logprobs.numel(), dtype=torch.float64)
        (logprobs * slopes).sum().backward()
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(grads) == (3 if trained else 1)
        results.append((logprobs.detach(), entropy, *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of inductor
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_body_around_the_head_has_the_same_gradients(backend: str) -> None:
    hidden, weight, _, targets, temperature = inputs(dtype=torch.float32)
    body = torch.nn.Linear(6, 6)

    def loss(inner: torch.nn.Module) -> list[Tensor]:
        body.zero_grad()
        head = weight.clone().requires_grad_()
        token_logprobs(inner(hidden).tanh(), head, targets, temperature)[0].sum().backward()
        grads = [head.grad, *(parameter.grad for parameter in body.parameters())]
        return [grad.clone() for grad in grads if grad is not None]

    compiled = torch.compile(body, backend=backend)
    for found, expected in zip(loss(compiled), loss(body), strict=True):
        torch.testing.assert_close(found, expected)
