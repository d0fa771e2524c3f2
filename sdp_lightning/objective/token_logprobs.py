"""Log-probs of given tokens over a large vocabulary, without the table of logits.

Shapes: N tokens, D hidden units, V vocabulary. Only one chunk of logits, [chunk, V], exists at a
time, forward and backward. Logits, softmax and gradients are accumulated in float32 (float64 for
float64 inputs), under autocast too: half-precision logits would move log-probs by a few percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdp_lightning.errors import ConfigError

_HALVES = (torch.bfloat16, torch.float16)
_LOWEST = -1e4  # nats; in float64 e^-1e4 is 0, too


@dataclass(frozen=True)
class LogitTransform:
    r"""Function that some models apply to the logits of their head, before any temperature.

    .. math:: l \to c \tanh(s l / c), \quad\text{or } s l \text{ without a cap}

    Args:
        scale: s, positive.
        softcap: c, positive; None is no cap.

    Raises:
        ConfigError: if a number is not positive and finite.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("softcap", self.softcap)):
            if value is not None and not 0 < value < math.inf:
                cure = "; None is no cap" if name == "softcap" else ""
                raise ConfigError(
                    f"{name} of logits must be positive and finite, got {value}{cure}."
                )


PLAIN = LogitTransform()


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 512,
    transform: LogitTransform = PLAIN,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-probs of ``targets`` under softmax((hidden W^T + bias) / temperature), and its entropy.

    Gradients of hidden, weight and bias are exact; one that is not required is not computed. With a
    frozen head the gradient is taken in the forward pass, which saves one of three products.

    Args:
        hidden: [N, D].
        weight: [V, D] of the language-model head.
        targets: [N] token ids.
        temperature: positive; one number, or [N]. Its inverse is finite, too.
        bias: [V] of the head, if it has one.
        chunk_size: tokens whose logits exist at once.
        transform: applied to the logits.
        num_tokens: token ids from this one on have probability 0; None or V or more: none has.

    Returns:
        Log-probs [N] in nats, and the entropy -sum p log p [N] in nats, detached, 0 or more. A
        logit of -inf is a token of probability 0. float32, or float64 where an input is.

    Raises:
        ValueError: if shapes do not fit, or a number is not positive and finite.
    """
    _check(hidden, weight, targets, chunk_size)
    dtype = torch.promote_types(
        torch.promote_types(hidden.dtype, weight.dtype), torch.float32
    )  # of logits and results
    scale = _inverse(temperature, targets, dtype).to(hidden.device)
    if transform.softcap is None:
        scale = scale * transform.scale
    head_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    eager = torch.is_grad_enabled() and hidden.requires_grad and not head_trained
    options = _Options(chunk_size, eager, transform, num_tokens)
    return _TokenLogprobs.apply(hidden, weight, bias, targets, scale, options)  # pyright: ignore[reportReturnType]


class _Options(NamedTuple):
    chunk_size: int
    eager: bool
    transform: LogitTransform
    num_tokens: int | None


class _TokenLogprobs(torch.autograd.Function):
    """See :func:`token_logprobs`.

    ``scale``, [N], is 1 / temperature, times that of a transform without a cap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        chunk_size, eager, transform, size = options
        logprobs, entropy, normalizer = (torch.empty_like(scale) for _ in range(3))
        slope = hidden.new_empty(hidden.shape if eager else (0,), dtype=scale.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            head, shift = _head(weight[:size], hidden, scale.dtype), _first(bias, size)
            for rows in _chunks(targets.shape[0], chunk_size):
                logits = _logits(hidden[rows], head, shift, scale[rows], transform)
                log_z = logits.logsumexp(-1)
                index = targets[rows, None]
                logprobs[rows] = logits.gather(-1, index).squeeze(-1) - log_z
                normalizer[rows] = log_z
                bend = _bend(logits, scale[rows], transform) if eager else None
                log_probs = logits.sub_(log_z[:, None])
                probs = log_probs.exp()
                entropy[rows] = _entropy(log_probs, probs)
                if eager:
                    d_logits = _logit_slope(probs, index, scale[rows], bend)
                    slope[rows] = _product(d_logits, head)
        ctx.options = options
        # With a frozen head the slope is all that backward needs; [N, D] as hidden would be.
        empty = hidden.new_empty(0)
        saved = (empty,) * 6 if eager else (hidden, weight, bias, targets, scale, normalizer)
        ctx.save_for_backward(slope, *saved)
        ctx.hidden_dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        chunk_size, eager, transform, size = ctx.options
        slope, hidden, weight, bias, targets, scale, normalizer = ctx.saved_tensors
        if eager:
            return (slope * grad[:, None]).to(ctx.hidden_dtype), None, None, None, None, None
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=scale.dtype) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=scale.dtype) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head, shift = _head(weight[:size], hidden, scale.dtype), _first(bias, size)
            for rows in _chunks(targets.shape[0], chunk_size):
                logits = _logits(hidden[rows], head, shift, scale[rows], transform)
                bend = _bend(logits, scale[rows], transform)
                probs = logits.sub_(normalizer[rows, None]).exp_()
                index, factor = targets[rows, None], scale[rows] * grad[rows]
                d_logits = _logit_slope(probs, index, factor, bend)
                if d_hidden is not None:
                    d_hidden[rows] = _product(d_logits, head).to(d_hidden.dtype)
                if d_weight is not None:
                    d_weight[:size] += _product(d_logits.t(), hidden[rows])
                if d_bias is not None:
                    d_bias[:size] += d_logits.sum(0)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, scale: Tensor, transform: LogitTransform
) -> Tensor:
    """[chunk, V], transformed and over temperature."""
    logits = _product(hidden, head.t())
    if bias is not None:
        logits += bias
    if transform.softcap is not None:
        logits.mul_(transform.scale / transform.softcap).tanh_().mul_(transform.softcap)
    return logits.mul_(scale[:, None])


