"""Checkpoints, settings and folders that an export refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny

import sdp_lightning as sdp
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.cli.main import main
from sdp_lightning.testing import tiny_model
from support.exports import TIED, content, save_checkpoint


def without(name: str) -> dict[str, torch.Tensor]:
    weights = tiny_model().state_dict()
    del weights[name]
    return weights


def broken(make: Callable[[], Any]) -> Callable[[Path], Path]:
    """A file of ``torch.save``."""

    def write(place: Path) -> Path:
        torch.save(make(), place / "broken.ckpt")
        return place / "broken.ckpt"

    return write


def holding(weights: Callable[[], dict[str, Any]], **rest: Any) -> Callable[[Path], Path]:
    return lambda place: save_checkpoint(place / "broken.ckpt", weights(), **rest)


def cut_short(place: Path) -> Path:
    path = save_checkpoint(place / "broken.ckpt", tiny_model())
    path.write_bytes(path.read_bytes()[:-100])
    return path


def folder_of_files(place: Path) -> Path:
    (place / "broken.ckpt").mkdir()
    return place / "broken.ckpt"


CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "not there": (lambda place: place / "no.ckpt", r"no checkpoint '.*no.ckpt': it is not there"),
    "a folder": (folder_of_files, r"a folder without .metadata"),
    "cut short": (
        cut_short,
        r"torn or damaged: it is cut short.*: [\d,]+ bytes\. There is no whole",
    ),
    "an object": (broken(lambda: {"state_dict": {}, "x": Path()}), r"more than tensors and plain"),
    "a list": (broken(lambda: [1]), r"no Lightning checkpoint but list"),
    "plain weights": (broken(lambda: {"a.weight": 1}), r"no 'state_dict' among 'a.weight'"),
    "another module": (
        broken(lambda: {"state_dict": {"net.weight": torch.ones(1)}}),
        r"no policy.\* weights but net.weight",
    ),
    "adapters": (
        holding(lambda: {"model.layers.0.mlp.up_proj.lora_A.default.weight": torch.ones(1)}),
        r"1 LoRA weights of its policy, but not with which alpha",
    ),
    "a weight too few": (
        holding(lambda: without("model.norm.weight")),
        r"not those of .*: model.norm.weight is missing\. Pass",
    ),
    "a weight too many": (
        holding(lambda: tiny_model().state_dict() | {"model.extra": torch.ones(1)}),
        r"model.extra is not in the model",
    ),
    "another size": (
        holding(lambda: tiny_model(hidden_size=64).state_dict()),
        r"embed_tokens.weight has shape \(50, 64\), in the model \(50, 32\);.*; and 17 more",
    ),
    "another depth": (
        holding(lambda: tiny_model(num_layers=1).state_dict()),
        r"model.layers.1.self_attn.q_proj.weight is missing;.*; and 5 more",
    ),
    "neither of two tied weights": (
        holding(lambda: {"model.norm.weight": torch.ones(32)}),
        r"model.embed_tokens.weight is missing",
    ),
    "two tied weights that differ": (
        holding(lambda: tiny_model().state_dict() | {TIED: torch.ones(50, 32)}),
        r"lm_head.weight and model.embed_tokens.weight differ",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
@pytest.mark.fault("corrupted data", "checkpoint")
def test_a_checkpoint_that_is_not_of_this_model_is_refused(
    case: str, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make, message = CHECKPOINTS[case]
    checkpoint, out = make(tmp_path), tmp_path / "out"
    before = content(tmp_path)
    assert main(["export", str(checkpoint), str(out), "--model", model_folder]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sdp-lightning: ") and re.search(message, said), said
    assert len(said.splitlines()) == 1
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/no/model"}, r"there is no model folder '/no/model'"),
        ({"model": "{empty}"}, r"no causal LM's config in '.*empty'"),
        ({"model": "{wordless}"}, r"no tokenizer in '.*wordless'"),
        ({"model": "{good}", "dtype": "int8"}, r"dtype='int8' is none of float32, bfloat16"),
    ],
    ids=["no such model", "no config", "no tokenizer", "unknown dtype"],
)
def test_a_setting_that_cannot_be_is_refused_and_leaves_nothing(
    settings: dict[str, str], message: str, trained: Path, model_folder: str, tmp_path: Path
):
    (tmp_path / "empty").mkdir()
    tiny_model().save_pretrained(tmp_path / "wordless")
    places = {"empty": tmp_path / "empty", "wordless": tmp_path / "wordless", "good": model_folder}
    given = {name: value.format(**places) for name, value in settings.items()}
    before = content(tmp_path)
    with pytest.raises(sdp.ConfigError, match=message):
        export_checkpoint(trained, tmp_path / "out", **given)  # type: ignore[arg-type]
    assert content(tmp_path) == before


def test_a_checkpoint_says_itself_which_model_was_trained(
    trained: Path, model_folder: str, tmp_path: Path
):
    assert export_checkpoint(trained, tmp_path / "out").model_id == model_folder


def test_a_checkpoint_that_names_no_model_needs_to_be_told(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", tiny_model())
    message = r"does not say which model was trained\. Pass it as --model"
    with pytest.raises(sdp.ConfigError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_a_checkpoint_whose_model_is_gone_is_refused(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", tiny_model(), sdp_model_id="/gone/model")
    with pytest.raises(sdp.ConfigError, match=r"of '/gone/model', which is missing"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_a_folder_that_is_in_use_is_refused(trained: Path, model_folder: str, tmp_path: Path):
    def refused(out: Path, message: str, checkpoint: Path = trained, base: str = model_folder):
        with pytest.raises(sdp.ConfigError, match=message):
            export_checkpoint(checkpoint, out, model=base, overwrite=True)

    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "exists and is not a folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "exists and is not a folder")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    refused(tmp_path / "work", r"is not a model folder \(no config.json\)")
    base = save_tiny(tmp_path / "base", seed=0)
    refused(Path(base), "which is read", base=base)
    inside = save_checkpoint(Path(base) / "a.ckpt", tiny_model())
    refused(Path(base), "a.ckpt, which is read", checkpoint=inside)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "x" and inside.is_file()
