"""What one type of model does in this package, each judged by plain forward passes of transformers.

A cell is ``OK``, the refusal's one line, or ``FAULT`` with what is wrong.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import sdp_lightning as sdp
import support.quick_lightning  # noqa: F401  # makes tiny fits cheap
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.errors import SDPError
from sdp_lightning.training.batch import Batch
from sdp_lightning.types import Segment
from support.embedded_engines import PATIENCE_S, full_logprobs, request, run, tokens_of
from support.plain_forwards import LAYOUTS, TOKENS, plain, random_batch
from support.score_runners import runner_of
from support.steps import Batches
from support.trainers import make_data, make_module, make_trainer, weights_of

OK, FAULT = "yes", "**fault**"
SCORE_ERROR = 1e-3  # nats that a score may be off, where it is not refused
ENGINE_ERROR = 2e-5  # nats
LOGIT_ERROR = 1e-3  # of logits after merging; an export is exact
LENGTH = 40  # tokens of an engine's longest sequence
COLUMNS = ("padded", "packed", "shared_prefix", "engine", "swap", "fit", "lora", "export")


class Kind:
    """One type of model, saved with tiny random weights.

    Args:
        name: the model type.
        folder: where the model and a tokenizer are saved.
        place: an empty folder for checkpoints and exports.
    """

    def __init__(self, name: str, folder: str, place: Path) -> None:
        self.name, self.folder = name, folder
        self._checkpoint, self._exported = place / "run" / "step.ckpt", place / "exported"

    def cells(self) -> list[str]:
        """One for each of ``COLUMNS``."""
        scores = [self._said(self._score, layout) for layout in LAYOUTS]
        engine = self._said(self._generate)
        fit = self._said(self._fit, engine == OK)
        export = self._said(self._export) if fit == OK else fit
        return [*scores, engine, engine, fit, self._said(self._adapt), export]

    def _said(self, cell: Callable[..., None], *arguments: Any) -> str:
        """``OK``, the first half of the refusal without numbers, or ``FAULT`` and what is wrong."""
        try:
            cell(*arguments)
        except SDPError as error:
            kind = f"model type '?{self.name}'?"
            message = re.sub(kind, "this", re.sub(f"^{kind} ", "", str(error)))
            return re.split(r"[:(|]| in the layout|\. |, so ", message)[0].strip()
        except AssertionError as error:
            return f"{FAULT}: {error}"
        except Exception as error:  # of a foreign model, or of this package: a fault either way
            line = str(error).strip().partition("\n")[0][:80].replace("|", "/")
            return f"{FAULT}: {type(error).__name__}: {line}"
        return OK

    def _reference(self, weights: Mapping[str, Tensor] | None = None, folder: Any = None) -> Any:
        """The model as transformers loads it, in eval mode, with eager attention if it has any."""
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder or self.folder, dtype=torch.float32, attn_implementation="eager"
        )
        if weights is not None:
            model.load_state_dict(weights)
        return model.eval()

    @cached_property
    def _batch(self) -> Batch:
        """Rows whose behavior policy is the saved model, and some of which are better."""
        batch = random_batch(0, sizes=(2, 2))
        with torch.no_grad():
            own = plain(self._reference(), batch)[0]
        rewards = torch.arange(len(batch.rewards)) / len(batch.rewards)
        return replace(batch, behavior_logprobs=own, rewards=rewards)

    @cached_property
    def _policy(self) -> Any:
        module = make_module(self.folder)
        module.configure_model()
        return module.require_policy()

    def _score(self, layout: Any) -> None:
        found = runner_of(self._policy, layout).logprobs(self._batch)
        _assert_close(found, self._batch.behavior_logprobs, SCORE_ERROR, f"{layout} scores")

    def _generate(self) -> None:
        """Groups and single sequences, with a swap while all but one of them are under way."""
        old = self._reference()
        new = _moved(self._reference())
        engine = EmbeddedEngine(self.folder, device="cpu", max_length=LENGTH, max_slots=4)
        engine.start()
        try:
            engine.update_weights(old.state_dict().items(), 0, reset=True)
            requests, segments = run(_swap_midway(engine, new))
        finally:
            engine.close()
        versions: set[int] = set()
        for one, found in zip(requests, segments, strict=True):
            tokens, start = tokens_of(found), 0
            assert len(tokens) == one.params.max_new_tokens
            for segment in found:
                model = new if segment.version else old
                wanted = full_logprobs(model, one.token_ids, tokens)[start : start + len(segment)]
                error = np.abs(wanted - segment.logprobs).max()
                assert error <= ENGINE_ERROR, f"version {segment.version} is off by {error:.1g}"
                start += len(segment)
                versions.add(segment.version)
        assert versions == {0, 1}

    def _fit(self, with_engine: bool) -> None:
        """Two steps, with rollouts if the engine has the model; a checkpoint of the second."""
        place = self._checkpoint
        keep = ModelCheckpoint(place.parent, filename=place.stem, every_n_train_steps=2)
        module = make_module(self.folder, lr=1e-3)
        callbacks = [sdp.WeightSyncCallback(), keep] if with_engine else [keep]
        trainer = make_trainer(
            *callbacks, max_steps=2, enable_checkpointing=True, limit_val_batches=0
        )
        options = {"device": "cpu", "max_slots": 4, "max_length": LENGTH}
        data = make_data(engine_options=options) if with_engine else Batches(*[self._batch] * 2)
        trainer.fit(module, datamodule=data)
        if with_engine and self._is_still(module):  # it samples one answer: rewards were equal
            self._checkpoint.unlink()
            self._fit(with_engine=False)
        else:
            self._assert_trained(module, 0.0)

    def _is_still(self, module: sdp.SegmentWisePPOModule) -> bool:
        moved = _logits(self._reference(weights_of(module))) - _logits(self._reference())
        return float(moved.abs().max()) <= 1e-5

    def _adapt(self) -> None:
        """Two steps of an adapter, whose merged weights give the logits of the policy."""
        lora = sdp.LoRAConfig(rank=2, alpha=4.0)
        module = make_module(self.folder, lr=1e-2, lora=lora)
        trainer = make_trainer(max_steps=2, limit_val_batches=0)
        trainer.fit(module, datamodule=Batches(*[self._batch] * 2))
        self._assert_trained(module, LOGIT_ERROR)

    def _assert_trained(self, module: sdp.SegmentWisePPOModule, error: float) -> None:
        """The published weights give the logits of the policy, which has moved."""
        published = self._reference(weights_of(module))
        policy = module.require_policy()
        _assert_close(_logits(published), _logits(policy), max(error, 1e-5), "published weights")
        moved = (_logits(published) - _logits(self._reference())).abs().max()
        assert moved > 1e-5, "nothing moved"

    def _export(self) -> None:
        export_checkpoint(self._checkpoint, self._exported, model=self.folder)
        saved = torch.load(self._checkpoint, weights_only=True)["state_dict"]
        weights = {name.removeprefix("policy."): value for name, value in saved.items()}
        found = _logits(self._reference(folder=self._exported))
        expected = _logits(self._reference(weights))
        if not torch.allclose(found, expected, atol=1e-6) and self._wrote(weights):
            raise SDPError("transformers loads this otherwise than it is written")
        _assert_close(found, expected, 1e-6, "the export")

    def _wrote(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether the exported file has these weights, so that another loader would have them."""
        written = load_file(self._exported / "model.safetensors")
        return all(torch.equal(weights[name], value) for name, value in written.items())


