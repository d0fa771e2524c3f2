r"""The last change to every page: formulas become MathML, roles of Sphinx become plain names.

So pages need no script and no network. ``pymdownx.arithmatex`` has marked the formulas of the pages
as ``\(...\)`` and ``\[...\]``; docstrings have ``.. math::`` and ``:class:`~package.Name```.
"""

import html
import re

from latex2mathml.converter import convert

_MARKED = re.compile(
    r'<(?:span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</(?:span|div)>', re.DOTALL
)
_DIRECTIVE = re.compile(r"<p>\.\. math:: (.*?)</p>", re.DOTALL)
_ROLE = re.compile(
    r":(?:class|func|mod|meth|attr):<code>"
    r"(?:~?(?:[\w.]+\.)?(?P<name>\w+)|(?P<title>[^<&]+?) &lt;[\w.]+&gt;)</code>"
)


def on_page_content(page_html: str, **_: object) -> str:
    """Replace every formula and role of a page."""
    page_html = _MARKED.sub(lambda math: _formula(math[1] or math[2], math[2]), page_html)
    page_html = _DIRECTIVE.sub(lambda math: _formula(math[1], math[1]), page_html)
    return _ROLE.sub(lambda role: f"<code>{role['name'] or role['title']}</code>", page_html)


def _formula(source: str, is_block: str | None) -> str:
    display, tag = ("block", "div") if is_block else ("inline", "span")
    formula = convert(html.unescape(source).strip(), display=display)
    return f'<{tag} class="formula">{formula}</{tag}>'
