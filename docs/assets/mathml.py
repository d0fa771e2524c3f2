r"""Formulas as MathML, made when the site is built: pages need no script and no network.

A hook of MkDocs. ``pymdownx.arithmatex`` has marked the formulas as ``\(...\)`` and ``\[...\]``.
"""

import html
import re

from latex2mathml.converter import convert

_MARKED = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL
)


def on_page_content(page_html: str, **_: object) -> str:
    """Replace every marked formula of a page."""
    return _MARKED.sub(_render, page_html)


def _render(found: re.Match[str]) -> str:
    tag, inline, block = found.groups()
    source = html.unescape(inline if inline is not None else block).strip()
    display = "inline" if inline is not None else "block"
    return f'<{tag} class="formula">{convert(source, display=display)}</{tag}>'
