"""Names of rows: files, datasets of Hugging Face, tasks of reasoning-gym."""

from __future__ import annotations

import json
import pickle
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.prompts.reasoning_gym import ASK, ReasoningGymRows
from sdp_lightning.prompts.sources import load_rows, split_settings
from sdp_lightning.testing import FakeEngine
from support.rollouts import rolling

# Files --------------------------------------------------------------------------------------------


def write(file: Path, *lines: str | bytes) -> str:
    data = [line.encode() if isinstance(line, str) else line for line in lines]
    file.write_bytes(b"\n".join(data))
    return str(file)


def test_a_jsonl_file_is_rows_that_know_their_lines(tmp_path: Path) -> None:
    lines = ('{"prompt": "1+1=", "answer": 2}', "", '{"id": "mine", "prompt": "\u2028"}', "  ")
    name = write(tmp_path / "train.jsonl", *lines)
    assert load_rows(name) == [
        {"id": "train.jsonl:1", "prompt": "1+1=", "answer": 2},
        {"id": "mine", "prompt": "\u2028"},
    ]


def test_a_file_of_another_system_is_read(tmp_path: Path) -> None:
    name = write(tmp_path / "windows.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r', b'{"prompt": "b"}\r')
    assert [row["prompt"] for row in load_rows(name)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+1="', r"line 2, is not JSON: Expecting ',' delimiter"),
        ("prompt", r"line 2, is not JSON"),
        (b'{"prompt": "\xff"}', r"line 2, is not JSON: 'utf-8' codec"),
        ("[1, 2]", r'line 2, is list; each line must be an object such as \{"prompt"'),
        ("null", r"line 2, is NoneType"),
    ],
    ids=["cut off", "text", "no UTF-8", "a list", "null"],
)
def test_a_bad_line_is_named_with_its_file(line: str | bytes, message: str, tmp_path: Path) -> None:
    name = write(tmp_path / "bad.jsonl", '{"prompt": "1+1="}', line)
    with pytest.raises(ConfigError, match=rf"bad\.jsonl, {message}"):
        load_rows(name)


def test_a_row_that_lacks_its_prompt_is_named_with_file_and_line(tmp_path: Path) -> None:
    name = write(tmp_path / "train.jsonl", '{"prompt": "1+1="}', '{"promt": "1+2="}')
    workflow = sdp.RLVRWorkflow(lambda completion, row: 0.0)
    with (
        rolling(FakeEngine(), workflow, rows=load_rows(name), num_epochs=1) as executor,
        pytest.raises(RolloutError, match=r"row 'train\.jsonl:2'.*no 'prompt'.*'promt'"),
    ):
        executor.take()


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"empty\.jsonl is empty"):
        load_rows(write(tmp_path / "empty.jsonl", content))


@pytest.mark.parametrize("name", ["none.jsonl", "no*.jsonl", "none.parquet"])
def test_a_missing_file_is_named_with_where_it_was_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nodes.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"there is no file '.*looked for /.*no"):
        load_rows(name)


def test_parquet_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part in (1, 0):
        prompt = [{"role": "user", "content": f"part {part}"}]
        table = pyarrow.Table.from_pylist([{"prompt": prompt, "answer": part}])
        parquet.write_table(table, tmp_path / f"train-{part}.parquet")
    first, second = load_rows(f"{tmp_path}/train-*.parquet")
    assert (first["id"], first["answer"]) == ("train-0.parquet[0]", 0)
    assert second["prompt"] == [{"role": "user", "content": "part 1"}]


def test_what_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(ConfigError, match=r"x\.parquet cannot be read as Parquet"):
        load_rows(write(tmp_path / "x.parquet", "rows"))


