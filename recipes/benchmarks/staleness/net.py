"""The tiny Llama, written out for groups of short answers, so that one run costs seconds.

The same function as transformers' LlamaForCausalLM (a test holds it to that), with two savings. A
group is one packed sequence: its prompt once, then the answers token by token (first tokens of all
answers, second tokens, ...), under one fixed mask. And linear layers run over real tokens only.

Shapes: G groups, R answers of a group, P prompt tokens, T tokens of an answer, S columns of a
packed group, N real tokens, D hidden units, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdp_lightning.objective import token_logprobs

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

    @cached_property
    def mask(self) -> Tensor:
        """[S, S] bool: a column sees the prompt and its own answer, up to itself."""
        answer = torch.arange(self.num_answers).repeat(self.max_new_tokens - 1)
        answer = torch.cat([torch.full((self.prompt_length,), -1), answer])
        reachable = (answer == -1) | (answer[:, None] == answer)
        return reachable & (self.positions[:, None] >= self.positions)


class TinyLlama(nn.Module):
    """Weights and the packed forward pass.

    Args:
        model: a LlamaForCausalLM with tied embeddings and as many key-value heads as heads.
        layout: of the groups.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        super().__init__()
        self.layout, config = layout, model.config
        self.num_heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        self.embedding = _copy(model.model.embed_tokens.weight)
        self.padding = model.model.embed_tokens.padding_idx  # learns nothing as an input
        self.norm = _copy(model.model.norm.weight)
        self.layers = nn.ModuleList(_Layer(layer) for layer in model.model.layers)
        half = config.hidden_size // config.num_attention_heads // 2
        theta = config.rope_parameters["rope_theta"]
        angle = layout.positions[:, None] * theta ** (-torch.arange(half) / half)
        scale = torch.tensor([(2 * half) ** -0.5, 1.0])[:, None, None]  # of queries, of keys
        cos, sin = (f(angle)[:, None, None] * scale for f in (torch.cos, torch.sin))
        self.cos = torch.cat([cos, cos], -1)  # [S, 2, 1, D / H]
        self.sin = torch.cat([-sin, sin], -1)
        self.bias = torch.zeros(layout.mask.shape).masked_fill(~layout.mask, -1e9)

    def hidden(
        self, tokens: Tensor, real: Tensor, *, start: int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """[G, S', D] normed states of the columns from ``start`` on, 0 where a token is not real.

        Args:
            tokens: [G, S'] of those columns.
            real: [G, S'] bool.
            start: earlier columns are read from the cache.
            cache: keys and values [G, H, S, D / H] of each layer; those of ``tokens`` are written.
        """
        groups, width = tokens.shape
        place = real.flatten().nonzero()[:, 0]
        column = start + place % width
        cos, sin = self.cos[column], self.sin[column]
        bias = self.bias[start : start + width, : start + width]
        x = functional.embedding(tokens.flatten()[place], self.embedding, self.padding)

        def spread(values: Tensor) -> Tensor:  # [N, ...] -> [G, S', ...]
            empty = values.new_zeros(groups * width, *values.shape[1:])
            return empty.index_copy(0, place, values).view(groups, width, *values.shape[1:])

        for number, layer in enumerate(self.layers):
            qkv = functional.linear(self._normed(x), layer.qkv * layer.norm)
            qk, v = qkv.view(len(place), 3, self.num_heads, -1).split((2, 1), 1)
            packed = torch.cat([_turned(qk, cos, sin), v], 1)
            q, k, v = spread(packed).permute(2, 0, 3, 1, 4)
            if cache is not None:
                keys, values = cache[number]
                keys[:, :, start : start + width], values[:, :, start : start + width] = k, v
                k, v = keys[:, :, : start + width], values[:, :, : start + width]
            mixed = (q @ k.mT + bias).softmax(-1) @ v  # so short, faster than the fused kernel
            mixed = mixed.transpose(1, 2).reshape(groups * width, -1)[place]
            x = x + functional.linear(mixed, layer.out)
            opened = functional.linear(self._normed(x), layer.gate_up * layer.mlp_norm)
            gate, up = opened.chunk(2, 1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return spread(self._normed(x) * self.norm)

    def logprobs(self, prompts: Tensor, answers: Tensor, scored: Tensor) -> Tensor:
        """[G, R, T] of the answers' tokens where ``scored``, 0 elsewhere.

        Args:
            prompts: [G, P].
            answers: [G, R, T].
            scored: [G, R, T] bool. A token's own prefix is computed, whether it is scored or not.
        """
        groups, rows, _ = answers.shape
        needed = scored.flip(-1).cumsum(-1).flip(-1) > 0  # [G, R, T] up to the last scored one
        own = answers[:, :, :-1].transpose(1, 2).reshape(groups, -1)
        is_input = needed[:, :, 1:].transpose(1, 2).reshape(groups, -1)
        real = torch.cat([torch.ones_like(prompts, dtype=torch.bool), is_input], 1)
        hidden = self.hidden(torch.cat([prompts, own], 1), real)
        group, row, index = scored.nonzero(as_tuple=True)
        before = self.layout.prompt_length - rows + index * rows + row  # column of the token before
        column = torch.where(index == 0, self.layout.prompt_length - 1, before)
        found = self._token_logprobs(hidden[group, column], answers[group, row, index])
        return found.new_zeros(answers.shape).index_put((group, row, index), found)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V]."""
        return functional.linear(hidden, self.embedding)

    def new_cache(self, groups: int) -> KVCache:
        """Empty keys and values of every layer."""
        width = self.embedding.shape[1] // self.num_heads
        shape = groups, self.num_heads, self.layout.num_columns, width
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]

    def _token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(hidden, self.embedding, targets, 1.0, chunk_size=4096)[0]

    def _normed(self, x: Tensor) -> Tensor:
        # The weight of the norm goes into the next matrix, which is smaller than the batch.
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class _Layer(nn.Module):
    """Weights of one decoder layer; what reads the same input is one matrix."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv = _copy(torch.cat([part.weight for part in parts]))
        self.out = _copy(attention.o_proj.weight)
        self.gate_up = _copy(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self.down = _copy(mlp.down_proj.weight)
        self.norm = _copy(layer.input_layernorm.weight)
        self.mlp_norm = _copy(layer.post_attention_layernorm.weight)


def _copy(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: [N, 2, H, D / H]."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
