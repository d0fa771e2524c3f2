"""Who has what on the NVIDIA GPUs, as ``nvidia-smi`` says it. Memory in MiB.

Its answers are parsed by pure functions. It shows only what this container may see, so every value
but a GPU's index and id may be missing.
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
_IDLE_MIB = 1024  # a driver takes some hundred for itself


class NvidiaSmiError(SDPError):
    """``nvidia-smi`` gave no answer, or none that could be read."""


@dataclass(frozen=True)
class Gpu:
    """One GPU; a value that is not told is None.

    Attributes:
        index: as nvidia-smi counts, which is how ``devices`` of a server does.
        uuid: its id.
        used_mib: memory in use, by whomever.
        total_mib: memory in all.
        is_split: whether MIG divides it into slices.
    """

    index: int
    uuid: str
    used_mib: int | None
    total_mib: int | None
    is_split: bool

    @property
    def free_share(self) -> float | None:
        """Of all its memory."""
        if self.used_mib is None or not self.total_mib:
            return None
        return 1 - self.used_mib / self.total_mib


@dataclass(frozen=True)
class GpuProcess:
    """One process on one GPU, or on a slice of it; a value that is not told is None."""

    gpu_uuid: str
    pid: int | None
    name: str
    used_mib: int | None

    def __str__(self) -> str:
        pid = "?" if self.pid is None else str(self.pid)
        told = [self.name.rpartition("/")[2]] if self.name[:1] != "[" else []
        told += [] if self.used_mib is None else [_gib(self.used_mib)]
        return f"{pid} ({', '.join(told)})" if told else pid

    def is_on(self, gpu: Gpu) -> bool:
        """A process on a slice names the slice; older drivers write the GPU's id into that."""
        return gpu.uuid in self.gpu_uuid


def check_gpus(ask: Ask | None, visible: str | None) -> list[Finding]:
    """What every GPU's memory is used for.

    Args:
        ask: asks nvidia-smi; None where there is none, which is no GPU and no finding.
        visible: ``CUDA_VISIBLE_DEVICES``, None if it is not set.
    """
    if ask is None:
        return []
    try:
        gpus = parse_gpus(ask(GPU_QUERY))
    except NvidiaSmiError as error:
        text = f"{error} Until it answers, no GPU can be counted on: look at the driver."
        return [Finding("note", "nvidia-smi", text)]
    findings = _check_visible(visible)
    processes: list[GpuProcess] = []
    try:
        processes = parse_processes(ask(PROCESS_QUERY))
    except NvidiaSmiError as error:
        findings.append(Finding("note", "GPU processes", f"not known: {error}"))
    for gpu in gpus:
        findings.append(_judge(gpu, [x for x in processes if x.is_on(gpu)]))
    if lost := [x for x in processes if not any(x.is_on(gpu) for gpu in gpus)]:
        text = f"hold memory of GPUs or slices that are not listed: pids {_join(lost)}."
        findings.append(Finding("note", "GPU processes", text))
    return findings


def parse_gpus(text: str) -> list[Gpu]:
    """What ``GPU_QUERY`` was answered.

    Raises:
        NvidiaSmiError: if it is something else.
    """
    found: list[Gpu] = []
    for index, uuid, used, total, mig, *_ in _rows(text, num_fields=5):
        if not index.isdigit():
            raise NvidiaSmiError(f"nvidia-smi answered: {_one_line(text)}")
        found.append(Gpu(int(index), uuid, _mib(used), _mib(total), mig == "Enabled"))
    return found


def parse_processes(text: str) -> list[GpuProcess]:
    """What ``PROCESS_QUERY`` was answered; nothing is no process.

    Raises:
        NvidiaSmiError: if it is something else.
    """
    found: list[GpuProcess] = []
    for uuid, pid, *name, used in _rows(text, num_fields=4):
        found.append(GpuProcess(uuid, _mib(pid), ", ".join(name), _mib(used)))
    return found


def ask_nvidia_smi(
    query: str, *, command: Sequence[str] = ("nvidia-smi",), deadline_s: float = DEADLINE_S
) -> str:
    """What it writes.

    Raises:
        NvidiaSmiError: if it cannot be run, fails, or takes longer than ``deadline_s``: with a
            broken driver it may hang, and then not even a kill ends it.
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
    if gpu.is_split:
        held = f" by pids {_join(holders)}" if holders else ""
        slices = "it is split by MIG: give `devices` the ids of slices that `nvidia-smi -L` lists."
        return Finding("note", subject, f"{text}{held}; {slices}")
    if holders:
        return Finding("note", subject, f"{text} by pids {_join(holders)}; {_advice(gpu)}")
    if gpu.used_mib is not None and gpu.used_mib >= _IDLE_MIB:
        unseen = "by processes that are not shown here (another user's or container's)"
        return Finding("note", subject, f"{text} {unseen}; {_advice(gpu)}")
    return Finding("ok", subject, text)


def _advice(gpu: Gpu) -> str:
    """For vLLM, which takes a share of the whole memory, and does not start if less is free."""
    share = gpu.free_share
    if share is None:
        return "to share it give vLLM gpu_memory_utilization."
    if share < 0.05:
        return "it is full: end them, or use another."
    hundredths = int(share * 100 + 1e-9)
    return f"to share it give vLLM gpu_memory_utilization below {hundredths / 100:.2f}."


def _check_visible(visible: str | None) -> list[Finding]:
    if visible is None:
        return []
    text = (
        f"is {visible!r}: trainer.devices counts within it, `devices` of a server and this list as "
        "nvidia-smi does."
    )
    return [Finding("note", "visible GPUs", f"CUDA_VISIBLE_DEVICES {text}")]


def _rows(text: str, *, num_fields: int) -> Iterator[list[str]]:
    """Lines of at least so many fields: a process may have a comma in its name."""
    for line in filter(str.strip, text.splitlines()):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) < num_fields:
            raise NvidiaSmiError(f"nvidia-smi answered: {_one_line(text)}")
        yield fields


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200] or "nothing."


def _mib(text: str) -> int | None:
    """None for ``[N/A]``, ``[Not Supported]``, ``[Insufficient Permissions]`` and the like."""
    return int(text) if text.isdigit() else None


def _gib(mib: int | None) -> str:
    return "?" if mib is None else f"{mib / 1024:.1f} GiB"


def _join(processes: Sequence[GpuProcess]) -> str:
    return ", ".join(map(str, processes))


def _abandon(process: subprocess.Popen[str]) -> None:
    """Kill it; one that hangs in the driver is not waited for."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    if process.stdout is not None:
        process.stdout.close()
