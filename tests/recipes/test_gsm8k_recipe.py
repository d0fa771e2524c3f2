"""The GSM8K recipe: its reward, its rows, its configs, and two steps of it without GPU or hub."""

from __future__ import annotations

import csv
import doctest
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdp_lightning.cli.main import main
from sdp_lightning.config.import_path import load_object
from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from support.paths import ROOT

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

RECIPE = "recipes/gsm8k_grpo"
TASK: Any = load_object(f"{ROOT / RECIPE}/task.py:__dict__")
RECORD = {"question": "How many eggs?", "answer": "6 * 12 = <<6*12=72>>72 eggs\n#### 72"}


# Reward ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        pytest.param("#### 72", "72", id="GSM8K's own mark"),
        pytest.param("#### 1,234,567.", "1234567", id="commas and a trailing dot"),
        pytest.param("#### $18.00\nThat is 5 more.", "18", id="the mark's line ends it"),
        pytest.param(r"2+2=4, so \boxed{4}", "4", id="boxed"),
        pytest.param(r"\boxed{\$1,200.00}", "1200", id="dollars in a box"),
        pytest.param(r"\boxed{1{,}200}", "1200", id="a LaTeX comma"),
        pytest.param(r"\boxed{1\,200}", "1200", id="a LaTeX space"),
        pytest.param(r"\boxed{72 \text{ eggs}}", "72", id="a unit in braces"),
        pytest.param(r"\boxed{x = 72}", "72", id="a name before the number"),
        pytest.param(r"\boxed{6 \times 12 = 72}", "72", id="a sum before its result"),
        pytest.param(r"\boxed{-3}", "-3", id="a sign"),
        pytest.param(r"\boxed{1} no, \boxed{2}", "2", id="the last box counts"),
        pytest.param("\\boxed{1}\n#### 2", "2", id="the later mark counts"),
        pytest.param("#### 1 \\boxed{2}", "2", id="a box behind a mark"),
        pytest.param("The answer is $1,200.", "1200", id="no mark: the last number"),
        pytest.param("**5%**", "5", id="percent and stars"),
        pytest.param(r"\boxed{2 or 3}", None, id="two numbers are no answer"),
        pytest.param(r"\boxed{\frac{3}{4}}", None, id="a fraction is no number"),
        pytest.param(r"It is 7. \boxed{}", None, id="an empty box hides what came before"),
        pytest.param(r"It is 7. \boxed{7", None, id="a box that was cut off"),
        pytest.param("#### ", None, id="an empty mark"),
        pytest.param("no idea", None, id="no number"),
        pytest.param("", None, id="nothing"),
        pytest.param("#### 1e99999999999999999999", None, id="an exponent beyond bounds"),
    ],
)
def test_the_final_number_is_found(text: str, number: str | None) -> None:
    found = TASK["final_number"](text)
    assert (found is None) if number is None else found == float(number)


def test_the_reward_is_1_for_the_row_s_number_and_0_for_any_other_or_none() -> None:
    row = {"answer": "18.5"}
    completions = [r"\boxed{18.50}", r"\boxed{18}", "none"]
    assert [TASK["reward"](text, row) for text in completions] == [1.0, 0.0, 0.0]


def test_the_examples_in_the_recipe_are_right() -> None:
    results = [
        doctest.DocTestRunner().run(test)
        for name in ("reward", "final_number")
        for test in doctest.DocTestFinder().find(TASK[name], name, globs=dict(TASK))
    ]
    assert sum(result.attempted for result in results) == 3
    assert not any(result.failed for result in results)


# Rows ------------------------------------------------------------


def write_jsonl(file: Path, records: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def test_jsonl_becomes_chats_with_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"question": "Line\u2028feed?", "answer": "#### 1,000"}
    write_jsonl(tmp_path / "train.jsonl", [RECORD, other])
    write_jsonl(tmp_path / "train_socratic.jsonl", [RECORD])
    monkeypatch.setenv("GSM8K_DATA", str(tmp_path))
    first, second = TASK["train_rows"]()
    assert (first["id"], first["answer"]) == ("train-0", "72")
    assert (second["id"], second["answer"]) == ("train-1", "1000")
    [message] = first["prompt"]
    assert message["role"] == "user"
    assert message["content"].startswith("How many eggs?\n\n")
    assert "\\boxed{}" in message["content"]


