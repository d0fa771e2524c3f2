"""The command line, from its arguments to its exit status."""

from __future__ import annotations

import csv
import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sdp_lightning as sdp
from sdp_lightning.cli.main import main
from sdp_lightning.observability.recording.files import EndMark
from support.cli_configs import TASK, small_config

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: str) -> dict[str, Any]:
    """A config that fits in a second, with files of its own in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    settings = small_config(model_folder)
    settings["data"]["engine_options"] = {"device": "cpu", "max_slots": 8}
    return settings


def run(command: str, config: dict[str, Any], *flags: str) -> int:
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return main([command, "--config", "config.yaml", *flags])


# Quick commands ------------------------------------------------------------


REFUSED = (
    ["fit", "--trainer.max_step=4"],
    ["fit", "--config=nope.yaml"],
    ["validate", "--x=1"],
    ["fit", "--data.engine=vllm://launch?python=/no/python"],
)


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_refused_setting_waits_for_no_large_import(arguments: list[str]):
    script = (
        "import sys\n"
        "from sdp_lightning.cli.main import main\n"
        f"status = main({arguments!r})\n"
        "slow = {'torch', 'numpy', 'lightning', 'transformers', 'jsonargparse'}\n"
        "heavy = slow & set(sys.modules)\n"
        "assert (status, heavy) == (2, set()), heavy\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=200)


@pytest.mark.parametrize("argument", ["--version", "doctor", "--help"])
def test_a_quick_command_imports_neither_lightning_nor_transformers(argument: str):
    script = (
        "import sys\n"
        "from sdp_lightning.cli.main import main\n"
        f"main([{argument!r}])\n"
        "heavy = {'lightning', 'transformers', 'pytorch_lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("module", ["sdp_lightning", "sdp_lightning.cli"])
def test_python_m_is_the_command_line(module: str) -> None:
    command = [sys.executable, "-m", module, "fitt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "there is no command 'fitt'. Did you mean fit?" in done.stderr


def test_a_bad_setting_of_fit_is_refused_with_a_near_one(capsys: pytest.CaptureFixture[str]):
    assert main(["fit", "--trainer.max_step=4"]) == 2
    assert "Did you mean trainer.max_steps?" in capsys.readouterr().err


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sdp-lightning {sdp.__version__}\n"


def test_without_a_command_the_help_is_shown_and_the_status_is_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["sdp-lightning"])
    assert main() == 2
    assert "sdp-lightning doctor" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_a_near_one(capsys: pytest.CaptureFixture[str]):
    assert main(["docter"]) == 2
    assert "Did you mean doctor?" in capsys.readouterr().err


def test_predict_is_no_command(capsys: pytest.CaptureFixture[str]):
    assert main(["predict"]) == 2
    assert "no command 'predict'" in capsys.readouterr().err


# fit, validate, test ------------------------------------------------------------


def test_a_config_without_the_callback_fits_and_its_settings_are_saved(config: dict[str, Any]):
    assert run("fit", config) == 0
    folder = Path("runs/version_0")
    assert "train/reward" in (folder / "metrics.csv").read_text()
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    workflow = saved["data"]["workflow"]["init_args"]
    assert workflow["reward"] == "task.py:reward"
    assert workflow["sampling"]["max_new_tokens"] == 4
    assert saved["seed_everything"] == 0


def test_a_saved_config_can_be_fitted_again_into_the_same_folder(config: dict[str, Any]):
    config["trainer"] |= {"logger": False, "default_root_dir": "again"}
    assert run("fit", config) == 0
    saved = yaml.safe_load(Path("again/config.yaml").read_text())
    assert run("fit", saved, "--model.loss.clip_epsilon=0.3") == 0
    again = yaml.safe_load(Path("again/config.yaml").read_text())
    assert again["model"]["loss"]["clip_epsilon"] == 0.3


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_the_last_checkpoint_of_an_earlier_run_is_found(config: dict[str, Any]):
    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    config["trainer"] |= {
        "enable_checkpointing": True,
        "callbacks": [{"class_path": saver, "init_args": {"save_last": True}}],
    }
    assert run("fit", config) == 0
    assert run("fit", config, "--ckpt_path", "last", "--trainer.max_steps", "5") == 0
    versions: list[list[str]] = []
    for folder in sorted(Path("runs").iterdir()):
        with (folder / "metrics.csv").open() as file:
            versions.append([row["rollout/version"] for row in csv.DictReader(file)])
    assert versions == [["1.0", "2.0"], ["3.0", "4.0", "5.0"]]


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_settings_of_a_config_are_in_force_before_those_of_the_checkpoint(config: dict[str, Any]):
    from sdp_lightning.cli.trainer import RolloutCLI

    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    config["trainer"] |= {
        "enable_checkpointing": True,
        "callbacks": [{"class_path": saver, "init_args": {"dirpath": "kept"}}],
    }
    assert run("fit", config) == 0
    (kept,) = Path("kept").glob("*.ckpt")
    flags = [f"--ckpt_path={kept}", "--model.optimizer.lr=0.5", "--trainer.max_steps=3"]
    cli = RolloutCLI(["fit", "--config=config.yaml", *flags])
    assert (cli.model.optimizer.lr, cli.trainer.global_step) == (0.5, 3)


def test_the_callback_that_publishes_is_added_only_if_the_config_has_none(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    from sdp_lightning.cli import trainer as trainer_cli

    made: list[Any] = []
    instantiate = trainer_cli.RolloutCLI.instantiate_trainer

    def keep(self: Any, **kwargs: Any) -> Any:
        made.append(instantiate(self, **kwargs))
        return made[-1]

    monkeypatch.setattr(trainer_cli.RolloutCLI, "instantiate_trainer", keep)
    assert run("fit", config) == 0
    config["trainer"]["callbacks"] = [{"class_path": "sdp_lightning.WeightSyncCallback"}]
    assert run("fit", config) == 0
    for trainer in made:
        kinds = [type(callback).__name__ for callback in trainer.callbacks]
        assert kinds.count("WeightSyncCallback") == 1
    assert type(made[0].callbacks[0]).__name__ == "WeightSyncCallback"


@pytest.mark.parametrize(
    ("command", "metric"), [("validate", "val/reward"), ("test", "test/reward")]
)
def test_rows_are_evaluated(
    command: str, metric: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    config["data"]["val_prompts"] = "task.py:prompts"
    assert run(command, config) == 0
    assert metric in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    [
        "--model.loss.clip_eps=0.1",
        "--data.rollout.batch=4",
        "--trainer.max_step=4",
        "--data.workflow.group=3",
        "--data.workflow.init_args.group=3",
        "--conf=config.yaml",
    ],
)
def test_an_abbreviated_flag_is_refused(
    flag: str, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    try:
        status: Any = run("fit", config, flag)
    except SystemExit as refusal:  # by the real parser
        status = refusal.code
    assert status == 2
    assert flag.partition("=")[0].lstrip("-").rpartition(".")[2] in capsys.readouterr().err


def test_print_config_shows_every_setting_and_can_be_read_back(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as done:
        run("fit", config, "--model.loss.clip_epsilon=0.3", "--print_config")
    assert done.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["loss"]["clip_epsilon"] == 0.3
    assert shown["model"]["loss"]["trust_region"] == "segment"
    assert shown["data"]["rollout"]["max_head_lag"] == 2
    assert shown["data"]["workflow"]["init_args"]["reward"] == "task.py:reward"


@pytest.mark.filterwarnings("default")  # as users run it: jsonargparse tries text after an error
def test_an_adapter_is_set_in_the_config_or_on_the_command_line(config: dict[str, Any]):
    config["trainer"] |= {"logger": False, "default_root_dir": "out"}
    config["model"]["lora"] = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
    assert run("fit", config, "--model.lora.alpha=4") == 0
    saved = yaml.safe_load(Path("out/config.yaml").read_text())["model"]["lora"]
    assert saved == {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "v_proj"]}


def test_an_adapter_alone_is_exported_by_a_flag(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    config["trainer"] |= {"logger": False, "default_root_dir": "out", "enable_checkpointing": True}
    assert run("fit", config, "--model.lora.rank=2") == 0
    (checkpoint,) = Path("out").rglob("*.ckpt")
    assert main(["export", str(checkpoint), "adapter", "--adapter"]) == 0
    assert "28 weights" in (text := capsys.readouterr().out) and "an adapter for" in text
    assert sorted(p.name for p in Path("adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_reward_in_a_file_stays_a_text_in_a_saved_config(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        run("fit", config, "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["data"]["workflow"]["init_args"]["reward"] == "task.py:reward"


def test_a_refused_setting_is_one_line_and_status_2(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    assert run("fit", config, "--model.loss.clip_epsilon=3") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sdp-lightning: clip_epsilon must be in (0, 1), got 3")
    assert "\n" not in error


# rollout ------------------------------------------------------------


def test_rollout_generates_and_records_and_trains_nothing(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    assert run("rollout", config, "--num_batches=3", "--folder=seen") == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("3 batches: 6 groups, 12 trajectories, ")
    assert line.endswith("recorded in seen")
    recording = sdp.Recording("seen")
    assert recording.versions == [0, 1, 2]
    segments = [s for batch in recording for group in batch.groups for s in group.segments]
    assert {segment.version for segment in segments} == {0}


def test_rollout_takes_a_config_that_a_fit_has_saved_and_records_beside_its_log(
    config: dict[str, Any],
):
    assert run("fit", config) == 0
    saved = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    assert run("rollout", saved) == 0
    assert len(sdp.Recording("runs/version_1/recording")) == 1


def fill_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_rollout_refuses_no_batches_and_a_folder_in_use_and_says_what_is_not_whole(
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    assert run("rollout", config, "--num_batches=0") == 2
    assert "num_batches must be at least 1, got 0" in capsys.readouterr().err
    assert run("rollout", config, "--folder=seen") == 0
    assert run("rollout", config, "--folder=seen") == 2
    assert "Give Recorder another folder" in capsys.readouterr().err
    monkeypatch.setattr(EndMark, "write", fill_disk)
    assert run("rollout", config, "--folder=full") == 1
    assert "1 batches: 2 groups" in capsys.readouterr().out
    assert "full is not whole: it has 1 steps, versions 0 to 0" in caplog.text
    with pytest.raises(SystemExit):
        run("rollout", config, "--num_batches=many")
    assert "num_batches" in capsys.readouterr().err
