"""The task of recipes/tiny_cpu, its warm model, and how well a policy does at it: exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdp_lightning.config.import_path import load_object

FOLDER = Path(__file__).parents[2] / "tiny_cpu"
Row = dict[str, str]
Judge = Callable[[str, Row], float]

judge: Judge
judge = load_object(f"{FOLDER}/task.py:reward")  # type: ignore[assignment]
_make_rows: Any = load_object(f"{FOLDER}/task.py:make_rows")
train_rows: list[Row] = _make_rows(4096, seed=1)
test_rows: list[Row] = _make_rows(128, seed=3)


def warm_model() -> Any:
    """A LlamaForCausalLM that knows how to sort and not when to stop."""
    from transformers import LlamaForCausalLM

    from sdp_lightning.config.model_source import quiet_transformers

    path: Any = load_object(f"{FOLDER}/model.py:model_path")
    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(path())
