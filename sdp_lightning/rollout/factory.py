"""The switch table: what ``RolloutConfig.enable_segment_wise_ppo`` turns on and off."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

from sdp_lightning.config import RolloutConfig
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.engines.protocol import InferenceEngine
from sdp_lightning.prompts.checks import RowFault
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.iterable_stream import IterableStream
from sdp_lightning.prompts.stream import PromptStream
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.group_source import GroupSource, Prompts
from sdp_lightning.rollout.groups.ledger import (
    CapacityModifier,
    FilteredSamplesCapacityModifier,
    StalenessManager,
)
from sdp_lightning.rollout.groups.registry import GroupRegistry
from sdp_lightning.rollout.groups.staleness import (
    SegmentWisePPOStrategy,
    StalenessControlStrategy,
    StandardPPOStrategy,
)
from sdp_lightning.rollout.proximal_recompute import ProximalRecomputer
from sdp_lightning.rollout.row_checks import RowJudge
from sdp_lightning.types import Row
from sdp_lightning.workflows.send_gate import SendGate
from sdp_lightning.workflows.workflow import RolloutWorkflow, Tokenizer

logger = logging.getLogger(__name__)


def create_staleness_strategy(config: RolloutConfig) -> StalenessControlStrategy:
    """The strategy that ``config`` asks for."""
    if not config.enable_segment_wise_ppo:
        return StandardPPOStrategy()
    return SegmentWisePPOStrategy(
        max_head_lag=config.max_head_lag,
        missing_proximal=config.missing_proximal,
        mask_overdue=config.on_overdue == "mask",
    )


def create_capacity_modifiers(config: RolloutConfig) -> tuple[CapacityModifier, ...]:
    """The capacity modifiers that ``config`` asks for."""
    return (FilteredSamplesCapacityModifier(),) if config.enable_segment_wise_ppo else ()


def create_recomputer(config: RolloutConfig) -> ProximalRecomputer | None:
    """The recomputer that ``config`` asks for; None when the mode is off."""
    if not config.enable_segment_wise_ppo:
        return None
    return ProximalRecomputer(
        max_head_lag=config.max_head_lag, mask_overdue=config.on_overdue == "mask"
    )


def create_prompts(
    rows: Sequence[Row] | IterableRows,
    config: RolloutConfig,
    ranks: RankGroup,
    judge: Callable[[int, Row], RowFault | None] = lambda index, row: None,
) -> Prompts:
    """This rank's part of ``rows``, in the order that ``config`` asks for.

    Raises:
        ConfigError: if there are no rows, or rows that can be read once are to be read again.
    """
    place = {"rank": ranks.rank, "num_ranks": ranks.size}
    if not isinstance(rows, IterableRows):
        epochs, seed = config.num_epochs, config.seed
        return PromptStream(rows, seed=seed, shuffle=config.shuffle, num_epochs=epochs, **place)
    if config.shuffle and ranks.rank == 0:
        logger.warning(
            "the prompts are a stream: shuffle=True has no effect, its rows come in its own order. "
            "Shuffle it where it is made, and set shuffle=False."
        )
    fills, timeout_s = config.last_batch == "fill", config.timeout_s
    return IterableStream(
        rows,
        num_epochs=config.num_epochs,
        fills=fills,
        timeout_s=timeout_s,
        judge=judge,
        drops=config.prompts_check == "drop",
        **place,
    )


def create_workflow_executor(
    *,
    config: RolloutConfig,
    engine: InferenceEngine,
    workflow: RolloutWorkflow,
    prompts: Sequence[Row] | IterableRows,
    tokenizer: Tokenizer,
    ranks: RankGroup | None = None,
    eos_token_ids: Sequence[int] = (),
    max_length: int | None = None,
) -> WorkflowExecutor:
    """An executor with the strategy and the capacity modifiers that ``config`` asks for.

    Args:
        config: of this process: counts are its share of the world's.
        engine: started, or started before the first publish.
        workflow: what one rollout does.
        prompts: rows; indexed, so any sequence will do, or read one after another.
        tokenizer: of the policy.
        ranks: that train together; None is this process alone.
        eos_token_ids: tokens that end a completion, as the model's folder says.
        max_length: tokens of the longest sequence of the engine, by which the rows of a stream are
            judged; None is not known.

    Raises:
        ConfigError: if ``prompts`` is empty.
    """
    ranks = RankGroup() if ranks is None else ranks
    fault_of = RowJudge(workflow, tokenizer).fault_of
    judge = functools.partial(fault_of, max_length=max_length)
    stream = create_prompts(prompts, config, ranks, judge)
    manager = _make_manager(config)
    gate = SendGate()
    source = GroupSource(
        stream, engine, gate, tokenizer, config=config, eos_token_ids=eos_token_ids
    )
    registry = GroupRegistry(
        config,
        create_staleness_strategy(config),
        manager,
        on_drop=source.give_back if config.requeue_dropped else None,
    )
    return WorkflowExecutor(
        config=config,
        engine=engine,
        workflow=workflow,
        source=source,
        gate=gate,
        registry=registry,
        recomputer=create_recomputer(config),
        ranks=ranks,
    )


def _make_manager(config: RolloutConfig) -> StalenessManager:
    return StalenessManager(
        max_concurrent=config.concurrency,
        batch_size=config.batch_size,
        max_head_lag=config.max_head_lag,
        modifiers=create_capacity_modifiers(config),
    )
