"""What the doctor says of a config before GPUs are paid for, held to what models really take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sdp_lightning.cli.doctor.absent_models import _known, known_size, size_of_config
from sdp_lightning.cli.doctor.config_checks import Machine, examine_configs
from sdp_lightning.cli.doctor.estimate import (
    check_division,
    check_engine_memory,
    check_trainer_memory,
    num_shards,
    size_of_model,
)
from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.machine import check_together
from sdp_lightning.cli.doctor.model_size import ModelSize, cache_bytes, trainer_memory
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.loading import recompute_activations

GIB = 2**30
SMALL = {"vocab_size": 300, "num_attention_heads": 4, "max_position_embeddings": 512}
MODELS: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
# Qwen2.5-7B: 7.6 B parameters, as its card says.
SEVEN_B = ModelSize({"all": 7_600_000_000}, 3584, 18944, 28, 2 * 128 * 4, 152064)


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.subject: finding.state for finding in findings}


def test_a_folder_is_counted_without_loading_it(model_folder: str) -> None:
    size = ModelSize.read(Path(model_folder))
    model = LlamaForCausalLM.from_pretrained(model_folder)
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    config = model.config
    assert (size.hidden, size.num_layers) == (config.hidden_size, config.num_hidden_layers)
    assert size.kv_units == 2 * config.num_key_value_heads * config.head_dim
    last = [p.numel() for name, p in model.named_parameters() if ".layers.1." in name]
    assert size.num_trained(r"layers\.1\.") == sum(last)
    assert size.num_trained(None) == size.num_parameters


@pytest.mark.parametrize("name", ["no config", "no weights", "torn weights"])
def test_a_folder_that_is_no_model_is_named(name: str, tmp_path: Path, model_folder: str) -> None:
    if name != "no config":
        (tmp_path / "config.json").write_text((Path(model_folder) / "config.json").read_text())
    if name == "torn weights":
        (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match=f"the size of {tmp_path} cannot be read"):
        ModelSize.read(tmp_path)
    assert size_of_model(ModelSource(str(tmp_path))) is None


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_activations_are_what_autograd_keeps(kind: str, half: bool, checkpointing: bool) -> None:
    model_class, config_class = MODELS[kind]
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    model = model_class(config_class(**SMALL, **shape, num_key_value_heads=2)).train()
    if checkpointing:
        recompute_activations(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        out = model.model(input_ids=torch.randint(0, 300, (2, 128)), use_cache=False)
    assert out.last_hidden_state.requires_grad
    measured = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    estimate = trainer_memory(
        ModelSize({}, 64, 192, 4, 2 * 16 * 2, 300),
        num_trained=0,
        dtype="float32",
        tokens=256,
        checkpointing=checkpointing,
        computes_in="bfloat16" if half else "float32",
    )
    found = estimate.activations - 2 * 512 * 300 * 4  # the logits that exist at once
    if checkpointing:  # what is kept between layers, and one layer while it is recomputed
        assert measured < found < measured + 8 * measured
    else:
        assert found == pytest.approx(measured, rel=0.15)


def test_what_a_process_holds_is_weights_gradients_and_two_moments() -> None:
    found = trainer_memory(
        SEVEN_B,
        num_trained=SEVEN_B.num_parameters,
        dtype="float32",
        num_shards=4,
        has_reference=True,
        tokens=1,
        checkpointing=True,
        computes_in="bfloat16",
    )
    assert found.weights == 2 * 4 * 7_600_000_000 // 4
    assert found.training == 3 * 4 * 7_600_000_000 // 4
    assert found.total == found.weights + found.training + found.activations


def test_a_trainer_that_does_not_fit_is_a_problem_with_the_remedy() -> None:
    def judge(**settings: Any) -> Finding:
        options: dict[str, Any] = {"num_shards": 1, "gpu_gib": 80.0, "server_share": 0.0}
        config = {
            "model": {"gradient_checkpointing": True},
            "trainer": {"precision": "bf16-mixed"},
        }
        return check_trainer_memory(config, SEVEN_B, **options | settings)

    assert judge().state == "problem" and "Use FSDP2" in judge().text
    assert "and there are 80" in judge().text
    assert judge(num_shards=4, gpu_gib=80.0).state == "ok"
    assert judge(num_shards=4, server_share=0.6).state == "problem"
    assert judge(gpu_gib=None).state == "ok", "nothing to judge by"


def test_a_server_is_told_how_many_samples_fit() -> None:
    config = {"data": {"rollout": {"batch_size": 32, "max_head_lag": 2}}}
    one = cache_bytes(SEVEN_B, 4096)
    assert one == 4096 * 28 * 1024 * 2
    found = check_engine_memory(config, SEVEN_B, {"max_model_len": "4096"}, gpu_gib=80.0)
    fits = int((0.92 * 80 * GIB - 2 * 7.6e9) // one)
    assert found.state == "ok" and f"{fits} fit, 768 are asked for at once" in found.text
    small = check_engine_memory(config, SEVEN_B, {"max_model_len": "4096"}, gpu_gib=15.0)
    some = check_engine_memory(config, SEVEN_B, {"max_model_len": "4096"}, gpu_gib=16.0)
    assert some.state == "note" and "most will wait" in some.text
    assert small.state == "problem" and "not one fits into 15 GiB" in small.text


@pytest.mark.parametrize(
    ("config", "world_size", "problem"),
    [
        ({"data": {"rollout": {"batch_size": 6}}}, 4, "batch_size=6 groups cannot be divided"),
        ({"model": {"update": {"num_minibatches": 4}}}, 4, "cannot fill num_minibatches=4"),
        (
            {"model": {"update": {"num_minibatches": 2}}, "trainer": {"max_steps": 3}},
            1,
            "max_steps=3 is no multiple of 2",
        ),
        ({"model": {"loss": {"clip_epsilon": 3}}}, 1, "clip_epsilon must be in (0, 1)"),
        ({"data": {"rollout": {"batch_size": "many"}}}, 1, "got 'many'"),
    ],
)
def test_what_cannot_be_divided_is_found_before_the_run(
    config: dict[str, Any], world_size: int, problem: str
) -> None:
    problems = [f.text for f in check_division(config, world_size) if f.state == "problem"]
    assert len(problems) == 1 and problem in problems[0]


@pytest.mark.parametrize(
    ("rollout", "says"),
    [
        ({"max_head_lag": 0}, "0: trainer and engine take turns"),
        ({"batch_size": 8, "max_concurrent": 4}, "about 0.5 versions if generation"),
        ({"batch_size": 8, "max_head_lag": 2}, "about 2.0 versions if generation"),
    ],
)
def test_the_lag_to_expect_is_told(rollout: dict[str, Any], says: str) -> None:
    found = {f.subject: f.text for f in check_division({"data": {"rollout": rollout}}, 1)}
    assert found["expected lag"].startswith(says)


def test_only_fsdp2_shares_weights() -> None:
    assert num_shards({"strategy": "ddp"}, 4) == 1
    named = {"strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}}
    assert num_shards(named, 4) == 4


def test_versions_that_do_not_go_together_are_named() -> None:
    here = {"vllm": "0.33.0", "torch": "2.13.0"}
    needs = {"vllm": ["torch==2.14.0", "numpy", "torch==1; extra == 'old'"], "torch": []}
    found = check_together(here.get, needs.get)
    assert [(f.state, f.subject) for f in found] == [("problem", "vllm")]
    assert found[0].text == "0.33.0 needs torch==2.14.0, and 2.13.0 is installed."
    assert check_together({**here, "torch": "2.14.0+cpu"}.get, needs.get) == []


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7.62),
        ("Qwen/Qwen2.5-Math-1.5B", 1.54),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30.5),
        ("Qwen/Qwen3-4B-Base", 4.02),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("meta-llama/Meta-Llama-3-8B", 8.03),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.6),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46.7),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7.25),
        ("google/gemma-2-9b-it", 9.24),
        ("google/gemma-3-1b-it", 1.0),
        ("openai/gpt-oss-20b", 20.9),
        ("microsoft/phi-4", 14.7),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78),
    ],
)
def test_well_known_models_have_their_published_size(name: str, billions: float) -> None:
    size = known_size(name)
    assert size is not None and size.num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert "not on this machine" in size.origin
    assert size.num_trained(r"layers\.0\.") < size.num_parameters / size.num_layers


NOBODYS = ("Qwen/Qwen9-7B", "someone/merge-of-7b", "qwen2.5-7", "a:b", "/x/y")


@pytest.mark.parametrize("name", NOBODYS)
def test_a_model_that_nobody_knows_has_no_size(name: str) -> None:
    assert known_size(name) is None
    assert len(_known()) >= 40


def test_a_config_is_counted_as_its_folder_is(model_folder: str) -> None:
    config = json.loads(Path(model_folder, "config.json").read_text())
    by_config, by_folder = size_of_config(config), ModelSize.read(Path(model_folder))
    assert by_config.num_parameters == by_folder.num_parameters
    assert replace(by_config, weights={}) == replace(by_folder, weights={})
    for broken in ({"model_type": "no such"}, {**config, "hidden_size": "many"}, {}):
        with pytest.raises(ConfigError):
            size_of_config(broken)


def test_the_hub_is_asked_before_the_table(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of files stands for the hub, which a name's config is read from by its address."""
    from huggingface_hub import constants

    there = tmp_path / "Qwen/Qwen2.5-7B/resolve/main"
    there.mkdir(parents=True)
    (there / "config.json").write_text(Path(model_folder, "config.json").read_text())
    monkeypatch.setattr(constants, "ENDPOINT", tmp_path.as_uri())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = size_of_model(ModelSource("Qwen/Qwen2.5-7B"))
    assert found is not None and found.origin == "by its config on the hub"
    assert found.num_parameters == ModelSize.read(Path(model_folder)).num_parameters
    (there / "config.json").write_text("{")
    known = size_of_model(ModelSource("Qwen/Qwen2.5-7B"))
    assert known == known_size("Qwen/Qwen2.5-7B")
    assert size_of_model(ModelSource("Qwen/Qwen9")) is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("make.py:model", "make.py:model makes the model, and doctor runs none"),
        ("/no", "nor known"),
    ],
)
def test_why_a_model_is_not_estimated_is_said(tmp_path: Path, name: str, why: str) -> None:
    file = tmp_path / "config.yaml"
    for model in (name, {"name": name}):
        file.write_text(yaml.safe_dump({"model": {"model": model}}))
        found = examine_configs([str(file)], Machine((), ()))
        (text,) = [each.text for each in found if each.subject == "trainer memory"]
        assert text.startswith("not estimated: ") and why in text
