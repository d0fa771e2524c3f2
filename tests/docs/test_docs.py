"""The documentation: its examples run, its generated pages are in step, the site builds clean."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdp_lightning.cli.main import HELP
from support.paths import ROOT

CLI_PAGE = ROOT / "docs" / "reference" / "cli.md"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
)
BLOCK = re.compile(r'^```(python|py)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, title and source of every block of Python."""
    return BLOCK.findall((ROOT / page).read_text())


WITH_PYTHON = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_examples_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python`` is run; ``py`` needs a model from a hub or a GPU, and is only compiled."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    for language, title, source in blocks(page):
        code = compile(source, f"{page}: {title or 'example'}", "exec")
        if title:
            (tmp_path / title).write_text(source)
        if language == "python":
            exec(code, names)


def test_most_pages_have_examples_that_run() -> None:
    run = [page for page in WITH_PYTHON if any(block[0] == "python" for block in blocks(page))]
    assert len(run) >= 6


def test_the_page_of_the_command_line_is_its_help() -> None:
    assert HELP in CLI_PAGE.read_text()


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text()
        loads = re.findall(
            r'<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)="(https?:[^"]+)"', text
        )
        assert not loads, f"{page} loads {loads}"
        assert 'class="arithmatex"' not in text and ".. math::" not in text, f"{page}: raw formula"
        assert not re.search(r":(class|func|mod|meth):<code>", text), f"{page}: raw reference"


def test_the_page_of_the_architecture_names_every_room_and_only_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"^\| `(\w+)(?:/|\.py)` \| (.*) \|$", page, re.MULTILINE)
    package = ROOT / "sdp_lightning"
    entries = {path.stem for path in package.iterdir() if not path.name.startswith(("_", "py."))}
    assert {room for room, _ in rooms} == entries
    for room, text in rooms:
        for name in re.findall(r"`([a-z_]+)`", text):
            found = [package / room / name, package / room / f"{name}.py"]
            assert any(path.exists() for path in found), f"{room}/{name}"
