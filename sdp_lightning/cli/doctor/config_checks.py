"""Checks that this machine has the GPUs, servers, model and rows of config files.

The files are read, and the rows checked. ``fit`` checks the settings themselves; flags of its
command line are unknown here.
"""

from __future__ import annotations

import re
import shutil
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast
from urllib.parse import parse_qs

from sdp_lightning.cli.config_rows import checked_rows
from sdp_lightning.cli.doctor.estimate import (
    check_division,
    check_engine_memory,
    check_trainer_memory,
    num_shards,
    part_of,
    size_of_model,
)
from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.gpus import GPU_QUERY, Ask, NvidiaSmiError, parse_gpus
from sdp_lightning.cli.doctor.model_size import ModelSize
from sdp_lightning.cli.doctor.prompt_checks import check_prompts
from sdp_lightning.cli.doctor.source_checks import check_source, model_folder, read_source
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.engines.remote.addresses import proxy_of, server_urls, tls_context
from sdp_lightning.errors import ConfigError
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.sources import load_rows

Tree = dict[str, Any]
_ANSWER_S = 5.0


@dataclass(frozen=True)
class Machine:
    """The GPUs of a machine, by the index of nvidia-smi, and the trainer's interpreter.

    Attributes:
        gpus: all GPUs.
        visible: GPUs that CUDA shows to the trainer, in its order.
        gpu_gib: memory of the smallest; None without GPUs, or if unknown.
        has_vllm: whether vLLM is installed in the interpreter.
    """

    gpus: tuple[int, ...] = ()
    visible: tuple[int, ...] = ()
    gpu_gib: float | None = None
    has_vllm: bool = False

    @classmethod
    def look(cls, ask: Ask | None, visible: str | None, *, has_vllm: bool = False) -> Machine:
        """The machine by nvidia-smi and ``CUDA_VISIBLE_DEVICES``; a GPU without a number is -1."""
        try:
            gpus = parse_gpus(ask(GPU_QUERY)) if ask is not None else []
        except NvidiaSmiError:  # check_gpus reports it
            gpus = []
        numbers = {name: gpu.index for gpu in gpus for name in (str(gpu.index), gpu.uuid)}
        shown = [gpu.uuid for gpu in gpus] if visible is None else visible.split(",")
        names = [name.strip() for name in shown if name.strip()]
        memory = min((gpu.total_mib for gpu in gpus if gpu.total_mib), default=None)
        return cls(
            tuple(gpu.index for gpu in gpus),
            tuple(numbers.get(name, -1) for name in names),
            None if memory is None else memory / 1024,
            has_vllm,
        )


def examine_configs(files: Sequence[str], machine: Machine) -> list[Finding]:
    """Findings about config files: what is missing here, and what they would need.

    Args:
        files: config files of ``fit``; later ones take precedence.
        machine: GPUs to judge by; their memory may be that of other GPUs.
    """
    import yaml

    config: Tree = {}
    for file in files:
        try:
            read = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError) as error:
            return [Finding("problem", "config", f"{file} cannot be read: {error}")]
        if not isinstance(read, Mapping):
            return [Finding("problem", "config", f"{file} holds no settings.")]
        config = merge(config, cast(Tree, read))
    trainer, data = part_of(config, "trainer"), part_of(config, "data")
    source = read_source(part_of(config, "model"))
    size = size_of_model(source) if isinstance(source, ModelSource) else None
    return [
        *check_devices(trainer, _engine(config), machine),
        *check_servers(_engine(config), machine, part_of(data, "engine_options")),
        *(check_source(source) if isinstance(source, ModelSource) else [source]),
        *(check_rows(name, data, source) for name in ("prompts", "val_prompts") if data.get(name)),
        *(check_prompts(source, data) if isinstance(source, ModelSource) else []),
        *check_division(config, world_size(trainer, machine)),
        *check_memory(config, machine, size),
    ]


