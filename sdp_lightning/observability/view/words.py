"""Words about token rows, shared by HTML and terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdp_lightning.observability.view.branches import Branch
from sdp_lightning.observability.view.token_rows import CONTEXT, Section, TokenRow


@dataclass(frozen=True)
class Facts:
    """Facts shown beside a row.

    Args:
        numbers: (name, value) of reward, rewards with names, and advantage.
        notes: lengths, versions, lags, and why it ended.
    """

    numbers: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def facts_of(row: TokenRow) -> Facts:
    """Facts about one row."""
    numbers = [("reward", f"{row.reward:.3g}")]
    numbers += [(f"reward {name}", f"{value:.3g}") for name, value in row.rewards.items()]
    if not np.isnan(row.advantage):
        numbers.append(("advantage", f"{row.advantage:+.2f}"))
    versions = row.versions[row.sampled]
    notes = [] if row.branch is None else [branch_text(row.branch)]
    notes += [f"{count_of(versions.size, 'token', 'tokens')} sampled"]
    if versions.size:
        low, high = int(versions.min()), int(versions.max())
        notes.append(f"version{'s' * (low != high)} {span_of(low, high)}")
        if row.version is not None:
            notes.append(f"lag {span_of(row.version - high, row.version - low)}")
    if row.note == "stop":
        notes.append("ended by itself")
    elif row.note:
        notes.append({"length": "out of budget", "abort": "aborted"}.get(row.note, row.note))
    return Facts(tuple(numbers), tuple(notes))


def branch_text(branch: Branch) -> str:
    """The number of a branch, and where it leaves another."""
    if branch.leaves is None:
        return f"branch {branch.number}" + (", shares nothing" if branch.number > 1 else "")
    shared = count_of(branch.shared, "token", "tokens")
    return f"branch {branch.number}, leaves branch {branch.leaves} after {shared}"


def parts_of(row: TokenRow, most: int) -> list[tuple[int, int, str]]:
    """(start, end, note before it) of the parts of a row to show: most tokens, less the shared."""
    begin = row.num_shared
    head, tail = window_of(len(row) - begin, most)
    parts = [(begin, begin + head, "")]
    if row.branch is not None and row.branch.leaves is not None:
        shared = count_of(begin, "token", "tokens")
        parts[0] = begin, begin + head, f"{shared} as in branch {row.branch.leaves}"
    if tail > head:
        parts.append((begin + tail, len(row), f"{tail - head:,} tokens not shown"))
    return parts


def legend_of(sections: Sequence[Section]) -> tuple[list[tuple[int, int | None]], bool, bool]:
    """(version, its lag if it is the same everywhere) in order; has contexts; has tool output."""
    lags_of: dict[int, set[int | None]] = {}
    has_context = has_tools = False
    for row in (row for section in sections for row in section.rows):
        for version, start, _ in row.runs:
            if version == CONTEXT:
                has_context, has_tools = True, has_tools or start > 0
            else:
                lag = None if row.version is None else row.version - version
                lags_of.setdefault(version, set()).add(lag)
    versions = [
        (version, next(iter(lags)) if len(lags) == 1 else None)
        for version, lags in sorted(lags_of.items())
    ]
    return versions, has_context, has_tools


def window_of(length: int, most: int) -> tuple[int, int]:
    """End of the first part to show, and start of the last one.

    >>> window_of(10, 4), window_of(3, 4)
    ((2, 8), (3, 3))
    """
    if length <= most:
        return length, length
    return most - most // 2, length - most // 2


def span_of(low: int, high: int) -> str:
    """One number, or the range from ``low`` to ``high``."""
    return str(low) if low == high else f"{low}-{high}"


def count_of(count: int, one: str, many: str) -> str:
    """A count with its noun."""
    return f"{count:,} {one if count == 1 else many}"
