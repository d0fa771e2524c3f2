"""The data of rollouts: dataset rows, contexts, segments, trajectories, groups.

Frozen data, numpy inside, no torch. Loss mask, versions and lags are derived from the parts, so
they cannot disagree with them. Only the proximal slot of a segment is written later, and only once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdp_lightning.errors import RolloutError, VersionError
from sdp_lightning.types.named_rewards import check_sum, weighted_sum
from sdp_lightning.types.sampling_params import SamplingParams as SamplingParams

if TYPE_CHECKING:
    from sdp_lightning.observability.view import View

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
FinishReason = Literal["stop", "length", "abort"]
KVPolicy = Literal["recompute", "keep"]
Row = Mapping[str, Any]  # of the dataset


class ProximalSlot:
    """The proximal log-probs of a segment and the version that scored them; set at most once.

    Containers share it by reference, so a segment may move while it is scored.
    """

    __slots__ = ("_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value: tuple[FloatArray, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_slot, (self._value,)

    @property
    def is_set(self) -> bool:
        """Whether the segment was scored."""
        return self._value is not None

    @property
    def logprobs(self) -> FloatArray | None:
        """``[n]`` nats, one for each token of the segment; None while unscored."""
        return None if self._value is None else self._value[0]

    @property
    def version(self) -> int | None:
        """The policy version that scored; None while unscored."""
        return None if self._value is None else self._value[1]

    def set(self, logprobs: ArrayLike, version: int) -> None:
        """Store the log-probs. ``VersionError`` if there are some already."""
        value = _read_only(np.array(logprobs, dtype=np.float32))
        with self._lock:
            if self._value is not None:
                raise VersionError(
                    f"this segment was scored under version {self._value[1]} already; "
                    f"a second score under {version} would overwrite it."
                )
            self._value = (value, version)


def _restore_slot(value: tuple[FloatArray, int] | None) -> ProximalSlot:
    slot = ProximalSlot()
    if value is not None:
        slot.set(*value)
    return slot


@dataclass(frozen=True, eq=False)
class Context:
    """Tokens that the policy did not choose: a prompt, a tool's output. Never trained on.

    Args:
        token_ids: ``[n]`` integers, n >= 1.
    """

    token_ids: IntArray

    def __init__(self, token_ids: ArrayLike) -> None:
        object.__setattr__(self, "token_ids", _token_array(token_ids, "Context"))


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens sampled under one policy version.

    Args:
        version: policy version that sampled the tokens, 0 or more.
        token_ids: ``[n]`` integers, n >= 1.
        logprobs: ``[n]`` nats under the distribution really sampled from; never changed.
        temperature: temperature of that distribution.
        kv_on_update: whether the engine recomputed or kept the KV cache of earlier tokens when
            weights changed during the request. With ``"keep"`` the log-probs of a segment after an
            update belong to no single version.

    Raises:
        VersionError: if the version is not an integer of 0 or more.
        RolloutError: if lengths differ, there are no tokens, or a log-prob is not finite.
    """

    version: int
    token_ids: IntArray
    logprobs: FloatArray
    temperature: float
    kv_on_update: KVPolicy
    proximal: ProximalSlot = field(repr=False)

    def __init__(
        self,
        version: int,
        token_ids: ArrayLike,
        logprobs: ArrayLike,
        temperature: float = 1.0,
        kv_on_update: KVPolicy = "recompute",
    ) -> None:
        if isinstance(version, bool) or not isinstance(version, (int, np.integer)) or version < 0:
            raise VersionError(
                f"a segment's version must be an integer of 0 or more, got {version!r}."
            )
        tokens = _token_array(token_ids, "Segment")
        values = _read_only(np.array(logprobs, dtype=np.float32))
        if values.shape != tokens.shape:
            raise RolloutError(f"Segment has {tokens.size} token_ids but {values.size} logprobs.")
        if not np.isfinite(values).all():
            raise RolloutError(
                f"Segment of version {version} has a log-prob that is not finite: {values}."
            )
        for name, value in (
            ("version", int(version)),
            ("token_ids", tokens),
            ("logprobs", values),
            ("temperature", float(temperature)),
            ("kv_on_update", kv_on_update),
            ("proximal", ProximalSlot()),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return int(self.token_ids.size)


class Displayed:
    """Base of data that notebooks and rich display by ``sdp_lightning.view``.

    The view is imported only when it is needed.
    """

    def _repr_html_(self) -> str:
        return self.__rich__().html()

    def __rich__(self) -> View:
        import sdp_lightning

        return sdp_lightning.view(self)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Trajectory(Displayed):
    """One sampled sequence: contexts and segments in order, and its reward.

    Args:
        parts: contexts and segments in order; the first is a :class:`Context`.
        reward: reward of the whole sequence, finite; of several, their weighted sum.
        finish_reason: reason why sampling ended.
        rewards: several rewards by name; empty if there is only the one.
        reward_weights: weight of each of ``rewards`` in the sum; empty is 1 for all.
        sample: number of the attempt that it is a branch of, in its group; None: it is one alone.

    Attributes:
        head_version: oldest version among the sampled tokens; None if there are none.
        tail_version: newest version among them.
    """

    parts: tuple[Context | Segment, ...]
    reward: float = 0.0
    finish_reason: FinishReason = "stop"
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    reward_weights: Mapping[str, float] = field(default_factory=dict[str, float])
    sample: int | None = None
    head_version: int | None = field(init=False)
    tail_version: int | None = field(init=False)

    def __post_init__(self) -> None:
        weights = self.reward_weights or dict.fromkeys(self.rewards, 1.0)
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "reward", float(self.reward))
        object.__setattr__(self, "rewards", {k: float(v) for k, v in self.rewards.items()})
        object.__setattr__(self, "reward_weights", {k: float(v) for k, v in weights.items()})
        if not self.parts or not isinstance(self.parts[0], Context):
            raise RolloutError(
                "a Trajectory must begin with a Context: its first token has no log-prob."
            )
        if not np.isfinite(self.reward):
            raise RolloutError(f"the reward of a Trajectory must be finite, got {self.reward}.")
        number: object = self.sample
        if number is not None and (type(number) is not int or number < 0):
            raise RolloutError(
                f"the sample of a Trajectory must be an integer of 0 or more, got {number!r}."
            )
        if self.rewards or self.reward_weights:
            check_sum(self.reward, self.rewards, self.reward_weights)
        versions = [part.version for part in self.segments]
        object.__setattr__(self, "head_version", min(versions, default=None))
        object.__setattr__(self, "tail_version", max(versions, default=None))

    def with_rewards(
        self, rewards: Mapping[str, float], weights: Mapping[str, float]
    ) -> Trajectory:
        """The same trajectory with other named rewards, or weights."""
        total = weighted_sum(rewards, weights)
        return replace(self, reward=total, rewards=rewards, reward_weights=weights)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments in order."""
        return tuple(part for part in self.parts if isinstance(part, Segment))

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence, contexts included."""
        return sum(int(part.token_ids.size) for part in self.parts)

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens."""
        return sum(len(segment) for segment in self.segments)

    @property
    def token_ids(self) -> IntArray:
        """``[num_tokens]``, contexts included."""
        return np.concatenate([part.token_ids for part in self.parts])


@dataclass(frozen=True, eq=False)
class TrajectoryGroup(Displayed):
    """The trajectories of one prompt: the unit of work, of capacity, of drops.

    Args:
        trajectories: one or more.
        row_id: id of the dataset row.
        order: number in the order of creation; the lowest are trained first.
        created_version: policy version when the group was submitted.

    Attributes:
        head_version: oldest version among the sampled tokens of all members.
        tail_version: newest version among them.
    """

    trajectories: tuple[Trajectory, ...]
    row_id: str = ""
    order: int = 0
    created_version: int = 0
    head_version: int | None = field(init=False)
    tail_version: int | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trajectories", tuple(self.trajectories))
        if not self.trajectories:
            raise RolloutError(f"group of row {self.row_id!r} has no trajectories.")
        heads = [t.head_version for t in self.trajectories if t.head_version is not None]
        tails = [t.tail_version for t in self.trajectories if t.tail_version is not None]
        object.__setattr__(self, "head_version", min(heads, default=None))
        object.__setattr__(self, "tail_version", max(tails, default=None))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments of all members."""
        return tuple(segment for t in self.trajectories for segment in t.segments)

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens of all members."""
        return sum(t.num_sampled for t in self.trajectories)

    @property
    def samples(self) -> list[list[int]]:
        """Indices of the trajectories of each sample, in order."""
        found: dict[tuple[str, int], list[int]] = {}
        for index, each in enumerate(self.trajectories):
            key = ("alone", index) if each.sample is None else ("sample", each.sample)
            found.setdefault(key, []).append(index)
        return list(found.values())

    @property
    def attempts(self) -> tuple[Trajectory, ...]:
        """The first trajectory of each sample, whose reward is the sample's."""
        return tuple(self.trajectories[members[0]] for members in self.samples)

    @property
    def reward(self) -> float:
        """Mean reward of the samples."""
        own = [t.reward for t in self.trajectories]
        return float(np.mean([np.mean([own[i] for i in each]) for each in self.samples]))


def count_sampled_tokens(groups: Iterable[TrajectoryGroup]) -> int:
    """Sampled tokens over all groups."""
    return sum(group.num_sampled for group in groups)


def _token_array(token_ids: ArrayLike | Sequence[int], owner: str) -> IntArray:
    array = np.array(token_ids)
    if array.ndim != 1 or array.size == 0:
        raise RolloutError(
            f"{owner} needs at least one token, in one dimension; got shape {array.shape}."
        )
    if not np.issubdtype(array.dtype, np.integer) or (array < 0).any():
        raise RolloutError(f"{owner} needs token ids of 0 or more, got {array!r}.")
    return _read_only(array.astype(np.int64))


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
