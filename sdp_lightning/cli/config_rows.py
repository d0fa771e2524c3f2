"""The rows of a config, checked by its workflow and tokenizer as a run checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from jsonargparse import ArgumentError, ArgumentParser

from sdp_lightning.cli.kept_texts import keep_texts
from sdp_lightning.config.model_limits import max_positions
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import load_config, load_tokenizer
from sdp_lightning.errors import ConfigError
from sdp_lightning.prompts.iterable_rows import IterableRows
from sdp_lightning.prompts.sources import NUM_CHECKED, first_rows, load_rows
from sdp_lightning.rollout.row_checks import RowChecks
from sdp_lightning.workflows.workflow import RolloutWorkflow


def checked_rows(data: Mapping[str, Any], what: str, source: ModelSource) -> RowChecks:
    """The rows of one setting, read and judged, for the engine that the config names.

    Of rows that are read one after another, these are the first few.

    Args:
        data: the config's ``data`` part.
        what: ``"prompts"`` or ``"val_prompts"``.
        source: resolved: what the model is read from.

    Raises:
        ConfigError: if rows, workflow or tokenizer cannot be read.
    """
    loaded = load_rows(data[what])
    rows = first_rows(loaded, NUM_CHECKED) if isinstance(loaded, IterableRows) else loaded
    settings = data.get("val_workflow") if what == "val_prompts" else None
    workflow = make_workflow(settings or data.get("workflow"))
    rollout: Mapping[str, Any] = data.get("rollout") or {}
    try:
        return RowChecks(
            *(rows, workflow, load_tokenizer(source)),
            mode=rollout.get("prompts_check", "error"),
            what=what,
            max_length=longest_sequence(data, source),
        )
    finally:
        workflow.close()


def longest_sequence(data: Mapping[str, Any], source: ModelSource) -> int | None:
    """Tokens of the longest sequence of the config's engine; None if only its servers know."""
    engine = str(data.get("engine") or "embedded")
    options: Mapping[str, Any] = data.get("engine_options") or {}
    if engine == "embedded":
        from sdp_lightning.engines.embedded.model_checks import DEFAULT_LENGTH  # slow to import

        positions = max_positions(load_config(source).get_text_config(decoder=True))
        return options.get("max_length") or min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
    (given,) = parse_qs(engine.partition("?")[2]).get("max_model_len", [""])[-1:]
    return int(given) if given.isdigit() else None


def make_workflow(settings: Any) -> RolloutWorkflow:
    """The workflow that a config describes. ``ConfigError`` if it cannot be made."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RolloutWorkflow, "workflow", required=True)
    try:
        config = parser.parse_object({"workflow": keep_texts(settings)})
        made: Any = parser.instantiate(config)
        return made.workflow
    except ArgumentError as error:
        raise ConfigError(f"data.workflow cannot be made: {error}") from error
