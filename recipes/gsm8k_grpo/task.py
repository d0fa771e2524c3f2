"""GSM8K: word problems whose answer is one number, and a reward of 1 for that number.

Rows come from the folder in the environment variable ``GSM8K_DATA``, or else from the Hugging Face
hub through the package ``datasets``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from sdp_lightning.errors import ConfigError
from sdp_lightning.rewards.text import find_numbers

FOLDER_VARIABLE = "GSM8K_DATA"
HUB_ID = "openai/gsm8k"
REMEDY = (
    f"Set {FOLDER_VARIABLE} to a folder with train.jsonl and test.jsonl (lines of "
    '{"question": ..., "answer": "... #### 72"}), or with the train and test parquet files of '
    f"{HUB_ID}."
)
INSTRUCTION = (
    "Reason step by step. Then write the final answer, a number without its unit, in \\boxed{}."
)
_MARK = re.compile(r"####|\\boxed\{")


def train_rows() -> list[dict[str, Any]]:
    """The 7,473 problems to train on."""
    return load_split("train")


def test_rows() -> list[dict[str, Any]]:
    """The 1,319 problems to be judged by."""
    return load_split("test")


def load_split(split: str) -> list[dict[str, Any]]:
    """Rows ``{"id", "prompt", "answer"}``; the prompt is a chat, the answer a number as text.

    Raises:
        ConfigError: if the data is not there or not of GSM8K's form, with what to do.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        place, records = _read_folder(Path(folder).expanduser(), split)
    else:
        place, records = HUB_ID, _read_hub(split)
    return [_make_row(record, f"{split}-{i}", place) for i, record in enumerate(records)]


def reward(completion: str, row: Mapping[str, Any]) -> float:
    r"""1.0 if the final number of the completion is the row's answer.

    >>> reward(r"6 * 12 = 72, so \boxed{72}.", {"answer": "72"})
    1.0
    """
    return float(final_number(completion) == Decimal(row["answer"]))


def final_number(text: str) -> Decimal | None:
    r"""The number that a solution ends with, or None.

    It stands after the last ``####`` (to the end of the line) or in the last ``\boxed{}``, the
    later of the two, and must be the only number there, or the only one behind the last ``=``. A
    text with neither ends with its last number.

    >>> [str(final_number(text)) for text in ("#### 1,200.", r"\boxed{\$18.00}", "It is $5.")]
    ['1200', '18.00', '5']
    >>> final_number(r"2 or 3: \boxed{2 or 3}") is None
    True
    """
    marks = list(_MARK.finditer(text))
    if not marks:
        numbers = _numbers(text)
        return numbers[-1] if numbers else None
    behind = text[marks[-1].end() :]
    in_box = marks[-1].group() != "####"
    marked = _up_to_closing_brace(behind) if in_box else behind.partition("\n")[0]
    numbers = _numbers(marked.rpartition("=")[2])
    return numbers[0] if len(numbers) == 1 else None


def _numbers(text: str) -> list[Decimal]:
    for space in ("{,}", "\\,", "\\!"):  # thousands separators of LaTeX
        text = text.replace(space, "," if space == "{,}" else "")
    try:
        return find_numbers(text)
    except InvalidOperation:  # an exponent beyond all bounds: the policy may write anything
        return []


def _up_to_closing_brace(text: str) -> str:
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return ""  # never closed: the completion was cut off


def _make_row(record: Mapping[str, Any], name: str, place: str | Path) -> dict[str, Any]:
    try:
        question, solution = str(record["question"]), str(record["answer"])
    except KeyError as error:
        raise ConfigError(f"{name} in {place} has no {error}. {REMEDY}") from error
    answer = final_number(solution) if "####" in solution else None
    if answer is None:
        raise ConfigError(f"{name} in {place} has no '#### number' in its answer. {REMEDY}")
    prompt = [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]
    return {"id": name, "prompt": prompt, "answer": str(answer)}


def _read_folder(folder: Path, split: str) -> tuple[Path, Iterable[Mapping[str, Any]]]:
    """The files of the first kind that exists: JSON lines, then parquet; also in ``main``."""
    if not folder.is_dir():
        raise ConfigError(f"{FOLDER_VARIABLE}={folder} is no folder. {REMEDY}")
    for place in (folder, folder / "main"):
        for pattern in (f"{split}.jsonl", f"{split}.parquet", f"{split}-*.parquet"):
            if files := sorted(place.glob(pattern)):
                read = _read_jsonl if pattern.endswith(".jsonl") else _read_parquet
                return files[0], [record for file in files for record in read(file)]
    raise ConfigError(f"there is no {split}.jsonl and no {split} parquet in {folder}. {REMEDY}")


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").split("\n")  # the texts have other line ends in them
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON, one object a line: {error}. {REMEDY}") from error


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"reading {file} needs pyarrow: pip install pyarrow.") from error
    return parquet.read_table(file).to_pylist()


def _read_hub(split: str) -> Iterable[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"GSM8K is not here, and without the package datasets it cannot be had from the hub: "
            f"pip install datasets. Or bring it yourself. {REMEDY}"
        ) from error
    try:
        return load_dataset(HUB_ID, "main", split=split)
    except OSError as error:
        raise ConfigError(f"the hub did not give {HUB_ID}: {error}. {REMEDY}") from error
