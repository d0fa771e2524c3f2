"""The tiny Llama, written out for groups of short answers, so that one run costs seconds.

The same function as transformers' LlamaForCausalLM (a test holds it to that), with two savings. A
group is one packed sequence: its prompt once, then the answers token by token (first tokens of all
answers, second tokens, ...), under one fixed mask. And linear layers run over real tokens only.

Of a larger model the layers below those that are trained are a trunk: its states are the same for
all versions of the weights.

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
        self.bias = torch.zeros(layout.mask.shape).masked_fill(~layout.mask, -1e9)

    def through(
        self, x: Tensor, real: Tensor, *, start: int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """[N, D] states of the real columns after these layers.

        Args:
            x: [N, D] states before them.
            real: [G, S'] bool, of which N are set.
            start: earlier columns are read from the cache.
            cache: keys and values [G, K, S, D / H] of each layer; those of ``x`` are written.
        """
        width = real.shape[1]
        place = real.flatten().nonzero()[:, 0]
        column = start + place % width
        cos, sin = self.cos[column], self.sin[column]
        bias = self.bias[start : start + width, : start + width]
        num_q, num_k, _ = self._heads
        for number, layer in enumerate(self.layers):
            qkv = _scaled(self._normed(x), layer.norm, layer.qkv)
            qk, v = qkv.view(len(place), -1, self._width).split((num_q + num_k, num_k), 1)
            packed = torch.cat([_turned(qk, cos, sin), v], 1)
            q, k, v = spread(packed, real).transpose(1, 2).split(self._heads, 1)
            if cache is not None:
                keys, values = cache[number]
                keys[:, :, start : start + width], values[:, :, start : start + width] = k, v
                k, v = keys[:, :, : start + width], values[:, :, : start + width]
            if num_q != num_k:
                k, v = (part.repeat_interleave(num_q // num_k, 1) for part in (k, v))
            mixed = (q @ k.mT + bias).softmax(-1) @ v  # so short, faster than the fused kernel
            mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)[place]
            x = x + functional.linear(mixed, layer.out)
            opened = _scaled(self._normed(x), layer.mlp_norm, layer.gate_up)
            gate, up = opened.chunk(2, 1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return x

    def new_cache(self, groups: int) -> KVCache:
        """Empty keys and values of every layer."""
        shape = groups, self._heads[1], self.layout.num_columns, self._width
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]

    def _normed(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Trunk(Layers):
    """The layers below those that are trained: a token's state is computed once, for all versions.

    Args:
        model: as of :class:`Layers`.
        layout: of the groups.
        num_layers: how many are frozen.
        num_kept: groups whose states are kept, the newest.
    """

    def __init__(self, model: Any, layout: Layout, num_layers: int, num_kept: int = 64) -> None:
        super().__init__(model, layout, end=num_layers)
        self.requires_grad_(False)
        self._embedding = model.model.embed_tokens.weight.detach()
        self._kept, self._num_kept = dict[bytes, Tensor](), num_kept

    @torch.no_grad()
    def extend(
        self, tokens: Tensor, real: Tensor, start: int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """[G, S', D] states of the columns from ``start`` on, 0 where a token is not real."""
        x = functional.embedding(tokens[real], self._embedding)
        return spread(self.through(x, real, start=start, cache=cache), real)

    def keep(self, columns: Tensor, states: Tensor) -> None:
        """Keep the states [G, S, D] of whole groups, [G, S] tokens."""
        for tokens, own in zip(columns.numpy(), states, strict=True):
            self._kept[tokens.tobytes()] = own
        while len(self._kept) > self._num_kept:
            self._kept.pop(next(iter(self._kept)))

    def states(self, columns: Tensor) -> Tensor:
        """[G, S, D] of groups, computed unless they were kept."""
        keys = [tokens.tobytes() for tokens in columns.numpy()]
        for index, key in enumerate(keys):
            if key not in self._kept:
                one = columns[index : index + 1]
                self.keep(one, self.extend(one, torch.ones_like(one, dtype=torch.bool)))
        return torch.stack([self._kept[key] for key in keys])


class TinyLlama(Layers):
    """Weights and the packed forward pass of what is trained.

    Args:
        model: as of :class:`Layers`.
        layout: of the groups.
        trunk: frozen layers below; with it embeddings and the last norm are frozen, too.
    """

    def __init__(self, model: Any, layout: Layout, trunk: Trunk | None = None) -> None:
        super().__init__(model, layout, first=0 if trunk is None else len(trunk.layers))
        self.trunk = [trunk] if trunk is not None else []  # in a list it is not a submodule
        hold = _copy if trunk is None else Tensor.detach
        self.embedding: Tensor = hold(model.model.embed_tokens.weight)
        self.norm: Tensor = hold(model.model.norm.weight)

    def hidden(
        self, inputs: Tensor, real: Tensor, *, start: int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """[G, S', D] normed states of the columns from ``start`` on, 0 where a token is not real.

        Args:
            inputs: [G, S'] tokens of those columns or, above a trunk, [G, S', D] its states.
            real: [G, S'] bool.
            start: earlier columns are read from the cache.
            cache: keys and values of each layer; those of ``inputs`` are written.
        """
        x = inputs[real]
        if not self.trunk:
            x = functional.embedding(x, self.embedding, self.padding)
        x = self.through(x, real, start=start, cache=cache)
        return spread(self._normed(x) * self.norm, real)

    def inputs(self, columns: Tensor) -> Tensor:
        """What :meth:`hidden` reads of whole groups, [G, S] tokens."""
        return self.trunk[0].states(columns) if self.trunk else columns

    def logprobs(self, prompts: Tensor, answers: Tensor, scored: Tensor) -> Tensor:
        """[G, R, T] of the answers' tokens where ``scored``, 0 elsewhere.

        Args:
            prompts: [G, P].
            answers: [G, R, T].
            scored: [G, R, T] bool. A token's own prefix is computed, whether it is scored or not.
        """
        rows = answers.shape[1]
        needed = scored.flip(-1).cumsum(-1).flip(-1) > 0  # [G, R, T] up to the last scored one
        is_input = needed[:, :, 1:].transpose(1, 2).flatten(1)
        real = torch.cat([torch.ones_like(prompts, dtype=torch.bool), is_input], 1)
        hidden = self.hidden(self.inputs(columns_of(prompts, answers)), real)
        group, row, index = scored.nonzero(as_tuple=True)
        before = self.layout.prompt_length - rows + index * rows + row  # column of the token before
        column = torch.where(index == 0, self.layout.prompt_length - 1, before)
        found = self._token_logprobs(hidden[group, column], answers[group, row, index])
        return found.new_zeros(answers.shape).index_put((group, row, index), found)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V]."""
        return functional.linear(hidden, self.embedding)

    def _token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(hidden, self.embedding, targets, 1.0, chunk_size=4096)[0]


def columns_of(prompts: Tensor, answers: Tensor) -> Tensor:
    """[G, S] tokens of packed groups: the prompt, first tokens of all answers, second ones, ..."""
    own = answers[:, :, :-1].transpose(1, 2).flatten(1)
    return torch.cat([prompts, own], 1)


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
        self.qkv = _copy(torch.cat([part.weight for part in parts]))
        self.out = _copy(attention.o_proj.weight)
        self.gate_up = _copy(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self.down = _copy(mlp.down_proj.weight)
        self.norm = _copy(layer.input_layernorm.weight)
        self.mlp_norm = _copy(layer.post_attention_layernorm.weight)


def _copy(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())


def _scaled(x: Tensor, norm: Tensor, matrix: Tensor) -> Tensor:
    """X times a norm's weight, through a matrix. The smaller of the two is scaled."""
    if len(x) < len(matrix):
        return functional.linear(x * norm, matrix)
    return functional.linear(x, matrix * norm)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: [N, H + K, D / H]."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
