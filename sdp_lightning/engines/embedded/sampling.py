"""Sampling of one token per row of logits, with the log-prob that it was sampled with.

Pure functions. B rows, V vocabulary. The random number of a token is a function of its request's
seed and its position alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sdp_lightning.types import SamplingParams

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_POSITION = np.uint64(0xD1342543DE82EF95)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """``[B]`` random numbers in [0, 1), each a hash (splitmix64 twice) of seed and position.

    Args:
        seeds: ``[B]`` integers, taken modulo 2**64.
        positions: ``[B]`` position of the token to sample, counted from the start of its sequence.
    """
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    counter = np.array(positions, dtype=np.uint64)
    bits = _mix(_mix(state + _GAMMA) ^ (counter * _POSITION + _GAMMA))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def sample(
    logits: Tensor, params: Sequence[SamplingParams], uniform: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """Sample every row with its own settings.

    Args:
        logits: ``[B, V]``, converted to float32 for the softmax. May be overwritten.
        params: ``[B]`` settings; temperature 0 is greedy.
        uniform: ``[B]`` in [0, 1).

    Returns:
        Tokens ``[B]`` int64 and log-probs ``[B]`` float64, nats, after temperature and truncation;
        0 for greedy rows.
    """
    logits = logits.float()
    temperatures = [p.temperature for p in params]
    scale = [t if t > 0 else 1.0 for t in temperatures]
    scaled = logits
    if any(t != 1 for t in scale):
        scaled = logits / torch.tensor(scale, device=logits.device)[:, None]
    cut = [row for row, p in enumerate(params) if p.top_p < 1 or p.top_k is not None]
    if cut:
        rows = torch.tensor(cut, device=logits.device)
        scaled = scaled.index_copy(0, rows, _truncate(scaled[rows], [params[row] for row in cut]))
    tokens, logprobs = _inverse_cdf(scaled, torch.from_numpy(uniform).to(logits.device))
    if any(t == 0 for t in temperatures):
        greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
        tokens = torch.where(greedy, logits.argmax(-1), tokens)
        logprobs = torch.where(greedy, 0.0, logprobs)
    return tokens, logprobs


def _truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """``[b, V]`` with -inf outside the top k, then outside the nucleus of the remaining ones."""
    vocabulary = logits.shape[-1]
    device = logits.device
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=torch.float64)[:, None]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=device)
    ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
    probs = ordered.softmax(-1, dtype=torch.float64)
    before = probs.cumsum(-1) - probs
    ordered = ordered.masked_fill((before >= top_p) & (rank > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative probability passes ``uniform``, and its log-prob.

    The search has two levels, blocks and then tokens of one block, in float64: one float32 running
    sum over a large vocabulary would never reach its rare tokens.
    """
    size = 2 ** math.ceil(math.log2(logits.shape[-1]) / 2)  # tokens of a block, about sqrt(V)
    padded = functional.pad(logits, (0, -logits.shape[-1] % size), value=-torch.inf)
    peak = padded.amax(-1, keepdim=True)
    mass = (padded - peak).exp_().unflatten(-1, (-1, size))
    cumulative = mass.sum(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    target = uniform[:, None] * total
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=mass.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = mass.gather(1, block[:, :, None].expand(-1, -1, size)).squeeze(1).double()
    rest = (target - before).clamp_(min=0)
    offset = torch.searchsorted(inner.cumsum(-1), rest, right=True)
    possible = (inner > 0) * torch.arange(size, device=logits.device)
    offset = torch.minimum(offset, possible.amax(-1, keepdim=True))
    token = block * size + offset
    logprob = (padded.gather(1, token) - peak).double() - total.log()
    return token.squeeze(1), logprob.squeeze(1)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
