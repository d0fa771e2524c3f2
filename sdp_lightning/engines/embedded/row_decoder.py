"""One row at a time through a model and the cache that it makes itself.

For models whose layers keep a state of fixed size (state spaces, linear attention, convolutions),
which cannot be cut, padded or batched by position, and for any other that decodes with its own
cache only.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sdp_lightning.engines.embedded.kv_cache import cache_argument
from sdp_lightning.types import IntArray

Cache = dict[str, Any]  # arguments of the next forward pass, by name


@dataclass
class RowState:
    """What a model has computed of one row of ``length`` tokens.

    Attributes:
        length: number of tokens.
        caches: of the first ``length`` tokens, last; with ``stride=2`` before it of the first
            ``length - 1``.
    """

    length: int
    caches: list[Cache]

    def copy(self) -> RowState:
        """A state that shares no tensor with this one."""
        return RowState(self.length, copy.deepcopy(self.caches))


@dataclass(frozen=True)
class RowMode:
    """How a model has to be run for its cache to be right.

    Attributes:
        positions: whether the positions of new tokens are passed; else the model counts them.
        stride: new tokens of a pass. Two take a model past the formula that it has for one token
            (Nemotron-H clamps its time steps in the other formula only); two caches, one token
            apart, then advance in turn.
    """

    positions: bool
    stride: int


ROW_MODES = [RowMode(positions, stride) for positions in (False, True) for stride in (1, 2)]


class RowDecoder:
    """Runs a model on rows, one after the other.

    Args:
        model: a causal LM of transformers, in eval mode.
        mode: how it is run.

    Raises:
        ValueError: if the model keeps no cache.
    """

    def __init__(self, model: Any, mode: RowMode) -> None:
        self.model = model
        self._mode = mode
        self._parameters = inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model)
        self._kept: list[tuple[nn.Module, str, Any]] = []
        self._makes_cache = True
        self._find_cache()

    @torch.inference_mode()
    def start(self, tokens: IntArray) -> tuple[RowState, Tensor]:
        """Compute a row from its first token on; returns its state and ``[1, V]`` logits."""
        state = RowState(int(tokens.size), [])
        logits = torch.empty(0)
        for length in range(tokens.size - self._mode.stride + 1, tokens.size + 1):
            cache: Cache = {}
            if length > 0:
                logits = self._forward(cache, tokens[:length], 0)
            state.caches.append(cache)
        return state, logits

    @torch.inference_mode()
    def extend(self, state: RowState, tokens: IntArray) -> Tensor:
        """Advance ``state`` in place by the last of ``tokens``; returns ``[1, V]`` logits."""
        cache = state.caches.pop(0)
        start = state.length + 1 - self._mode.stride
        logits = self._forward(cache, tokens[start : state.length + 1], start)
        state.caches.append(cache)
        state.length += 1
        return logits

    def _forward(self, cache: Cache, tokens: IntArray, start: int) -> Tensor:
        """Run the model on ``tokens``, from position ``start`` on, and update ``cache``."""
        model = self.model
        ids = torch.from_numpy(tokens).to(model.device)[None]
        options: dict[str, Any] = {name: cache[name] for name in cache if name != _IN_MODULES}
        if not cache and not self._makes_cache:
            options[self._cache_argument] = DynamicCache(config=model.config)
        if self._mode.positions and "position_ids" in self._parameters:
            positions = torch.arange(start, start + tokens.size, device=ids.device)
            options["position_ids"] = positions[None]
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        at_rest = [value for *_, value in self._kept]
        self._place(cache.get(_IN_MODULES, at_rest))
        output = model(input_ids=ids, use_cache=True, **options)
        # asked of the output, which knows by which old names a forward may take what it returns
        cache.update({name: output[name] for name in self._parameters if name in output})
        if not self._makes_cache:
            cache[self._cache_argument] = options[self._cache_argument]
        if self._kept:
            cache[_IN_MODULES] = [vars(module)[name] for module, name, _ in self._kept]
            self._place(at_rest)
        return output.logits[:, -1]

    def _place(self, values: list[Any]) -> None:
        """Set the attributes of modules that belong to the cache of a row."""
        for (module, name, _), value in zip(self._kept, values, strict=True):
            setattr(module, name, value)

    @torch.inference_mode()
    def _find_cache(self) -> None:
        """Learn from a first pass where the model keeps what it has computed.

        It returns a cache under the name of an argument, or fills the cache that it is given, and
        may keep tensors in attributes of its modules (RecurrentGemma).
        """
        before = _module_tensors(self.model)
        cache: Cache = {}
        tokens = torch.zeros(1, 2, dtype=torch.long).numpy()[0]
        self._forward(cache, tokens, 0)
        if not cache:
            if self._cache_argument not in self._parameters:
                raise ValueError("it returns no cache")
            self._makes_cache = False
            self._forward(cache, tokens, 0)
        for key, value in _module_tensors(self.model).items():
            if before.get(key) is not value:
                self._kept.append((*key, before.get(key)))
        self._place([value for *_, value in self._kept])


_IN_MODULES = " in modules"  # no argument has this name


def _module_tensors(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Tensors that modules hold as plain attributes."""
    return {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
