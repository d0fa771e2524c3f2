"""Asynchronous RL post-training of language models as an ordinary PyTorch Lightning fit.

The public names load what they need when they are first used: importing this package imports
neither lightning nor transformers. A public name is added below, once for type checkers and once
for Python.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
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
        Environment as Environment,
        Episode as Episode,
        MultiTurnWorkflow as MultiTurnWorkflow,
        RLVRWorkflow as RLVRWorkflow,
        RolloutWorkflow as RolloutWorkflow,
        ShapedWorkflow as ShapedWorkflow,
        StepResult as StepResult,
        ToolEnvironment as ToolEnvironment,
    )

_HOMES = {
    "cli.from_config": ("from_config",),
    "config": (
        "LoRAConfig",
        "LossConfig",
        "OptimizerConfig",
        "RolloutConfig",
        "UpdateConfig",
    ),
    "engines.connect": ("connect_engine",),
    "engines.embedded": ("EmbeddedEngine",),
    "engines.protocol": ("InferenceEngine",),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "EngineError",
        "RankError",
        "RecordingError",
        "RolloutError",
        "RolloutTimeout",
        "SDPError",
        "VersionError",
    ),
    "lightning.datamodule": ("RolloutDataModule",),
    "lightning.module": ("SegmentWisePPOModule",),
    "lightning.watchdog": ("Watchdog",),
    "lightning.weight_sync": ("WeightSyncCallback",),
    "objective": ("segment_wise_ppo_loss",),
    "observability.progress.callback": ("ProgressLine",),
    "observability.recording": ("Recording",),
    "observability.recording.recorder": ("Recorder",),
    "observability.recording.replay": ("ReplayDataModule",),
    "observability.report.callback": ("RunReport",),
    "observability.summary": ("RunSummary",),
    "observability.view": (
        "set_view_tokenizer",
        "view",
    ),
    "rewards.pool": ("RewardPool",),
    "rollout.executor": ("WorkflowExecutor",),
    "rollout.factory": (
        "create_staleness_strategy",
        "create_workflow_executor",
    ),
    "rollout.groups.ledger": (
        "FilteredSamplesCapacityModifier",
        "StalenessManager",
    ),
    "rollout.groups.staleness": (
        "SegmentWisePPOStrategy",
        "StandardPPOStrategy",
    ),
    "rollout.proximal_recompute": ("ProximalRecomputer",),
    "rollout.task_runner": ("AsyncTaskRunner",),
    "training.batch": ("Batch",),
    "types": (
        "Context",
        "SamplingParams",
        "Segment",
        "Trajectory",
        "TrajectoryGroup",
    ),
    "workflows": (
        "Environment",
        "Episode",
        "MultiTurnWorkflow",
        "RLVRWorkflow",
        "RolloutWorkflow",
        "ShapedWorkflow",
        "StepResult",
        "ToolEnvironment",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
