"""``sdp-lightning fit --dry-run``: a small run of all parts of a config, before GPUs are paid for.

It checks all rows, and trains two batches with the tokenizer, rows, workflow, reward, loss and
callbacks of the config, and a model of the same architecture, cut down to a few layers of a few
units with random weights. Of the rows it has the first few, and one of each kind: all kinds of
prompts are written.
It runs on the CPU, in one process, with the embedded engine, and so shows nothing of speed, memory,
servers and GPUs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from transformers import GenerationConfig, PreTrainedConfig

from sdp_lightning.cli.config_rows import checked_rows, longest_sequence
from sdp_lightning.cli.kept_texts import keep_texts
from sdp_lightning.cli.trainer import RolloutCLI
from sdp_lightning.config.eos_tokens import load_eos_tokens
from sdp_lightning.config.import_path import load_object
from sdp_lightning.config.model_source import ModelSource, quiet_transformers
from sdp_lightning.config.pretrained import auto_classes, load_config, load_tokenizer
from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.types import Row
from sdp_lightning.workflows.chat.row_kinds import first_of_each_kind

NUM_BATCHES, NUM_ROWS, MAX_NEW_TOKENS = 2, 8, 16
_TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "profiler": None,
}
_REPORTERS = ("RunSummary", "RunReport", "Recorder")
# Settings of a model's config that determine its size, and their values in a dry run.
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_window_layers": 2,
}
_DEPTHS = ("depth", "num_hidden_layers", "num_layers")


def dry_run(arguments: Sequence[str]) -> str:
    """Run ``fit`` cut down; returns a message about it.

    Raises:
        ConfigError: if the command is not ``fit``, or a setting is refused.
        SDPError: if a part of the run fails.
    """
    if arguments[:1] != ["fit"]:
        raise ConfigError(f"--dry-run belongs to fit, not to {arguments[0]!r}.")
    with tempfile.TemporaryDirectory(prefix="sdp-dry-run-") as folder:

        class Cut(RolloutCLI):
            def before_instantiate_classes(self) -> None:
                _cut(self.config["fit"], Path(folder))

        cli = Cut(arguments)
        cli.trainer.save_checkpoint(Path(folder) / "dry-run.ckpt")
        return _report(cli)


def _cut(config: Any, folder: Path) -> None:
    """Change the settings of ``fit`` (a jsonargparse namespace) to those of a small run."""
    data, update = config.data, config.model["update"]  # config.model.update is a method
    given = config.model.model
    given = given if isinstance(given, str | Path) else ModelSource(**vars(given))
    source, _ = ModelSource.of(given, config.model.model_kwargs or {})
    config.model.model = str(shrink(source, folder / "model"))
    settings = data.as_dict()  # with the engine and the budgets of the run
    length = longest_sequence(settings, source.resolved())
    whole = {
        name: checked_rows(settings, name, source.resolved()).kept()
        for name in ("prompts", "val_prompts")
        if data[name]
    }
    config.model.model_kwargs = {"trust_remote_code": source.trust_remote_code}
    config.model.trainable = None  # it may name layers that are cut
    for name, value in {**_TRAINER, "default_root_dir": str(folder)}.items():
        config.trainer[name] = value
    config.trainer.callbacks = [c for c in config.trainer.callbacks or () if not _leaves_traces(c)]
    steps = update.num_minibatches * update.num_epochs
    config.trainer.max_steps = NUM_BATCHES * steps
    config.model.optimizer.warmup_steps = 0
    config.ckpt_path = None
    data.engine = "embedded"
    data.engine_options = {"device": "cpu"} | ({"max_length": length} if length else {})
    data.rollout.batch_size = max(2, update.num_minibatches)
    data.rollout.max_concurrent = None
    for name, rows in whole.items():
        data[name] = keep_texts(few_rows(rows))
    for name in ("workflow", "val_workflow"):
        sampling = data[name] and data[name].get("init_args", {}).get("sampling")
        if sampling:
            sampling.max_new_tokens = min(MAX_NEW_TOKENS, sampling.max_new_tokens)


def few_rows(rows: Sequence[Row]) -> list[Row]:
    """The first rows, and the first of each kind."""
    kinds = dict(first_of_each_kind(enumerate(rows)))
    first = {index: rows[index] for index in range(min(NUM_ROWS, len(rows)))}
    return list((first | kinds).values())


def _leaves_traces(callback: Any) -> bool:
    """Whether a callback of the config writes to a folder or to the terminal."""
    module, _, name = str(callback.class_path).rpartition(".")
    kind: Any = load_object(f"{module}:{name}")
    return name in _REPORTERS or issubclass(kind, Checkpoint | ProgressBar)


def shrink(model: str | ModelSource, folder: Path) -> Path:
    """Write a model like ``model``, with a few units and the same tokenizer, to ``folder``.

    Raises:
        ConfigError: if there is no such model, or its architecture cannot be cut down.
    """
    source = ModelSource.of(model, {})[0].resolved()
    try:
        config, tokenizer = load_config(source), load_tokenizer(source)
    except OSError as error:
        raise ConfigError(f"the model {str(source.name)!r} cannot be read: {error}") from error
    _cut_down(config)
    try:
        with quiet_transformers(), torch.random.fork_rng():
            torch.manual_seed(0)
            small = auto_classes(config)[0].from_config(
                config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
            )
            small.save_pretrained(folder)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"model type {config.model_type!r} cannot be cut down for a dry run: {error}"
        ) from error
    if ends := load_eos_tokens(source).ids:
        GenerationConfig(eos_token_id=list(ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _cut_down(whole: PreTrainedConfig) -> None:
    """Fewer and smaller layers for text; what is beside it, and not run, has one layer."""
    config: Any = whole.get_text_config(decoder=True)
    for name in whole.sub_configs:
        beside: Any = getattr(whole, name)
        if beside is None or beside is config:
            continue
        for depth in _DEPTHS:
            if isinstance(beside.to_dict().get(depth), int):
                setattr(beside, depth, 1)
    settings = config.to_dict()
    multi_head = settings.get("num_key_value_heads") == settings.get("num_attention_heads")
    for name, value in _SMALL.items():
        if isinstance(settings.get(name), int):
            setattr(config, name, min(value, settings[name]))
    if multi_head and "num_key_value_heads" in settings:
        config.num_key_value_heads = config.num_attention_heads
    if isinstance(layers := settings.get("layer_types"), list):
        config.layer_types = layers[: config.num_hidden_layers]
    if isinstance(scaling := settings.get("rope_scaling"), Mapping) and "short_factor" in scaling:
        config.rope_scaling = None  # it has a factor for each unit of the large model


def _report(cli: RolloutCLI) -> str:
    trainer, data = cli.trainer, cli.datamodule
    assert isinstance(data, RolloutDataModule)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    parts = [
        f"{NUM_BATCHES} batches of {data.rollout.batch_size} groups trained, with "
        f"{metrics['train/tokens']:.0f} sampled tokens and a mean reward of "
        f"{metrics['train/reward']:.3f} in the last",
        f"versions 0 to {metrics['rollout/version']:.0f} published",
        f"a checkpoint of {trainer.global_step} optimizer steps written",
    ]
    if "val/reward" in metrics:
        parts.insert(2, f"validation rewarded with {metrics['val/reward']:.3f}")
    return (
        "dry run: " + "; ".join(parts) + ". The model was a tiny random one, so rewards mean "
        "nothing. Not tried: real weights, speed, memory, servers, GPUs (see `doctor --config`)."
    )
