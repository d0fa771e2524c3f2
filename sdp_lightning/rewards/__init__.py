"""Verifiers: what a completion is worth. Pure functions of the completion and its dataset row."""

from sdp_lightning.rewards.text import exact_match, find_numbers, numeric_match

__all__ = ["exact_match", "find_numbers", "numeric_match"]
