"""The tiny Llama, written out for groups of short answers, so that one run costs seconds.

The same function as transformers' LlamaForCausalLM (a test holds it to that), with three savings: a
group is one packed sequence, answers that begin alike share the columns of their beginning, and
linear layers run over real tokens only.

Of a larger model the layers below those that are trained are a trunk: its states are the same for
all versions of the weights. Shapes are those of :mod:`staleness.layers`.
"""

from __future__ import annotations

from typing import Any

import torch
from staleness.layers import KVCache, Layers, Layout, copied, spread
from staleness.tree import Tree
from staleness.trunk import Inputs, Trunk
from torch import Tensor
from torch.nn import functional

from sdp_lightning.objective import token_logprobs


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
        hold = copied if trunk is None else Tensor.detach
        self.embedding: Tensor = hold(model.model.embed_tokens.weight)
        self.norm: Tensor = hold(model.model.norm.weight)

    def hidden(
        self,
        inputs: Tensor,
        real: Tensor,
        bias: Tensor,
        *,
        start: int = 0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[G, S', D] normed states of the columns from ``start`` on, 0 where a token is not real.

        Args:
            inputs: [G, S'] tokens of those columns or, above a trunk, [G, S', D] its states.
            real: [G, S'] bool.
            bias: [G, S, S] of the attention.
            start: earlier columns are read from the cache.
            cache: keys and values of each layer; those of ``inputs`` are written.
        """
        x = inputs[real]
        if not self.trunk:
            x = functional.embedding(x, self.embedding, self.padding)
        x = self.through(x, real, bias, start=start, cache=cache)
        return spread(self.normed(x) * self.norm, real)

    def inputs(self, prompts: Tensor) -> Inputs:
        """What :meth:`hidden` reads of groups with these prompts, [G, P] tokens."""
        return Inputs(self.trunk[0] if self.trunk else None, prompts, self.layout.num_answers)

    def logprobs(self, prompts: Tensor, answers: Tensor, scored: Tensor) -> Tensor:
        """[G, R, T] of the answers' tokens where ``scored``, 0 elsewhere.

        Args:
            prompts: [G, P].
            answers: [G, R, T].
            scored: [G, R, T] bool. A token's own prefix is computed, whether it is scored or not.
        """
        tree = Tree(self.layout, answers)
        needed = scored.flip(-1).cumsum(-1).flip(-1) > 0  # [G, R, T] up to the last scored one
        real = tree.real(needed[:, :, 1:])
        inputs = self.inputs(prompts)(answers[:, :, :-1], tree, real)
        hidden = self.hidden(inputs, real, tree.bias(answers.shape[2] - 1))
        group, row, index = tree.owned(scored).nonzero(as_tuple=True)
        column = tree.before()[group, row, index]
        found = self._token_logprobs(hidden[group, column], answers[group, row, index])
        table = found.new_zeros(answers.shape).index_put((group, row, index), found)
        return torch.where(scored, table.gather(1, tree.owner), 0.0)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V]."""
        return functional.linear(hidden, self.embedding)

    def _token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(hidden, self.embedding, targets, 1.0, chunk_size=4096)[0]
