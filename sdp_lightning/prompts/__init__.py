"""Dataset rows that a string names: files, Hugging Face datasets, reasoning-gym.

Nothing of a library is imported before it is named.
"""

from __future__ import annotations

from sdp_lightning.prompts.sources import find_rows

__all__ = ["find_rows"]
