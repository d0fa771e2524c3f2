"""What a new user does wrong: each gives one line that says what and what to do, and a status.

The table is tried through the command line, as a user would; nothing else is printed, no traceback.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdp_lightning.cli.main import main
from sdp_lightning.errors import ConfigError
from support.cli_configs import small_config

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:.max_epochs. was not set",  # Lightning's, before it asks the data module
)

TASK = """
prompts = [{"prompt": f"{i}+{i}="} for i in range(8)]
none_at_all = []
very_long = [{"prompt": "1" * 2000}]
chats = [{"prompt": [{"role": "user", "content": "1+1"}]}]
questions = [{"question": "1+1="}]

def reward(completion, row): return len(set(completion)) / 10
def not_a_number(completion, row): return float("nan")
def nothing(completion, row): return None
def words(completion, row): return "good"
def same(completion, row): return 1.0
def fails(completion, row): return row["gold"]

import lightning as L
import torch


class Refuses(L.Callback):
    def __init__(self):
        raise ValueError("no such mode")


class MissesItsFile(L.Callback):
    def __init__(self):
        {}["at first"]


class MissesAWeight(L.Callback):
    def on_train_start(self, trainer, pl_module):
        torch.nn.Linear(1, 1).no_such_weight  # torch raises on purpose
"""

Tree = dict[str, Any]
Change = Callable[[Tree], object]


def put(path: str, value: object) -> Change:
    """Set one value of a config, by its dotted place."""

    def change(config: Tree) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            config = config.setdefault(parent, {})
        config[last] = value

    return change


def rewarded(name: str) -> Change:
    return put("data.workflow.init_args.reward", f"task.py:{name}")


def of_lightning(name: str, **arguments: object) -> Tree:
    return {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}


def saver(**arguments: object) -> Tree:
    return of_lightning("ModelCheckpoint", **arguments)


def nothing(config: Tree) -> None:
    """Leave the config as it is."""


# What is wrong, flags, status, and what the line says.
TABLE: dict[str, tuple[Change, list[str], int, str]] = {
    "a config file that is not there": (
        nothing,
        ["--config=nope.yaml"],
        2,
        r"no config file nope\.yaml.*Did you mean config\.yaml\?",
    ),
    "a model folder that is not there": (
        put("model.model", "/no/such/model"),
        [],
        2,
        r"no model folder '/no/such/model'",
    ),
    "a file of prompts that is not there": (
        put("data.prompts", "tusk.py:prompts"),
        [],
        2,
        r"no file 'tusk\.py'.*Did you mean task\.py\?",
    ),
    "prompts of another name": (
        put("data.prompts", "task.py:promts"),
        [],
        2,
        r"no 'promts'\. Did you mean prompts\?",
    ),
    "a reward of another name": (
        rewarded("rewad"),
        [],
        2,
        r"no 'rewad'\. Did you mean reward\?",
    ),
    "no prompts at all": (
        put("data.prompts", "task.py:none_at_all"),
        [],
        2,
        r"prompts is empty: a run needs at least one row",
    ),
    "rows without a prompt": (
        put("data.prompts", "task.py:questions"),
        [],
        2,
        r"row 0: row has no 'prompt'; its keys are \['question'\]\. Set prompt_key",
    ),
    "a reward that is not a number": (
        rewarded("not_a_number"),
        [],
        1,
        r"reward 'not_a_number' returned nan; it must be finite",
    ),
    "a reward that returns nothing": (
        rewarded("nothing"),
        [],
        1,
        r"reward 'nothing' returned None; it must be a number",
    ),
    "a reward that returns words": (
        rewarded("words"),
        [],
        1,
        r"reward 'words' returned 'good'; it must be a number",
    ),
    "a reward that fails": (
        rewarded("fails"),
        [],
        1,
        r"row '\d'.* failed: KeyError: 'gold' It came from .*task\.py:13, in fails",
    ),
    "a prompt longer than the model": (
        put("data.prompts", "task.py:very_long"),
        [],
        2,
        r"its prompt has 2000 tokens, and 508 leave room for a completion, of the engine's 512",
    ),
    "a chat for a tokenizer without a template": (
        put("data.prompts", "task.py:chats"),
        [],
        2,
        r"cannot write a chat.*Use a model with a chat template",
    ),
    "a typo in a flag": (
        nothing,
        ["--data.rollout.batch_sise=4"],
        2,
        r"batch_sise.*Did you mean data\.rollout\.batch_size\?",
    ),
    "a typo in a file": (
        put("data.rollout.max_hed_lag", 1),
        [],
        2,
        r"max_hed_lag.*Did you mean data\.rollout\.max_head_lag\?",
    ),
    "an abbreviated flag": (nothing, ["--model.loss.clip_eps=0.1"], 2, r"clip_eps"),
    "a class of another name": (
        put("data.workflow.class_path", "sdp_lightning.RLVRWorkflw"),
        [],
        2,
        r"RLVRWorkflw",
    ),
    "text where a number belongs": (
        nothing,
        ["--data.rollout.batch_size=many"],
        2,
        r"data\.rollout\.batch_size.*many",
    ),
    "an engine that nobody knows": (
        put("data.engine", "vlm://127.0.0.1:9"),
        [],
        2,
        r"engine 'vlm://127\.0\.0\.1:9' is not known\. Known are",
    ),
    "a server that is not there": (
        put("data.engine", "vllm://127.0.0.1:9"),
        [],
        1,
        r"cannot use the vllm server at http://127\.0\.0\.1:9.*Is it running there\?",
    ),
    "rewards that are all equal for ever": (
        rewarded("same"),
        ["--model.update.max_uniform_in_a_row=2"],
        1,
        r"in 2 batches in a row all samples of every prompt had the same reward \(mean 1\)",
    ),
    "no end": (put("trainer.max_steps", -1), [], 2, r"nothing ends this run: set the Trainer's"),
    "a number of steps that does not divide": (
        put("model.update", {"num_minibatches": 2}),
        ["--trainer.max_steps=3"],
        2,
        r"max_steps=3 is no multiple of 2.*use 2 or 4",
    ),
    "a checkpoint that is not there": (
        nothing,
        ["--ckpt_path=nope.ckpt"],
        2,
        r"no checkpoint nope\.ckpt.*`--ckpt_path last` takes the newest",
    ),
    "a config that is no YAML": (
        nothing,
        ["--config=task.py"],
        2,
        r"the config task\.py is no YAML at line 4",
    ),
    "a config of another shape": (nothing, ["--config=list.yaml"], 2, r"list\.yaml holds a list"),
    "a config without text": (nothing, ["--config=binary.yaml"], 2, r"binary\.yaml is no YAML"),
    "an accelerator that is not here": (
        put("trainer.accelerator", "tpu"),
        [],
        2,
        r"Requirement 'torch_xla",
    ),
    "a strategy that nobody knows": (
        put("trainer.strategy", "dpp"),
        [],
        2,
        r"invalid strategy name.*Change trainer\.accelerator=cpu, trainer\.strategy=dpp: `auto`",
    ),
    "processes that take pickles": (
        put("trainer.strategy", "ddp_spawn"),
        ["--trainer.devices=2"],
        2,
        r"use trainer\.strategy=ddp",
    ),
    "no devices": (put("trainer.devices", 0), [], 2, r"Change .*trainer\.devices=0: `auto`"),
    "clipping that nobody knows": (
        put("trainer.gradient_clip_algorithm", "by_norm"),
        [],
        2,
        r"Allowed algorithms.*Change trainer\.gradient_clip_algorithm=by_norm",
    ),
    "accumulation": (put("trainer.accumulate_grad_batches", 4), [], 2, r"set batch_size=8"),
    "a logger whose package is not here": (
        put("trainer.logger", {"class_path": "lightning.pytorch.loggers.CometLogger"}),
        [],
        2,
        r"CometLogger': Requirement 'comet-ml.* Try running `pip install",
    ),
    "a callback that refuses its argument": (
        put("trainer.callbacks", [saver(save_top_k=-3)]),
        [],
        2,
        r"Invalid value for save_top_k=-3",
    ),
    "a callback that the trainer refuses": (
        put("trainer.callbacks", [saver()]),
        [],
        2,
        r"enable_checkpointing=False.*Change trainer\.enable_checkpointing=False",
    ),
    "a metric that is never logged": (
        put("trainer.callbacks", [of_lightning("EarlyStopping", monitor="nope")]),
        [],
        1,
        r"metric `nope` which is not available",
    ),
    "a callback of the user that refuses its argument": (
        put("trainer.callbacks", [{"class_path": "task.Refuses"}]),
        [],
        2,
        r": no such mode\.",
    ),
    "an argument that the model does not have": (
        put("model.model_kwargs", {"foo": 3}),
        [],
        2,
        r"model_kwargs=\{'foo': 3\} do not fit the model.*'foo'",
    ),
    "a best checkpoint of nothing": (nothing, ["--ckpt_path=best"], 1, r"is not configured"),
    "types of one of several": (
        put("trainer.benchmark", "abc"),
        [],
        2,
        r"trainer\.benchmark\": expected bool or None, got abc$",
    ),
    "a folder of runs that cannot be written": (
        put("trainer.default_root_dir", "/proc/nope"),
        ["--trainer.logger=true"],
        1,
        r"/proc/nope",
    ),
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: str) -> Tree:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "task", raising=False)
    Path("task.py").write_text(TASK)
    Path("list.yaml").write_text("- 1\n")
    Path("binary.yaml").write_bytes(bytes(range(256)))
    return small_config(model_folder)


def run(config: Tree, *flags: str) -> int:
    Path("config.yaml").write_text(yaml.safe_dump(config))
    try:
        return main(["fit", "--config", "config.yaml", *flags])
    except SystemExit as done:
        assert isinstance(done.code, int)
        return done.code


@pytest.mark.parametrize("wrong", TABLE)
def test_what_is_wrong_is_one_line_and_a_status(
    wrong: str, config: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    change, flags, status, says = TABLE[wrong]
    change(config)
    assert run(config, *flags) == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("sdp-lightning: ") and "\n" not in error, error
    assert re.search(says, error), error


@pytest.mark.parametrize(
    ("name", "error"), [("MissesItsFile", ValueError), ("MissesAWeight", AttributeError)]
)
def test_a_fault_keeps_its_traceback(name: str, error: type[Exception], config: Tree) -> None:
    config["trainer"]["callbacks"] = [{"class_path": f"task.{name}"}]
    with pytest.raises(error):
        run(config)


@pytest.mark.usefixtures("config")
def test_every_error_shows_its_traceback_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDP_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="no config file"):
        main(["fit", "--config=nope.yaml"])


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with no room for a checkpoint, and one of an earlier run on it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system, which root has")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk_is_named_and_what_was_saved_before_is_untouched(
    config: Tree, full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = full_disk / "last.ckpt"
    earlier.write_bytes(b"an earlier run")
    config["trainer"] |= {
        "logger": False,
        "enable_checkpointing": True,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": str(full_disk / "new"), "every_n_train_steps": 1},
            }
        ],
    }
    assert run(config) == 1
    error = capsys.readouterr().err.strip()
    assert "the disk is full" in error and "was not written" in error, error
    assert "Traceback" not in error
    assert earlier.read_bytes() == b"an earlier run"
    assert not list((full_disk / "new").iterdir()), "no part of one"
