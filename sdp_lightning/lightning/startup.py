"""How a run starts: its engine, its servers, its rank group, and CPU cores for sampling."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch

from sdp_lightning.config.eos_tokens import load_eos_tokens
from sdp_lightning.distributed.rank_group import RankGroup, make_rank_group
from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.protocol import InferenceEngine, SharedServerEngine
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.servers.interpreter import require_vllm
from sdp_lightning.engines.servers.placement import require_one_host
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.stop_request import StopRequest
from sdp_lightning.types import Row
from sdp_lightning.workflows.workflow import RolloutWorkflow

logger = logging.getLogger(__name__)

MARGIN_S = 30.0  # ranks wait longer for each other than for a batch, whose error says more
_START_S = 1200.0  # longest start of servers, or of a model that every rank loads


def open_engine(
    source: str | InferenceEngine,
    options: Mapping[str, Any],
    *,
    module: SegmentWisePPOModule,
    trainer: L.Trainer | None,
) -> InferenceEngine:
    """The engine for ``source``, not started yet; model and adapter come from ``module``.

    Raises:
        ConfigError: if servers that this run starts would be out of reach, or on a GPU that the
            trainer uses.
    """
    known = {"model": module.source} if isinstance(source, str) else {}
    settings: dict[str, Any] = {**known, **options}
    if module.lora is not None and settings.get("transport") == "lora":
        settings.setdefault("lora_alpha", module.lora.alpha)
    engine = connect_engine(source, **settings)
    servers = engine.server_config if isinstance(engine, RemoteInfEngine) else None
    if servers is not None and trainer is not None:
        require_one_host(trainer.num_nodes, os.environ)
        require_vllm(servers.python)
        if trainer.strategy.root_device.type == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            servers.check_trainer_devices(trainer.device_ids, visible=visible)
    return engine


def make_trainer_ranks(
    trainer: L.Trainer | None, stop: StopRequest, *, batch_timeout_s: float
) -> RankGroup:
    """The trainer's processes. SIGTERM ends their waits, and each wait counts as a sign of life."""
    if trainer is None or trainer.world_size == 1:
        return RankGroup()

    def is_interrupted() -> bool:
        stop.look()
        return trainer.received_sigterm

    return make_rank_group(timeout_s=batch_timeout_s + MARGIN_S, interrupted=is_interrupted)


def start_engine(engine: InferenceEngine, ranks: RankGroup) -> None:
    """Start ``engine`` on every rank. Rank 0 may start the servers, which the others then join."""
    if not isinstance(engine, SharedServerEngine):
        ranks.run_on_all_ranks("starting the engine", engine.start, timeout_s=_START_S)
        return
    leads = ranks.rank == 0
    _, urls = ranks.run_on_all_ranks(
        "starting the engine",
        engine.start if leads else _nothing,
        lambda _: list(engine.server_urls),
        timeout_s=_START_S,
    )
    join = _nothing if leads else lambda: engine.join(urls[0])
    ranks.run_on_all_ranks("joining the servers of rank 0", join)


def find_eos_tokens(module: SegmentWisePPOModule, workflow: RolloutWorkflow) -> tuple[int, ...]:
    """The end-of-sequence tokens of the model's folder; they are logged, with the tokenizer's."""
    found, tokenizer = load_eos_tokens(module.source), module.tokenizer
    if module.global_rank == 0:
        ids = dict.fromkeys((*found.ids, tokenizer.eos_token_id))
        names = {i: f"{i} {tokenizer.decode([i])}" for i in ids if i is not None}
        of_model = ", ".join(names[i] for i in found.ids) or "none"
        logger.info(
            "Completions end at the tokenizer's end of text (%s), and at the model's (%s%s%s).",
            names.get(tokenizer.eos_token_id, "none"),
            of_model,
            f", in {found.file}" if found.file else "",
            "" if workflow.sampling.stop_at_model_eos else ": left out by stop_at_model_eos=False",
        )
    return found.ids


def say_unstopped(
    module: SegmentWisePPOModule, workflow: RolloutWorkflow, rows: Iterable[tuple[int, Row]]
) -> None:
    """Warn if the chat template ends turns with a token that ends no completion of ``workflow``."""
    for _, row in itertools.islice(rows, 1):
        eos_token_ids = load_eos_tokens(module.source).ids
        if text := workflow.unstopped(row, module.tokenizer, eos_token_ids):
            logger.warning("%s", text)


def longest_sequence(engine: InferenceEngine) -> int | None:
    """Tokens of the longest sequence of a started engine, prompt included; None is not known."""
    return engine.max_length if isinstance(engine, EmbeddedEngine | RemoteInfEngine) else None


def tell_vocabulary(engine: InferenceEngine, num_tokens: int) -> None:
    """Let servers' answers be held to the model's vocabulary of ``num_tokens``."""
    if isinstance(engine, RemoteInfEngine):
        engine.use_vocabulary(num_tokens)


def leave_cores(engine: InferenceEngine) -> int | None:
    """Leave an embedded engine its cores: on shared ones two OpenMP pools spin against each other.

    Returns:
        How many threads torch had before, to be given back; None if that was not changed.
    """
    if not isinstance(engine, EmbeddedEngine) or "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    share, threads = max(1, cores - engine.num_cpu_threads), torch.get_num_threads()
    if not engine.num_cpu_threads or share >= threads:
        return None
    torch.set_num_threads(share)
    return threads


def _nothing() -> None:
    pass
