"""Tables of the ablation, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from staleness.methods import DEFAULT, METHODS
from staleness.plan import STALENESS, cell_of, representative
from staleness.summary import Estimate, Line, Place, Table, final, whole_course

MEASURES = {
    "abs_drift": "mean abs(x - b)",
    "moved_with_advantage": "moved over 20 % with the advantage",
    "clipped_high": "clipped above",
    "clipped_low": "clipped below",
    "rejected": "rejected",
    "weight": "mean weight",
    "abs_bridge": "mean abs(x - q)",
    "grad_norm": "gradient norm",
    "lr_scale": "learning rate x",
}


def expanded(lines: Iterable[Line], methods: Iterable[str] = METHODS) -> list[Line]:
    """The lines, repeated for every cell of ``methods`` that a line stands for."""
    found: list[Line] = []
    for line in lines:
        cell = cell_of(line)
        for method in methods:
            for staleness in STALENESS:
                twin = replace(cell, method=method, staleness=staleness)
                if twin == cell or representative(twin) == cell:
                    found.append({**line, "method": method, "staleness": staleness})
    return found


def exact(lines: Iterable[Line]) -> list[Line]:
    """Lines of runs whose engine has the trainer's weights exactly."""
    return [line for line in lines if line.get("engine_bits") is None]


def write(lines: Sequence[Line], path: Path, probed: Sequence[Line] = ()) -> None:
    """Write all tables to ``path``."""
    path.write_text(tables(lines, probed))


def tables(
    lines: Sequence[Line], probed: Sequence[Line] = (), methods: Sequence[str] = tuple(METHODS)
) -> str:
    """All tables of one task, in Markdown."""
    table = Table(expanded(exact(lines), methods), methods)
    parts: list[str] = []
    for minibatches, rate in sorted({(p.minibatches, p.rate) for p in table.places}):
        places = [p for p in table.places if (p.minibatches, p.rate) == (minibatches, rate)]
        places = [p for p in places if p.lag > 0 or p.staleness == "whole"]
        head = f"## {minibatches} minibatch{'es' if minibatches > 1 else ''}" + (
            "" if rate == 1 else f", learning rate x {rate}"
        )
        parts += [head, "### Chance of a right answer at the end", _levels(table, places, final)]
        parts += ["### The same, mean over the course", _levels(table, places, whole_course)]
        parts += [
            f"### Paired differences to {DEFAULT} at the end, with 95 % intervals",
            _differences(table, places, final),
            "### The same, mean over the course",
            _differences(table, places, whole_course),
        ]
        if rate == 1:
            for place in (p for p in places if p.lag >= 2):
                parts += [f"### What happened to tokens: {_name(place)}", _measures(table, place)]
    if len(exact(lines)) < len(lines):
        parts += ["## An engine that rounds its weights", engines(lines, methods)]
    if probed:
        parts += ["## Gradients against those of fresh samples", gradients(probed)]
    return "\n\n".join(parts) + "\n"


def engines(lines: Sequence[Line], methods: Sequence[str]) -> str:
    """Levels, and differences to the default, by lag and by what engine and trainer differ."""
    rows = [["lag", "bits", "mean abs(x - b) at lag 0, nats", "method"]]
    rows[0] += ["clipped", "end", f"less {DEFAULT}'s", "course"]
    for bits in sorted({line["engine_bits"] for line in lines if "engine_bits" in line})[::-1]:
        rounded = (line for line in lines if line.get("engine_bits") == bits)
        table = Table(expanded(rounded, methods), methods)
        for place in table.places:
            for method in methods:
                level = table.level(place, method)
                if level is None:
                    continue
                scores = (final, whole_course)
                gains = [table.difference(place, method, DEFAULT, score) for score in scores]
                told = ["" if e is None or method == DEFAULT else difference_text(e) for e in gains]
                names = ("mismatch", "clipped_low", "clipped_high")
                mismatch, *clipped = (table.measure(place, method, name) or 0.0 for name in names)
                row = [str(place.lag), str(bits), f"{mismatch:.4f}", method, f"{sum(clipped):.1%}"]
                rows.append([*row, f"{level.mean:.3f} ({level.count})", *told])
    rows[1:] = sorted(rows[1:], key=lambda row: row[0])
    return _markdown(rows)


def gradients(lines: Sequence[Line]) -> str:
    """Means of the probe over steps and seeds, by lag and method."""
    columns = ("cosine_of_mean", "cosine", "length", "noise", "acting")
    rows = [["lag", "method", "cosine of the mean", "of one batch", "length", "noise", "acting"]]
    for lag in sorted({line["lag"] for line in lines}):
        for method in dict.fromkeys(line["method"] for line in lines):
            found = [x for x in lines if x["lag"] == lag and x["method"] == method]
            if found:
                means = [statistics.fmean(x[name] for x in found) for name in columns]
                rows.append([str(lag), method, *(f"{mean:.2f}" for mean in means)])
    return _markdown(rows)


def _levels(table: Table, places: Sequence[Place], score: Callable[[Line], float]) -> str:
    def cell(place: Place, method: str) -> str:
        found = table.level(place, method, score)
        return "" if found is None else f"{found.mean:.3f} ({found.count})"

    return _grid(table, places, cell)


def _differences(table: Table, places: Sequence[Place], score: Callable[[Line], float]) -> str:
    stale = [place for place in places if place.lag >= 2]
    rows = [["", *map(_name, places), "mean of lags from 2 on"]]
    for method in table.order:
        found = [table.difference(place, method, DEFAULT, score) for place in places]
        if method == DEFAULT or not any(found):
            continue
        found.append(table.pooled(stale, method, DEFAULT, score) if stale else None)
        rows.append([method, *("" if e is None else difference_text(e) for e in found)])
    return _markdown(rows)


def difference_text(found: Estimate) -> str:
    """``+.012 ± .030``, in bold where the interval excludes zero."""
    if found.count == 1:
        return f"{found.mean:+.3f} (1)"
    text = f"{found.mean:+.3f} ± {found.half:.3f}"
    return f"**{text}** ({found.count})" if found.excludes_zero else f"{text} ({found.count})"


def _measures(table: Table, place: Place) -> str:
    rows = [["", *MEASURES.values()]]
    for method in table.order:
        values = [table.measure(place, method, name) for name in MEASURES]
        if any(value is not None for value in values):
            rows.append([method, *("" if v is None else f"{v:.3f}" for v in values)])
    return _markdown(rows)


def _grid(table: Table, places: Sequence[Place], cell: Callable[[Place, str], str]) -> str:
    rows = [["", *map(_name, places)]]
    for method in table.order:
        if any(table.runs(place, method) for place in places):
            rows.append([method, *(cell(place, method) for place in places)])
    return _markdown(rows)


def _name(place: Place) -> str:
    return f"{place.staleness} {place.lag}" if place.lag else "fresh"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
