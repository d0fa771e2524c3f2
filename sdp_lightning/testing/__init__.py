"""Stand-ins that obey the real protocols: a fake engine, and a tiny model with its tokenizer."""

from __future__ import annotations

from sdp_lightning.testing.fake_engine import FakeEngine
from sdp_lightning.testing.tiny_model import TINY_CHARACTERS, tiny_model, tiny_tokenizer

__all__ = ["TINY_CHARACTERS", "FakeEngine", "tiny_model", "tiny_tokenizer"]
