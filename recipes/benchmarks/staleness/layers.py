"""Decoder layers of a Llama, written out for packed groups of short answers.

A group is one packed sequence: its prompt once, then the answers token by token (first tokens of
all answers, second tokens, ...). Linear layers run over the real ones of its columns only.

Shapes: G groups, R answers of a group, P prompt tokens, T tokens of an answer, S columns of a
packed group, N real tokens, D hidden units, H heads, K key-value heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

KVCache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a group lie in its packed sequence.

    Args:
        num_answers: R.
        prompt_length: P.
        max_new_tokens: T; the last is predicted and never an input.
    """

    num_answers: int = 8
    prompt_length: int = 7
    max_new_tokens: int = 9

    @property
    def num_columns(self) -> int:
        """S, the columns of a packed group."""
        return self.end(self.max_new_tokens - 1)

    def end(self, num_tokens: int) -> int:
        """The first column after the first ``num_tokens`` tokens of every answer."""
        return self.prompt_length + num_tokens * self.num_answers

    @cached_property
    def positions(self) -> Tensor:
        """[S] of a column in its own sequence."""
        own = torch.arange(self.max_new_tokens - 1).repeat_interleave(self.num_answers)
        return torch.cat([torch.arange(self.prompt_length), self.prompt_length + own])


class Layers(nn.Module):
    """Some layers of a model, and the positions of a packed group.

    Args:
        model: a LlamaForCausalLM with tied embeddings.
        layout: of the groups.
        first: the first layer.
        end: the layer after the last; None is the model's end.
    """

    def __init__(self, model: Any, layout: Layout, first: int = 0, end: int | None = None) -> None:
        super().__init__()
        self.layout, config = layout, model.config
        self.num_heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        self._heads = (self.num_heads, *2 * [config.num_key_value_heads])
        self._width = config.hidden_size // self.num_heads
        self.padding = model.model.embed_tokens.padding_idx  # learns nothing as an input
        self.layers = nn.ModuleList(_Layer(layer) for layer in model.model.layers[first:end])
        half = self._width // 2
        theta = config.rope_parameters["rope_theta"]
        angle = layout.positions[:, None] * theta ** (-torch.arange(half) / half)
        scale = [(2 * half) ** -0.5] * self._heads[0] + [1.0] * self._heads[1]  # of q, of k
        cos, sin = (
            f(angle)[:, None] * torch.tensor(scale)[:, None] for f in (torch.cos, torch.sin)
        )
        self.cos = torch.cat([cos, cos], -1)  # [S, H + K, D / H]
        self.sin = torch.cat([-sin, sin], -1)

    def through(
        self,
        x: Tensor,
        real: Tensor,
        bias: Tensor,
        *,
        start: int = 0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[N, D] states of the real columns after these layers.

        Args:
            x: [N, D] states before them.
            real: [G, S'] bool, of which N are set.
            bias: [G, S, S] of the attention, 0 where a column sees another one.
            start: earlier columns are read from the cache.
            cache: keys and values [G, K, S, D / H] of each layer; those of ``x`` are written.
        """
        width = real.shape[1]
        place = real.flatten().nonzero()[:, 0]
        column = start + place % width
        cos, sin = self.cos[column], self.sin[column]
        bias = bias[:, None, start : start + width, : start + width]
        is_real = real[:, None, :, None]
        num_q, num_k, _ = self._heads
        for number, layer in enumerate(self.layers):
            qkv = _scaled(self.normed(x), layer.norm, layer.qkv)
            qk, v = qkv.view(len(place), -1, self._width).split((num_q + num_k, num_k), 1)
            packed = torch.cat([_turned(qk, cos, sin), v], 1)
            q, k, v = spread(packed, real).transpose(1, 2).split(self._heads, 1)
            if cache is not None:
                for kept, own in zip(cache[number], (k, v), strict=True):
                    there = kept[:, :, start : start + width]
                    there.copy_(torch.where(is_real, own, there))
                k, v = (kept[:, :, : start + width] for kept in cache[number])
            if num_q != num_k:
                k, v = (part.repeat_interleave(num_q // num_k, 1) for part in (k, v))
            mixed = (q @ k.mT + bias).softmax(-1) @ v  # so short, faster than the fused kernel
            mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)[place]
            x = x + functional.linear(mixed, layer.out)
            opened = _scaled(self.normed(x), layer.mlp_norm, layer.gate_up)
            gate, up = opened.chunk(2, 1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return x

    def new_cache(self, groups: int) -> KVCache:
        """Empty keys and values of every layer."""
        shape = groups, self._heads[1], self.layout.num_columns, self._width
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]

    def normed(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def spread(values: Tensor, real: Tensor) -> Tensor:
    """[G, S', ...] of the values [N, ...] of the real columns, 0 elsewhere."""
    place = real.flatten().nonzero()[:, 0]
    empty = values.new_zeros(real.numel(), *values.shape[1:])
    return empty.index_copy(0, place, values).view(*real.shape, *values.shape[1:])


class _Layer(nn.Module):
    """Weights of one decoder layer; what reads the same input is one matrix."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv = copied(torch.cat([part.weight for part in parts]))
        self.out = copied(attention.o_proj.weight)
        self.gate_up = copied(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self.down = copied(mlp.down_proj.weight)
        self.norm = copied(layer.input_layernorm.weight)
        self.mlp_norm = copied(layer.post_attention_layernorm.weight)


def copied(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())


def _scaled(x: Tensor, norm: Tensor, matrix: Tensor) -> Tensor:
    """X times a norm's weight, through a matrix. The smaller of the two is scaled."""
    if len(x) < len(matrix):
        return functional.linear(x * norm, matrix)
    return functional.linear(x, matrix * norm)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: [N, H + K, D / H]."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
