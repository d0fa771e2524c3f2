"""The weights of a module as its engine reads them."""

from __future__ import annotations

from transformers import PreTrainedModel

from sdp_lightning.engines.protocol import InferenceEngine, SharedServerEngine
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.training.policy.checkpoint_names import as_in_checkpoint
from sdp_lightning.weights.protocol import WeightStream


def weights_for(
    engine: InferenceEngine, module: SegmentWisePPOModule, *, changed_only: bool = False
) -> WeightStream:
    """Weights as ``engine`` reads them: servers know the names of checkpoints."""
    if not isinstance(engine, SharedServerEngine):
        return module.named_weights(changed_only=changed_only)
    weights = module.named_weights(changed_only=changed_only, lora_alpha=engine.lora_alpha)
    return as_in_checkpoint(module.require_policy(), weights)


def num_embeddings(policy: PreTrainedModel) -> int:
    """Number of token ids that ``policy`` has logits of."""
    return int(policy.get_input_embeddings().weight.shape[0])  # type: ignore
