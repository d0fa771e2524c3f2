"""Check that the tokenizer of a config can write one prompt of each kind, as ``fit`` does first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.source_checks import model_folder
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
            found.append(_check(rows, source, data, settings))
    return found


def _check(
    name: str, source: ModelSource, data: Mapping[str, Any], settings: Mapping[str, Any]
) -> Finding:
    from sdp_lightning.cli.config_rows import checked_rows, make_workflow  # slow to import

    subject = f"{name}, written"
    try:
        tokenizer = load_tokenizer(source.resolved())
        rows = checked_rows(data, name, source.resolved()).good_rows()
        workflow = make_workflow(settings)
    except Exception as error:  # code of the config's files is run
        reason = " ".join(str(error).split())
        return Finding("note", subject, f"not tried: {type(error).__name__}: {reason}")
    try:
        workflow.check_prompts(rows, tokenizer)
    except ConfigError as error:
        return Finding("problem", subject, str(error))
    finally:
        workflow.close()
    return Finding("ok", subject, "one of each kind")
