"""What the doctor says of a config: what of the things it asks for are on this machine."""

from __future__ import annotations

import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdp_lightning.cli.doctor.config_checks import (
    Machine,
    check_devices,
    check_rows,
    check_servers,
    examine_configs,
    merge,
    trainer_positions,
)
from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.gpus import NvidiaSmiError
from sdp_lightning.cli.doctor.source_checks import check_source
from sdp_lightning.cli.main import main
from sdp_lightning.config.model_source import ModelSource
from support.paths import ROOT
from support.raw_server import raw_server

EIGHT = Machine(tuple(range(8)), tuple(range(8)), has_vllm=True)
GPU = {"accelerator": "gpu", "devices": 1}


def problems(findings: list[Finding]) -> dict[str, str]:
    return {finding.subject: finding.text for finding in findings if finding.state == "problem"}


# GPUs ------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "num_visible", "places"),
    [
        ({}, 0, []),
        ({}, 2, [0, 1]),
        ({"accelerator": "cpu", "devices": 4}, 2, []),
        ({"accelerator": "gpu"}, 0, [0]),
        ({"accelerator": "gpu", "devices": "auto"}, 2, [0, 1]),
        ({"accelerator": "cuda", "devices": -1}, 2, [0, 1]),
        ({"accelerator": "gpu", "devices": 2}, 8, [0, 1]),
        ({"accelerator": "gpu", "devices": "2"}, 8, [0, 1]),
        ({"accelerator": "gpu", "devices": "2,"}, 8, [2]),
        ({"accelerator": "gpu", "devices": "1, 3"}, 8, [1, 3]),
        ({"accelerator": "gpu", "devices": [4, 5]}, 8, [4, 5]),
    ],
)
def test_the_trainer_s_gpus_are_read_as_lightning_reads_them(
    trainer: dict[str, Any], num_visible: int, places: list[int]
) -> None:
    assert trainer_positions(trainer, num_visible) == places


def test_gpus_that_are_not_there_are_named() -> None:
    found = problems(check_devices(GPU | {"devices": [0, 9]}, "vllm://launch?devices=7,8", EIGHT))
    assert found == {
        "trainer": "GPU 9 is missing: 8 can be seen, counted from 0.",
        "servers": "GPU 8 is missing: 8 can be seen, counted from 0.",
    }


@pytest.mark.parametrize(
    ("engine", "visible", "shared"),
    [
        ("vllm://launch?devices=0", (0, 1), True),
        ("vllm://launch?devices=0&gpu_memory_utilization=0.4", (0, 1), False),
        ("vllm://launch?devices=1", (0, 1), False),
        ("vllm://launch?devices=1", (1,), True),  # place 0 of the visible ones
        ("vllm://launch?devices=cpu", (0, 1), False),
        ("vllm://launch?devices=MIG-0aa6", (0, 1), False),
        ("vllm://launch", (0, 1), True),  # its servers would see all
        ("vllm://launch?replicas=2", (0, 1), True),
        ("vllm://launch?gpu_memory_utilization=0.4", (0, 1), False),
        ("vllm://host:8000", (0, 1), False),
        ("embedded", (0, 1), False),
    ],
)
def test_a_gpu_with_two_owners_needs_a_share(
    engine: str, visible: tuple[int, ...], shared: bool
) -> None:
    found = problems(check_devices(GPU, engine, Machine((0, 1), visible)))
    assert set(found) == ({"shared GPUs"} if shared else set())


@pytest.mark.parametrize("engine", ["vllm://launch", "vllm://launch?replicas=2"])
def test_servers_that_are_given_no_devices_see_those_of_the_trainer_or_none(engine: str) -> None:
    def servers(machine: Machine) -> str:
        return next(f.text for f in check_devices({}, engine, machine) if f.subject == "servers")

    assert servers(Machine((0, 1, 2), (2, 0))) == "GPU 2, 0"
    assert servers(Machine()) == "no GPU is asked for"
    assert problems(check_devices({}, engine, Machine())) == {}  # the CPU, as ServerConfig does


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (0, 1)),
        ("1", (1,)),
        ("1,0", (1, 0)),
        ("GPU-b, MIG-7", (1, -1)),
        ("", ()),
    ],
)
def test_a_machine_knows_which_gpus_the_trainer_sees(
    visible: str | None, expected: tuple[int, ...]
) -> None:
    text = "0, GPU-a, 0, 1, [N/A]\n1, GPU-b, 0, 1, [N/A]\n"
    assert Machine.look(lambda query: text, visible) == Machine((0, 1), expected, 1 / 1024)


