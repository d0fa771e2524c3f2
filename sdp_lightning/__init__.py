"""Asynchronous RL post-training of language models as an ordinary PyTorch Lightning fit.

The public names load what they need when they are first used: importing this package imports
neither lightning nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sdp_lightning.display import Drawn, hooks

if TYPE_CHECKING:
    from sdp_lightning.config import (
        LoRAConfig,
        LossConfig,
        OptimizerConfig,
        RolloutConfig,
        UpdateConfig,
    )
    from sdp_lightning.engines.connect import connect_engine
    from sdp_lightning.engines.embedded import EmbeddedEngine
    from sdp_lightning.engines.protocol import InferenceEngine
    from sdp_lightning.errors import (
        CheckpointError,
        ConfigError,
        EngineError,
        RankError,
        RecordingError,
        RolloutError,
        RolloutTimeout,
        SDPError,
        VersionError,
    )
    from sdp_lightning.lightning.datamodule import RolloutDataModule
    from sdp_lightning.lightning.module import SegmentWisePPOModule
    from sdp_lightning.lightning.watchdog import Watchdog
    from sdp_lightning.lightning.weight_sync import WeightSyncCallback
    from sdp_lightning.objective import segment_wise_ppo_loss
    from sdp_lightning.progress import ProgressLine
    from sdp_lightning.recorder import Recorder
    from sdp_lightning.recording import Recording
    from sdp_lightning.replay import ReplayDataModule
    from sdp_lightning.report.callback import RunReport
    from sdp_lightning.rewards.pool import RewardPool
    from sdp_lightning.rollout.executor import WorkflowExecutor
    from sdp_lightning.rollout.factory import create_staleness_strategy, create_workflow_executor
    from sdp_lightning.rollout.groups.ledger import (
        FilteredSamplesCapacityModifier,
        StalenessManager,
    )
    from sdp_lightning.rollout.groups.staleness import SegmentWisePPOStrategy, StandardPPOStrategy
    from sdp_lightning.rollout.proximal_recompute import ProximalRecomputer
    from sdp_lightning.rollout.task_runner import AsyncTaskRunner
    from sdp_lightning.summary import RunSummary
    from sdp_lightning.training.batch import Batch
    from sdp_lightning.types import Context, SamplingParams, Segment, Trajectory, TrajectoryGroup
    from sdp_lightning.viewing import view
    from sdp_lightning.workflows import (
        Environment,
        Episode,
        MultiTurnWorkflow,
        RLVRWorkflow,
        RolloutWorkflow,
        ShapedWorkflow,
        StepResult,
        ToolEnvironment,
    )

_HOMES = {
    "training.batch": ("Batch",),
    "lightning.weight_sync": ("WeightSyncCallback",),
    "config": ("LoRAConfig", "LossConfig", "OptimizerConfig", "RolloutConfig", "UpdateConfig"),
    "lightning.datamodule": ("RolloutDataModule",),
    "engines.protocol": ("InferenceEngine",),
    "engines.connect": ("connect_engine",),
    "engines.embedded": ("EmbeddedEngine",),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "ConfigError",
        "EngineError",
        "RankError",
        "RecordingError",
        "RolloutError",
        "RolloutTimeout",
        "SDPError",
        "VersionError",
    ),
    "lightning.module": ("SegmentWisePPOModule",),
    "objective": ("segment_wise_ppo_loss",),
    "progress": ("ProgressLine",),
    "recorder": ("Recorder",),
    "recording": ("Recording",),
    "replay": ("ReplayDataModule",),
    "report.callback": ("RunReport",),
    "rewards.pool": ("RewardPool",),
    "rollout.groups.ledger": ("FilteredSamplesCapacityModifier", "StalenessManager"),
    "rollout.executor": ("WorkflowExecutor",),
    "rollout.factory": ("create_staleness_strategy", "create_workflow_executor"),
    "rollout.proximal_recompute": ("ProximalRecomputer",),
    "rollout.task_runner": ("AsyncTaskRunner",),
    "rollout.groups.staleness": ("SegmentWisePPOStrategy", "StandardPPOStrategy"),
    "summary": ("RunSummary",),
    "types": ("Context", "SamplingParams", "Segment", "Trajectory", "TrajectoryGroup"),
    "viewing": ("view",),
    "lightning.watchdog": ("Watchdog",),
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

try:
    __version__ = version("sdp-lightning")
except PackageNotFoundError:  # imported from its folder by a server's worker
    __version__ = "0+unknown"

__all__ = [
    "AsyncTaskRunner",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "Context",
    "EmbeddedEngine",
    "EngineError",
    "Environment",
    "Episode",
    "FilteredSamplesCapacityModifier",
    "InferenceEngine",
    "LoRAConfig",
    "LossConfig",
    "MultiTurnWorkflow",
    "OptimizerConfig",
    "ProgressLine",
    "ProximalRecomputer",
    "RLVRWorkflow",
    "RankError",
    "Recorder",
    "Recording",
    "RecordingError",
    "ReplayDataModule",
    "RewardPool",
    "RolloutConfig",
    "RolloutDataModule",
    "RolloutError",
    "RolloutTimeout",
    "RolloutWorkflow",
    "RunReport",
    "RunSummary",
    "SDPError",
    "SamplingParams",
    "Segment",
    "SegmentWisePPOModule",
    "SegmentWisePPOStrategy",
    "ShapedWorkflow",
    "StalenessManager",
    "StandardPPOStrategy",
    "StepResult",
    "ToolEnvironment",
    "Trajectory",
    "TrajectoryGroup",
    "UpdateConfig",
    "VersionError",
    "Watchdog",
    "WeightSyncCallback",
    "WorkflowExecutor",
    "connect_engine",
    "create_staleness_strategy",
    "create_workflow_executor",
    "segment_wise_ppo_loss",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _draw(data: Any) -> Drawn:
    return import_module(f"{__name__}.viewing").view(data)


hooks.draw = _draw
