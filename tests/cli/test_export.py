"""From a checkpoint to a folder that transformers loads, by the command and by the function."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import sdp_lightning as sdp
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.cli.main import main
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from support.trainers import make_data, make_module, make_trainer

TOKENS = torch.tensor([[5, 9, 12, 7, 20, 3]])
TIED = "lm_head.weight"


def save(folder: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_checkpoint(path: Path, model: PreTrainedModel | dict[str, Any], **rest: Any) -> Path:
    """What Lightning would write of a module that holds ``model``."""
    weights = model if isinstance(model, dict) else model.state_dict()
    state = {f"policy.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": state, "epoch": 0} | rest, path)
    return path


def fit(folder: str, place: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    """The checkpoint of one step of training, and the trained policy's logits."""
    module = make_module(folder, lr=1e-2, **settings)
    keep = ModelCheckpoint(place, filename="step", every_n_train_steps=1)
    trainer = make_trainer(sdp.WeightSyncCallback(), keep, max_steps=1, enable_checkpointing=True)
    trainer.fit(module, datamodule=make_data())
    return place / "step.ckpt", logits(module.require_policy())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load(folder: Path) -> Any:
    """As transformers loads it, with nothing to remark."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("untied"), tiny_model(tie_word_embeddings=False))


@pytest.fixture(scope="module")
def trained(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ``model_folder``, as a training run leaves it."""
    return fit(model_folder, tmp_path_factory.mktemp("trained"))[0]


# Trained by this package ------------------------------------------------------------


@pytest.mark.parametrize("trainable", [None, r"layers\.1\."], ids=["all trained", "one layer"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_exported_checkpoint_has_the_logits_of_the_policy_that_was_trained(
    tied: bool,
    trainable: str | None,
    model_folder: str,
    untied_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    base = model_folder if tied else untied_folder
    checkpoint, expected = fit(base, tmp_path / "run", trainable=trainable)
    out = tmp_path / "deep" / "out"
    assert main(["export", str(checkpoint), str(out), "--model", base]) == 0
    assert f"wrote {out}: {20 + (not tied)} weights" in capsys.readouterr().out
    model = load(out)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(load(Path(base))))  # it was trained
    assert model.dtype == torch.float32
    assert (TIED in names_in(out)) is not tied
    assert set(content(out)) == set(content(Path(base)))
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # others may read it
    text = "12+3="
    assert AutoTokenizer.from_pretrained(out)(text) == tiny_tokenizer()(text)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_command_runs_in_a_process_of_its_own_without_lightning(
    trained: Path, model_folder: str, tmp_path: Path
):
    script = (
        "import sys\n"
        "from sdp_lightning.cli.main import main\n"
        "status = main()\n"
        "assert 'lightning' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, "export", str(trained)]
    arguments = [str(tmp_path / "out"), "--model", model_folder, "--dtype", "bfloat16"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {tmp_path / 'out'}: 20 weights, 0.0 MB")
    state = torch.load(trained, weights_only=True)["state_dict"]
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"policy.{name}"].bfloat16())


# Sharded ------------------------------------------------------------

TRAIN_SHARDED = """
import sys
import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1:]

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.policy = None

    def configure_model(self):
        if self.policy is None:
            self.policy = AutoModelForCausalLM.from_pretrained(folder).train()
            for part in (*self.policy.model.layers, self.policy):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.policy(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-2)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["sdp_model_id"] = folder

if __name__ == "__main__":
    torch.set_num_threads(1)
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.arange(3, 35).view(4, 8), 2))
    trainer.save_checkpoint(out)
"""


def train_sharded(base: str, place: Path) -> Path:
    """The folder that 2 processes write under FSDP2."""
    script, out = place / "train.py", place / "shards"
    script.write_text(TRAIN_SHARDED)
    command = [sys.executable, str(script), base, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=place)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.distcp"))) == 2
    return out


def test_a_sharded_checkpoint_has_the_logits_of_its_weights(model_folder: str, tmp_path: Path):
    """Read the other way, by torch's own converter."""
    shards = train_sharded(model_folder, tmp_path)
    dcp_to_torch_save(shards, tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", weights_only=True)["state_dict"]
    reference = tiny_model()
    reference.load_state_dict({n.removeprefix("policy."): tensor for n, tensor in state.items()})
    reference.eval()
    assert not torch.equal(logits(reference), logits(load(Path(model_folder))))  # it was trained

    assert main(["export", str(shards), str(tmp_path / "out")]) == 0  # it names its model
    assert torch.equal(logits(load(tmp_path / "out")), logits(reference))
    assert TIED not in names_in(tmp_path / "out")

    assert main(["export", str(shards), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = load(tmp_path / "half").state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(half[name], tensor.bfloat16())

    next(shards.glob("__1_*.distcp")).unlink()
    with pytest.raises(
        sdp.ConfigError, match=r"cannot read all shards of .*shards: .*__1_0.distcp"
    ):
        export_checkpoint(shards, tmp_path / "none")
    assert not list(tmp_path.glob(".none*")) and not (tmp_path / "none").exists()


# What is written ------------------------------------------------------------


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
    trained: Path, model_folder: str, tmp_path: Path
):
    script = (
        "import os, signal, sys, transformers\n"
        "from sdp_lightning.cli.main import main\n"
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "transformers.AutoTokenizer.from_pretrained = die  # the weights are written by then\n"
        "main()\n"
    )
    old = Path(save(tmp_path / "old", tiny_model(seed=5)))
    before = content(old)
    command = [sys.executable, "-c", script, "export", str(trained), str(old)]
    arguments = ["--model", model_folder, "--overwrite"]
    done = subprocess.run([*command, *arguments], capture_output=True, timeout=200)
    assert done.returncode == -9
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


# Refusals ------------------------------------------------------------


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


def test_an_empty_folder_is_filled(trained: Path, model_folder: str, tmp_path: Path):
    (tmp_path / "out").mkdir()
    export_checkpoint(trained, tmp_path / "out", model=model_folder)
    load(tmp_path / "out")
