"""vLLM servers that this process starts, and that never outlive it.

Each runs in a process group of its own under a guard (:mod:`sdp_lightning.engines.guard`) that ends
the whole group when this process ends it, or dies, however it dies.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from sdp_lightning.errors import ConfigError, EngineError

_TAIL_LINES = 15
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ServerConfig:
    """How managed vLLM servers are started.

    Args:
        model: id or folder.
        replicas: how many servers.
        port: of the first one, the others follow; 0 takes free ones.
        python: interpreter of an environment that has vLLM.
        devices: CUDA devices, dealt out to the replicas in order; None leaves them all visible.
        gpu_memory_utilization: share of a device's memory; needed where a device is shared.
        max_model_len: tokens of a sequence; None is what the model allows.
        dtype: of the weights; None is float32 on a CPU and the checkpoint's on GPUs.
        cores: CPU cores of each replica (a ``taskset`` list such as ``"0"``); None binds none.
        extra_args: passed on to vLLM.
        log_folder: where each server's output goes; None is a temporary folder.
        startup_timeout_s: longest wait for a server to be ready.

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
    extra_args: tuple[str, ...] = ()
    log_folder: str | None = None
    startup_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas must be at least 1, got {self.replicas}.")
        if self.devices is not None:
            shared = len(self.devices) % self.replicas or len(set(self.devices)) < len(self.devices)
            if shared and self.gpu_memory_utilization is None:
                raise ConfigError(
                    f"devices {self.devices} are shared by {self.replicas} replicas: say how much "
                    "of a device's memory each may take with gpu_memory_utilization."
                )
        if self.cores is not None and len(self.cores) != self.replicas:
            raise ConfigError(
                f"cores must name one list a replica: {len(self.cores)} for {self.replicas}."
            )

    def command(self, index: int, port: int) -> list[str]:
        """What starts replica ``index``."""
        bind = ["taskset", "-c", self.cores[index]] if self.cores is not None else []
        on_cpu = self.devices is None and shutil.which("nvidia-smi") is None
        dtype = self.dtype or ("float32" if on_cpu else "auto")
        options = {
            "--model": self.model,
            "--served-model-name": "policy",
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": dtype,
            "--logprobs-mode": "processed_logprobs",
            "--worker-extension-cls": "sdp_lightning.engines.vllm_worker.WorkerExtension",
        }
        if self.max_model_len is not None:
            options["--max-model-len"] = str(self.max_model_len)
        if self.gpu_memory_utilization is not None:
            options["--gpu-memory-utilization"] = str(self.gpu_memory_utilization)
        flags = ["--enable-scale-out", *(["--enforce-eager"] if on_cpu else [])]
        named = [text for pair in options.items() for text in pair]
        server = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        return [*bind, *server, *named, *flags, *self.extra_args]

    def environment(self, index: int) -> dict[str, str]:
        """The environment of replica ``index``."""
        values = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
        }
        values.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if self.devices is not None:
            share = max(1, len(self.devices) // self.replicas)
            mine = [self.devices[(index * share + i) % len(self.devices)] for i in range(share)]
            values["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return values


@dataclass(eq=False)
class _Server:
    guard: subprocess.Popen[bytes]
    url: str
    log: Path


@dataclass(eq=False)
class ManagedServers:
    """Starts servers, waits until they are ready, and ends them.

    Attributes:
        config: how they are started.
    """

    config: ServerConfig
    _servers: list[_Server] = field(default_factory=list[_Server])

    @property
    def urls(self) -> list[str]:
        """One for each server."""
        return [server.url for server in self._servers]

    @property
    def process_ids(self) -> list[int]:
        """Of the guards, which lead the servers' process groups."""
        return [server.guard.pid for server in self._servers]

    def start(self) -> list[str]:
        """Start all, wait until each is ready; returns their URLs.

        Raises:
            EngineError: if one ends or is not ready in time, with the end of its log. None is left.
        """
        folder = Path(self.config.log_folder or tempfile.mkdtemp(prefix="sdp-vllm-"))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for index in range(self.config.replicas):
                self._servers.append(self._launch(index, folder / f"server-{index}.log"))
            deadline = time.monotonic() + self.config.startup_timeout_s
            for server in self._servers:
                self._await_ready(server, deadline)
        except BaseException:
            self.close()
            raise
        return self.urls

    def close(self, timeout_s: float = 30.0) -> None:
        """End all servers. Safe to call twice."""
        servers, self._servers = self._servers, []
        for server in servers:
            if server.guard.stdin is not None:
                server.guard.stdin.close()  # the guard's sign to end its group
        for server in servers:
            try:
                server.guard.wait(timeout_s)
            except subprocess.TimeoutExpired:
                server.guard.kill()
                server.guard.wait(5.0)

    def _launch(self, index: int, log: Path) -> _Server:
        port = self.config.port + index if self.config.port else _free_port()
        guard = [sys.executable, "-m", "sdp_lightning.engines.guard"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*guard, *self.config.command(index, port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.config.environment(index),
                start_new_session=True,
            )
        return _Server(process, f"http://127.0.0.1:{port}", log)

    def _await_ready(self, server: _Server, deadline: float) -> None:
        while True:
            if server.guard.poll() is not None:
                raise EngineError(
                    f"the vLLM server of {server.url} ended with {server.guard.returncode} before "
                    f"it was ready. The end of {server.log}:\n{_tail(server.log)}"
                )
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the vLLM server of {server.url} was not ready within "
                    f"{self.config.startup_timeout_s:.0f} s. The end of {server.log}:\n"
                    f"{_tail(server.log)}"
                )
            try:
                with urllib.request.urlopen(f"{server.url}/health", timeout=5.0) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
