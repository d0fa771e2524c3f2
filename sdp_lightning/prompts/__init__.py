"""Dataset rows: a stream of prompts, local files, Hugging Face datasets, reasoning-gym.

A library is imported only when a source names it.
"""

from __future__ import annotations

from sdp_lightning.prompts.sources import find_rows

__all__ = ["find_rows"]
