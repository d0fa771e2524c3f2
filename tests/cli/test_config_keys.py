"""A server's key is in nothing that a run writes, says or shows to other users of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sdp_lightning.cli.main import main
from support.cli_configs import TASK, small_config
from support.fake_servers import QUICK, servers

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
KEY = "sk-do-not-tell"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: str) -> dict[str, Any]:
    """Of a run that leaves every kind of file behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SDP_API_KEY", raising=False)
    Path("task.py").write_text(TASK)
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": None},
    }
    observers: list[dict[str, Any]] = [
        {"class_path": f"sdp_lightning.{name}"}
        for name in ("WeightSyncCallback", "RunReport", "Recorder")
    ]
    observers[0]["init_args"] = {"weight_check_every": 0}  # the server has no model
    files = {"max_steps": 1, "enable_checkpointing": True, "logger": logger, "callbacks": observers}
    settings = small_config(model_folder, **files)
    settings["data"]["engine"] = "vllm://127.0.0.1:1"
    settings["data"]["engine_options"] = {**QUICK, "api_key": KEY}
    return settings


def fit(config: dict[str, Any], *flags: str) -> int:
    Path("given.yaml").write_text(yaml.safe_dump(config))
    return main(["fit", "--config", "given.yaml", *flags])


def holding_the_key(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html"} < {path.name for path in files}
    assert any(path.suffix == ".ckpt" for path in files)
    assert any(path.suffix == ".parquet" for path in files)
    return [str(path) for path in files if KEY.encode() in path.read_bytes()]


def test_a_run_leaves_its_key_in_no_file_and_its_saved_config_asks_for_it(
    config: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with servers(1, "--api-key", KEY) as [server]:
        config["data"]["engine"] = f"vllm://{server.host}"
        assert fit(config) == 0
        assert holding_the_key(Path("runs")) == []
        saved = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
        assert saved["data"]["engine_options"]["api_key"] == "env:SDP_API_KEY"
        assert saved["data"]["engine_options"]["recover_s"] == QUICK["recover_s"]
        assert fit(saved) == 2
        said = capfd.readouterr().err
        assert "api_key='env:SDP_API_KEY': that variable is not set" in said
        monkeypatch.setenv("SDP_API_KEY", KEY)
        assert fit(saved) == 0
        config["data"]["engine_options"]["api_key"] = KEY[:-1]
        assert fit(config) == 1
    shown = capfd.readouterr()
    assert "answered 401" in shown.err
    assert KEY[:-1] not in said + shown.out + shown.err + caplog.text


@pytest.mark.parametrize(
    "wrong", [("data", "no_such", 1), ("data", "engine_options", ["api_key: " + KEY])]
)
def test_no_error_about_a_config_shows_its_key(
    config: dict[str, Any], wrong: tuple[str, str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    room, name, value = wrong
    config[room][name] = value
    try:
        status: Any = fit(config)
    except SystemExit as refusal:  # by the real parser
        status = refusal.code
    assert status == 2
    said = capsys.readouterr().err
    assert name in said and KEY not in said


def test_a_config_is_printed_without_its_key(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        fit(config, "--print_config")
    said = capsys.readouterr().out
    assert "api_key: env:SDP_API_KEY" in said and KEY not in said


@pytest.mark.parametrize(
    "flags",
    [
        [f"--data.engine_options.api_key={KEY}"],
        ["--data.engine_options.api_key", KEY],
        [f'--data.engine_options={{"api_key": "{KEY}"}}'],
    ],
)
def test_a_key_on_the_command_line_is_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *flags]) == 2
    said = capsys.readouterr().err
    assert "everybody on this machine sees" in said and KEY not in said
