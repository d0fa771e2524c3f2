"""An engine that samples from a transformers causal LM in the trainer's process."""

from sdp_lightning.engines.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
