"""Which tokens a model's folder says that its turns end at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.source_checks import check_source
from sdp_lightning.config.eos_tokens import EosTokens, load_eos_tokens, read_eos_tokens
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.errors import ConfigError

GENERATION, CONFIG = "generation_config.json", "config.json"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes files of a model's folder, each from its settings."""

    def write(**files: Any) -> Path:
        for name, settings in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("files", "found"),
    [
        pytest.param(
            {"generation_config": {"eos_token_id": [1, 107, 1]}, "config": {"eos_token_id": 5}},
            EosTokens((1, 107), GENERATION),
            id="all of generation_config.json (Gemma)",
        ),
        pytest.param(
            {"generation_config": {"max_length": 9}, "config": {"eos_token_id": 5}},
            EosTokens((5,), CONFIG),
            id="of config.json where generation_config.json names none",
        ),
        pytest.param(
            {"config": {"eos_token_id": [7, 8]}}, EosTokens((7, 8), CONFIG), id="config.json alone"
        ),
        pytest.param(
            {"config": {"text_config": {"eos_token_id": 3, "vocab_size": 9}}},
            EosTokens((3,), CONFIG),
            id="of the text part of a vision-language model",
        ),
        pytest.param(
            {"generation_config": {"eos_token_id": [2, 90]}, "config": {"vocab_size": 90}},
            EosTokens((2,), GENERATION),
            id="not one that the model cannot write",
        ),
        pytest.param({"config": {"eos_token_id": None}}, EosTokens(), id="none"),
    ],
)
def test_they_are_read_from_the_files_that_have_them(
    write: Callable[..., Path], files: dict[str, Any], found: EosTokens
) -> None:
    folder = write(**files)
    assert read_eos_tokens(folder) == found
    assert load_eos_tokens(ModelSource(str(folder))) == found


@pytest.mark.parametrize("named", ["</s>", [1, -1], [True]], ids=["text", "negative", "bool"])
def test_what_is_no_token_id_is_named(write: Callable[..., Path], named: Any) -> None:
    folder = write(generation_config={"eos_token_id": named})
    with pytest.raises(ConfigError, match=r"generation_config\.json .* as eos_token_id: no token"):
        load_eos_tokens(ModelSource(str(folder)))


def ends(folder: Path) -> Finding:
    (found,) = [f for f in check_source(ModelSource(str(folder))) if f.subject == "ends of turns"]
    return found


def test_the_doctor_prints_them_with_their_texts(write: Callable[..., Path]) -> None:
    added = [{"id": 1, "content": "<eos>"}, {"id": 107, "content": "<end_of_turn>"}]
    write(config={}, generation_config={"eos_token_id": [1, 107, 9]})
    folder = write(tokenizer={"added_tokens": added})
    assert ends(folder).text == "1 <eos>, 107 <end_of_turn>, 9 (generation_config.json)"
    write(generation_config={})
    assert (ends(folder).state, ends(folder).text) == (
        "note",
        "the model's folder names no eos_token_id.",
    )
    write(generation_config={"eos_token_id": "</s>"})
    assert ends(folder).state == "problem"
