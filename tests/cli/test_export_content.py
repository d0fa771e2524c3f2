"""What an export writes: names, config, the whole folder or nothing, and never all in memory."""

from __future__ import annotations

import ctypes
import json
import re
import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sdp_lightning as sdp
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.cli.main import main
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from support.exports import TIED, content, load, names_in, save, save_checkpoint
from support.fork_server import ForkServer
from support.plain_forwards import logits


def test_a_mixture_of_experts_is_written_under_its_names_on_the_hub(tmp_path: Path):
    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    base = save(tmp_path / "base", model)
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", model)
    export_checkpoint(checkpoint, tmp_path / "out", model=base)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names_in(tmp_path / "out")
    assert names_in(tmp_path / "out") == names_in(Path(base))
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_of_two_tied_weights_the_checkpoint_needs_only_one(model_folder: str, tmp_path: Path):
    weights = tiny_model(seed=3).state_dict()
    del weights["model.embed_tokens.weight"]
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", weights)
    export_checkpoint(checkpoint, tmp_path / "out", model=model_folder)
    assert torch.equal(logits(load(tmp_path / "out")), logits(tiny_model(seed=3)))
    assert TIED not in names_in(tmp_path / "out")


def test_a_generation_config_that_transformers_would_not_write_is_kept_as_it_is(tmp_path: Path):
    base = Path(save(tmp_path / "base", tiny_model()))
    text = json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": [1, 2]})
    (base / "generation_config.json").write_text(text)
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", tiny_model())
    export_checkpoint(checkpoint, tmp_path / "out", model=str(base))
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def test_a_model_that_was_quantized_before_it_was_trained_is_so_no_more(tmp_path: Path):
    base = Path(save(tmp_path / "base", tiny_model()))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (base / "config.json").write_text(json.dumps(config))
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", tiny_model(seed=3))
    export_checkpoint(checkpoint, tmp_path / "out", model=str(base))
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert torch.equal(logits(load(tmp_path / "out")), logits(tiny_model(seed=3)))


def test_the_model_is_the_one_that_the_checkpoint_names_unless_another_is_given(
    model_folder: str, untied_folder: str, tmp_path: Path
):
    model = tiny_model(tie_word_embeddings=False)
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", model, sdp_model_id=untied_folder)
    assert export_checkpoint(checkpoint, tmp_path / "own").model_id == untied_folder
    with pytest.raises(sdp.ConfigError, match="config ties them"):
        export_checkpoint(checkpoint, tmp_path / "other", model=model_folder)


def test_overwriting_replaces_the_whole_folder(trained: Path, model_folder: str, tmp_path: Path):
    out = Path(save(tmp_path / "out", tiny_model(seed=5)))
    (out / "model-00001-of-00002.safetensors").write_text("of an older one")
    arguments = ["export", str(trained), str(out), "--model", model_folder]
    before = content(out)
    assert main(arguments) == 2
    assert content(out) == before
    assert main([*arguments, "--overwrite"]) == 0
    assert set(content(out)) == set(content(Path(model_folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load(out)


@pytest.mark.fault("process killed", "checkpoint")
def test_an_export_that_is_killed_leaves_the_folder_as_it_was(
    fork_server: ForkServer, trained: Path, model_folder: str, tmp_path: Path
):
    script = (
        "import os, signal, sys, transformers\n"
        "from sdp_lightning.cli.main import main\n"
        "die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "transformers.AutoTokenizer.from_pretrained = die  # the weights are written by then\n"
        "main()\n"
    )
    old = Path(save(tmp_path / "old", tiny_model(seed=5)))
    before = content(old)
    arguments = ["export", str(trained), str(old), "--model", model_folder, "--overwrite"]
    assert fork_server.start(script, *arguments, stderr=2).wait(200.0) == -9
    assert list(tmp_path.glob(".old.*.part/*.safetensors"))
    assert content(old) == before


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_weights_are_never_all_in_memory(dtype: str | None, tmp_path: Path):
    config = LlamaConfig(
        vocab_size=50, hidden_size=512, intermediate_size=1024, num_hidden_layers=10
    )
    model = LlamaForCausalLM(config)
    size = sum(p.nbytes for p in model.parameters())
    config.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", model)
    del model
    ctypes.CDLL(None).malloc_trim(0)  # what is free would be used again, unseen
    before, peak, stop = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        export_checkpoint(checkpoint, tmp_path / "out", model=str(tmp_path / "base"), dtype=dtype)
    finally:
        stop.set()
        watcher.join()
    assert size > 100e6 and 0 < peak < before + size / 4, (size, before, peak)


def anonymous_memory() -> int:
    """Bytes of this process that are in no file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def test_an_empty_folder_is_filled(trained: Path, model_folder: str, tmp_path: Path):
    (tmp_path / "out").mkdir()
    export_checkpoint(trained, tmp_path / "out", model=model_folder)
    load(tmp_path / "out")