def test_the_hub_s_parquet_files_are_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "main").mkdir()
    for part in (1, 0):
        table = pyarrow.Table.from_pylist([{"question": "?", "answer": f"#### {part}"}])
        parquet.write_table(table, tmp_path / "main" / f"test-0000{part}-of-00002.parquet")
    monkeypatch.setenv("GSM8K_DATA", str(tmp_path))
    assert [row["answer"] for row in TASK["test_rows"]()] == ["0", "1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no train.jsonl"),
        ("question\n", "is not JSON"),
        ('{"question": "?"}\n', "train-0 in .*train.jsonl has no 'answer'"),
        ('{"question": "?", "answer": "72"}\n', "has no '#### number'"),
        ('{"question": "?", "answer": "#### many"}\n', "has no '#### number'"),
    ],
)
def test_data_of_another_form_names_the_one_that_is_wanted(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)
    monkeypatch.setenv("GSM8K_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=f"(?s){message}.*Set GSM8K_DATA"):
        TASK["train_rows"]()


def test_a_folder_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSM8K_DATA", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="gone is no folder"):
        TASK["train_rows"]()


def test_without_folder_and_datasets_both_remedies_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GSM8K_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install datasets.*Set GSM8K_DATA"):
        TASK["train_rows"]()


# Configs ------------------------------------------------------------


def configs(gpus: int) -> list[str]:
    return [f"--config={RECIPE}/base.yaml", f"--config={RECIPE}/gpus_{gpus}.yaml"]


@pytest.mark.parametrize(
    ("gpus", "trained_on", "served_on"),
    [(1, 1, ("0",)), (2, [0], ("1",)), (8, [0, 1, 2, 3], ("4", "5", "6", "7"))],
)
def test_every_config_parses_and_gives_each_gpu_its_work(
    gpus: int,
    trained_on: Any,
    served_on: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as done:
        main(["fit", *configs(gpus), "--print_config"])
    assert done.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["devices"] == trained_on
    assert shown["model"]["model"] == "Qwen/Qwen2.5-1.5B-Instruct"  # of base.yaml
    engine = connect_engine(shown["data"]["engine"], model="m")
    assert isinstance(engine, RemoteInfEngine) and engine._managed is not None
    servers = engine._managed.config
    assert servers.devices == served_on and not servers.on_cpu
    alone = [servers.environment(i, ROOT)["CUDA_VISIBLE_DEVICES"] for i in range(servers.replicas)]
    assert alone == list(served_on)
    assert (servers.gpu_memory_utilization is not None) == (gpus == 1)
    workflows = [shown["data"][name]["init_args"] for name in ("workflow", "val_workflow")]
    assert [workflow["reward"] for workflow in workflows] == [f"{RECIPE}/task.py:reward"] * 2
    longest = shown["data"]["workflow"]["init_args"]["sampling"]["max_new_tokens"]
    assert servers.max_model_len is not None and servers.max_model_len > longest


def test_eight_gpus_train_in_one_fsdp2_group_of_as_many_as_the_trainer_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(["fit", *configs(8), "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["strategy"]["class_path"].endswith(".ModelParallelStrategy")
    sizes = trainer["strategy"]["init_args"]
    assert sizes["data_parallel_size"] * sizes["tensor_parallel_size"] == len(trainer["devices"])


# Two steps ------------------------------------------------------------


def save_chatting_model(folder: Path) -> str:
    """The tiny model, and its tokenizer with a chat template, which chats need."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_two_steps_of_each_config_with_a_tiny_model_on_the_cpu(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # a config names files from the root
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        records = [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(4)]
        write_jsonl(tmp_path / f"{split}.jsonl", records)
    monkeypatch.setenv("GSM8K_DATA", str(tmp_path))
    overrides = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.precision": "32-true",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "model.model": save_chatting_model(tmp_path / "tiny"),
        "model.optimizer.warmup_steps": 1,
        "data.engine": "embedded",
        "data.rollout.batch_size": 2,
        "data.rollout.timeout_s": 60,
        "data.workflow.init_args.sampling.max_new_tokens": 8,
        "data.val_workflow.init_args.sampling.max_new_tokens": 8,
    }
    flags = [f"--{name}={value}" for name, value in overrides.items()]
    assert main(["fit", *configs(gpus), *flags]) == 0
    with (tmp_path / "runs/gsm8k_grpo/version_0/metrics.csv").open() as file:
        metrics = list(csv.DictReader(file))
    steps = [row for row in metrics if row["train/reward"]]
    assert len(steps) == 2
    for row in steps:
        assert 0 <= float(row["train/reward"]) <= 1
        assert math.isfinite(float(row["train/loss"])) and float(row["train/skipped"]) == 0
        assert 2 * 8 <= float(row["train/tokens"]) <= 2 * 8 * 8  # 2 groups of 8, to 8 tokens each
    [evaluated] = [row for row in metrics if row["val/reward"]]
    assert float(evaluated["val/version"]) == 2
