"""Asynchronous RL post-training of language models as an ordinary PyTorch Lightning fit.

The public names load what they need when they are first used: importing this package imports
neither lightning nor transformers. A public name is added in one place: the imports below.
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdp_lightning.config.renamed import accept_old_modules

if TYPE_CHECKING:
    from sdp_lightning.cli.from_config import (
        from_config as from_config,
    )
    from sdp_lightning.config import (
        LoRAConfig as LoRAConfig,
        LossConfig as LossConfig,
        OptimizerConfig as OptimizerConfig,
        RolloutConfig as RolloutConfig,
        UpdateConfig as UpdateConfig,
    )
    from sdp_lightning.config.model_source import (
        ModelSource as ModelSource,
    )
    from sdp_lightning.engines.connect import (
        connect_engine as connect_engine,
    )
    from sdp_lightning.engines.embedded import (
        EmbeddedEngine as EmbeddedEngine,
    )
    from sdp_lightning.engines.protocol import (
        InferenceEngine as InferenceEngine,
    )
    from sdp_lightning.errors import (
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        EngineError as EngineError,
        HangError as HangError,
        InfrastructureError as InfrastructureError,
        RankError as RankError,
        RecordingError as RecordingError,
        RolloutError as RolloutError,
        RolloutTimeout as RolloutTimeout,
        SDPError as SDPError,
        VersionError as VersionError,
    )
    from sdp_lightning.lightning.datamodule import (
        RolloutDataModule as RolloutDataModule,
    )
    from sdp_lightning.lightning.module import (
        SegmentWisePPOModule as SegmentWisePPOModule,
    )
    from sdp_lightning.lightning.watchdog import (
        Watchdog as Watchdog,
    )
    from sdp_lightning.lightning.weight_sync import (
        WeightSyncCallback as WeightSyncCallback,
    )
    from sdp_lightning.objective import (
        segment_wise_ppo_loss as segment_wise_ppo_loss,
    )
    from sdp_lightning.observability.progress.callback import (
        ProgressLine as ProgressLine,
    )
    from sdp_lightning.observability.recording import (
        Recording as Recording,
    )
    from sdp_lightning.observability.recording.recorder import (
        Recorder as Recorder,
    )
    from sdp_lightning.observability.recording.replay import (
        ReplayDataModule as ReplayDataModule,
    )
    from sdp_lightning.observability.report.callback import (
        RunReport as RunReport,
    )
    from sdp_lightning.observability.summary import (
        RunSummary as RunSummary,
    )
    from sdp_lightning.observability.view import (
        set_view_tokenizer as set_view_tokenizer,
        view as view,
    )
    from sdp_lightning.rewards.pool import (
        RewardPool as RewardPool,
    )
    from sdp_lightning.rollout.executor import (
        WorkflowExecutor as WorkflowExecutor,
    )
    from sdp_lightning.rollout.factory import (
        create_staleness_strategy as create_staleness_strategy,
        create_workflow_executor as create_workflow_executor,
    )
    from sdp_lightning.rollout.groups.ledger import (
        FilteredSamplesCapacityModifier as FilteredSamplesCapacityModifier,
        StalenessManager as StalenessManager,
    )
    from sdp_lightning.rollout.groups.staleness import (
        SegmentWisePPOStrategy as SegmentWisePPOStrategy,
        StandardPPOStrategy as StandardPPOStrategy,
    )
    from sdp_lightning.rollout.proximal_recompute import (
        ProximalRecomputer as ProximalRecomputer,
    )
    from sdp_lightning.rollout.task_runner import (
        AsyncTaskRunner as AsyncTaskRunner,
    )
    from sdp_lightning.training.batch import (
        Batch as Batch,
    )
    from sdp_lightning.types import (
        Context as Context,
        SamplingParams as SamplingParams,
        Segment as Segment,
        Trajectory as Trajectory,
        TrajectoryGroup as TrajectoryGroup,
    )
    from sdp_lightning.workflows import (
        AgentWorkflow as AgentWorkflow,
        CommandAgent as CommandAgent,
        Environment as Environment,
        Episode as Episode,
        MultiTurnWorkflow as MultiTurnWorkflow,
        RLVRWorkflow as RLVRWorkflow,
        RolloutWorkflow as RolloutWorkflow,
        ShapedWorkflow as ShapedWorkflow,
        StepResult as StepResult,
        ToolEnvironment as ToolEnvironment,
    )


def _find_homes() -> dict[str, str]:
    """The module of each public name, read from the imports above that type checkers see."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOME_OF = _find_homes()

if not TYPE_CHECKING:  # type checkers read the imports above
    __all__ = sorted(_HOME_OF)

try:
    __version__ = version("sdp-lightning")
except PackageNotFoundError:  # imported from its folder by a server's worker
    __version__ = "0+unknown"

accept_old_modules()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
