"""Check that the tokenizer of a config can write one prompt of each kind, as ``fit`` does first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.cli.doctor.source_checks import model_folder
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import load_tokenizer
from sdp_lightning.errors import ConfigError
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.sources import NUM_CHECKED, first_rows, load_rows


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
            found.append(_check(f"{rows}, written", source, data[rows], settings))
    return found


def _check(subject: str, source: ModelSource, rows: Any, settings: Mapping[str, Any]) -> Finding:
    try:
        workflow, tokenizer = _make_workflow(settings), load_tokenizer(source.resolved())
        loaded = load_rows(rows)
        is_iterable = isinstance(loaded, IterableRows)
        checked = first_rows(loaded, NUM_CHECKED) if is_iterable else loaded
    except Exception as error:  # code of the config's files is run
        reason = " ".join(str(error).split())
        return Finding("note", subject, f"not tried: {type(error).__name__}: {reason}")
    try:
        workflow.check_prompts(enumerate(checked), tokenizer)
    except ConfigError as error:
        return Finding("problem", subject, str(error))
    return Finding("ok", subject, "one of each kind")


def _make_workflow(settings: Mapping[str, Any]) -> Any:
    """The workflow that a config describes."""
    from jsonargparse import ArgumentParser

    from sdp_lightning.workflows.workflow import RolloutWorkflow

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--workflow", type=RolloutWorkflow)
    given = {"workflow": dict(settings)}
    return parser.instantiate(parser.parse_object(given)).workflow  # type: ignore[no-any-return]
