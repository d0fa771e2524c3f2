r"""What mkdocs leaves to us: notebooks become pages, formulas MathML, roles of Sphinx plain names.

So pages need no script and no network. A notebook's page shows the outputs that are committed with
it. ``pymdownx.arithmatex`` has marked the formulas of the pages as ``\(...\)`` and ``\[...\]``;
docstrings have ``.. math::`` and ``:class:`~package.Name```.
"""

import html
import re
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

_MARKED = re.compile(
    r'<(?:span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</(?:span|div)>', re.DOTALL
)
_DIRECTIVE = re.compile(r"<p>\.\. math:: (.*?)</p>", re.DOTALL)
_ROLE = re.compile(
    r":(?:class|func|mod|meth|attr):<code>"
    r"(?:~?(?:[\w.]+\.)?(?P<name>\w+)|(?P<title>[^<&]+?) &lt;[\w.]+&gt;)</code>"
)


def on_files(files: Files, config: Any, **_: object) -> Files:
    """Add a page for every notebook: ``notebooks/01_the_loss_by_hand.md`` of that ``.ipynb``."""
    for path in sorted(_NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(_markdown_of(cell) for cell in cells)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def _markdown_of(cell: Any) -> str:
    if cell.cell_type == "markdown":
        return cell.source
    return "\n\n".join([_fenced(cell.source, "python"), *map(_shown, cell.outputs)])


def _shown(output: Any) -> str:
    """An output as Markdown: its richest form."""
    if output.output_type == "stream":
        return _fenced(output.text.rstrip("\n"), "text")
    if "image/png" in output.data:
        alt = html.escape(output.metadata.get("image/png", {}).get("alt", "picture"))
        data = output.data["image/png"].replace("\n", "")
        return f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    if "text/markdown" in output.data:
        return output.data["text/markdown"]
    if "text/html" in output.data:
        return f'<div class="output">{output.data["text/html"]}</div>'
    return _fenced(output.data["text/plain"], "text")


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text}\n````"


def on_page_content(page_html: str, **_: object) -> str:
    """Replace every formula and role of a page."""
    page_html = _MARKED.sub(lambda math: _formula(math[1] or math[2], math[2]), page_html)
    page_html = _DIRECTIVE.sub(lambda math: _formula(math[1], math[1]), page_html)
    return _ROLE.sub(lambda role: f"<code>{role['name'] or role['title']}</code>", page_html)


def _formula(source: str, is_block: str | None) -> str:
    display, tag = ("block", "div") if is_block else ("inline", "span")
    formula = convert(html.unescape(source).strip(), display=display)
    return f'<{tag} class="formula">{formula}</{tag}>'
