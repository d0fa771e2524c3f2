"""Memory and processes of the NVIDIA GPUs, from ``nvidia-smi``. Memory in MiB.

Pure functions parse its output. It shows only what this container may see, so every value but a
GPU's index and id may be missing.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.errors import SDPError

Ask = Callable[[str], str]
DEADLINE_S = 10.0
GPU_QUERY = "--query-gpu=index,uuid,memory.used,memory.total,mig.mode.current"
PROCESS_QUERY = "--query-compute-apps=gpu_uuid,pid,process_name,used_memory"
FORMAT = "--format=csv,noheader,nounits"
_IDLE_MIB = 1024  # a driver takes some hundred MiB for itself


class NvidiaSmiError(SDPError):
    """``nvidia-smi`` gave no output, or none that can be parsed."""


@dataclass(frozen=True)
class Gpu:
    """One GPU; unknown values are None.

    Attributes:
        index: index of nvidia-smi, which ``devices`` of a server uses.
        uuid: id of the GPU.
        used_mib: memory in use by all processes.
        total_mib: memory of the GPU.
        is_split: whether MIG divides it into slices.
    """

    index: int
    uuid: str
    used_mib: int | None
    total_mib: int | None
    is_split: bool

    @property
    def free_share(self) -> float | None:
        """Free share of the memory; None if unknown."""
        if self.used_mib is None or not self.total_mib:
            return None
        return 1 - self.used_mib / self.total_mib


@dataclass(frozen=True)
class GpuProcess:
    """One process on a GPU or a slice of it; unknown values are None."""

    gpu_uuid: str
    pid: int | None
    name: str
    used_mib: int | None

    def __str__(self) -> str:
        pid = "?" if self.pid is None else str(self.pid)
        known = [self.name.rpartition("/")[2]] if self.name[:1] != "[" else []
        known += [] if self.used_mib is None else [_gib(self.used_mib)]
        return f"{pid} ({', '.join(known)})" if known else pid

    def is_on(self, gpu: Gpu) -> bool:
        """Whether the process runs on ``gpu``: the id of a slice may contain that of its GPU."""
        return gpu.uuid in self.gpu_uuid


def check_gpus(ask: Ask | None, visible: str | None) -> list[Finding]:
    """Findings about the memory of every GPU, and the processes that use it.

    Args:
        ask: runs nvidia-smi; None where there is none, which gives no findings.
        visible: ``CUDA_VISIBLE_DEVICES``; None if it is not set.
    """
    if ask is None:
        return []
    try:
        gpus = parse_gpus(ask(GPU_QUERY))
    except NvidiaSmiError as error:
        text = f"{error} Until it does, expect no GPU to work: check the driver."
        return [Finding("note", "nvidia-smi", text)]
    findings: list[Finding] = []
    if visible is not None:
        text = (
            f"CUDA_VISIBLE_DEVICES is {visible!r}: trainer.devices counts within it, `devices` of "
            "a server and this list as nvidia-smi does."
        )
        findings.append(Finding("note", "visible GPUs", text))
    processes: list[GpuProcess] = []
    try:
        processes = parse_processes(ask(PROCESS_QUERY))
    except NvidiaSmiError as error:
        findings.append(Finding("note", "GPU processes", f"unknown: {error}"))
    for gpu in gpus:
        findings.append(_judge(gpu, [x for x in processes if x.is_on(gpu)]))
    if lost := [x for x in processes if not any(x.is_on(gpu) for gpu in gpus)]:
        text = f"hold memory of GPUs or slices that are not listed: pids {_join(lost)}."
        findings.append(Finding("note", "GPU processes", text))
    return findings


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs from the output of ``GPU_QUERY``.

    Raises:
        NvidiaSmiError: if it cannot be parsed.
    """
    gpus: list[Gpu] = []
    for index, uuid, used, total, mig, *_ in _rows(text, num_fields=5):
        if not index.isdigit():
            raise NvidiaSmiError(f"nvidia-smi answered: {_one_line(text)}")
        gpus.append(Gpu(int(index), uuid, _mib(used), _mib(total), mig == "Enabled"))
    return gpus


def parse_processes(text: str) -> list[GpuProcess]:
    """Processes from the output of ``PROCESS_QUERY``, which is empty without any.

    Raises:
        NvidiaSmiError: if it cannot be parsed.
    """
    return [
        GpuProcess(uuid, _mib(pid), ", ".join(name), _mib(used))
        for uuid, pid, *name, used in _rows(text, num_fields=4)
    ]


def ask_nvidia_smi(
    query: str, *, command: Sequence[str] = ("nvidia-smi",), deadline_s: float = DEADLINE_S
) -> str:
    """Output of ``nvidia-smi``.

    Raises:
        NvidiaSmiError: if it cannot be run, fails, or takes longer than ``deadline_s``: with a
            broken driver it may hang so that not even a kill ends it.
    """
    try:
        process = subprocess.Popen(
            [*command, query, FORMAT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise NvidiaSmiError(f"nvidia-smi cannot be run: {error}.") from error
    try:
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired as error:
        _abandon(process)
        raise NvidiaSmiError(f"nvidia-smi did not answer within {deadline_s:g} s.") from error
    if process.returncode:
        raise NvidiaSmiError(f"nvidia-smi failed ({process.returncode}): {_one_line(output)}")
    return output


def _judge(gpu: Gpu, holders: Sequence[GpuProcess]) -> Finding:
    text = f"{_gib(gpu.used_mib)} of {_gib(gpu.total_mib)} used"
    subject = f"GPU {gpu.index} memory"
    if holders:
        text += f" by pids {_join(holders)}"
    if gpu.is_split:
        slices = "it is split by MIG: give `devices` the ids of slices that `nvidia-smi -L` lists."
        return Finding("note", subject, f"{text}; {slices}")
    if not holders and (gpu.used_mib or 0) < _IDLE_MIB:
        return Finding("ok", subject, text)
    if not holders:
        text += " by processes that are not shown here (another user's or container's)"
    return Finding("note", subject, f"{text}; {_advice(gpu)}")


def _advice(gpu: Gpu) -> str:
    """Advice on sharing the GPU with vLLM, which does not start if its share is not free."""
    share = gpu.free_share
    if share is None:
        return "to share it give vLLM gpu_memory_utilization."
    if share < 0.05:
        return "it is full: end them, or use another."
    hundredths = int(share * 100 + 1e-9)
    return f"to share it give vLLM gpu_memory_utilization below {hundredths / 100:.2f}."


def _rows(text: str, *, num_fields: int) -> Iterator[list[str]]:
    """Fields of every line, at least ``num_fields``: a process may have a comma in its name."""
    for line in filter(str.strip, text.splitlines()):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) < num_fields:
            raise NvidiaSmiError(f"nvidia-smi answered: {_one_line(text)}")
        yield fields


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200] or "nothing."


def _mib(text: str) -> int | None:
    """A number; None for ``[N/A]``, ``[Not Supported]``, ``[Insufficient Permissions]`` etc."""
    return int(text) if text.isdigit() else None


def _gib(mib: int | None) -> str:
    return "?" if mib is None else f"{mib / 1024:.1f} GiB"


def _join(processes: Sequence[GpuProcess]) -> str:
    return ", ".join(map(str, processes))


def _abandon(process: subprocess.Popen[str]) -> None:
    """Kill a process, without waiting for one that hangs in the driver."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    if process.stdout is not None:
        process.stdout.close()
