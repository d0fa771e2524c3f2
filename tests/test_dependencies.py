"""No dependency may be older than the version that mends a known advisory."""

from __future__ import annotations

import io
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    path = ROOT / ".ci/audit"
    module = ModuleType("audit")
    module.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module


def run(audit: ModuleType, monkeypatch: pytest.MonkeyPatch, **versions: str) -> int:
    """The audit's exit status for a made-up environment, as pip lists it."""
    listed = [{"name": name, "version": version} for name, version in versions.items()]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(listed)))
    return audit.main(["-"])


def test_an_old_package_fails_with_its_version_the_one_that_mends_it_and_the_advisory(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(audit, monkeypatch, AioHTTP="3.14.2", numpy="2.3.5", unheard_of="0.1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("audit: aiohttp 3.14.2: CVE-2026-69244, the parser of answers")
    assert line.endswith("Upgrade to 3.14.3 or later.")


def test_every_finding_is_named_and_a_release_before_the_fixed_one_counts_as_older(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(audit, monkeypatch, filelock="3.20", Jinja2="3.1.6rc1", jupyter_core="5.8.0") == 1
    lines = capsys.readouterr().err.splitlines()
    found = [line.split(",")[0].removeprefix("audit: ") for line in lines]
    assert found == [
        "filelock 3.20: CVE-2026-22701",
        "filelock 3.20: CVE-2025-68146",
        "jinja2 3.1.6rc1: CVE-2025-27516",
        "jupyter-core 5.8.0: CVE-2025-30167",
    ]


def test_what_no_release_mends_is_said_and_passes(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(audit, monkeypatch, torch="2.13.0+cpu", aiohttp="3.14.3") == 0
    said = capsys.readouterr()
    assert not said.err
    assert "no release mends torch 2.13.0+cpu: CVE-2025-3000" in said.out


@pytest.mark.parametrize("line", ["aiohttp 3.14.3 CVE-1", "aiohttp | 3.14.3 | | text", "a | 1 | b"])
def test_a_line_that_does_not_fit_is_quoted(audit: ModuleType, tmp_path: Path, line: str) -> None:
    (tmp_path / "list").write_text(f"# comment\n\n{line}\n")
    with pytest.raises(SystemExit, match=r"list:3: not 'package . version . id . text': "):
        audit.read_advisories(tmp_path / "list")


def requirements() -> Iterator[Requirement]:
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        yield Requirement(text)


def mended(audit: ModuleType) -> dict[str, Version]:
    """For each package with an advisory, the first version without any."""
    latest: dict[str, Version] = {}
    for advisory in audit.read_advisories():
        if advisory.fixed is not None:
            best = latest.get(advisory.package, advisory.fixed)
            latest[advisory.package] = max(best, advisory.fixed)
    return latest


def test_floors_are_not_below_the_versions_that_mend_advisories(audit: ModuleType) -> None:
    latest = mended(audit)
    named = set[str]()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name in latest:
            named.add(name)
            floors = [
                Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")
            ]
            assert floors and max(floors) >= latest[name], f"{requirement} < {latest[name]}"
    # pip installs itself, and lightning brings the other at its own version.
    assert set(latest) - named == {"pip", "pytorch-lightning"}


def test_the_pinned_versions_are_not_below_the_floors_and_mend_the_advisories(
    audit: ModuleType,
) -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / ".ci/constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    for name, version in mended(audit).items():
        assert pins.get(name, version) >= version, name
    for requirement in requirements():
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is None or requirement.specifier.contains(pin), f"{requirement}, pinned at {pin}"
