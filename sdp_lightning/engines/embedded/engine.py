"""The engine that lives in the trainer's process: checks, versions, weights.

The decode thread is in ``decode_loop``, batching in ``scheduler``, keys and values in ``kv_cache``;
models that cannot be batched are decoded by ``row_scheduler`` and ``row_decoder``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.validation import at_least, one_of
from sdp_lightning.engines.embedded.decode_loop import DecodeLoop, Job
from sdp_lightning.engines.embedded.model_checks import (
    load_model,
    plain_attention,
    resolve_max_length,
    text_logprobs,
    vocab_size,
)
from sdp_lightning.engines.embedded.row_checks import choose_scheduler
from sdp_lightning.engines.embedded.sequences import SequenceScheduler, SequenceState
from sdp_lightning.engines.protocol import (
    GenerationRequest,
    NamedWeights,
    PublishReport,
    SegmentSink,
    require_next_version,
)
from sdp_lightning.errors import EngineError
from sdp_lightning.types import FinishReason, FloatArray, IntArray, KVPolicy
from sdp_lightning.weights.in_process import check_weights, copy_weights
from sdp_lightning.weights.protocol import WeightStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Running:
    """Parts of a started engine. ``num_tokens`` is the size of the vocabulary."""

    model: PreTrainedModel
    scheduler: SequenceScheduler
    loop: DecodeLoop
    max_length: int
    num_tokens: int


class EmbeddedEngine:
    """Samples from its own copy of a transformers causal LM, in this process.

    Requests beyond ``max_slots`` wait in order of arrival. Weights are swapped between two decode
    steps with requests in flight: their open segments close under the old version and they continue
    under the new one. ``pause`` is a state, not a count: one ``resume`` ends it.

    A model that cannot be batched exactly is decoded row by row, which is slower; one that cannot
    be either is refused.

    Args:
        model: a Hugging Face id, a folder, a ``ModelSource``, or a module, which ``start`` copies:
            the engine never shares weights with a trainer.
        device: ``"auto"`` is the current GPU, else the CPU.
        dtype: None keeps a module's dtype; a model id is loaded in float32 on CPU and in the
            checkpoint's dtype elsewhere.
        max_slots: number of sequences decoded at once.
        max_length: tokens of a sequence, prompt included; None: 1024 or what the model allows.
        kv_on_update: ``"recompute"`` rebuilds the KV cache of requests in flight under new weights
            (in the decode thread, after ``update_weights`` returned); ``"keep"`` continues with the
            old KV cache, so that log-probs after an update belong to no single version.
        num_threads: torch threads of the decode thread on CPU.
        model_kwargs: passed to ``from_pretrained``.

    Raises:
        ConfigError: if a value is out of range.
    """

    updates_in_flight = True

    def __init__(
        self,
        model: str | ModelSource | PreTrainedModel,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        max_slots: int = 64,
        max_length: int | None = None,
        kv_on_update: KVPolicy = "recompute",
        num_threads: int = 1,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        at_least("max_slots", max_slots, 1)
        at_least("num_threads", num_threads, 1)
        if max_length is not None:
            at_least("max_length", max_length, 2)
        one_of("kv_on_update", kv_on_update, get_args(KVPolicy))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model_kwargs = dict(model_kwargs or {})
        self._source: ModelSource | PreTrainedModel
        if isinstance(model, (str, ModelSource)):
            self._source, self._model_kwargs = ModelSource.of(model, self._model_kwargs)
        else:
            self._source = model
        self._device = torch.device(device)
        self._dtype = dtype
        self._max_slots = max_slots
        self._max_length = max_length
        self._kv_on_update: KVPolicy = kv_on_update
        self._num_threads = num_threads
        self._running: _Running | None = None
        self._closed = False
        self._update_lock = threading.Lock()

    @property
    def version(self) -> int | None:
        return None if self._running is None else self._running.loop.version

    @property
    def num_generated(self) -> int:
        return 0 if self._running is None else self._running.scheduler.num_generated

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens computed: rebuilt KV cache counts, KV copied from another row does not."""
        return 0 if self._running is None else self._running.scheduler.num_prefill_tokens

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest sequence, prompt included; None before ``start``."""
        return None if self._running is None else self._running.max_length

    @property
    def num_active(self) -> int:
        """Number of requests that are decoding now."""
        return 0 if self._running is None else self._running.scheduler.num_active

    @property
    def num_cpu_threads(self) -> int:
        """Number of CPU threads that decoding keeps busy; 0 on a GPU."""
        return self._num_threads if self._device.type == "cpu" else 0

    def start(self) -> None:
        """Load the model, check that it decodes correctly, start the thread. No-op if running.

        Raises:
            EngineError: if this type of model cannot be served, or the engine was closed.
        """
        if self._closed:
            raise EngineError("the engine is closed. Make a new one.")
        if self._running is not None:
            self._running.loop.require_usable()
            return
        model = load_model(
            self._source, device=self._device, dtype=self._dtype, model_kwargs=self._model_kwargs
        )
        max_length = resolve_max_length(model, self._max_length)
        scheduler = choose_scheduler(model, max_length=max_length, max_slots=self._max_slots)
        on_cpu = self._device.type == "cpu"
        loop = DecodeLoop(
            scheduler,
            num_threads=self._num_threads if on_cpu else None,
            kv_on_update=self._kv_on_update,
        )
        self._running = _Running(model, scheduler, loop, max_length, vocab_size(model))
        loop.start()

    async def generate(self, request: GenerationRequest, sink: SegmentSink) -> FinishReason:
        """See the protocol. Cancelling the task that awaits this frees the slot."""
        running = self._require_usable()
        _check_request(request, num_tokens=running.num_tokens, max_length=running.max_length)
        job = Job(SequenceState.of(request), sink, asyncio.get_running_loop().create_future())
        running.loop.submit(job)
        try:
            return await job.future
        finally:
            running.loop.forget(job)

    def pause(self) -> None:
        self._require_usable().loop.pause()

    def resume(self) -> None:
        self._require_usable().loop.resume()

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        """See the protocol. Names and shapes are checked before anything changes.

        A :class:`~sdp_lightning.weights.protocol.WeightStream` is read while sampling waits, so
        that no second copy is made of what has to be gathered or merged; anything else before it.
        """
        with self._update_lock:
            running = self._require_usable()
            require_next_version(version, self.version, holder="the engine", reset=reset)
            if isinstance(weights, WeightStream):
                source, layout = weights, list(weights.layout.items())
            else:
                source = layout = list(weights)
            check_weights(layout, running.model, full=reset)
            with running.loop.hold():
                begin_s = time.perf_counter()
                running.loop.close_segments()
                num_bytes = _swap(
                    source, version, running, keep_kv=self._kv_on_update == "keep" and not reset
                )
            return PublishReport(int(version), num_bytes, transfer_s=time.perf_counter() - begin_s)

    def prompt_logprobs(self, token_ids: IntArray) -> Mapping[str, FloatArray]:
        running = self._require_usable()
        with running.loop.hold(), plain_attention(running.model):
            return {"embedded": text_logprobs(running.model, token_ids).cpu().numpy()}

    def close(self) -> None:
        self._closed = True
        if self._running is not None:
            self._running.loop.close()

    def _require_usable(self) -> _Running:
        if self._running is None:
            state = "is closed. Make a new one" if self._closed else "has not started. Call start()"
            raise EngineError(f"the engine {state}.")
        self._running.loop.require_usable()
        return self._running


def _swap(source: NamedWeights, version: int, running: _Running, *, keep_kv: bool) -> int:
    try:
        num_bytes = copy_weights(source, running.model)
        if not keep_kv:
            running.scheduler.restart()
        running.loop.version = int(version)
        return num_bytes
    except Exception as error:
        running.loop.fail(error)
        raise EngineError(
            f"copying the weights of version {version} failed half way, so the engine is unusable: "
            f"{type(error).__name__}: {error}"
        ) from error
    except BaseException as error:  # an interrupt makes the engine unusable, too
        running.loop.fail(error)
        raise


def _check_request(request: GenerationRequest, *, num_tokens: int, max_length: int) -> None:
    tokens, budget = request.token_ids, request.params.max_new_tokens
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise EngineError(
            f"token_ids must be one row of integers, got shape {tokens.shape} of {tokens.dtype}."
        )
    if tokens.min() < 0 or tokens.max() >= num_tokens:
        raise EngineError(
            f"token ids go from {tokens.min()} to {tokens.max()}, but the model's vocabulary has "
            f"{num_tokens}. Do tokenizer and model belong together?"
        )
    if tokens.size + budget > max_length:
        raise EngineError(
            f"a prompt of {tokens.size} tokens and max_new_tokens={budget} do not fit the engine's "
            f"max_length={max_length}. Shorten one of them, or raise max_length."
        )
