"""vLLM servers that this process starts, and that never outlive it.

Each runs in its own process group under :mod:`sdp_lightning.distributed.process_guard`, which
ends all that it started when this process closes it or dies. The guard has its own session, so
Ctrl-C reaches the trainer only.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdp_lightning.distributed import process_guard
from sdp_lightning.engines.servers.config import ServerConfig
from sdp_lightning.errors import EngineError

__all__ = ["ManagedServers", "ServerConfig"]

logger = logging.getLogger(__name__)

_TAIL_LINES, _TAIL_BYTES = 15, 2**16
_STOP_S = 20.0  # added to the grace
_PACKAGE = Path(__file__).resolve().parents[2]
# Calls to loopback addresses must not go through a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(eq=False)
class _Server:
    guard: subprocess.Popen[bytes]
    url: str
    log: Path


@dataclass(eq=False)
class ManagedServers:
    """Starts servers, waits until they are ready, and ends them.

    Attributes:
        config: settings of the servers.
        grace_s: seconds that a server has to end after SIGTERM.
    """

    config: ServerConfig
    grace_s: float = 10.0
    _servers: list[_Server] = field(default_factory=list[_Server])

    @property
    def urls(self) -> list[str]:
        """URL of each server."""
        return [server.url for server in self._servers]

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the guards; each guard has one child, its server."""
        return [server.guard.pid for server in self._servers]

    def start(self, api_key: str | None = None) -> list[str]:
        """Start all servers, wait until each is ready; returns their URLs.

        Args:
            api_key: key that they shall ask for; it goes into their environment.

        Raises:
            EngineError: if a server ends or is not ready in time, with the end of its log, or a
                port is taken. No server is left running.
        """
        if self._servers:
            return self.urls
        folder = Path(self.config.log_folder or tempfile.mkdtemp(prefix="sdp-vllm-"))
        package = _package_alone(folder)
        try:
            for index, port in enumerate(_choose_ports(self.config)):
                log = folder / f"server-{index}.log"
                environment = self.config.environment(index, package)
                if api_key is not None:
                    environment["VLLM_API_KEY"] = api_key
                self._servers.append(self._launch(index, port, log, environment))
            logger.info("Starting vLLM servers; their logs are in %s.", folder)
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
                server.guard.stdin.close()  # makes the guard end its group
        for server in servers:
            try:
                server.guard.wait(self.grace_s + _STOP_S)
            except subprocess.TimeoutExpired:
                server.guard.kill()  # its death ends the server
                server.guard.wait(5.0)

    def explain(self, url: str) -> str:
        """The exit status of the server at ``url``, if it ended, and the end of its log.

        The status is known once all processes of the server have ended. Empty for the URL of
        another server. Raises nothing, waits for nothing.
        """
        for server in self._servers:
            if server.url == url:
                status = server.guard.poll()
                ended = "" if status is None else f"Its process ended with {_describe(status)}. "
                return f"{ended}{_end_of(server.log)}"
        return ""

    def _launch(self, index: int, port: int, log: Path, environment: Mapping[str, str]) -> _Server:
        guard = [sys.executable, "-I", process_guard.__file__, str(self.grace_s), "-", "0"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*guard, *self.config.command(index, port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return _Server(process, f"http://127.0.0.1:{port}", log)

    def _await_ready(self, server: _Server, deadline: float) -> None:
        while not _is_healthy(server.url):
            if (status := server.guard.poll()) is not None:
                raise EngineError(
                    f"the vLLM server of {server.url} ended with {_describe(status)} before it was "
                    f"ready. {_end_of(server.log)}"
                )
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the vLLM server of {server.url} was not ready within "
                    f"{self.config.startup_timeout_s:g} s (startup_timeout_s). "
                    f"{_end_of(server.log)}"
                )
            time.sleep(0.25)


def _is_healthy(url: str) -> bool:
    try:
        with _DIRECT.open(f"{url}/health", timeout=5.0) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, http.client.HTTPException):
        return False


def _describe(status: int) -> str:
    """An exit status of the guard, in words; like a shell's, it is 128 + the signal."""
    return f"{status} (killed by signal {status - 128})" if status > 128 else str(status)


def _end_of(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return f"Its log cannot be read: {error}"
    return f"The end of {log}:\n" + "\n".join(lines[-_TAIL_LINES:])


def _package_alone(folder: Path) -> Path:
    """Make a folder with a link to this package, without the trainer's other packages."""
    path = folder / "path"
    path.mkdir(parents=True, exist_ok=True)
    link = path / _PACKAGE.name
    if link.resolve() != _PACKAGE:
        link.unlink(missing_ok=True)
        link.symlink_to(_PACKAGE, target_is_directory=True)
    return path


def _choose_ports(config: ServerConfig) -> list[int]:
    """A port for each replica, all different and free now."""
    wanted = [config.port + i if config.port else 0 for i in range(config.replicas)]
    with contextlib.ExitStack() as listeners:
        ports: list[int] = []
        for port in wanted:
            listener = listeners.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError as error:
                raise EngineError(
                    f"port {port} of 127.0.0.1 is taken: {error}. Choose another, or port=0."
                ) from error
            ports.append(int(listener.getsockname()[1]))
        return ports
