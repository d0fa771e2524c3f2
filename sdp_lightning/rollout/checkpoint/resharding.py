"""Redistributes a checkpoint to another number of ranks: no row twice, none left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sdp_lightning.prompts.stream import row_order
from sdp_lightning.rollout.checkpoint.group_state import groups_as_dicts, num_groups
from sdp_lightning.rollout.groups.telemetry import RolloutTelemetry

logger = logging.getLogger(__name__)


def reshard(parts: Sequence[Mapping[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    """States for ``num_ranks`` ranks, given the ``WorkflowExecutor.state_dict`` of each old rank.

    Groups, finished or not, are dealt out in the order of their creation. New rows begin at the
    position of the furthest rank; rows before it that other ranks had not begun come first.
    """
    if len(parts) == num_ranks:
        return [dict(part) for part in parts]
    streams = [part["prompts"] for part in parts]
    is_iterable = streams[0].get("kind") == "stream"
    prompts = (_reshard_stream if is_iterable else _reshard_rows)(streams, num_ranks)
    rows = [row for part in parts for row in part.get("rows", ())]
    groups = [
        (int(group["created_version"]), int(group["order"]), rank, kind, group)
        for rank, part in enumerate(parts)
        for kind in ("pending", "running")
        for group in groups_as_dicts(part[kind], finished=kind == "pending")
    ]
    groups.sort(key=lambda group: group[:3])
    return [
        {
            "prompts": prompts[rank],
            **({"rows": rows} if is_iterable else {}),
            "next_order": len(groups),
            **{
                kind: [
                    {**group, "order": order}
                    for order, (_, _, _, group_kind, group) in enumerate(groups)
                    if group_kind == kind and order % num_ranks == rank
                ]
                for kind in ("pending", "running")
            },
        }
        for rank in range(num_ranks)
    ]


def _reshard_rows(streams: Sequence[Mapping[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    num_rows = int(streams[0]["num_rows"])
    positions = [int(stream["epoch"]) * num_rows + int(stream["position"]) for stream in streams]
    start = max(positions)
    skipped = sorted(p for position in positions for p in range(position, start, len(streams)))
    waiting = [tuple(pair) for stream in streams for pair in stream["returned"]]
    waiting += [_row_at(position, streams[0]) for position in skipped]
    return [
        {
            **streams[0],
            **_position(start + (rank - start) % num_ranks, num_rows),
            "returned": [list(pair) for pair in waiting[rank::num_ranks]],
        }
        for rank in range(num_ranks)
    ]


def _reshard_stream(streams: Sequence[Mapping[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    """All go on after the least row; what other ranks had begun beyond it is done."""
    first = min(streams, key=lambda stream: int(stream["count"]))
    start, num_parts = int(first["count"]), len(streams)
    done = {number for stream in streams for number in stream["done"] if number >= start}
    for rank, stream in enumerate(streams):
        begun = range(start, int(stream["count"]))
        done |= {number for number in begun if number % num_parts == rank}
    waiting = [pair for stream in streams for pair in stream["returned"]]
    return [
        {**first, "done": sorted(done), "returned": waiting[rank::num_ranks]}
        for rank in range(num_ranks)
    ]


def _position(total: int, num_rows: int) -> dict[str, int]:
    epoch, position = divmod(total, num_rows)
    return {"epoch": epoch, "position": position}


def _row_at(total: int, stream: Mapping[str, Any]) -> tuple[int, int]:
    num_rows = int(stream["num_rows"])
    epoch, position = divmod(total, num_rows)
    order = row_order(num_rows, epoch, seed=int(stream["seed"]), shuffle=bool(stream["shuffle"]))
    return epoch, order[position]


def count_discarded(parts: Sequence[Mapping[str, Any]], telemetry: RolloutTelemetry) -> None:
    """Count the groups of the states ``parts``, which are not resumed, as discarded."""
    counts = {kind: sum(num_groups(p[kind]) for p in parts) for kind in ("pending", "running")}
    telemetry.num_discarded += sum(counts.values())
    logger.warning(
        "prompts_on_resume='restart': the prompts begin from their start; %d finished and %d "
        "unfinished groups of the checkpoint are discarded.",
        *counts.values(),
    )
