"""Managed servers are started as vLLM needs it and never outlive what started them.

Real processes; the interpreter that they are started with is a script that answers ``/health``.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.engines.servers import managed as server_module
from sdp_lightning.engines.servers.managed import ManagedServers, ServerConfig
from sdp_lightning.errors import ConfigError, EngineError
from sdp_lightning.weights.protocol import TransportName
from support.paths import ROOT
from support.real_vllm import assert_gone

# Says who it is, leaves a child of its own, and then does what FAKE_VLLM says.
FAKE_PYTHON = """#!{python} -IS
import http.server, json, os, signal, subprocess, sys
mode = os.environ.get("FAKE_VLLM", "ready")
port = int(sys.argv[sys.argv.index("--port") + 1])
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the child inherits it
child = subprocess.Popen([sys.executable, "-IS", "-c", "import signal; signal.pause()"])
cores = sorted(os.sched_getaffinity(0))
print(json.dumps(dict(pid=os.getpid(), child=child.pid, cores=cores)), flush=True)
if mode == "dies" or (mode == "second dies" and "server-1" in os.readlink("/proc/self/fd/1")):
    print("\\n".join("line %d" % i for i in range(40)) + "\\nValueError: no such model", flush=True)
    sys.exit(3)
if mode == "late":
    print("still loading", flush=True)
    signal.pause()

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("x" * 2**17 + "\\nCUDA error: device-side assert", flush=True)
            os._exit(7)
        if self.path == "/kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass

http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    script = tmp_path / "python"
    script.write_text(FAKE_PYTHON.format(python=sys.executable))
    script.chmod(0o755)
    return str(script)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def make_servers(python: str, folder: Path, **settings: Any) -> ManagedServers:
    config = ServerConfig("some/model", python=python, log_folder=str(folder), **settings)
    return ManagedServers(config, grace_s=0.5)


def read_pids(folder: Path, index: int = 0) -> list[int]:
    """The server's and its child's."""
    said = json.loads((folder / f"server-{index}.log").read_text().splitlines()[0])
    return [said["pid"], said["child"]]


def has_option(command: list[str], name: str, value: str) -> bool:
    return name in command and command[command.index(name) + 1] == value


def environment(config: ServerConfig, index: int = 0) -> dict[str, str]:
    return config.environment(index, Path("/folder"))


