"""Every notebook runs from a clean kernel, and shows what it claims to show."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from sdp_lightning.config.build_cache import cache_folder
from sdp_lightning.config.import_path import load_object
from support.notebooks import code_cells, execute, printed
from support.paths import ROOT

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
BY_HAND = "01_the_loss_by_hand.ipynb"
LIFE = "02_life_of_a_rollout.ipynb"
TRAIN = "03_train_in_a_notebook.ipynb"
READING = "04_reading_the_metrics.ipynb"
FROM_TRL = "05_from_trl.ipynb"
AGENT = "06_train_an_agent.ipynb"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository's notebooks, with the recipes beside them and a clean IPython."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    for recipe in ("arithmetic_cpu", "tiny_cpu"):  # not in a cell's time
        load_object(str(ROOT / "recipes" / recipe / "model.py:model_path"))()
    return tmp_path


def read(folder: Path, name: str) -> Any:
    return nbformat.read(folder / name, as_version=4)


def pages(notebook: Any) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(o.data.get("text/html", "") for o in outputs if o.output_type == "display_data")


def kinds(notebook: Any) -> list[list[str]]:
    """What each code cell put out: all streams but ``stdout`` and all errors show up here."""
    return [[o.get("name", o.output_type) for o in cell.outputs] for cell in code_cells(notebook)]


def tables(notebook: Any) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    shown = (o.data.get("text/markdown", "") for o in outputs if o.output_type == "display_data")
    return "".join(shown)


def pictures(notebook: Any) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in o.data for o in outputs if o.output_type == "display_data")


def check_the_loss_by_hand(notebook: Any) -> None:
    text = printed(notebook)
    assert pictures(notebook) == 3
    table = re.findall(r"^(\w+) +(-?[\d.]+) +(-?[\d.]+) +([A-E.]{5}) +([A-E.]{5})$", text, re.M)
    assert [row[0] for row in table] == ["segment", "proximal", "behavior"]
    assert all(abs(float(library) - float(hand)) < 2e-4 for _, library, hand, _, _ in table)
    clipped = {name: marks for name, _, _, marks, _ in table}
    assert clipped == {"segment": "A.C.E", "proximal": ".....", "behavior": "A.C.E"}
    biases = re.findall(r"lag \d: bias ([\d.]+) with the bridge, ([\d.]+) without", text)
    assert [float(with_it) for with_it, _ in biases] == [0.0] * 6
    without = [float(value) for _, value in biases]
    assert without[:2] == [0.0, 0.0] and sorted(without[2:]) == without[2:] and without[2] > 0.1
    assert re.search(r"^lag +3 +3 +1 +1 +0$", text, re.M), "one row, three authors"


def check_life_of_a_rollout(notebook: Any) -> None:
    text, page = printed(notebook), pages(notebook)
    assert re.findall(r"published version (\d)", text) == ["0", "1", "2", "3"]

    sentences = page.split('<div class="sdp-row">')[1:]
    assert len(sentences) == 4, "one group of four"
    for sentence in sentences:
        assert re.findall(r'class="sdp-label">v(\d)<', sentence) == ["0", "1"], "cut in two"
        old, new = (sentence.count(f'title="version {v}, lag {1 - v}\n') for v in (0, 1))
        assert old and new and sentence.count("\nbehavior ") == old + new
        assert sentence.count("\nsegment ") == old, "what the publish closed was scored in time"
    tokens = sum(map(int, re.findall(r"lag \d: (\d+) tokens", text)))
    assert page.count('<span class="sdp-t"') == tokens

    errors = re.findall(r"tokens stamped version \d +([\d.]+) +([\d.]+)", text)
    (own_0, other_0), (other_1, own_1) = [tuple(map(float, row)) for row in errors]
    assert max(own_0, own_1) < 1e-4 < min(other_0, other_1), "every stamp is true"

    assert re.search(r" lag +b +q +x +n +w +r +drift +kept +clipped\n", text)
    table = [line.split()[-10:] for line in text.splitlines() if line.endswith(("True", "False"))]
    old, new = ([row for row in table if row[0] == lag] for lag in "21")
    assert old and new
    assert any(q != x for _, _, q, x, *_ in old), "scored under version 1, not under 2"
    assert all(q == x == n for _, _, q, x, n, *_ in new)

    by_library, by_hand = re.findall(r"loss (-?[\d.]+), by hand (-?[\d.]+)", text)[0]
    assert abs(float(by_library) - float(by_hand)) < 2e-4
    before, after = re.findall(r"loss (-?[\d.]+) before the step, (-?[\d.]+) after", text)[0]
    assert float(after) < float(before)
    assert text.endswith("threads left: 0\n")


def check_train_in_a_notebook(notebook: Any) -> None:
    text, page = printed(notebook), pages(notebook)
    assert pictures(notebook) == 2, "each fit has one picture, which is replaced"
    stop = (
        r"Ctrl-C: the run ends after this step; once more ends it at once\.\n"
        r"version 16 is saved: go on with ckpt_path='.*last-stopped-step=32\.ckpt'\.\n"
        r"stopped at optimizer step 32, policy version 16\n"
        r"saved: last-stopped-step=32\.ckpt; threads left: 0\n"
    )
    assert re.search(stop, text)
    assert "policy versions: 1 to 16, then 17 to 40\n" in text
    assert "640 groups were trained on, of 640 prompts\n" in text
    sampled_by, trained_by = re.findall(r"sampled by versions \[(.*)\], .* version (\d+)", text)[0]
    versions = [int(version) for version in sampled_by.split(", ")]
    assert max(versions) <= int(trained_by) <= min(versions) + 2
    assert page.count('<div class="sdp-row">') == 4 and "4 more trajectories not shown" in page
    before, after = map(int, re.findall(r"before (\d+)%, after (\d+)%", text)[0])
    assert after > before + 10
    assert text.endswith("threads left: 0\n")


def check_reading_the_metrics(notebook: Any) -> None:
    text, page = printed(notebook), tables(notebook)
    assert pictures(notebook) == 2
    names = ["healthy", "too fast", "stale", "stale, segment"]
    found = re.findall(r"^(\w[\w, ]*?) +(\d\.\d\d) +(\d\.\d\d)$", text, re.M)
    assert [name for name, _, _ in found] == names
    last = {name: float(reward) for name, _, reward in found}
    assert last["too fast"] < last["stale"] < last["stale, segment"] < last["healthy"]

    assert re.findall(r"^\*\*(.*)\*\*$", page, re.M) == names
    by_lag = re.findall(r"^\| (0|1|2|3|4\+) \| ([\d,]+) \|", page, re.M)
    assert [lag for lag, _ in by_lag] == ["0", "1", "2", "3", "4+"] * 4
    assert [count != "0" for _, count in by_lag[:5]] == [True, True, True, False, False]
    assert all(count != "0" for _, count in by_lag[10:])

    said = text[text.index("HEALTHY: ") :]
    _, fast, stale, segment = re.split(r"^(?:TOO FAST|STALE|STALE, SEGMENT): ", said, flags=re.M)
    assert "low_ess: said of" in fast and "lower lr" in fast
    assert "large_bridge: said of" in stale and "trust_region='segment'" in stale
    assert "large_bridge" not in segment


def table_rows(text: str) -> set[tuple[str, str]]:
    """The first two cells of every row of its tables, below their heads."""
    cells = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", text, re.M)
    return {(here, there) for here, there in cells if (here, there) != ("here", "TRL")}


def check_from_trl(notebook: Any) -> None:
    text = printed(notebook)
    assert pictures(notebook) == 1
    assert "correct: [1.0, 0.0, 0.0]\nform: [1.0, 0.0, 1.0]\n" in text
    found = re.findall(r"^(\w+): (\w+) (\d\.\d\d) in .*, (\d\.\d\d) in", text, re.M)
    runs = ("synchronous", "asynchronous")
    assert [f[:2] for f in found] == [(run, r) for run in runs for r in ("correct", "form")]
    assert all(float(last) > float(first) + 0.1 for *_, first, last in found)
    old, stale = map(int, re.findall(r"(\d+)% of the tokens are older", text))
    assert old == 0 < stale
    sources = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    page = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
    settings = table_rows(sources)
    assert len(settings) >= 8 and settings <= table_rows(page)
    assert text.endswith("threads left: 0\n")


def check_train_an_agent(notebook: Any) -> None:
    text, page = printed(notebook), pages(notebook)
    assert pictures(notebook) == 1
    ((first, last),) = re.findall(r"reward ([\d.]+) in the first .*, ([\d.]+) in the last", text)
    assert float(last) > float(first) + 0.2
    ((samples, branches, mixed),) = re.findall(r"(\d+) samples, (\d+) branches; (\d+) of", text)
    assert int(samples) == 24 * 64 < int(branches) and 0 < int(mixed) < int(branches)
    errors = dict(re.findall(r"^version (\d+): \d+ tokens, .* up to ([\d.]+)$", text, re.M))
    assert float(errors["12"]) < 1e-4
    assert all(float(error) > 0.01 for version, error in errors.items() if version != "12")
    assert "leaves branch 1 after 7 tokens" in page and "7 tokens as in branch 1" in page
    assert 'data-kind="tool"' in page, "what the tool said, in the middle of a branch"
    assert text.endswith("threads left: 0\n")


CLAIMS = {
    BY_HAND: check_the_loss_by_hand,
    LIFE: check_life_of_a_rollout,
    TRAIN: check_train_in_a_notebook,
    READING: check_reading_the_metrics,
    FROM_TRL: check_from_trl,
    AGENT: check_train_an_agent,
}


@pytest.mark.slow
@pytest.mark.timeout(480)  # the kernel gets 180 s a cell; all cells take up to 80 s of CPU
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_its_folder_and_shows_what_it_claims(checkout: Path, name: str):
    notebook = read(checkout / "notebooks", name)
    committed = kinds(notebook)
    execute(notebook, checkout / "notebooks")
    assert kinds(notebook) == committed, "the committed outputs are those of other cells"
    CLAIMS[name](notebook)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_finds_the_repository_from_its_root_too(checkout: Path, name: str):
    notebook = read(checkout / "notebooks", name)
    notebook.cells = code_cells(notebook)[:1]
    execute(notebook, checkout)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_holds_one_clean_run_and_nothing_of_the_machine(name: str):
    notebook = read(ROOT / "notebooks", name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {kind for cell in kinds(notebook) for kind in cell} <= {"stdout", "display_data"}
    assert all(not cell.metadata for cell in notebook.cells), "timings of an execution"
    assert notebook.metadata.kernelspec.name == "python3"
    assert "version" not in notebook.metadata.language_info
    text = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
    for place in (str(ROOT), str(Path.home()), str(cache_folder()), sys.prefix):
        assert place not in text
    CLAIMS[name](notebook)
