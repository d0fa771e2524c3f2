"""Codec between consumed groups and table rows, one row a trajectory, exact to the bit.

==================  ===========================================================================
column              meaning
==================  ===========================================================================
``version``         policy version that trained on the trajectory
``step``            optimizer steps made before
``rank``            process that trained on it
``group``           index of its group in the batch of that process
``member``          index in the group
``sample``          number of the attempt that it is a branch of; null if it is one alone
``row_id``          id of the dataset row, as text; a lone surrogate as its escape
``epoch``           pass over the dataset
``row_index``       index of the row in the dataset
``order``           number of the group in the order of creation
``created_version`` policy version when the group was submitted
``reward``          reward of the trajectory; of several, their weighted sum
``rewards``         list of several rewards with names, empty if there is one:
``.name``           name of the reward
``.value``          the reward
``.weight``         its weight in the sum
``finish_reason``   stop, length or abort
``truncated``       whether sampling did not end by itself
``num_tokens``      tokens of the trajectory, contexts included
``num_sampled``     tokens that the policy chose
``head_version``    the oldest policy version among them
``tail_version``    the newest one
``parts``           list, in order, of:
``.kind``           context (prompt, tool output) or segment (sampled)
``.token_ids``      token ids of the part
``.version``        policy version that sampled it; null for a context, like all that follows
``.logprobs``       behavior log-probs, nats, float32
``.temperature``    temperature of the distribution sampled from
``.kv_on_update``   what the engine does with the KV cache when weights change
``.proximal``       segment proximal log-probs, null if the segment was not scored
``.proximal_version``  policy version that scored it
==================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from sdp_lightning.config.storable_text import storable
from sdp_lightning.errors import ConfigError, RecordingError, RolloutError, VersionError
from sdp_lightning.rollout.checkpoint.segment_codec import part_from_fields, part_to_fields
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup

LATER = ("rewards", "sample")  # columns that recordings of earlier releases lack


@dataclass(frozen=True, eq=False)
class RecordedBatch:
    """The groups that one process trained on in one step.

    Args:
        version: policy version c of the trainer.
        step: optimizer steps made before.
        groups: the groups in the order of the batch.
        places: (epoch, index) of the dataset row of every group.
        sizes: number of groups of each process, if they are of several.
    """

    version: int
    step: int
    groups: tuple[TrajectoryGroup, ...]
    places: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...] = ()

    @property
    def num_trajectories(self) -> int:
        """Number of trajectories, which are rows of the table."""
        return sum(len(group.trajectories) for group in self.groups)


def import_pyarrow() -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        ConfigError: if they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "recordings are Parquet files, and pyarrow is not installed: "
            "pip install 'sdp-lightning[recording]'."
        ) from error
    return pyarrow, pyarrow.parquet


def schema() -> Any:
    """The ``pyarrow.Schema`` of a recording."""
    pa, _ = import_pyarrow()
    part = pa.struct(
        [
            ("kind", pa.string()),
            ("token_ids", pa.list_(pa.int64())),
            ("version", pa.int64()),
            ("logprobs", pa.list_(pa.float32())),
            ("temperature", pa.float64()),
            ("kv_on_update", pa.string()),
            ("proximal", pa.list_(pa.float32())),
            ("proximal_version", pa.int64()),
        ]
    )
    named = pa.struct([("name", pa.string()), ("value", pa.float64()), ("weight", pa.float64())])
    whole = ("version", "step", "rank", "group", "member")
    counts = ("num_tokens", "num_sampled", "head_version", "tail_version")
    return pa.schema(
        [
            *((name, pa.int64()) for name in (*whole, "sample")),
            ("row_id", pa.string()),
            *((name, pa.int64()) for name in ("epoch", "row_index", "order", "created_version")),
            ("reward", pa.float64()),
            ("rewards", pa.list_(named)),
            ("finish_reason", pa.string()),
            ("truncated", pa.bool_()),
            *((name, pa.int64()) for name in counts),
            ("parts", pa.list_(part)),
        ]
    )


def rows_of(batch: RecordedBatch, rank: int) -> Iterator[dict[str, Any]]:
    """Rows of a batch, one for each trajectory."""
    for number, (group, (epoch, index)) in enumerate(zip(batch.groups, batch.places, strict=True)):
        for member, trajectory in enumerate(group.trajectories):
            yield {
                "version": batch.version,
                "step": batch.step,
                "rank": rank,
                "group": number,
                "member": member,
                "sample": trajectory.sample,
                "row_id": storable(group.row_id),
                "epoch": epoch,
                "row_index": index,
                "order": group.order,
                "created_version": group.created_version,
                "reward": trajectory.reward,
                "rewards": [
                    {"name": name, "value": value, "weight": trajectory.reward_weights[name]}
                    for name, value in trajectory.rewards.items()
                ],
                "finish_reason": trajectory.finish_reason,
                "truncated": trajectory.finish_reason != "stop",
                "num_tokens": trajectory.num_tokens,
                "num_sampled": trajectory.num_sampled,
                "head_version": trajectory.head_version,
                "tail_version": trajectory.tail_version,
                "parts": [_part_to_row(part) for part in trajectory.parts],
            }


def to_rows(table: Any) -> list[dict[str, Any]]:
    """Rows of a ``pyarrow.Table``, with numpy arrays in their parts."""
    lists = table["parts"].combine_chunks()
    values = lists.values
    names = ("kind", "version", "temperature", "kv_on_update", "proximal_version")
    columns = {name: values.field(name).to_pylist() for name in names}
    columns |= {n: _arrays(values.field(n)) for n in ("token_ids", "logprobs", "proximal")}
    parts = [dict(zip(columns, part, strict=True)) for part in zip(*columns.values(), strict=True)]
    bounds = lists.offsets.to_pylist()
    return [
        row | {"parts": parts[start:end]}
        for row, (start, end) in zip(
            table.drop_columns(["parts"]).to_pylist(), pairwise(bounds), strict=True
        )
    ]


def _arrays(column: Any) -> list[NDArray[Any] | None]:
    """Arrays of a column of lists, None where it is null."""
    values, bounds = column.values.to_numpy(), column.offsets.to_pylist()
    valid = column.is_valid().to_pylist()
    return [
        values[start:end] if is_valid else None
        for (start, end), is_valid in zip(pairwise(bounds), valid, strict=True)
    ]


def batch_of(rows: Sequence[Mapping[str, Any]], source: str) -> RecordedBatch:
    """The batch that :func:`rows_of` turned into ``rows``.

    Args:
        rows: at least one, all of one version and one rank.
        source: path of the file, for errors.

    Raises:
        RecordingError: if the values make no trajectory.
    """
    members: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        members.setdefault(row["group"], []).append(row)
    try:
        groups = [_group_of(members[number]) for number in sorted(members)]
    except (RolloutError, VersionError, ValueError, TypeError) as error:
        raise RecordingError(f"{source} holds values that make no trajectory: {error}") from error
    first = [members[number][0] for number in sorted(members)]
    return RecordedBatch(
        version=rows[0]["version"],
        step=rows[0]["step"],
        groups=tuple(groups),
        places=tuple((row["epoch"], row["row_index"]) for row in first),
    )


def _group_of(rows: Sequence[Mapping[str, Any]]) -> TrajectoryGroup:
    return TrajectoryGroup(
        tuple(map(_trajectory_of, sorted(rows, key=lambda row: row["member"]))),
        row_id=rows[0]["row_id"],
        order=rows[0]["order"],
        created_version=rows[0]["created_version"],
    )


def _trajectory_of(row: Mapping[str, Any]) -> Trajectory:
    named = row.get("rewards") or ()  # not in recordings from before rewards had names
    return Trajectory(
        tuple(_part_of(part) for part in row["parts"]),
        reward=row["reward"],
        finish_reason=row["finish_reason"],
        rewards={each["name"]: each["value"] for each in named},
        reward_weights={each["name"]: each["weight"] for each in named},
        sample=row.get("sample"),
    )


def _part_to_row(part: Context | Segment) -> dict[str, Any]:
    kind = "context" if isinstance(part, Context) else "segment"
    return {"kind": kind, **part_to_fields(part)}


def _part_of(row: Mapping[str, Any]) -> Context | Segment:
    is_context = row["kind"] == "context"
    return part_from_fields({"token_ids": row["token_ids"]} if is_context else row)