def world_size(trainer: Mapping[str, Any], machine: Machine) -> int:
    """Number of training processes on all nodes."""
    positions = trainer_positions(trainer, len(machine.visible))
    devices = trainer.get("devices", 1)
    on_cpu = int(devices) if str(devices).isdigit() else 1
    return (len(positions) or on_cpu) * int(trainer.get("num_nodes", 1))


def check_memory(config: Tree, machine: Machine, size: ModelSize | None) -> Iterator[Finding]:
    """Findings about the memory of trainer and servers, if the model's size is known."""
    if size is None:
        model: object = part_of(config, "model").get("model")
        name = model.get("name") if isinstance(model, Mapping) else model
        why = "the model is neither on this machine nor known."
        if isinstance(name, str) and ":" in name:
            why = f"{name} makes the model, and doctor runs none: name the folder in model.model."
        yield Finding("note", "trainer memory", f"not estimated: {why}")
        return
    if size.origin:
        text = f"{size.num_parameters / 1e9:.2f} billion weights, {size.origin}"
        yield Finding("ok", "model size", text)
    trainer, query = part_of(config, "trainer"), launch_query(_engine(config))
    share = float(query.get("gpu_memory_utilization", 0))
    gib = machine.gpu_gib
    shards = num_shards(trainer, world_size(trainer, machine))
    try:
        yield check_trainer_memory(config, size, num_shards=shards, gpu_gib=gib, server_share=share)
        if _launches(_engine(config)):
            yield check_engine_memory(config, size, query, gpu_gib=gib)
    except ConfigError:
        return  # check_division reports it


def merge(first: Tree, second: Mapping[str, Any]) -> Tree:
    """Both trees, with the values of the second where they differ.

    >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        merged[key] = merge(cast(Tree, old), cast(Tree, value)) if both else value
    return merged


def check_devices(trainer: Mapping[str, Any], engine: str, machine: Machine) -> list[Finding]:
    """Checks that the GPUs of trainer and servers exist, and that they share none by mistake."""
    positions = trainer_positions(trainer, len(machine.visible))
    missing = [position for position in positions if position >= len(machine.visible)]
    of_trainer = [machine.visible[i] for i in positions if i < len(machine.visible)]
    query, launches = launch_query(engine), _launches(engine)
    names = query.get("devices", "cpu")
    of_servers = [int(name) for name in names.split(",") if name.isdigit()]  # others are ids
    unknown = [index for index in of_servers if index not in machine.gpus]
    see_all = launches and "devices" not in query and bool(machine.gpus)
    if see_all:
        of_servers = [index for index in machine.visible if index >= 0]
    findings = [_judge_gpus("trainer", missing, of_trainer, len(machine.visible))]
    if launches:
        findings.append(_judge_gpus("servers", unknown, of_servers, len(machine.gpus)))
    if "gpu_memory_utilization" in query:
        return findings
    shared = sorted(set(of_trainer) & set(of_servers))
    if see_all or shared:
        text = (
            "data.engine names no devices=, so its servers would see the trainer's GPUs: name "
            "some, or cpu, or add gpu_memory_utilization."
            if see_all
            else f"trainer and servers both use GPU {_list(shared)}: add gpu_memory_utilization to "
            "data.engine, or give the servers GPUs of their own with devices=."
        )
        findings.append(Finding("problem", "shared GPUs", text))
    return findings


def trainer_positions(trainer: Mapping[str, Any], num_visible: int) -> list[int]:
    """Positions among the visible GPUs that ``accelerator`` and ``devices`` ask for."""
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    if accelerator not in ("gpu", "cuda") and not (accelerator == "auto" and num_visible):
        return []
    if devices in ("auto", -1, "-1"):
        return list(range(max(1, num_visible)))
    listed = isinstance(devices, list) or "," in str(devices)
    numbers = [int(number) for number in re.findall(r"\d+", str(devices))]
    return numbers if listed else [position for number in numbers for position in range(number)]


def launch_query(engine: str) -> dict[str, str]:
    """Options of ``vllm://launch?...``; empty for other engines."""
    query = engine.partition("?")[2]
    return {k: v[-1] for k, v in parse_qs(query).items()} if _launches(engine) else {}