def test_a_machine_without_an_answer_has_no_gpu() -> None:
    def refuse(query: str) -> str:
        raise NvidiaSmiError("no driver")

    assert Machine.look(refuse, None) == Machine.look(None, None) == Machine()


# Servers ------------------------------------------------------------


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def host() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_servers_that_should_run_are_asked(host: str) -> None:
    well, ill = check_servers(f"vllm://{host},127.0.0.1:1", Machine())
    assert (well.state, well.text) == ("ok", f"{host} answers 200")
    assert ill.state == "problem" and "127.0.0.1:1 does not answer" in ill.text


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("vllm://user:hunter2@127.0.0.1:1", "***@127.0.0.1:1 has a name and a password in it"),
        ("vllms://127.0.0.1:1", "127.0.0.1:1 does not answer"),
        ("vllm://127.0.0.1:0", "is not the address of a server"),
    ],
)
def test_an_address_that_cannot_be_asked_is_a_problem_without_its_secret(
    engine: str, said: str
) -> None:
    [found] = check_servers(engine, Machine())
    assert found.state == "problem" and said in found.text
    assert "hunter2" not in found.text


def test_a_server_that_speaks_no_http_is_a_problem() -> None:
    with raw_server() as server:
        server.answer = b"SSH-2.0\r\n"
        [found] = check_servers(server.url.replace("http", "vllm"), Machine())
    assert found.state == "problem" and "does not answer" in found.text


def test_servers_are_asked_through_the_proxy_that_the_run_would_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with raw_server() as proxy:
        proxy.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        monkeypatch.setenv("http_proxy", proxy.url)
        far = "vllm://sdp-server.invalid:8000"
        [through] = check_servers(far, Machine(), {"use_proxy": True})
        [direct] = check_servers(far, Machine(), {})
    assert (through.state, direct.state) == ("ok", "problem")
    monkeypatch.setenv("http_proxy", "socks5://h:1")
    [found] = check_servers(far, Machine(), {"use_proxy": True})
    assert found.state == "problem" and "is no http:// proxy" in found.text


def test_servers_to_be_started_need_their_interpreter(tmp_path: Path) -> None:
    [missing] = check_servers(f"vllm://launch?python={tmp_path}/bin/python", EIGHT)
    assert missing.state == "problem" and f"{tmp_path}/bin/python is not there" in missing.text
    assert check_servers("vllm://launch?python=/bin/sh", Machine()) == []
    assert check_servers("embedded", Machine()) == []


def test_servers_to_be_started_by_the_trainer_s_interpreter_need_vllm_there() -> None:
    [missing] = check_servers("vllm://launch?replicas=2", Machine())
    assert missing.state == "problem" and f"{sys.executable} has no vLLM" in missing.text
    assert check_servers("vllm://launch?replicas=2", EIGHT) == []


# Model and rows ------------------------------------------------------------


def test_a_model_is_looked_for_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.py").write_text("")
    monkeypatch.chdir(tmp_path)
    states = {
        str(tmp_path): "ok",
        f"{tmp_path}/gone": "problem",
        "model.py:path": "ok",
        "gone.py:path": "problem",
        "package.module:path": "ok",
        "nobody/has-this-in-the-cache": "note",
        "no/folder/and-no-id": "problem",
        "here/cached": "ok",
    }
    snapshot = tmp_path / "hub" / "models--here--cached"
    (snapshot / "snapshots" / "abc").mkdir(parents=True)
    (snapshot / "snapshots" / "abc" / "config.json").write_text("{}")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = {name: next(iter(check_source(ModelSource(name)))).state for name in states}
    assert found == states


def test_rows_are_counted_or_their_error_is_the_finding(tmp_path: Path) -> None:
    file, gone = tmp_path / "task.py", ModelSource("/gone")
    file.write_text("rows = [{}, {}]")
    rows = {"prompts": f"{file}:rows", "workflow": {"class_path": "sdp_lightning.RLVRWorkflow"}}
    assert check_rows("prompts", rows, gone) == Finding("ok", "prompts", "2 rows, not checked")
    missing = check_rows("prompts", {"prompts": f"{file}:row"}, gone)
    assert missing.state == "problem" and "Did you mean rows" in missing.text


