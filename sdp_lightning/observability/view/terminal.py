"""Token rows as a rich renderable, with the colors and labels of the HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdp_lightning.observability.view.palette import TERMINAL, hue_of
from sdp_lightning.observability.view.text import Decoder, token_texts, visible
from sdp_lightning.observability.view.token_rows import CONTEXT, Section, TokenRow
from sdp_lightning.observability.view.words import facts_of, legend_of, parts_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.style import Style
    from rich.text import Text


def renderable(
    sections: Sequence[Section],
    *,
    tokenizer: Decoder | None,
    max_tokens: int,
    notes: Sequence[str] = (),
) -> RenderableType:
    """A renderable for a rich console; arguments as for :func:`~.html.fragment`."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [_legend(sections)]
    for section in sections:
        if section.title:
            parts.append(Text(f"\n{visible(section.title)}", style="bold"))
        for row in section.rows:
            depth = 0 if row.branch is None else row.branch.depth
            tokens = Padding(_tokens(row, tokenizer, max_tokens), (0, 0, 1, 2))
            parts += [Padding(part, (0, 0, 0, 2 * min(depth, 8))) for part in (_facts(row), tokens)]
    parts += [Text(note, style="italic") for note in notes]
    return Group(*parts)


def _legend(sections: Sequence[Section]) -> Text:
    from rich.text import Text

    versions, has_context, has_tools = legend_of(sections)
    line = Text("sampled by ")
    for version, lag in versions:
        text = f" v{version}{'' if lag is None else f', lag {lag}'} "
        line.append(text, _style(version)).append(" ")
    if has_context:
        line.append("prompt and tools" if has_tools else "prompt", "dim italic")
    return line


def _facts(row: TokenRow) -> Text:
    from rich.text import Text

    facts = facts_of(row)
    line = Text()
    for name, value in facts.numbers:
        line.append(value, "bold").append(f" {name}  ")
    return line.append(", ".join(facts.notes), "dim")


def _tokens(row: TokenRow, tokenizer: Decoder | None, max_tokens: int) -> Text:
    from rich.text import Text

    gap = " " if tokenizer is None else ""
    text = Text(overflow="fold")
    for start, end, note in parts_of(row, max_tokens):
        if note:
            text.append(f"{_line_before(text)}[{note}]\n", "italic")
        texts = token_texts(row.token_ids[start:end].tolist(), tokenizer)
        for version, first, last in row.runs:
            first, last = max(first, start), min(last, end)
            if first >= last:
                continue
            piece = gap.join(texts[first - start : last - start])
            if version == CONTEXT:  # contexts have lines of their own
                after = "" if piece.endswith("\n") else "\n"
                text.append(f"{_line_before(text)}{piece}{after}", "dim italic")
            else:
                text.append(f"v{version}\u2502", _style(version, bold=True))
                text.append(piece, _style(version))
    return text


def _line_before(text: Text) -> str:
    return "\n" if text and not text.plain.endswith("\n") else ""


def _style(version: int, *, bold: bool = False) -> Style:
    from rich.style import Style

    tint = TERMINAL.tints[hue_of(version)]
    return Style(color=TERMINAL.text, bgcolor=tint, bold=bold)
