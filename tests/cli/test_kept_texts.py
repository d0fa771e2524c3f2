"""A text of a config is a text, whatever it looks like: in rows, arguments, and what is saved."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

import sdp_lightning as sdp
from sdp_lightning.cli.main import main
from support.cli_configs import small_config

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
TASK = """
from lightning import Callback
seen, made = [], []

class Keeper(Callback):
    def __init__(self, anything, table: dict[str, object], count: int, name: str):
        made.append((anything, table, count, name))

def rows():
    return ROWS

def reward(completion, row):
    seen.append({name: row[name] for name in ("answer", "nested")})
    return 1.0 if row == ROWS[int(row["nested"]["at"][0])] else 0.0

ROWS = """
ROWS: list[dict[str, Any]] = [
    {"prompt": "2+1=", "answer": "3", "nested": {"at": ["0"], "none": "null", "list": "[1, 2]"}},
    {"prompt": "1e3", "answer": "true", "nested": {"at": ["1"], "pair": "question: 4", "date": 3}},
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: str) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    Path("texts_task.py").write_text(f"{TASK}{ROWS!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = small_config(model_folder, logger=False)
    init = {"anything": "007", "table": {"a": "1", "b": ["{x}"]}, "count": "4", "name": "12"}
    keeper = {"class_path": "texts_task.Keeper", "init_args": init}
    settings["trainer"]["callbacks"] = [keeper]
    settings["data"]["workflow"]["init_args"]["reward"] = "texts_task:reward"
    settings["data"]["prompts"] = ROWS
    return settings


def run(config: dict[str, Any], *flags: str) -> int:
    Path("config.yaml").write_text(json.dumps(config))  # which is YAML, with quoted texts
    return main(["fit", "--config=config.yaml", *flags])


def seen() -> list[Any]:
    import texts_task  # pyright: ignore

    return texts_task.seen


@pytest.mark.parametrize("prompts", [ROWS, "texts_task:rows"], ids=["inline", "by a function"])
def test_a_dry_run_rewards_rows_as_they_are(
    prompts: Any, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["data"]["prompts"] = prompts
    assert run(config, "--dry-run") == 0
    assert "mean reward of 1.000" in capsys.readouterr().out
    assert {row["answer"] for row in seen()} == {"3", "true"}


def test_a_fit_from_python_and_its_saved_config_have_the_texts_too(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    import texts_task  # pyright: ignore

    with pytest.raises(SystemExit, match="0"):
        run(config, "--print_config")
    shown = capsys.readouterr().out
    saved = yaml.safe_load(shown)
    assert saved["data"]["prompts"] == ROWS
    assert saved["trainer"]["callbacks"][0]["init_args"] == {
        **config["trainer"]["callbacks"][0]["init_args"],
        "count": 4,
    }
    Path("config.yaml").write_text(shown)
    trainer, model, data = sdp.from_config("config.yaml")
    assert texts_task.made[-1] == ("007", {"a": "1", "b": ["{x}"]}, 4, "12")
    trainer.fit(model, data)
    assert trainer.callback_metrics["train/reward"] == 1.0
    kept = texts_task.made[-1][0]
    assert copy.deepcopy(kept) is kept and type(pickle.loads(pickle.dumps(kept))) is str


def test_what_is_typed_is_still_read_as_yaml(config: dict[str, Any]) -> None:
    import texts_task  # pyright: ignore

    config["data"]["engine_options"] = {"device": "cpu"}
    flags = ["--data.engine_options.max_slots=8", "--data.workflow.init_args.group_size=2"]
    assert run(config, *flags, "--trainer.max_steps=1") == 0
    assert texts_task.made