def check_servers(
    engine: str, machine: Machine, options: Mapping[str, Any] = MappingProxyType({})
) -> list[Finding]:
    """Checks that running servers answer, and that launched ones have an interpreter with vLLM.

    Of ``options``, the config's engine_options, ``ca_file`` and ``use_proxy`` are used.
    """
    scheme, separator, rest = engine.partition("://")
    if not separator:
        return []
    if _launches(engine):
        python = launch_query(engine).get("python")
        if machine.has_vllm if python is None else shutil.which(python) is not None:
            return []
        text = (
            f"{sys.executable} has no vLLM: pip install 'vllm>=0.32', or name an interpreter that "
            "has it with python= in data.engine."
            if python is None
            else f"{python} is not there: make that environment, or change python= in data.engine."
        )
        return [Finding("problem", "servers", text)]
    try:
        urls = server_urls(scheme.lower(), rest)
    except ConfigError as error:
        return [Finding("problem", "server", str(error))]
    proxied = options.get("use_proxy") is True
    return [_ask(url, options.get("ca_file"), proxied=proxied) for url in urls]


def check_rows(name: str, data: Mapping[str, Any], source: ModelSource | Finding) -> Finding:
    """Checks the rows as a run does, or by loading them if the tokenizer is not here as a file.

    Args:
        name: ``"prompts"`` or ``"val_prompts"``.
        data: the config's ``data`` part.
        source: what the model is read from.
    """
    found = None if isinstance(source, Finding) or source.trust_remote_code else source
    try:
        if found is None or model_folder(found) is None or not data.get("workflow"):
            rows = load_rows(data[name])
            if isinstance(rows, IterableRows):
                text = f"{rows.name}: read row by row, of which {len(rows.head(1))} was read"
                return Finding("ok", name, text)
            return Finding("ok", name, f"{len(rows)} rows, not checked")
        checks = checked_rows(data, name, found.resolved())
        bad: Literal["note", "problem"] = "note" if checks.mode == "drop" else "problem"
        return Finding(bad if checks.faults else "ok", name, checks.summary)
    except (ConfigError, OSError) as error:
        return Finding("problem", name, str(error))


def _judge_gpus(owner: str, missing: list[int], wanted: list[int], number: int) -> Finding:
    if missing:
        visible = f"{number} can be seen" + (", counted from 0" if number else "")
        return Finding("problem", owner, f"GPU {_list(missing)} is missing: {visible}.")
    return Finding("ok", owner, f"GPU {_list(wanted)}" if wanted else "no GPU is asked for")


def _engine(config: Tree) -> str:
    return str(part_of(config, "data").get("engine", "embedded"))


def _launches(engine: str) -> bool:
    return engine.partition("?")[0] == "vllm://launch"


def _ask(url: str, ca_file: str | None, *, proxied: bool) -> Finding:
    host = url.partition("://")[2]
    try:
        tls = urllib.request.HTTPSHandler(context=tls_context(ca_file, [url]))
        proxy = proxy_of(url) if proxied else None  # as the run's requests
        by = urllib.request.ProxyHandler({url.partition(":")[0]: proxy} if proxy else {})
        opener = urllib.request.build_opener(by, tls)
        with opener.open(f"{url}/health", timeout=_ANSWER_S) as answer:
            return Finding("ok", "server", f"{host} answers {answer.status}")
    except ConfigError as error:
        return Finding("problem", "server", str(error))
    except (OSError, ValueError, HTTPException) as error:  # statuses and timeouts are OSErrors
        text = f"{host} does not answer: {error}. Start it, or let data.engine launch one."
        return Finding("problem", "server", text)


def _list(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))
