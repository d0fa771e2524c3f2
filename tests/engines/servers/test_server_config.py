"""Command lines, environments and devices of managed vLLM servers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.engines.servers.managed import ManagedServers, ServerConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.weights.protocol import TransportName
from support.managed_servers import fake_python, no_gpu

__all__ = ["fake_python", "no_gpu"]  # fixtures


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


def test_a_launched_server_reads_what_the_module_reads(model_folder: str):
    source = ModelSource("org/m", revision="v2", trust_remote_code=True, tokenizer=model_folder)
    engine = connect_engine("vllm://launch?devices=cpu&python=py", model=source)
    assert isinstance(engine, RemoteInfEngine) and engine.server_config is not None
    command = engine.server_config.command(0, 8001)
    assert has_option(command, "--model", "org/m") and has_option(command, "--revision", "v2")
    assert has_option(command, "--tokenizer", model_folder)
    assert has_option(command, "--tokenizer-revision", "main")  # else vLLM takes the model's
    assert "--trust-remote-code" in command
    other = "vllm://launch?devices=cpu&model=other&trust_remote_code=false"
    engine = connect_engine(other, model=source)
    assert isinstance(engine, RemoteInfEngine)
    assert engine.server_config == ServerConfig("other", devices=("cpu",))
    with pytest.raises(ConfigError, match="trust_remote_code must be true or false, got 'maybe'"):
        connect_engine("vllm://launch?devices=cpu&trust_remote_code=maybe", model="m")


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
        ("tcp", [], None),
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
        ({"extra_args": ("--api-key", "k")}, "would show --api-key .* Set SDP_API_KEY"),
        ({"extra_args": ("--api-key=k",)}, "would show --api-key .* Set SDP_API_KEY"),
        ({"transport": "pigeon"}, "one of files, tcp, nccl, ipc, lora, delta; got 'pigeon'"),
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
    with pytest.raises(ConfigError, match=r"started for transport='tcp'"):
        connect_engine("vllm://launch?transport=tcp", model="m")
