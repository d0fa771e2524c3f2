"""Settings of managed vLLM servers: command lines, environments and devices.

:mod:`sdp_lightning.engines.servers.managed` starts them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdp_lightning.config.validation import at_least, check_types, positive
from sdp_lightning.errors import ConfigError
from sdp_lightning.weights.protocol import TransportName

_ON_CPU = ("cpu",)
# A seeded request whose prefill is split kills vLLM 0.32 on a CPU ("CPU Generator does not use
# offset"); this happens when many requests rebuild their KV cache after an update.
_CPU_FLAGS = ("--enforce-eager", "--no-enable-chunked-prefill")
# A request for prompt log-probs beside other requests kills
# vLLM 0.32 on a CPU if an adapter may be applied to the head.
_CPU_LORA_FLAGS = (
    *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
# Variables of the trainer's process: its Python, its rank, torchrun's rendezvous, and a key that
# the server would require and the client does not send.
_NOT_INHERITED = (
    *("PYTHONHOME", "PYTHONSTARTUP", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"),
    *("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "VLLM_API_KEY"),
)
_TORCHRUN = "TORCHELASTIC_"


@dataclass(frozen=True)
class ServerConfig:
    """Settings of managed vLLM servers.

    Args:
        model: model id or folder.
        revision: branch, tag or commit of a model id; None is its main branch.
        trust_remote_code: run the Python files that the model brings with it.
        tokenizer: id or folder of another tokenizer; None is the model's own.
        replicas: number of servers.
        port: port of the first server; the others take the next ones. 0 takes free ports.
        python: interpreter of an environment that has vLLM.
        devices: CUDA devices as nvidia-smi counts them, distributed evenly over the replicas in
            order, or ``("cpu",)``. None is the CPU on a machine without NVIDIA GPUs, else all
            devices, including the trainer's.
        gpu_memory_utilization: share of a device's memory; required where a device is shared.
        max_model_len: tokens of a sequence; None is the model's limit.
        dtype: dtype of the weights; None is float32 on a CPU and the checkpoint's on GPUs.
        cores: CPU cores of each replica (a ``taskset`` list such as ``"0"``); None binds none.
        transport: the transport of weights that the servers are started for.
        max_lora_rank: largest rank of an adapter that ``"lora"`` may send; vLLM knows 1, 8 and up.
        extra_args: further arguments of vLLM's command line.
        log_folder: folder of the servers' logs; None is a temporary folder.
        startup_timeout_s: longest wait until a server is ready.

    Raises:
        ConfigError: naming the value.
    """

    model: str
    replicas: int = 1
    port: int = 0
    python: str = sys.executable
    devices: tuple[str, ...] | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    cores: tuple[str, ...] | None = None
    transport: TransportName = "files"
    max_lora_rank: int = 64
    extra_args: tuple[str, ...] = ()
    log_folder: str | None = None
    startup_timeout_s: float = 600.0
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        at_least("replicas", self.replicas, 1)
        at_least("max_lora_rank", self.max_lora_rank, 1)
        positive("startup_timeout_s", self.startup_timeout_s)
        if self.port and not 0 < self.port <= 65536 - self.replicas:
            raise ConfigError(f"port must leave room for {self.replicas} up to 65535: {self.port}.")
        if any(argument.startswith("--api-key") for argument in self.extra_args):
            raise ConfigError(
                "extra_args would show --api-key to everybody on this machine. Set SDP_API_KEY, or "
                "api_key to env:NAME or file:PATH: the servers get the key in their environment."
            )
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {share}.")
        if not self.on_cpu:
            self._check_devices()
        if self.cores is not None and len(self.cores) != self.replicas:
            raise ConfigError(
                f"cores must name one list a replica: {len(self.cores)} for {self.replicas}."
            )

    @property
    def on_cpu(self) -> bool:
        """Whether the servers compute on the CPU."""
        if self.devices is None:
            return shutil.which("nvidia-smi") is None
        return self.devices == _ON_CPU

    def check_trainer_devices(self, devices: Sequence[int], *, visible: str | None) -> None:
        """Refuse a GPU that the trainer uses too, unless ``gpu_memory_utilization`` is set.

        Args:
            devices: the trainer's devices on this host, as indices into ``visible``.
            visible: the trainer's ``CUDA_VISIBLE_DEVICES``; None if it is not set.

        Raises:
            ConfigError: naming the GPUs.
        """
        if self.devices is None or self.on_cpu or self.gpu_memory_utilization is not None:
            return
        if visible is None:
            trainers = {str(device) for device in devices}
        else:
            names = [name.strip() for name in visible.split(",")]
            trainers = {names[device] for device in devices if device < len(names)}
        if shared := sorted(trainers & set(self.devices)):
            raise ConfigError(
                f"trainer and vLLM servers both use GPU {', '.join(shared)}: set "
                "gpu_memory_utilization, the share of its memory for each server, or give the "
                "servers other devices."
            )

    def command(self, index: int, port: int) -> list[str]:
        """Command line of replica ``index``."""
        bind = ["taskset", "-c", self.cores[index]] if self.cores is not None else []
        options = {
            "--model": self.model,
            "--served-model-name": "policy",
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": self.dtype or ("float32" if self.on_cpu else "auto"),
            "--logprobs-mode": "processed_logprobs",
            "--worker-extension-cls": "sdp_lightning.engines.servers.vllm_worker.WorkerExtension",
        }
        if self.revision is not None:
            options["--revision"] = self.revision
        if self.tokenizer is not None:  # else vLLM looks for the model's revision there, too
            options |= {"--tokenizer": self.tokenizer, "--tokenizer-revision": "main"}
        if self.max_model_len is not None:
            options["--max-model-len"] = str(self.max_model_len)
        if self.gpu_memory_utilization is not None:
            options["--gpu-memory-utilization"] = str(self.gpu_memory_utilization)
        if len(devices := self._devices_of(index)) > 1:
            options["--tensor-parallel-size"] = str(len(devices))
        flags = ["--enable-scale-out", *(_CPU_FLAGS if self.on_cpu else [])]
        flags += ["--trust-remote-code"] if self.trust_remote_code else []
        named = [text for pair in options.items() for text in pair]
        server = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        return [*bind, *server, *named, *flags, *self._transport_flags, *self.extra_args]

    def environment(self, index: int, path: Path) -> dict[str, str]:
        """The environment of replica ``index``.

        Args:
            index: index of the replica.
            path: a folder that holds only this package, for the worker extension.
        """
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in _NOT_INHERITED and not name.startswith(_TORCHRUN)
        }
        paths = [str(path), *filter(None, [inherited.get("PYTHONPATH")])]
        values = {
            **inherited,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        values.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if self.transport == "lora":
            values["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        if self.transport == "ipc":  # handles of CUDA memory are pickled
            values["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if devices := self._devices_of(index):
            values["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
            values["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts; CUDA: fastest first
        return values

    def _check_devices(self) -> None:
        share, devices = self.gpu_memory_utilization, self.devices
        count = self.replicas if devices is None else len(devices)
        if not count or (count % self.replicas and self.replicas % count):
            raise ConfigError(
                f"{count} devices cannot be distributed evenly over {self.replicas} replicas: "
                "one number must be a multiple of the other."
            )
        held = Counter(name for i in range(self.replicas) for name in self._devices_of(i))
        # Servers that see all devices compute on the first one.
        most = max(held.values()) if held else self.replicas
        if share is None and (devices is None or most > 1):
            raise ConfigError(
                f"{self.replicas} vLLM servers on {devices or 'all devices'} share a GPU with one "
                "another or with the trainer: set gpu_memory_utilization, the share of its memory "
                "for each server, or give them devices of their own."
            )
        if share is not None and most * share > 1 + 1e-9:
            raise ConfigError(
                f"{most} vLLM servers on one of the devices {devices} would take "
                f"{most} x {share:g} of its memory: gpu_memory_utilization may be at most "
                f"{1 / most:.3g} there."
            )

    @property
    def _transport_flags(self) -> list[str]:
        match self.transport:
            case "lora":
                rank = str(self.max_lora_rank)
                modules = _CPU_LORA_FLAGS if self.on_cpu else ()
                return ["--enable-lora", "--max-lora-rank", rank, *modules]
            case "nccl" | "ipc":
                return ["--weight-transfer-config", json.dumps({"backend": self.transport})]
            case "files" | "tcp" | "delta":
                return []

    def _devices_of(self, index: int) -> list[str]:
        if self.devices is None or self.on_cpu:
            return []
        share = max(1, len(self.devices) // self.replicas)
        return [self.devices[(index * share + i) % len(self.devices)] for i in range(share)]