def test_a_server_on_the_cpu_gets_every_flag_that_the_engine_relies_on():
    command = ServerConfig("m", python="py", max_model_len=64).command(0, 8001)
    assert command[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in (
        ("--model", "m"),
        ("--host", "127.0.0.1"),
        ("--port", "8001"),
        ("--dtype", "float32"),
        ("--max-model-len", "64"),
        ("--logprobs-mode", "processed_logprobs"),
        ("--worker-extension-cls", "sdp_lightning.engines.servers.vllm_worker.WorkerExtension"),
    ):
        assert has_option(command, name, value), name
    assert {"--enable-scale-out", "--enforce-eager", "--no-enable-chunked-prefill"} < set(command)
    assert "--gpu-memory-utilization" not in command and "--tensor-parallel-size" not in command


def test_the_environment_opens_the_routes_for_weights_and_leaves_out_the_trainers_rank(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("PYTHONHOME", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    values = environment(ServerConfig("m"))
    assert values["VLLM_SERVER_DEV_MODE"] == "1"
    assert values["PYTHONPATH"] == os.pathsep.join(["/folder", "/mine"])
    assert "RANK" not in values and "PYTHONHOME" not in values


# What torchrun sets for every process that it starts.
TORCHRUN = {
    *("LOCAL_RANK", "RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "LOCAL_WORLD_SIZE"),
    *("WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"),
}


def test_nothing_of_torchrun_reaches_a_server_nor_a_key_that_the_client_does_not_send(
    monkeypatch: pytest.MonkeyPatch,
):
    for name in (*TORCHRUN, "VLLM_API_KEY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    values = environment(ServerConfig("m"))
    assert not (TORCHRUN | {"VLLM_API_KEY"}) & set(values)
    assert values["VLLM_LOGGING_LEVEL"] == "DEBUG"


@pytest.mark.parametrize(
    ("transport", "flags", "variable"),
    [
        ("files", [], None),
        ("gloo", [], None),
        ("nccl", ["--weight-transfer-config", '{"backend": "nccl"}'], None),
        (
            "ipc",
            ["--weight-transfer-config", '{"backend": "ipc"}'],
            ("VLLM_ALLOW_INSECURE_SERIALIZATION", "1"),
        ),
        (
            "lora",
            ["--enable-lora", "--max-lora-rank", "16"],
            ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True"),
        ),
    ],
)
def test_what_a_transport_needs_is_set_for_it_and_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
    transport: TransportName,
    flags: list[str],
    variable: tuple[str, str] | None,
):
    names = "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    devices: dict[str, Any] = {"devices": ("0",), "gpu_memory_utilization": 0.5}
    config = ServerConfig("m", transport=transport, max_lora_rank=16, **devices)
    plain = ServerConfig("m", **devices).command(0, 8001)
    assert config.command(0, 8001) == [*plain, *flags]
    values = environment(config)
    assert [(name, values[name]) for name in names if name in values] == [variable] * bool(variable)


def test_on_a_cpu_no_adapter_may_lie_on_the_head_which_an_echo_would_not_survive():
    command = ServerConfig("m", transport="lora").command(0, 8001)
    assert command[-8:][:3] == ["--lora-target-modules", "q_proj", "k_proj"]
    assert "lm_head" not in command


def test_extra_arguments_come_last_where_vllm_lets_them_win():
    command = ServerConfig("m", transport="lora", extra_args=("--max-lora-rank", "8")).command(0, 1)
    assert has_option(command, "--max-lora-rank", "64")
    assert command[-2:] == ["--max-lora-rank", "8"]


def test_devices_are_dealt_out_and_several_for_one_server_are_tensor_parallel(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    one_each = ServerConfig("m", replicas=2, devices=("4", "5"), gpu_memory_utilization=0.3)
    assert [environment(one_each, i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["4", "5"]
    assert environment(one_each)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # as nvidia-smi counts
    assert environment(ServerConfig("m"))["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    command = one_each.command(1, 8001)
    assert has_option(command, "--gpu-memory-utilization", "0.3")
    assert has_option(command, "--dtype", "auto") and "--enforce-eager" not in command
    two_each = ServerConfig("m", replicas=2, devices=("0", "1", "2", "3"))
    assert environment(two_each, 1)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert has_option(two_each.command(1, 8001), "--tensor-parallel-size", "2")
    shared = ServerConfig("m", replicas=2, devices=("7",), gpu_memory_utilization=0.4)
    assert [environment(shared, i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["7", "7"]
    thirds = ServerConfig("m", replicas=3, devices=("7",), gpu_memory_utilization=1 / 3)
    assert environment(thirds, 2)["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 0}, "replicas must be an integer of at least 1, got 0"),
        ({"replicas": 2, "devices": ("0",)}, "gpu_memory_utilization"),
        ({"replicas": 2, "devices": ("0", "0")}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.5}, "1.5"),
        ({"devices": ()}, "0 devices .* evenly over 1 replicas"),
        ({"replicas": 2, "devices": ("0", "1", "2")}, "3 devices .* evenly over 2 replicas"),
        (
            {"replicas": 3, "devices": ("0", "1"), "gpu_memory_utilization": 0.1},
            "2 devices .* evenly over 3 replicas",
        ),
        (
            {"replicas": 4, "devices": ("0", "1"), "gpu_memory_utilization": 0.51},
            r"would take 2 x 0\.51 .* at most 0\.5 there",
        ),
        (
            {"replicas": 2, "devices": ("0", "0"), "gpu_memory_utilization": 0.6},
            r"would take 2 x 0\.6 ",
        ),
        ({"replicas": 2, "cores": ("0",)}, "one list a replica: 1 for 2"),
        ({"port": 65535, "replicas": 2}, "65535"),
        ({"startup_timeout_s": 0}, "startup_timeout_s"),
        ({"transport": "pigeon"}, "one of files, gloo, nccl, ipc, lora; got 'pigeon'"),
        (
            {"transport": "lora", "max_lora_rank": 0},
            "max_lora_rank must be an integer of at least 1, got 0",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        ServerConfig("m", **settings)


def test_gpus_shared_with_the_trainer_are_refused_unless_the_cpu_is_named(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ConfigError, match="with the trainer"):
        ServerConfig("m")
    with pytest.raises(ConfigError, match=r"would take 3 x 0\.4 "):
        ServerConfig("m", replicas=3, gpu_memory_utilization=0.4)
    config = ServerConfig("m", devices=("cpu",), replicas=2)
    assert config.on_cpu and has_option(config.command(1, 8001), "--dtype", "float32")


@pytest.mark.parametrize(
    ("settings", "devices", "visible", "shared"),
    [
        ({"devices": ("1", "2")}, [0, 1], None, "GPU 1:"),
        ({"devices": ("1", "2")}, [0], None, None),
        ({"devices": ("0", "1", "5")}, [1, 2], "4, 5,0", "GPU 0, 5:"),
        ({"devices": ("0",)}, [0], "1", None),
        ({"devices": ("0",)}, [0], "", None),
        ({"devices": ("0",)}, [3], "0,1", None),  # Lightning refuses what is not there
        ({"devices": ("GPU-b",)}, [1], "GPU-a,GPU-b", "GPU GPU-b:"),
        ({"devices": ("0",), "gpu_memory_utilization": 0.4}, [0], None, None),
        ({"gpu_memory_utilization": 0.4}, [0], None, None),
        ({"devices": ("cpu",)}, [0], None, None),
    ],
)
def test_a_gpu_of_the_trainers_is_no_servers_unless_its_share_is_said(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    devices: list[int],
    visible: str | None,
    shared: str | None,
):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    config = ServerConfig("m", **settings)
    if shared is None:
        config.check_trainer_devices(devices, visible=visible)
    else:
        with pytest.raises(ConfigError, match=f"both use {shared}.*gpu_memory_utilization"):
            config.check_trainer_devices(devices, visible=visible)


def test_two_replicas_get_ports_and_cores_of_their_own(fake_python: str, tmp_path: Path):
    available = sorted(os.sched_getaffinity(0))
    cores = available[0], available[-1]
    bound = tuple(map(str, cores))
    servers = make_servers(fake_python, tmp_path / "logs", replicas=2, cores=bound)
    try:
        urls = servers.start()
        assert len(set(urls)) == 2 and urls == servers.urls == servers.start()
        for index in (0, 1):
            log = (tmp_path / "logs" / f"server-{index}.log").read_text()
            assert json.loads(log.splitlines()[0])["cores"] == [cores[index]]
    finally:
        servers.close()


def test_closing_ends_server_and_children_and_can_be_done_twice(fake_python: str, tmp_path: Path):
    servers = make_servers(fake_python, tmp_path / "logs")
    servers.start()
    pids = [*servers.process_ids, *read_pids(tmp_path / "logs")]
    servers.close()
    servers.close()
    assert_gone(pids)
    assert servers.urls == []


@pytest.mark.fault("hang", "teardown")
def test_a_server_that_ignores_sigterm_is_killed_after_the_grace(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    servers = make_servers(fake_python, tmp_path / "logs")
    servers.start()
    pids = [*servers.process_ids, *read_pids(tmp_path / "logs")]
    start = time.monotonic()
    servers.close()
    assert time.monotonic() - start >= servers.grace_s
    assert_gone(pids)


def test_a_server_that_dies_is_an_error_with_the_end_of_its_log_and_nothing_is_left(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_VLLM", "second dies")
    servers = make_servers(fake_python, tmp_path / "logs", replicas=2)
    with pytest.raises(EngineError, match=r"ended with 3 before(.|\n)*no such model") as caught:
        servers.start()
    assert "line 39" in str(caught.value) and "line 5\n" not in str(caught.value)
    assert_gone(pid for index in (0, 1) for pid in read_pids(tmp_path / "logs", index))


def test_a_server_that_is_late_is_an_error_with_the_end_of_its_log_and_nothing_is_left(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_VLLM", "late")
    servers = make_servers(fake_python, tmp_path / "logs", startup_timeout_s=3.0)
    with pytest.raises(EngineError, match=r"not ready within 3 s(.|\n)*still loading"):
        servers.start()
    assert_gone(read_pids(tmp_path / "logs"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/die", ["Its process ended with 7. The end of ", "\nCUDA error: device-side assert"]),
        ("/kill", ["Its process ended with 137 (killed by signal 9). The end of "]),
    ],
)
def test_a_server_that_dies_later_is_explained_and_the_others_run_on(
    fake_python: str, tmp_path: Path, path: str, said: list[str]
):
    servers = make_servers(fake_python, tmp_path / "logs", replicas=2)
    try:
        first, second = servers.start()
        with pytest.raises((http.client.HTTPException, OSError)):
            urllib.request.urlopen(second + path, timeout=10.0)
        assert_gone(servers.process_ids[1:])
        told = servers.explain(second)
        assert all(text in told for text in [*said, str(tmp_path / "logs" / "server-1.log")]), told
        assert len(told) < 2**17
        running = servers.explain(first)
        assert running.startswith(f"The end of {tmp_path / 'logs' / 'server-0.log'}:\n")
        assert "ended" not in running
        (tmp_path / "logs" / "server-0.log").unlink()
        assert servers.explain(first).startswith("Its log cannot be read: ")
        assert servers.explain("http://127.0.0.1:1") == ""
    finally:
        servers.close()


def test_an_interrupted_start_leaves_nothing(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(url: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(server_module, "_is_healthy", interrupt)
    servers = make_servers(fake_python, tmp_path / "logs")
    with pytest.raises(KeyboardInterrupt):
        servers.start()
    assert servers.process_ids == []


def test_a_port_that_is_taken_is_refused_instead_of_taking_its_server_for_ours(tmp_path: Path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        servers = make_servers("/nowhere", tmp_path / "logs", port=port)
        with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 is taken"):
            servers.start()


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path):
    servers = make_servers("/nowhere/python", tmp_path / "logs")
    with pytest.raises(EngineError, match="/nowhere/python"):
        servers.start()


PARENT = """
import json, signal, sys
from sdp_lightning.engines.servers.managed import ManagedServers, ServerConfig, _is_healthy

servers = ManagedServers(ServerConfig("m", python=sys.argv[1], log_folder=sys.argv[2],
                                      devices=("cpu",)))
try:
    servers.start()
    print(json.dumps(servers.process_ids), flush=True)
    while True:
        signal.pause()
except KeyboardInterrupt:
    print(json.dumps(_is_healthy(servers.urls[0])), flush=True)
    servers.close()
"""


def start_parent(fake_python: str, folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    command = [sys.executable, "-c", PARENT, fake_python, str(folder)]
    parent = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    guards: list[int] = json.loads(parent.stdout.readline())
    return parent, [*guards, *read_pids(folder)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.fault("process killed", "teardown")
def test_a_killed_parent_takes_guard_server_and_their_children_with_it(
    fake_python: str, tmp_path: Path, number: signal.Signals
):
    parent, pids = start_parent(fake_python, tmp_path / "logs")
    with parent:
        parent.send_signal(number)
    assert parent.returncode == -number
    assert_gone(pids)


@pytest.mark.fault("process killed", "teardown")
def test_a_guard_that_is_killed_itself_takes_its_server_with_it(fake_python: str, tmp_path: Path):
    servers = make_servers(fake_python, tmp_path / "logs")
    servers.start()
    try:
        server, child = read_pids(tmp_path / "logs")  # vLLM ends its own children
        os.kill(servers.process_ids[0], signal.SIGKILL)
        assert_gone([server])
        os.kill(child, signal.SIGKILL)
    finally:
        servers.close()


def test_ctrl_c_reaches_the_parent_alone_which_then_ends_the_server(
    fake_python: str, tmp_path: Path
):
    parent, pids = start_parent(fake_python, tmp_path / "logs")
    with parent:
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
        assert parent.stdout is not None
        assert json.loads(parent.stdout.readline()) is True
    assert parent.returncode == 0
    assert_gone(pids)


def test_a_launch_url_sets_the_fields_of_the_server_config(fake_python: str, tmp_path: Path):
    engine: Any = connect_engine(
        f"vllm://launch?replicas=2&devices=cpu&max_model_len=64&python={fake_python}"
        f"&log_folder={tmp_path / 'logs'}&startup_timeout_s=9",
        model="some/model",
    )
    config = engine._managed.config
    assert (config.model, config.replicas, config.max_model_len) == ("some/model", 2, 64)
    assert config.devices == ("cpu",) and config.startup_timeout_s == 9.0
    engine.close()


def test_a_launch_url_makes_servers_for_the_transport_of_the_options():
    engine: Any = connect_engine(
        "vllm://launch?max_lora_rank=8", model="m", transport="lora", lora_alpha=16.0
    )
    config = engine._managed.config
    assert (config.transport, config.max_lora_rank) == ("lora", 8)
    assert connect_engine("vllm://launch", model="m")._managed.config.transport == "files"  # type: ignore


def test_servers_started_for_another_transport_than_the_engines_are_refused():
    servers = ManagedServers(ServerConfig("m", transport="nccl"))
    with pytest.raises(ConfigError, match=r"started for transport='nccl', but .* is 'files'"):
        RemoteInfEngine(servers, VLLMBackend())
    with pytest.raises(ConfigError, match=r"started for transport='gloo'"):
        connect_engine("vllm://launch?transport=gloo", model="m")
