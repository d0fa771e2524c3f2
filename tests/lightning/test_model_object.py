"""A model object in place of a path: it is copied, and a checkpoint says what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdp_lightning as sdp
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.testing import FakeEngine, tiny_model, tiny_tokenizer
from support.plain_forwards import logits
from support.trainers import Recorder, make_data, make_module, make_trainer, weights_of

AGAIN = r"give it, load_from_checkpoint\(path, model=ModelSource\(model, tokenizer=tokenizer\)\)"


def read(folder: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def fit(
    model: Any, steps: int, path: Path | None = None, *, engine: Any = "embedded", **settings: Any
) -> tuple[sdp.SegmentWisePPOModule, Recorder, Any]:
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder := Recorder(), max_steps=steps)
    module = make_module(model, lr=1e-2, **settings)
    trainer.fit(module, datamodule=make_data(engine=engine), ckpt_path=path)
    return module, recorder, trainer


def test_an_object_is_copied_trained_resumed_and_exported(
    model_folder: str, tmp_path: Path
) -> None:
    """The reference policy is the object as it was given, also on resume."""
    model, path = read(model_folder), tmp_path / "a.ckpt"
    loss = sdp.LossConfig(kl_coefficient=0.1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    _, first, trainer = fit(model, 1, loss=loss)
    trainer.save_checkpoint(path)
    assert first.metrics[0]["train/kl"] == pytest.approx(0, abs=1e-6)
    module, resumed, _ = fit(model, 2, path, loss=loss)
    assert resumed.engine_versions == [1, 2]
    assert resumed.metrics[0]["train/kl"] > 1e-5
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    trained = first.weights[1]
    assert any(not trained[name].equal(before[name]) for name in trained)
    assert module.tokenizer.encode("1+2") == AutoTokenizer.from_pretrained(model_folder).encode(
        "1+2"
    )

    again = sdp.SegmentWisePPOModule.load_from_checkpoint(path)
    assert all(weight.equal(trained[name]) for name, weight in weights_of(again).items())
    export_checkpoint(path, tmp_path / "out")
    assert torch.equal(logits(again.require_policy()), logits(read(str(tmp_path / "out"))))
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_an_object_that_was_read_from_nowhere_is_given_again(tmp_path: Path) -> None:
    tokenizer, path = tiny_tokenizer(), tmp_path / "a.ckpt"
    tokenizer.chat_template = "{{ messages[0].content }}"
    source = sdp.ModelSource(tiny_model(seed=5), tokenizer=tokenizer)
    lora = sdp.LoRAConfig(rank=2, target_modules=("q_proj",))
    module, _, trainer = fit(source, 1, engine=FakeEngine(), lora=lora)
    trainer.save_checkpoint(path)
    assert module.tokenizer is tokenizer
    with pytest.raises(sdp.ConfigError, match=AGAIN):
        sdp.SegmentWisePPOModule.load_from_checkpoint(path)
    again = sdp.SegmentWisePPOModule.load_from_checkpoint(path, model=source)
    trained = weights_of(module)
    assert all(weight.equal(trained[name]) for name, weight in weights_of(again).items())
    with pytest.raises(sdp.ConfigError, match=r"does not say which model was trained.*--model"):
        export_checkpoint(path, tmp_path / "out")
    tiny_model(seed=5).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    export_checkpoint(path, tmp_path / "out", model=str(tmp_path / "base"))
    exported = read(str(tmp_path / "out")).state_dict()
    assert all(exported[name].equal(trained[name]) for name in trained)


@pytest.mark.parametrize("part", ["config", "tokens", "weights"])
def test_what_was_changed_after_it_was_read_is_not_made_again(
    model_folder: str, tmp_path: Path, part: str
) -> None:
    model, tokenizer = read(model_folder), AutoTokenizer.from_pretrained(model_folder)
    if part == "config":
        model.config.rope_parameters["rope_theta"] = 5000.0
    elif part == "tokens":
        tokenizer.add_tokens(["<new>"])
    else:
        torch.nn.init.zeros_(model.get_output_embeddings().weight)
    module = make_module(sdp.ModelSource(model, tokenizer=tokenizer))
    made = sdp.SegmentWisePPOModule(**module.hparams)
    with pytest.raises(sdp.ConfigError, match=f"the {part} of {model_folder!r} are not.*{AGAIN}"):
        made.configure_model()
        made.tokenizer  # noqa: B018


def test_a_model_of_a_base_in_bfloat16_is_made_again_in_it(model_folder: str) -> None:
    model = read(model_folder, dtype=torch.bfloat16)
    lora = sdp.LoRAConfig(rank=2, target_modules=("q_proj",))
    made = sdp.SegmentWisePPOModule(**make_module(model, lora=lora).hparams)
    made.configure_model()
    assert made.require_policy().get_input_embeddings().weight.dtype == torch.bfloat16


def test_what_cannot_be_had_of_an_object_is_refused(model_folder: str) -> None:
    model: Any = read(model_folder)
    with pytest.raises(sdp.ConfigError, match=r"read from nowhere.*ModelSource\(model, tokenizer="):
        make_module(tiny_model())
    with pytest.raises(sdp.ConfigError, match="revision has no effect on a model object"):
        make_module(sdp.ModelSource(model, revision="main"))
    with pytest.raises(sdp.ConfigError, match="made already: leave out dtype"):
        make_module(model, model_kwargs={"dtype": "bfloat16"})
    with pytest.raises(sdp.ConfigError, match="got Linear"):
        make_module(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(sdp.ConfigError, match=r"save model and tokenizer with save_pretrained"):
        sdp.connect_engine("vllm://launch", model=make_module(model).source)
    model.model.layers[0].base_layer = torch.nn.Linear(1, 1)
    with pytest.raises(sdp.ConfigError, match="holds an adapter already: merge it"):
        make_module(model)
