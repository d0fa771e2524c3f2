"""The fingerprint of rows: of their content alone, the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from sdp_lightning.errors import RolloutError
from sdp_lightning.prompts.checks import KeptRows
from sdp_lightning.prompts.fingerprint import SAMPLED, digest, fingerprint

ROW: dict[str, Any] = {"prompt": "1+1=", "answer": 2, "deep": {"tests": ["a", {"b": 0.5}]}}


def test_equal_rows_have_equal_fingerprints_in_every_process() -> None:
    rows = [ROW, {"tags": {"a", "b", "c"}, "day": date(2026, 1, 2), 3: None}]
    code = (
        "from datetime import date\nfrom sdp_lightning.prompts.fingerprint import fingerprint\n"
        f"row = {json.dumps(ROW)}\nother = {{3: None, 'day': date(2026, 1, 2), "
        "'tags': {'c', 'b', 'a'}}\nprint(fingerprint((dict(reversed(row.items())), other)))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {fingerprint(rows)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": [1, 2]}, {"a": (1, 2)}),
        ({"a": [1]}, MappingProxyType({"a": [1]})),
        ({"a": 3}, {"a": np.int64(3)}),
        ({"a": np.arange(3000)}, {"a": torch.arange(3000)}),
        ({"a": object()}, {"a": object()}),
    ],
    ids=["order", "tuple", "mapping", "numpy scalar", "arrays", "no content"],
)
def test_what_has_the_same_content_is_the_same(one: Any, other: Any) -> None:
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": "1"}, {"a": 1}),
        ({"a": {"b": [{"c": 1}]}}, {"a": {"b": [{"c": 2}]}}),
        ({"a": np.arange(3000)}, {"a": np.append(np.arange(2999), 7)}),
        ({"a": np.zeros((2, 3))}, {"a": np.zeros((3, 2))}),
        ({"a": b"x"}, {"a": b"y"}),
        ({1: "x", "2": "y"}, {1: "y", "2": "x"}),
        ({"a": date(2026, 1, 2)}, {"a": date(2026, 1, 3)}),
    ],
    ids=["type", "depth", "middle of an array", "shape", "bytes", "keys", "date"],
)
def test_what_has_another_content_is_another(one: Any, other: Any) -> None:
    assert digest(one) != digest(other)
    rows = [{"n": i} for i in range(2000)]
    assert fingerprint([*rows, one]) != fingerprint([*rows, other])
    assert fingerprint([one, *rows]) != fingerprint([*rows, one])


class Lazy(Sequence[Any]):
    """Rows that are made when they are read."""

    def __init__(self, size: int, worth: int = 0) -> None:
        self.size, self.worth, self.read = size, worth, list[int]()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        if self.worth < 0:
            raise OSError("disk")
        return {"n": index, "worth": self.worth}


def test_of_rows_that_are_made_some_are_read_the_first_and_the_last_among_them() -> None:
    rows = Lazy(100_000)
    whole = fingerprint(rows)
    assert (len(rows.read), rows.read[0], rows.read[-1]) == (SAMPLED, 0, 99_999)
    assert whole == fingerprint(Lazy(100_000))
    assert whole not in (fingerprint(Lazy(100_001)), fingerprint(Lazy(100_000, worth=1)))
    small = Lazy(3)
    assert fingerprint(small) == fingerprint([{"n": i, "worth": 0} for i in range(3)])
    assert small.read == [0, 1, 2] and fingerprint(Lazy(1)) == fingerprint([{"n": 0, "worth": 0}])
    with pytest.raises(RolloutError, match="reading the prompts failed: OSError"):
        fingerprint(Lazy(3, worth=-1))


def test_a_dataset_of_columns_is_read_whole_and_is_as_its_rows() -> None:
    """``datasets.Dataset``: its own ``_fingerprint`` is that of how it was made."""
    rows = [{"prompt": f"{i}", "tests": [i]} for i in range(2500)]

    class Dataset(Lazy):
        _fingerprint = "of the steps that made it"

        def __getitem__(self, index: Any) -> Any:
            assert isinstance(index, slice), "one by one it would take seconds"
            part = rows[index]
            return {name: [row[name] for row in part] for name in ("tests", "prompt")}

    Dataset.__module__ = "datasets.arrow_dataset"
    assert fingerprint(Dataset(len(rows))) == fingerprint(rows)


def test_of_kept_rows_all_count_and_so_does_what_is_left_out() -> None:
    rows = [{"prompt": f"{n}+1="} for n in range(500)]
    other = [*rows[:77], {"prompt": "another"}, *rows[78:]]
    kept = list(range(1, 500))
    first = fingerprint(KeptRows(rows, kept))
    assert fingerprint(KeptRows(rows, list(kept))) == first
    others = KeptRows(other, kept), KeptRows(rows, [0, *kept[1:]]), rows[1:]
    assert first not in map(fingerprint, others)
