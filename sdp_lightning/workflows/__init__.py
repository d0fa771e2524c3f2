"""What one rollout does: workflows write to episodes, and know no engine."""

from sdp_lightning.workflows.base import RolloutSession, RolloutWorkflow, Tokenizer
from sdp_lightning.workflows.episode import Episode
from sdp_lightning.workflows.gate import SendGate
from sdp_lightning.workflows.rlvr import RLVRWorkflow

__all__ = [
    "Episode",
    "RLVRWorkflow",
    "RolloutSession",
    "RolloutWorkflow",
    "SendGate",
    "Tokenizer",
]