def _bend(logits: Tensor, scale: Tensor, transform: LogitTransform) -> Tensor | None:
    """Slope of the cap at each logit, [chunk, V]: s (1 - tanh^2); None without a cap."""
    if transform.softcap is None:
        return None
    tanh = logits / (scale[:, None] * transform.softcap)
    return tanh.square_().neg_().add_(1).mul_(transform.scale)


def _entropy(log_probs: Tensor, probs: Tensor) -> Tensor:
    """[chunk] -sum p log p; overwrites ``log_probs``.

    Log-probs near a normalizer of 1,000 are 3e-5 off, all of a row by the same: dividing by what
    the probabilities add up to takes that out again.
    """
    log_probs.clamp_(min=_LOWEST)  # 0 * -inf
    total = probs.sum(-1)
    entropy = total.log() - torch.linalg.vecdot(probs, log_probs) / total
    return entropy.clamp_(min=0)


def _logit_slope(probs: Tensor, index: Tensor, factor: Tensor, bend: Tensor | None) -> Tensor:
    """(one-hot - probs) * factor * bend, [chunk, V]; overwrites ``probs``."""
    slope = probs.neg_()
    slope.scatter_add_(-1, index, torch.ones_like(index, dtype=slope.dtype))
    slope.mul_(factor[:, None])
    return slope if bend is None else slope.mul_(bend)


def _first(bias: Tensor | None, size: int | None) -> Tensor | None:
    return None if bias is None else bias[:size]


def _head(weight: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the type in which products are taken; cast once for all chunks."""
    halves = weight.is_cuda and weight.dtype == hidden.dtype and weight.dtype in _HALVES
    return weight if halves else weight.to(dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Product with a result of at least float32.

    Tensor cores multiply halves into float32; elsewhere a cast has to come first.
    """
    if left.is_cuda and right.dtype in _HALVES:  # pragma: no cover (needs a GPU)
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(dtype) @ right.to(dtype)


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> None:
    shapes = tuple(hidden.shape), tuple(weight.shape), tuple(targets.shape)
    if hidden.dim() != 2 or weight.dim() != 2 or targets.dim() != 1:
        raise ValueError(f"hidden, weight, targets must be [N, D], [V, D], [N]; got {shapes}.")
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"hidden, weight, targets must agree on N and D; got {shapes}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")


def _inverse(temperature: float | Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """[N] 1 / temperature, detached."""
    if isinstance(temperature, Tensor) and temperature.shape != targets.shape:
        raise ValueError(
            f"temperature must be a number or {tuple(targets.shape)}, got "
            f"{tuple(temperature.shape)}."
        )
    values = torch.as_tensor(temperature, dtype=dtype).detach()
    inverse = values.reciprocal()
    fits = (inverse > 0) & inverse.isfinite()
    if not fits.all():
        place = f" for token {int(fits.logical_not().nonzero()[0])}" if fits.dim() else ""
        raise ValueError(
            f"temperature must be positive, got {values[~fits][0].item():g}{place}; it and its "
            "inverse must be finite."
        )
    return inverse.expand(targets.shape[0]).contiguous()
