"""Checks that model, tokenizer and chat template of a config are on this machine.

Only files are looked for and read: no code of a model is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from sdp_lightning.cli.doctor.finding import Finding
from sdp_lightning.config.eos_tokens import describe_tokens, read_eos_tokens
from sdp_lightning.config.model_source import ModelSource, template_text
from sdp_lightning.errors import ConfigError

_WITH_CODE = ("config.json", "tokenizer_config.json")  # files that may name code


def read_source(settings: Mapping[str, Any]) -> ModelSource | Finding:
    """What the model is read from, by the config's ``model`` part, or why that cannot be said."""
    model: object = settings.get("model")
    if not isinstance(model, (str, Mapping)):
        text = f"model.model is {model!r}: an id or a folder is needed."
        return Finding("problem", "model", text)
    try:
        given = model if isinstance(model, str) else ModelSource(**cast("dict[str, Any]", model))
        return ModelSource.of(given, settings.get("model_kwargs") or {})[0]
    except (ConfigError, TypeError) as error:
        return Finding("problem", "model", str(error))


def check_source(source: ModelSource) -> Iterator[Finding]:
    """Findings about the model, and about what is read beside it if it is set."""
    yield _find("model", str(source.name), source.revision)
    folder = model_folder(source)
    if source.revision is not None and Path(source.name).is_dir():
        text = f"revision={source.revision!r} has no effect on a folder: leave it out."
        yield Finding("problem", "revision", text)
    if folder is not None and (code := _own_code(folder)):
        trusted = source.trust_remote_code
        text = f"{code} of the model is run" if trusted else f"{code} of the model is not run"
        text += "." if trusted else ", which a type that transformers lacks needs: read it, then "
        text += "" if trusted else "set model.model.trust_remote_code."
        yield Finding("ok" if trusted else "note", "remote code", text)
    if folder is not None:
        yield _check_ends(folder)
    if source.tokenizer is not None:
        yield _find("tokenizer", str(source.tokenizer), None)
    if source.chat_template is not None:
        try:
            text = f"{len(template_text(source.chat_template))} characters"
            yield Finding("ok", "chat template", text)
        except ConfigError as error:
            yield Finding("problem", "chat template", str(error))


def model_folder(source: ModelSource) -> Path | None:
    """The model's folder, or that of its revision in the hub's cache; None if it is not here."""
    name = str(source.name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name[:1] in "/.~" or ":" in name:
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=source.revision)
    except ValueError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _find(what: str, name: str, revision: str | None) -> Finding:
    file, colon, _ = name.rpartition(":")
    path = Path(file if colon else name).expanduser()
    if (colon and file.endswith(".py")) or name[:1] in "/.~":
        here = path.is_file() if colon else path.is_dir()
        text = name if here else f"there is no {path} (looked for {path.absolute()})."
        return Finding("ok" if here else "problem", what, text)
    if colon or path.is_dir():
        return Finding("ok", what, name)
    from huggingface_hub import try_to_load_from_cache

    shown = name if revision is None else f"{name} at {revision}"
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError as error:
        return Finding("problem", what, f"{name} is neither a folder nor an id: {error}")
    if isinstance(cached, str):
        return Finding("ok", what, f"{shown}, in the hub's cache")
    return Finding("note", what, f"{shown} is fetched from the hub by the first run.")


def _check_ends(folder: Path) -> Finding:
    """The tokens that end a turn, beside the tokenizer's own."""
    try:
        found = read_eos_tokens(folder)
        text = f"{describe_tokens(found.ids, folder)} ({found.file})"
    except ConfigError as error:
        return Finding("problem", "ends of turns", str(error))
    if not found.ids:
        return Finding("note", "ends of turns", "the model's folder names no eos_token_id.")
    return Finding("ok", "ends of turns", text)


def _own_code(folder: Path) -> str:
    """Names of the Python files that the folder's settings name; empty if there are none."""
    found: set[str] = set()
    for name in _WITH_CODE:
        try:
            read: object = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        settings = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
        for places in dict(settings.get("auto_map") or {}).values():
            listed = places if isinstance(places, list) else [places]
            found |= {f"{str(place).rpartition('.')[0]}.py" for place in listed if place}
    return ", ".join(sorted(found))