async def _swap_midway(engine: EmbeddedEngine, new: Any) -> tuple[list[Any], list[list[Segment]]]:
    """Sample five sequences; the first to end lets ``new`` be published before the others go on."""
    rng, reached = np.random.default_rng(0), threading.Event()
    group = rng.integers(3, 45, 13)
    prompts = [rng.integers(3, 45, 2), group, group, rng.integers(3, 45, 20), group]
    budgets = [4, 14, 14, 14, 14]
    requests = [
        request(p, n, seed=i) for i, (p, n) in enumerate(zip(prompts, budgets, strict=True))
    ]
    segments: list[list[Segment]] = [[] for _ in requests]

    def pause(segment: Segment) -> None:
        segments[0].append(segment)
        engine.pause()  # from the decode thread: after this step
        reached.set()

    engine.pause()
    sinks = [pause, *(found.append for found in segments[1:])]
    tasks = [
        asyncio.create_task(engine.generate(one, sink))
        for one, sink in zip(requests, sinks, strict=True)
    ]
    await asyncio.sleep(0)
    engine.resume()
    assert await asyncio.to_thread(reached.wait, PATIENCE_S)
    await asyncio.to_thread(engine.update_weights, new.state_dict().items(), 1)
    engine.resume()
    await asyncio.gather(*tasks)
    return requests, segments


@torch.no_grad()
def _moved(model: Any) -> Any:
    """``model`` with matrices a little further on."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() >= 2:
            weight += 0.03 * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def _assert_close(found: Tensor, wanted: Tensor, error: float, what: str) -> None:
    gap = float((found - wanted).abs().max())
    assert gap <= error, f"{what} off by {gap:.1g}"
