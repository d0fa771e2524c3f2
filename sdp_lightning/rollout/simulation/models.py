"""What is modelled in a simulated run: engines, trainer, lengths. Seconds, tokens and rows.

A row is one trajectory while it is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from sdp_lightning.config.validation import at_least, check_types
from sdp_lightning.errors import ConfigError
from sdp_lightning.types import IntArray

_BLOCK = 1024  # groups whose lengths are drawn at once
_P95 = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class EngineModel:
    r"""Replicas that batch continuously: a decode pass of n rows takes a + b n seconds.

    Every row of a replica gains one token in a pass, so a replica samples n / (a + b n) tokens a
    second. A group goes to the replica with the fewest rows. Rows beyond ``max_rows`` wait there.

    Args:
        num_replicas: engines that sample independently of each other.
        pass_s: a, seconds of a decode pass whatever its number of rows.
        row_s: b, further seconds of a pass for each of its rows.
        max_rows: most rows of a replica that are decoded at once.
        prefill_token_s: seconds to prefill one token, in which the replica decodes nothing. The
            prompt of a group is prefilled once; a restart after a publish prefills every row.
        recompute_kv: whether the rows in flight are prefilled anew after each publish.
    """

    num_replicas: int
    pass_s: float
    row_s: float = 0.0
    max_rows: int = 256
    prefill_token_s: float = 0.0
    recompute_kv: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        at_least("num_replicas", self.num_replicas, 1)
        at_least("max_rows", self.max_rows, 1)
        _not_negative(self, "pass_s", "row_s", "prefill_token_s")
        if self.pass_s + self.row_s <= 0:
            raise ConfigError("pass_s and row_s are both 0: a decode pass must take some time.")
        if self.recompute_kv and not self.prefill_token_s:
            raise ConfigError("recompute_kv has no effect while prefill_token_s is 0: give both.")

    def tokens_per_s(self, rows: float) -> float:
        """Most tokens a second that all replicas sample with ``rows`` rows at once over all."""
        each = min(rows / self.num_replicas, self.max_rows)
        return self.num_replicas * each / (self.pass_s + self.row_s * each) if each else 0.0


@dataclass(frozen=True)
class TrainerModel:
    """A trainer whose batch of n sampled tokens takes ``step_s + token_s * n`` seconds.

    Args:
        step_s: seconds of a step whatever its number of tokens.
        token_s: further seconds for each sampled token, with its share of prompt and scoring.
        stage_s: seconds of a publish in which weights are gathered and written; engines sample.
        load_s: seconds of a publish in which engines stand still.
    """

    token_s: float
    step_s: float = 0.0
    stage_s: float = 0.0
    load_s: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        _not_negative(self, "step_s", "token_s", "stage_s", "load_s")
        if self.step_s + self.token_s + self.stage_s + self.load_s <= 0:
            raise ConfigError("a step of the trainer must take some time: token_s or step_s.")

    def train_s(self, num_tokens: int) -> float:
        """Seconds of a step that trains on so many sampled tokens, without its publish."""
        return self.step_s + self.token_s * num_tokens


def _not_negative(model: object, *names: str) -> None:
    for name in names:
        value = getattr(model, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a number of 0 or more, got {value!r}.")


class Lengths:
    """The sampled tokens of every trajectory of the n-th group, the same whatever else changes.

    Args:
        groups: groups to draw from, or their distribution.
        prompt_tokens: tokens of a prompt.
        seed: seed of the random numbers.
    """

    def __init__(
        self, groups: Sequence[tuple[int, ...]] | _LogNormal, *, prompt_tokens: int, seed: int
    ) -> None:
        at_least("prompt_tokens", prompt_tokens, 0)
        at_least("seed", seed, 0)
        self.prompt_tokens = prompt_tokens
        self._groups, self._seed = groups, seed
        self._block = lru_cache(maxsize=8)(self._draw)

    @classmethod
    def recorded(
        cls, groups: Iterable[Sequence[int]], *, prompt_tokens: int = 0, seed: int = 0
    ) -> Lengths:
        """Whole groups of a recording, drawn with replacement.

        Args:
            groups: sampled tokens of each trajectory of each recorded group.
            prompt_tokens: tokens of a prompt.
            seed: seed of the draws.

        Raises:
            ConfigError: if there is no group, or a trajectory without tokens.
        """
        found = [tuple(map(int, group)) for group in groups]
        if not found or not all(group and min(group) >= 1 for group in found):
            raise ConfigError(
                "lengths need at least one group, and at least one token in every trajectory of it."
            )
        return cls(found, prompt_tokens=prompt_tokens, seed=seed)

    @classmethod
    def lognormal(
        cls,
        *,
        median: float,
        p95: float,
        maximum: int,
        group_size: int,
        prompt_tokens: int = 0,
        seed: int = 0,
    ) -> Lengths:
        """Independent lognormal lengths, rounded, of at least 1 and at most ``maximum`` tokens.

        Args:
            median: median before the cut, in tokens.
            p95: 95th percentile before the cut; the median itself makes all lengths equal.
            maximum: token budget of a trajectory.
            group_size: trajectories of a group.
            prompt_tokens: tokens of a prompt.
            seed: seed of the draws.

        Raises:
            ConfigError: if the percentiles are out of order.
        """
        if not 1 <= median <= p95 < math.inf or not median <= maximum < 2**31:
            raise ConfigError(
                "lengths need 1 <= median <= p95, and a maximum from the median to 2**31 - 1; got "
                f"median {median}, p95 {p95} and maximum {maximum}."
            )
        at_least("group_size", group_size, 1)
        sigma = math.log(p95 / median) / _P95
        model = _LogNormal(math.log(median), sigma, maximum, group_size)
        return cls(model, prompt_tokens=prompt_tokens, seed=seed)

    def of(self, number: int) -> Sequence[int]:
        """Sampled tokens of each trajectory of the group with this number."""
        block, place = divmod(number, _BLOCK)
        group = self._block(block)[place]
        return group if isinstance(group, tuple) else group.tolist()

    @property
    def mean_tokens(self) -> float:
        """Mean sampled tokens of a group, of all recorded ones or 16,384 drawn ones."""
        groups = self._groups
        if isinstance(groups, _LogNormal):
            return sum(int(np.sum(self._block(n))) for n in range(16)) / (16 * _BLOCK)
        return sum(map(sum, groups)) / len(groups)

    @property
    def group_size(self) -> float:
        """Mean trajectories of a group."""
        groups = self._groups
        if isinstance(groups, _LogNormal):
            return groups.group_size
        return sum(map(len, groups)) / len(groups)

    def _draw(self, block: int) -> Sequence[tuple[int, ...]] | IntArray:
        random = np.random.default_rng([self._seed, block])
        groups = self._groups
        if isinstance(groups, _LogNormal):
            return groups.draw(random)
        return [groups[int(n)] for n in random.integers(len(groups), size=_BLOCK)]


@dataclass(frozen=True)
class _LogNormal:
    mu: float
    sigma: float
    maximum: int
    group_size: int

    def draw(self, random: np.random.Generator) -> IntArray:
        drawn = random.lognormal(self.mu, self.sigma, (_BLOCK, self.group_size))
        return np.clip(np.rint(drawn), 1, self.maximum).astype(np.int64)
