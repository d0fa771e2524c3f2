"""A checkpoint of some ranks, for another number of them: no row twice, and none left out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdp_lightning.prompts.stream import row_order


def reshard(parts: Sequence[Mapping[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    """One state for each of ``num_ranks``, from what ``WorkflowExecutor.state_dict`` gave on each.

    Groups, finished or under way, are dealt out in the order of their creation. New rows begin
    where the rank that was furthest would have gone on; what the others had not begun before that
    comes first.
    """
    if len(parts) == num_ranks:
        return [dict(part) for part in parts]
    streams = [part["prompts"] for part in parts]
    num_rows = int(streams[0]["num_rows"])
    places = [int(stream["epoch"]) * num_rows + int(stream["position"]) for stream in streams]
    start = max(places)
    skipped = sorted(p for place in places for p in range(place, start, len(parts)))
    waiting = [tuple(pair) for stream in streams for pair in stream["returned"]]
    waiting += [_row_at(place, streams[0]) for place in skipped]
    groups = [
        (int(group["created_version"]), int(group["order"]), rank, kind, group)
        for rank, part in enumerate(parts)
        for kind in ("pending", "running")
        for group in part[kind]
    ]
    groups.sort(key=lambda group: group[:3])
    return [
        {
            "prompts": {
                **streams[0],
                **_position(start + (rank - start) % num_ranks, num_rows),
                "returned": [list(pair) for pair in waiting[rank::num_ranks]],
            },
            "next_order": len(groups),
            **{
                kind: [
                    {**group, "order": order}
                    for order, (_, _, _, its_kind, group) in enumerate(groups)
                    if its_kind == kind and order % num_ranks == rank
                ]
                for kind in ("pending", "running")
            },
        }
        for rank in range(num_ranks)
    ]


def _position(place: int, num_rows: int) -> dict[str, int]:
    epoch, position = divmod(place, num_rows)
    return {"epoch": epoch, "position": position}


def _row_at(place: int, stream: Mapping[str, Any]) -> tuple[int, int]:
    num_rows = int(stream["num_rows"])
    epoch, position = divmod(place, num_rows)
    order = row_order(num_rows, epoch, seed=int(stream["seed"]), shuffle=bool(stream["shuffle"]))
    return epoch, order[position]