@pytest.mark.parametrize(
    ("module", "source", "command"),
    [
        ("pyarrow", "x.parquet", "pip install pyarrow"),
        ("datasets", "datasets:openai/gsm8k", "pip install datasets"),
        ("reasoning_gym", "reasoning_gym:chain_sum", "pip install reasoning-gym"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_the_command(
    module: str, source: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.parquet", "rows")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"not installed: {command}$"):
        load_rows(source)


# Hugging Face -------------------------------------------------------------------------------------


class FakeDatasets(types.ModuleType):
    """``datasets`` as far as it is used."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.__spec__ = ModuleSpec("datasets", None)

    def load_dataset(self, path: str, **settings: Any) -> Any:
        self.asked = path, settings
        return [{"prompt": "?"}] if "split" in settings else {"train": [], "test": []}


def test_a_dataset_of_hugging_face_is_loaded_as_its_name_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert load_rows("datasets:openai/gsm8k?name=main&split=train") == [{"prompt": "?"}]
    assert library.asked == ("openai/gsm8k", {"name": "main", "split": "train"})
    with pytest.raises(ConfigError, match=r"has the splits train, test: add \?split="):
        load_rows("datasets:openai/gsm8k?name=main")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task?size", r"cannot read 'size' in 'task\?size': write name\?a=1"),
        ("task?size=1&size=2", "a setting comes twice"),
    ],
)
def test_settings_that_cannot_be_read_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_settings(text)


def test_settings_are_json_or_text() -> None:
    text = "t?a=1&b=0.5&c=true&d=True&e=None&f=[1, 2]&g=x y&h="
    found = dict(zip("abcdefgh", [1, 0.5, True, True, None, [1, 2], "x y", ""], strict=True))
    assert split_settings(text) == ("t", found)


# reasoning-gym ------------------------------------------------------------------------------------

pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("name", ["chain_sum", "letter_counting", "simple_equations", "maze"])
def test_a_row_is_the_same_whenever_and_in_whatever_order_it_is_made(name: str) -> None:
    rows, others = (load_rows(f"reasoning_gym:{name}?size=9&seed=3") for _ in "12")
    assert len(rows) == 9
    backwards = [others[i] for i in reversed(range(9))]
    assert list(rows) == backwards[::-1]
    again = load_rows(f"reasoning_gym:{name}?size=9&seed=4")
    assert [r["prompt"] for r in again] != [r["prompt"] for r in rows]
    assert pickle.loads(pickle.dumps(rows[0])) == rows[0], "it goes to worker processes"


def test_rows_have_what_workflows_and_rewards_need() -> None:
    row = load_rows("reasoning_gym:chain_sum?size=9&seed=1&max_terms=2&max_digits=1")[3]
    assert row["id"] == "chain_sum-3" and row["prompt"] == row["question"] + ASK
    assert row["metadata"]["source_dataset"] == "chain_sum"
    assert int(row["answer"]) == eval(row["metadata"]["expression"])


def test_shots_are_solved_tasks_before_every_question_and_none_of_the_rows() -> None:
    rows = ReasoningGymRows("chain_sum", size=50, seed=1, shots=2)
    head = rows[0]["prompt"].removesuffix(f"Question: {rows[0]['question']}\nAnswer:")
    assert head.count("Question: ") == head.count("\nAnswer: ") == 2
    assert all(row["prompt"].startswith(head) for row in rows)
    assert [row["question"] for row in rows if row["question"] in head] == []


def test_rows_are_a_sequence() -> None:
    rows = ReasoningGymRows("chain_sum", size=5)
    assert rows[-1] == rows[4] and rows[1:3] == [rows[1], rows[2]]
    assert len(list(rows)) == 5
    with pytest.raises(IndexError):
        rows[5]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("chain_sun", r"has no task 'chain_sun'. Did you mean chain_sum"),
        ("", r"has no task ''.$"),
        ("chain_sum?max_digit=2", r"refuses chain_sum with .*max_digit"),
        ("chain_sum?max_digits=0", r"refuses chain_sum with \{'max_digits': 0\}"),
        ("chain_sum?size=0", r"size must be at least 1 and shots 0, got 0 and 0"),
        ("chain_sum?shots=-1", r"got 500 and -1"),
    ],
)
def test_a_task_that_is_not_there_is_named(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_rows(f"reasoning_gym:{source}")


def test_naming_rows_imports_no_library_before(tmp_path: Path) -> None:
    import subprocess

    name = write(tmp_path / "a.jsonl", '{"prompt": "?"}')
    code = (
        "import sys\nfrom sdp_lightning.prompts.sources import load_rows\n"
        f"load_rows({name!r})\n"
        "print([m for m in ('reasoning_gym', 'pyarrow', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
