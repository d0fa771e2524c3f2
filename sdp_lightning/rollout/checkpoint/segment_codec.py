"""Contexts and segments as named values: what checkpoints and recordings write of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sdp_lightning.types import Context, SamplingParams, Segment


def part_to_fields(part: Context | Segment) -> dict[str, Any]:
    """Numbers, strings, None and numpy arrays by name; a context has ``token_ids`` only."""
    if isinstance(part, Context):
        return {"token_ids": part.token_ids}
    return {
        "token_ids": part.token_ids,
        "version": part.version,
        "logprobs": part.logprobs,
        "temperature": part.temperature,
        "kv_on_update": part.kv_on_update,
        "proximal": part.proximal.logprobs,
        "proximal_version": part.proximal.version,
    }


def part_from_fields(fields: Mapping[str, Any]) -> Context | Segment:
    """The part that :func:`part_to_fields` wrote, with the proximal that it had.

    Raises:
        VersionError: if a version makes no sense.
        RolloutError: if tokens or log-probs make no sense.
    """
    if "version" not in fields:
        return Context(fields["token_ids"])
    segment = Segment(
        fields["version"],
        fields["token_ids"],
        fields["logprobs"],
        temperature=fields["temperature"],
        kv_on_update=fields["kv_on_update"],
    )
    if fields["proximal"] is not None:
        segment.proximal.set(fields["proximal"], fields["proximal_version"])
    return segment


def params_to_fields(params: SamplingParams) -> dict[str, Any]:
    """Numbers, strings, None and lists by name, of which ``SamplingParams`` is made again."""
    values = asdict(params).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values}
