"""HTML of token rows: no scripts, nothing from the network, everything escaped.

A page has :data:`STYLE` once, however many fragments it has.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from string import Template

import numpy as np

from sdp_lightning.observability.view.palette import DARK, HUES, LIGHT, Theme, hue_of, underline_of
from sdp_lightning.observability.view.text import PART, Decoder, token_texts, visible
from sdp_lightning.observability.view.token_rows import CONTEXT, NAMES, Section, TokenRow
from sdp_lightning.observability.view.words import facts_of, legend_of, parts_of


def fragment(
    sections: Sequence[Section],
    *,
    tokenizer: Decoder | None,
    max_tokens: int,
    notes: Sequence[str] = (),
) -> str:
    """One ``<div class="sdp-view">``; it needs :data:`STYLE` on the page.

    Args:
        sections: rows to show.
        tokenizer: decodes the tokens; None shows token ids.
        max_tokens: tokens of a row to show; more are cut from its middle, with a note.
        notes: notes below the rows, about what is not shown.
    """
    parts = ['<div class="sdp-view">', _legend(sections)]
    for section in sections:
        parts.append('<section class="sdp-group">')
        if section.title:
            parts.append(f'<div class="sdp-title">{_escaped(visible(section.title))}</div>')
        parts += [_row(row, tokenizer, max_tokens) for row in section.rows]
        parts.append("</section>")
    parts += [f'<div class="sdp-note">{_escaped(note)}</div>' for note in notes]
    return "".join([*parts, "</div>"])


def page(body: str, title: str) -> str:
    """A document around a fragment."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta name="color-scheme" content="light dark"><title>{_escaped(title)}</title>{STYLE}'
        f'</head><body class="sdp-page">{body}</body></html>\n'
    )


def _legend(sections: Sequence[Section]) -> str:
    versions, has_context, has_tools = legend_of(sections)
    chips = [
        f'<span class="sdp-chip sdp-v{hue_of(version)} sdp-u-{underline_of(version)}">'
        f"v{version}{'' if lag is None else f', lag {lag}'}</span>"
        for version, lag in versions
    ]
    if has_context:
        text = "prompt and tools" if has_tools else "prompt"
        chips.append(f'<span class="sdp-chip sdp-chip-context">{text}, not trained on</span>')
    return f'<div class="sdp-legend">sampled by {" ".join(chips)}</div>'


def _row(row: TokenRow, tokenizer: Decoder | None, max_tokens: int) -> str:
    facts = facts_of(row)
    side = "".join(
        f'<div class="sdp-fact"><b>{_escaped(value)}</b> {_escaped(name)}</div>'
        for name, value in facts.numbers
    )
    notes = "".join(f'<div class="sdp-small">{_escaped(note)}</div>' for note in facts.notes)
    depth = 0 if row.branch is None else row.branch.depth
    branch = f' sdp-branch" style="--sdp-depth:{depth}' if depth else ""
    return (
        f'<div class="sdp-row{branch}"><div class="sdp-side">{side}{notes}</div>'
        f'<div class="sdp-main">{_strip(row)}{_tokens(row, tokenizer, max_tokens)}</div></div>'
    )


def _strip(row: TokenRow) -> str:
    """A bar with a piece for every run of one version, in proportion to its tokens."""
    pieces = "".join(
        f'<i style="flex:{end - start};'
        f'background:{"var(--sdp-line)" if version == CONTEXT else HUES[hue_of(version)]}"></i>'
        for version, start, end in row.runs
    )
    return f'<div class="sdp-strip">{pieces}</div>'


def _tokens(row: TokenRow, tokenizer: Decoder | None, max_tokens: int) -> str:
    parts: list[str] = []
    for start, end, note in parts_of(row, max_tokens):
        if note:
            parts.append(f'<div class="sdp-note sdp-cut">{note}</div>')
        texts = token_texts(row.token_ids[start:end].tolist(), tokenizer)
        for version, first, last in row.runs:
            first, last = max(first, start), min(last, end)
            if first < last:
                piece = texts[first - start : last - start]
                parts.append(_run(row, version, first, piece, is_ids=tokenizer is None))
    return f'<div class="sdp-text">{"".join(parts)}</div>'


def _run(row: TokenRow, version: int, first: int, texts: list[str], *, is_ids: bool) -> str:
    gap = " " if is_ids else ""
    if version == CONTEXT:
        kind = "prompt" if first == 0 else "history" if first == row.num_shared else "tool"
        text = _escaped(gap.join(texts))
        return f'<div class="sdp-context" data-kind="{kind}">{text}</div>'
    spans = [
        f'<span class="sdp-t" title="{_escaped(_hover(row, first + index, text))}">'
        f"{_escaped(text)}</span>"
        for index, text in enumerate(texts)
    ]
    label = f'<sup class="sdp-label">v{version}</sup>'
    style = f"sdp-run sdp-v{hue_of(version)} sdp-u-{underline_of(version)}"
    return f'<span class="{style}">{label}{gap.join(spans)}</span>'


def _hover(row: TokenRow, index: int, text: str) -> str:
    version = int(row.versions[index])
    lag = "" if row.version is None else f", lag {row.version - version}"
    lines = [f"version {version}{lag}"]
    for name in NAMES:
        value = float(row.numbers[name][index])
        if np.isnan(value):
            continue
        shown = f"{value:.4f}"
        if name != "weight":
            shown += f" (p {np.exp(min(value, 0.0)):.3g})"
        lines.append(f"{name} {shown}")
    lines.append(f"token {int(row.token_ids[index])}")
    if text == PART:
        lines.append("the beginning of a character that goes on in the next token")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _variables(theme: Theme) -> str:
    named = {
        **{f"t{i}": tint for i, tint in enumerate(theme.tints)},
        **{name: getattr(theme, name) for name in ("ground", "text", "muted", "panel", "line")},
    }
    return "".join(f"--sdp-{name}:{color};" for name, color in named.items())


def _style() -> str:
    hues = "".join(
        f".sdp-v{i}{{background:var(--sdp-t{i});text-decoration-color:{hue}}}"
        for i, hue in enumerate(HUES)
    )
    css = Template((files("sdp_lightning.observability.view") / "style.css").read_text("utf-8"))
    light, dark = (_variables(theme) + "color-scheme:" for theme in (LIGHT, DARK))
    return css.substitute(light=f"{light}light", dark=f"{dark}dark", hues=hues)


STYLE = f"<style>{_style()}</style>"
