"""Pieces of HTML: numbers with their keys, tables, cards. Texts are escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

Cell = tuple[str, str]  # (class, HTML)


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def value(key: str, number: float, text: str) -> str:
    """A number as text, with its key and exact value as attributes for programs."""
    return f'<span data-key="{escape(key)}" data-value="{number!r}">{escape(text)}</span>'


def section(anchor: str, title: str, body: str, sub: str = "") -> str:
    """A part of the page under a heading; empty without a body."""
    if not body:
        return ""
    note = f'<p class="sub">{escape(sub)}</p>' if sub else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{note}{body}</section>'


def card(title: str, body: str, sub: str = "") -> str:
    """A box with a title."""
    note = f'<p class="sub">{escape(sub)}</p>' if sub else ""
    return f'<div class="card"><h3>{escape(title)}</h3>{note}{body}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, last_is_sum: bool = False) -> str:
    """A table whose cells hold HTML; a head that begins with ``#`` is a column of numbers."""
    top = "".join(
        f'<th class="{"n" if name[:1] == "#" else ""}">{escape(name.lstrip("#"))}</th>'
        for name in head
    )
    body = ""
    for index, row in enumerate(rows):
        kind = ' class="sum"' if last_is_sum and index + 1 == len(rows) else ""
        cells = "".join(f'<td class="{kind}">{text}</td>' for kind, text in row)
        body += f"<tr{kind}>{cells}</tr>"
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def duration(seconds: float) -> str:
    """Seconds as a readable duration.

    >>> duration(0.0123), duration(4.56), duration(75), duration(4000), duration(200000)
    ('12 ms', '4.6 s', '1:15', '1:06:40', '2 d 7:33:20')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return clock(seconds)


def clock(seconds: float) -> str:
    """Whole seconds as minutes, hours and days.

    >>> clock(5), clock(75), clock(4000), clock(200000)
    ('0:05', '1:15', '1:06:40', '2 d 7:33:20')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not days and not hours:
        return f"{minutes}:{rest:02d}"
    text = f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{days} d {text}" if days else text
