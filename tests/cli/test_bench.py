"""The command that runs benchmarks: what they print is in the report, and how each ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdp_lightning.cli import bench
from sdp_lightning.cli.main import main
from support.paths import ROOT


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with three benchmarks, which is the present folder."""
    folder = tmp_path / bench.FOLDER
    folder.mkdir(parents=True)
    (folder / "quick.py").write_text(
        '"""What is quick: ``python quick.py``.\n\nMore."""\nimport sys\nprint(*sys.argv[1:], 42)\n'
    )
    (folder / "broken.py").write_text('"""What fails."""\nprint("first", flush=True)\n1 / 0\n')
    (folder / "endless.py").write_text(
        '"""What does not end, and has a child of its own session."""\nimport subprocess, time\n'
        'child = ["sh", "-c", "echo $$ > child; exec sleep 600"]\n'
        "subprocess.Popen(child, start_new_session=True)\n"
        'print("begun", flush=True)\ntime.sleep(600)\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_benchmark_printed_is_in_the_report(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "quick", "--out", "out/R.md", "--", "--rounds", "3"]) == 0
    told = (checkout / "out/R.md").read_text()
    assert "## quick\n\nWhat is quick\n" in told
    assert f"`python {bench.FOLDER}/quick.py --rounds 3`" in told
    assert "```text\n--rounds 3 42\n```" in told
    assert "| torch | " in told and "| processor | " in told and "UTC." in told
    assert "quick: done in" in capsys.readouterr().out


def test_one_that_fails_is_named_and_the_others_are_run(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "broken", "quick"]) == 1
    told = (checkout / "RESULTS.md").read_text()
    assert "**failed with status 1 in" in told and "first\n" in told
    assert "ZeroDivisionError" in told and "## quick" in told
    assert "broken: failed with status 1" in capsys.readouterr().out


def test_one_that_does_not_end_is_stopped_with_its_children_and_keeps_what_it_printed(
    checkout: Path,
) -> None:
    assert main(["bench", "endless", "--limit-s", "5"]) == 1
    told = (checkout / "RESULTS.md").read_text()
    assert "**stopped after" in told and "begun\n```" in told
    child = int((checkout / "child").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quik"], "there is no benchmark 'quik'; there are broken, endless, quick."),
        (["--", "--rounds", "3"], "arguments are of one benchmark, and all are to run."),
        (["quick", "--limit-s", "nan"], "--limit-s must be a positive number of seconds, got nan."),
        (["quick", "--out", "recipes"], "--out: the report cannot be written to recipes: "),
        (["quick", "broken", "--", "-x"], "arguments are of one benchmark, and 2 are to run."),
    ],
)
def test_what_cannot_be_run_is_refused(
    checkout: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (checkout / "RESULTS.md").exists()


def test_without_a_checkout_it_says_where_benchmarks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.sdp_lightning, "__file__", str(tmp_path / "site/pkg/__init__.py"))
    assert main(["bench"]) == 2
    assert "Run this in a checkout of it." in capsys.readouterr().err


def test_every_benchmark_here_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in bench.scripts().values():
        about = bench._about(path)  # pyright: ignore[reportPrivateUsage]
        assert about and "``" not in about, path
