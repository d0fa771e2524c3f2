"""Workflows: the steps of one rollout. They write to episodes, and know no engine."""

from sdp_lightning.workflows.agent.command import CommandAgent
from sdp_lightning.workflows.agent.workflow import AgentWorkflow
from sdp_lightning.workflows.environment import Environment, StepResult
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.multi_turn import MultiTurnWorkflow
from sdp_lightning.workflows.rlvr import RLVRWorkflow
from sdp_lightning.workflows.send_gate import SendGate
from sdp_lightning.workflows.shaping import (
    AllEqual,
    AllRight,
    AllWrong,
    GroupFilter,
    LengthPenalty,
    LinearLength,
    ShapedWorkflow,
    SoftOverlong,
    Truncated,
)
from sdp_lightning.workflows.tools import ToolEnvironment
from sdp_lightning.workflows.workflow import RolloutSession, RolloutWorkflow, Tokenizer

__all__ = [
    "AgentWorkflow",
    "AllEqual",
    "AllRight",
    "AllWrong",
    "CommandAgent",
    "Environment",
    "Episode",
    "GroupFilter",
    "LengthPenalty",
    "LinearLength",
    "MultiTurnWorkflow",
    "RLVRWorkflow",
    "RolloutSession",
    "RolloutWorkflow",
    "SendGate",
    "ShapedWorkflow",
    "SoftOverlong",
    "StepResult",
    "Tokenizer",
    "ToolEnvironment",
    "Truncated",
]