def test_rows_are_checked_for_the_engine_and_the_budgets_of_the_config(
    tmp_path: Path, model_folder: str
) -> None:
    file, source = tmp_path / "rows.jsonl", ModelSource(model_folder)
    file.write_text('{"prompt": "1+1="}\n{"prompt": "11111111111111111111"}\n{"prompt": ""}\n')
    init = {"reward": "builtins:len", "sampling": {"max_new_tokens": 500}}
    data: dict[str, Any] = {
        "prompts": str(file),
        "workflow": {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": init},
    }
    found = check_rows("prompts", data, source)  # the tiny model has 512 positions
    assert found.state == "problem"
    for part in (
        "2 of 3 rows of prompts cannot be used (1 prompt too long, 1 empty prompt)",
        "row 'rows.jsonl:2': its prompt has 20 tokens, and 12 leave room",
    ):
        assert part in found.text
    dropped = check_rows("prompts", data | {"rollout": {"prompts_check": "drop"}}, source)
    assert dropped == Finding("note", "prompts", found.text.partition(" Correct")[0])
    launched = {"engine": "vllm://launch?max_model_len=530"}
    assert "1 of 3 rows" in check_rows("prompts", data | launched, source).text
    ill = {"workflow": {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": {"group": 1}}}
    assert check_rows("prompts", data | ill, source).state == "problem"


# Configs ------------------------------------------------------------


def test_a_later_file_overrides_an_earlier_one_setting_by_setting() -> None:
    first = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert merge(first, {"a": {"c": {"d": 3}}, "e": [2], "f": {}}) == {
        "a": {"b": 1, "c": {"d": 3}},
        "e": [2],
        "f": {},
    }
    assert first["a"] == {"b": 1, "c": {"d": 2}}


def test_all_that_is_missing_for_a_config_is_said(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("rows = [{}]")
    rows = f"{tmp_path}/task.py:rows"
    base, late = tmp_path / "base.yaml", tmp_path / "late.yaml"
    data = {"prompts": rows, "val_prompts": f"{rows}x", "engine": "vllm://launch?devices=0"}
    base.write_text(yaml.safe_dump({"trainer": GPU, "model": {"model": "/gone"}, "data": data}))
    late.write_text(yaml.safe_dump({"data": {"val_prompts": rows}}))
    found = examine_configs([str(base)], EIGHT)
    assert set(problems(found)) == {"shared GPUs", "model", "val_prompts"}
    assert set(problems(examine_configs([str(base), str(late)], EIGHT))) == {"shared GPUs", "model"}


@pytest.mark.parametrize("text", [None, "a: [", "text"])
def test_a_file_that_is_no_config_is_a_problem(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    [finding] = examine_configs([str(file)], EIGHT)
    assert finding.state == "problem" and str(file) in finding.text


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_the_gsm8k_recipe_is_well_on_eight_gpus_and_ill_on_none(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n')
    monkeypatch.setenv("GSM8K_DATA", str(tmp_path))
    monkeypatch.chdir(ROOT)
    files = [f"recipes/gsm8k_grpo/{name}.yaml" for name in ("base", f"gpus_{gpus}")]
    assert problems(examine_configs(files, EIGHT)) == {}
    assert set(problems(examine_configs(files, Machine()))) == {"trainer", "servers"}


def test_the_command_looks_at_the_configs_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    tiny = "recipes/tiny_cpu/config.yaml"
    assert main(["doctor", "--config", tiny]) == 0
    assert "4096 rows" in capsys.readouterr().out
    assert main(["doctor", f"--config={tiny}", "--config=gone.yaml"]) == 1
    assert "gone.yaml cannot be read" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refusal:
        main(["doctor", "--conf", tiny])
    assert refusal.value.code == 2


def test_gpus_to_be_had_are_judged_by_the_memory_that_is_named(
    tmp_path: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    engine = "vllm://launch?devices=0&gpu_memory_utilization=0.4&max_model_len=512"
    config.write_text(
        yaml.safe_dump({"model": {"model": model_folder}, "data": {"engine": engine}})
    )
    main(["doctor", "--config", str(config), "--gpu-gib", "80"])
    out = capsys.readouterr().out
    assert "of 48." in out, "what the server leaves of 80"
    assert " fit, " in out
    assert "about 2.0 versions if generation" in out
