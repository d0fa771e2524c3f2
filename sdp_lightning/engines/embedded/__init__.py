"""A transformers causal LM that samples in this process, with weights swapped under requests."""

from sdp_lightning.engines.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
