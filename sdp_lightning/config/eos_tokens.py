"""The end-of-sequence tokens that a model's folder names: where a turn of the model ends.

``generation_config.json`` has all of them (Gemma's ``<end_of_turn>``, Phi-3's ``<|end|>``), while
the tokenizer has one. They are read from JSON, so no code of a model is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sdp_lightning.config.model_source import ModelObject, ModelSource, quiet_transformers
from sdp_lightning.errors import ConfigError

GENERATION_FILE, CONFIG_FILE = "generation_config.json", "config.json"
_TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class EosTokens:
    """End-of-sequence tokens, and the file that names them; empty if none does."""

    ids: tuple[int, ...] = ()
    file: str = ""


def load_eos_tokens(source: ModelSource) -> EosTokens:
    """The end-of-sequence tokens of ``source`` (resolved), from its folder or the hub.

    Raises:
        ConfigError: if a file names what is no token id.
    """
    if isinstance(source, ModelObject):
        return EosTokens(tuple(source.eos_token_ids), "the model object")

    from transformers.utils.hub import cached_file

    def find(name: str) -> Path | None:
        try:
            with quiet_transformers():
                found: Any = cached_file(str(source.name), name, revision=source.revision)
        except OSError:  # there is no such file; without a model, loading it says so
            return None
        return None if found is None else Path(found)

    return _read(find(GENERATION_FILE), find(CONFIG_FILE))


def read_eos_tokens(folder: Path) -> EosTokens:
    """The end-of-sequence tokens of a model's folder. ``ConfigError`` as above."""
    files = [folder / name for name in (GENERATION_FILE, CONFIG_FILE)]
    return _read(*(file if file.is_file() else None for file in files))


def describe_tokens(ids: Sequence[int], folder: Path) -> str:
    """Token ids with their texts, as far as the folder's tokenizer files name them."""
    texts: dict[int, str] = {}
    for name in _TOKEN_FILES:
        settings = _settings(folder / name) if (folder / name).is_file() else {}
        listed: Any = settings.get("added_tokens") or ()
        texts |= {int(token["id"]): str(token["content"]) for token in listed}
        named: Any = settings.get("added_tokens_decoder") or {}
        texts |= {int(key): str(token["content"]) for key, token in named.items()}
    return ", ".join(f"{i} {texts[i]}" if i in texts else str(i) for i in ids)


def _read(generation: Path | None, config: Path | None) -> EosTokens:
    return eos_tokens_in(
        {} if generation is None else _settings(generation),
        {} if config is None else _settings(config),
    )


def eos_tokens_in(generation: Mapping[str, Any], settings: Mapping[str, Any]) -> EosTokens:
    """Those of the first configuration that has some, as transformers chooses.

    Args:
        generation: the generation configuration.
        settings: the model's.

    Raises:
        ConfigError: if one names what is no token id.
    """
    text_part: Any = settings.get("text_config") or {}  # of a vision-language model
    known = settings.get("vocab_size", text_part.get("vocab_size"))
    places: list[tuple[str, Any]] = [
        (GENERATION_FILE, generation),
        (CONFIG_FILE, settings),
        (CONFIG_FILE, text_part),
    ]
    for file, values in places:
        named = values.get("eos_token_id")
        ids: list[Any] = named if isinstance(named, list) else [] if named is None else [named]
        if bad := [i for i in ids if type(i) is not int or i < 0]:
            raise ConfigError(f"{file} of the model names {bad[0]!r} as eos_token_id: no token id.")
        # Some files name tokens that the model cannot write, and a server would refuse.
        if ids := [i for i in dict.fromkeys(ids) if not isinstance(known, int) or i < known]:
            return EosTokens(tuple(ids), file)
    return EosTokens()


def _settings(file: Path) -> Mapping[str, Any]:
    try:
        read: object = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from error
    return cast("Mapping[str, Any]", read) if isinstance(read, dict) else {}
