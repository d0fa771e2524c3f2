"""vLLM servers that this process starts, and that never outlive it.

Each runs in a process group of its own under a guard (:mod:`sdp_lightning.engines.guard`) that ends
the whole group when this process ends it, or dies, however it dies. The guard has a session of its
own, so Ctrl-C reaches the trainer only.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
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

from sdp_lightning.engines import guard as guard_module
from sdp_lightning.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

_TAIL_LINES = 15
_STOP_S = 20.0  # beyond the grace
_ON_CPU = ("cpu",)
# A seeded request whose prefill is cut in two kills vLLM 0.32 on a CPU ("CPU Generator does not use
# offset"); many requests that rebuild their KV cache after an update are cut so.
_CPU_FLAGS = ("--enforce-eager", "--no-enable-chunked-prefill")
_PACKAGE = Path(__file__).resolve().parents[1]
# Of the trainer's own process: its Python, and its rank among the processes that train.
_NOT_INHERITED = (
    *("PYTHONHOME", "PYTHONSTARTUP", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"),
    *("LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
)
# Loopback is never asked through a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class ServerConfig:
    """How managed vLLM servers are started.

    Args:
        model: id or folder.
        replicas: how many servers.
        port: of the first one, the others follow; 0 takes free ones.
        python: interpreter of an environment that has vLLM.
        devices: CUDA devices, dealt out to the replicas in order, or ``("cpu",)``. None is the CPU
            on a machine without NVIDIA GPUs, and else leaves all visible, the trainer's too.
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
        if self.port and not 0 < self.port <= 65536 - self.replicas:
            raise ConfigError(f"port must leave room for {self.replicas} up to 65535: {self.port}.")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {share}.")
        if not self.startup_timeout_s > 0:
            raise ConfigError(f"startup_timeout_s must be positive, got {self.startup_timeout_s}.")
        if share is None and not self.on_cpu and self._shares_devices:
            raise ConfigError(
                f"{self.replicas} vLLM servers on devices {self.devices} share a GPU with one "
                "another or with the trainer: say how much of its memory each may take with "
                "gpu_memory_utilization, or give them devices of their own."
            )
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

    @property
    def _shares_devices(self) -> bool:
        if self.devices is None:
            return True
        return bool(len(self.devices) % self.replicas) or len(set(self.devices)) < len(self.devices)

    def command(self, index: int, port: int) -> list[str]:
        """What starts replica ``index``."""
        bind = ["taskset", "-c", self.cores[index]] if self.cores is not None else []
        options = {
            "--model": self.model,
            "--served-model-name": "policy",
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": self.dtype or ("float32" if self.on_cpu else "auto"),
            "--logprobs-mode": "processed_logprobs",
            "--worker-extension-cls": "sdp_lightning.engines.vllm_worker.WorkerExtension",
        }
        if self.max_model_len is not None:
            options["--max-model-len"] = str(self.max_model_len)
        if self.gpu_memory_utilization is not None:
            options["--gpu-memory-utilization"] = str(self.gpu_memory_utilization)
        if len(devices := self._devices_of(index)) > 1:
            options["--tensor-parallel-size"] = str(len(devices))
        flags = ["--enable-scale-out", *(_CPU_FLAGS if self.on_cpu else [])]
        named = [text for pair in options.items() for text in pair]
        server = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        return [*bind, *server, *named, *flags, *self.extra_args]

    def environment(self, index: int, path: Path) -> dict[str, str]:
        """The environment of replica ``index``.

        Args:
            index: of the replica.
            path: a folder that holds this package and nothing else, for the worker extension.
        """
        inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
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
        if devices := self._devices_of(index):
            values["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return values

    def _devices_of(self, index: int) -> list[str]:
        if self.devices is None or self.on_cpu:
            return []
        share = max(1, len(self.devices) // self.replicas)
        return [self.devices[(index * share + i) % len(self.devices)] for i in range(share)]


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
        grace_s: how long a server may take to end by itself.
    """

    config: ServerConfig
    grace_s: float = 10.0
    _servers: list[_Server] = field(default_factory=list[_Server])

    @property
    def urls(self) -> list[str]:
        """One for each server."""
        return [server.url for server in self._servers]

    @property
    def process_ids(self) -> list[int]:
        """Of the guards; each has one child, its server."""
        return [server.guard.pid for server in self._servers]

    def start(self) -> list[str]:
        """Start all, wait until each is ready; returns their URLs.

        Raises:
            EngineError: if one ends or is not ready in time, with the end of its log, or a port is
                taken. None is left running.
        """
        if self._servers:
            return self.urls
        folder = Path(self.config.log_folder or tempfile.mkdtemp(prefix="sdp-vllm-"))
        package = _package_alone(folder)
        try:
            for index, port in enumerate(_choose_ports(self.config)):
                log = folder / f"server-{index}.log"
                self._servers.append(self._launch(index, port, log, package))
            logger.info("vLLM servers start; their logs are in %s.", folder)
            deadline = time.monotonic() + self.config.startup_timeout_s
            for server in self._servers:
                self._await_ready(server, deadline)
        except BaseException:
            self.close()
            raise
        return self.urls

    def close(self) -> None:
        """End all servers. Safe to call twice."""
        servers, self._servers = self._servers, []
        for server in servers:
            if server.guard.stdin is not None:
                server.guard.stdin.close()  # the guard's sign to end its group
        for server in servers:
            try:
                server.guard.wait(self.grace_s + _STOP_S)
            except subprocess.TimeoutExpired:
                server.guard.kill()  # its death is the server's sign to end
                server.guard.wait(5.0)

    def _launch(self, index: int, port: int, log: Path, package: Path) -> _Server:
        guard = [sys.executable, "-I", guard_module.__file__, str(self.grace_s)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*guard, *self.config.command(index, port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.config.environment(index, package),
                start_new_session=True,
            )
        return _Server(process, f"http://127.0.0.1:{port}", log)

    def _await_ready(self, server: _Server, deadline: float) -> None:
        while not _is_healthy(server.url):
            end = f"The end of {server.log}:\n{_tail(server.log)}"
            if server.guard.poll() is not None:
                raise EngineError(
                    f"the vLLM server of {server.url} ended with {server.guard.returncode} before "
                    f"it was ready. {end}"
                )
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the vLLM server of {server.url} was not ready within "
                    f"{self.config.startup_timeout_s:g} s (startup_timeout_s). {end}"
                )
            time.sleep(0.25)


def _is_healthy(url: str) -> bool:
    try:
        with _DIRECT.open(f"{url}/health", timeout=5.0) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, http.client.HTTPException):
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def _package_alone(folder: Path) -> Path:
    """A folder with this package only: beside an installed one lies all that the trainer has."""
    path = folder / "path"
    path.mkdir(parents=True, exist_ok=True)
    link = path / _PACKAGE.name
    if link.resolve() != _PACKAGE:
        link.unlink(missing_ok=True)
        link.symlink_to(_PACKAGE, target_is_directory=True)
    return path


def _choose_ports(config: ServerConfig) -> list[int]:
    """One for each replica, all different and free now."""
    wanted = [config.port + i if config.port else 0 for i in range(config.replicas)]
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        for port in wanted:
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError as error:
                raise EngineError(
                    f"port {port} of 127.0.0.1 is taken: {error}. Choose another, or port=0."
                ) from error
            ports.append(int(listener.getsockname()[1]))
        return ports
