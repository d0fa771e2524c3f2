"""What the doctor reads from nvidia-smi: answers as they were recorded, and none at all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.gpus import (
    GPU_QUERY,
    PROCESS_QUERY,
    Gpu,
    GpuProcess,
    NvidiaSmiError,
    ask_nvidia_smi,
    check_gpus,
    parse_gpus,
    parse_processes,
)
from sdp_lightning.cli.doctor.machine import examine

A, B = "GPU-5d0bb1a1-3f5c-4a39-9c7e-000000000000", "GPU-77c0de55-0b1a-4c3d-8a11-111111111111"
TWO = f"0, {A}, 30720, 81920, Disabled\n1, {B}, 4, 81920, Disabled\n"
DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"


def answer(gpus: str, processes: str | NvidiaSmiError = "") -> Callable[[str], str]:
    def ask(query: str) -> str:
        text = {GPU_QUERY: gpus, PROCESS_QUERY: processes}[query]
        if isinstance(text, NvidiaSmiError):
            raise text
        return text

    return ask


def states(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.state, finding.subject) for finding in findings]


# Parsing ------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "gpu"),
    [
        pytest.param(
            f"0, {A}, 1234, 81559, Disabled", Gpu(0, A, 1234, 81559, False), id="as usual"
        ),
        pytest.param(f"3, {A}, 0, 24576, [N/A]", Gpu(3, A, 0, 24576, False), id="no MIG there"),
        pytest.param(
            f"0, {A}, [N/A], [N/A], [Not Supported]", Gpu(0, A, None, None, False), id="not told"
        ),
        pytest.param(
            f"0, {A}, [Insufficient Permissions], 81559, Enabled",
            Gpu(0, A, None, 81559, True),
            id="split by MIG, seen from a slice",
        ),
    ],
)
def test_a_line_is_a_gpu(line: str, gpu: Gpu) -> None:
    assert parse_gpus(line + "\n") == [gpu]


@pytest.mark.parametrize(
    ("line", "process", "text"),
    [
        pytest.param(
            f"{A}, 4242, /usr/bin/python3, 20480",
            GpuProcess(A, 4242, "/usr/bin/python3", 20480),
            "4242 (python3, 20.0 GiB)",
            id="as usual",
        ),
        pytest.param(
            f"{A}, 4242, VLLM::EngineCore, [N/A]",
            GpuProcess(A, 4242, "VLLM::EngineCore", None),
            "4242 (VLLM::EngineCore)",
            id="memory not told",
        ),
        pytest.param(
            f"{A}, 4242, [Not Found], 512",
            GpuProcess(A, 4242, "[Not Found]", 512),
            "4242 (0.5 GiB)",
            id="in another container",
        ),
        pytest.param(
            f"{A}, [Insufficient Permissions], [Insufficient Permissions], [N/A]",
            GpuProcess(A, None, "[Insufficient Permissions]", None),
            "?",
            id="nothing told",
        ),
        pytest.param(
            f"{A}, 7, /opt/train, eval/run.py, 512",
            GpuProcess(A, 7, "/opt/train, eval/run.py", 512),
            "7 (run.py, 0.5 GiB)",
            id="a comma in the name",
        ),
    ],
)
def test_a_line_is_a_process(line: str, process: GpuProcess, text: str) -> None:
    assert parse_processes(f"\n{line}\n") == [process]
    assert str(process) == text


@pytest.mark.parametrize("text", ["No devices were found\n", DRIVER, "a, b, c, d, e\n"])
def test_what_is_no_list_of_gpus_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(NvidiaSmiError, match=f"answered: {text.strip()[:20]}"):
        parse_gpus(text)


def test_no_line_is_no_process_and_half_a_line_is_refused() -> None:
    assert parse_processes("\n") == []
    with pytest.raises(NvidiaSmiError, match="answered: No running"):
        parse_processes("No running processes found\n")


# Findings ------------------------------------------------------------


def test_without_nvidia_smi_nothing_is_said() -> None:
    assert check_gpus(None, "0") == []


def test_holders_are_named_with_the_share_that_is_left() -> None:
    held = f"{A}, 11, python, 20480\n{A}, 12, /opt/VLLM::EngineCore, 10000\n"
    first, second = check_gpus(answer(TWO, held), None)
    assert states([first, second]) == [("note", "GPU 0 memory"), ("ok", "GPU 1 memory")]
    assert first.text == (
        "30.0 GiB of 80.0 GiB used by pids 11 (python, 20.0 GiB), 12 (VLLM::EngineCore, 9.8 GiB); "
        "to share it give vLLM gpu_memory_utilization below 0.62."  # 1 - 30 / 80 = 0.625
    )
    assert second.text == "0.0 GiB of 80.0 GiB used"


@pytest.mark.parametrize(
    ("used", "total", "advice"),
    [
        ("8192", "81920", "below 0.90."),
        ("80000", "81920", "it is full: end them, or use another."),
        ("[N/A]", "[N/A]", "? of ? used by pids 1; to share it give vLLM gpu_memory_utilization."),
    ],
)
def test_the_advice_follows_from_what_is_free(used: str, total: str, advice: str) -> None:
    [finding] = check_gpus(
        answer(f"0, {A}, {used}, {total}, [N/A]\n", f"{A}, 1, [N/A], [N/A]\n"), None
    )
    assert finding.state == "note"
    assert finding.text.endswith(advice)


def test_memory_that_no_shown_process_holds_is_noted_but_not_a_driver_s_few_mib() -> None:
    hidden, idle = check_gpus(answer(TWO), None)
    assert hidden.state == "note" and "not shown here" in hidden.text and "0.62" in hidden.text
    assert idle.state == "ok"


@pytest.mark.parametrize("slice_id", [f"MIG-{A}/3/0", A])
def test_a_split_gpu_asks_for_slices_and_shows_who_is_on_them(slice_id: str) -> None:
    [finding] = check_gpus(
        answer(f"0, {A}, 2048, 81920, Enabled\n", f"{slice_id}, 5, python, [N/A]\n"), None
    )
    assert finding.state == "note"
    assert "by pids 5 (python); it is split by MIG" in finding.text
    assert "gpu_memory_utilization" not in finding.text


def test_a_process_on_a_slice_with_an_id_of_its_own_is_listed_apart() -> None:
    found = check_gpus(answer(TWO, "MIG-0aa6, 5, python, 512\n"), None)
    assert states(found)[-1] == ("note", "GPU processes")
    assert "5 (python, 0.5 GiB)" in found[-1].text


def test_gpus_are_shown_though_their_processes_may_not_be_asked_for() -> None:
    refusal = NvidiaSmiError("nvidia-smi failed (4): Insufficient Permissions")
    found = check_gpus(answer(TWO, refusal), None)
    assert states(found)[0] == ("note", "GPU processes")
    assert "Insufficient Permissions" in found[0].text
    assert [finding.subject for finding in found[1:]] == ["GPU 0 memory", "GPU 1 memory"]


def test_a_driver_that_does_not_answer_is_one_note() -> None:
    [finding] = check_gpus(answer(DRIVER), None)
    assert (finding.state, finding.subject) == ("note", "nvidia-smi")
    assert "couldn't communicate" in finding.text


def test_a_choice_of_visible_gpus_is_said() -> None:
    found = check_gpus(answer(TWO), "1")
    assert states(found)[0] == ("note", "visible GPUs")
    assert "CUDA_VISIBLE_DEVICES is '1'" in found[0].text


# Asking ------------------------------------------------------------


def test_the_query_and_the_format_are_passed_on() -> None:
    shown = ask_nvidia_smi(
        GPU_QUERY, command=[sys.executable, "-c", "import sys; print(sys.argv[1:])"]
    )
    assert shown.strip() == str([GPU_QUERY, "--format=csv,noheader,nounits"])


def test_a_failure_says_what_nvidia_smi_said() -> None:
    script = f"print({DRIVER!r}); raise SystemExit(9)"
    with pytest.raises(NvidiaSmiError, match=r"failed \(9\): NVIDIA-SMI has failed"):
        ask_nvidia_smi(GPU_QUERY, command=[sys.executable, "-c", script])


def test_a_missing_one_is_an_error() -> None:
    with pytest.raises(NvidiaSmiError, match="cannot be run"):
        ask_nvidia_smi(GPU_QUERY, command=["/nowhere/nvidia-smi"])


def test_one_that_hangs_is_left_at_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(NvidiaSmiError, match=r"did not answer within 0\.5 s"):
        ask_nvidia_smi(
            GPU_QUERY,
            command=[sys.executable, "-c", "import time; time.sleep(60)"],
            deadline_s=0.5,
        )
    assert time.monotonic() - start < 50


def test_the_report_asks_the_nvidia_smi_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$1" in *query-gpu*) printf "{TWO}";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert ("ok", "GPU 1 memory") in states(examine())
