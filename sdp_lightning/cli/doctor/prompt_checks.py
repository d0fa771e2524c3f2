"""Check that the tokenizer of a config can write one prompt of each kind, as ``fit`` does first."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.source_checks import model_folder
from sdp_lightning.config.eos_tokens import load_eos_tokens
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import load_tokenizer
from sdp_lightning.errors import ConfigError


def check_prompts(source: ModelSource, data: Mapping[str, Any]) -> list[Finding]:
    """Findings about the prompts of a config's ``data`` part, if tokenizer and workflow are here.

    Prompts that an environment makes are made, of a few rows.
    """
    if model_folder(source) is None:
        return []
    found: list[Finding] = []
    for rows, workflow in (("prompts", "workflow"), ("val_prompts", "val_workflow")):
        settings = data.get(workflow) or data.get("workflow")
        if data.get(rows) and isinstance(settings, Mapping):
            found += _check(rows, source, data, settings)
    return found


def _check(
    name: str, source: ModelSource, data: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[Finding]:
    from sdp_lightning.cli.config_rows import checked_rows, make_workflow  # slow to import

    subject = f"{name}, written"
    try:
        tokenizer = load_tokenizer(source.resolved())
        checks = checked_rows(data, name, source.resolved())
        workflow = make_workflow(settings)
    except Exception as error:  # code of the config's files is run
        reason = " ".join(str(error).split())
        return [Finding("note", subject, f"not tried: {type(error).__name__}: {reason}")]
    try:
        workflow.check_prompts(checks.good_rows(), tokenizer)
        eos_token_ids = load_eos_tokens(source.resolved()).ids
        rows = [row for _, row in itertools.islice(checks.good_rows(), 1)]
        unstopped = [workflow.unstopped(row, tokenizer, eos_token_ids) for row in rows]
    except ConfigError as error:
        return [Finding("problem", subject, str(error))]
    finally:
        workflow.close()
    found = [Finding("ok", subject, "one of each kind")]
    return [*found, *(Finding("note", f"{name}, ends of turns", t) for t in unstopped if t)]
