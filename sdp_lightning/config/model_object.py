"""Model objects in place of an id or folder: what is read of them, and how they are told apart."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdp_lightning.config.eos_tokens import eos_tokens_in
from sdp_lightning.config.model_source import ModelObject, ModelSource, template_text
from sdp_lightning.config.pretrained import config_digest, load_tokenizer, tokens_digest
from sdp_lightning.config.weights_digest import weights_digest
from sdp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def object_source(source: ModelSource) -> ModelObject:
    """The source of the objects that a ModelSource was given.

    Raises:
        ConfigError: if there is no tokenizer, or the model holds what would not be trained.
    """
    model: Any = source.name
    _refuse_changed(model, source)
    plain = replace(source, name=str(model.name_or_path or ""), tokenizer=None)
    tokenizer = _tokenizer(source, plain)
    # foreign: a tokenizer may be none of transformers
    place = str(getattr(tokenizer, "name_or_path", "") or "")
    template = getattr(tokenizer, "chat_template", None)  # foreign: see above
    return ModelObject(
        plain.name,
        trust_remote_code=source.trust_remote_code,
        tokenizer=place if place and place != plain.name else None,
        chat_template=template if isinstance(template, str) else None,
        digests={
            "config": config_digest(model.config),
            "tokens": tokens_digest(tokenizer),
            "weights": weights_digest(model.state_dict()),
        },
        dtype=str(model.dtype).removeprefix("torch."),
        eos_token_ids=_eos_token_ids(model),
        given=(model, tokenizer),
    )


def _tokenizer(source: ModelSource, plain: ModelSource) -> Any:
    """The tokenizer object of ``source``, or the one that is read from where it says."""
    given = source.tokenizer
    if given is None and not plain.name:
        raise ConfigError(
            f"{type(source.name).__name__} was read from nowhere, so its tokenizer is not known: "
            "give ModelSource(model, tokenizer=tokenizer)."
        )
    if given is None or isinstance(given, str | Path):
        own = plain if given is None else replace(plain, name=given)
        return load_tokenizer(own.resolved())
    if source.chat_template is None:
        return given
    tokenizer = copy.deepcopy(given)
    tokenizer.chat_template = template_text(source.chat_template)
    return tokenizer


def _refuse_changed(model: Any, source: ModelSource) -> None:
    kind = type(model).__name__
    if source.revision is not None:
        raise ConfigError(f"revision has no effect on a model object ({kind}): leave it out.")
    # foreign: modules of peft and of transformers
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConfigError(
            f"the {kind} holds an adapter already: merge it (merge_and_unload() of peft), and "
            "train one with lora=LoRAConfig()."
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise ConfigError(f"the {kind} has weights on the meta device, which have no values.")


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    # foreign: models without generation have no such config
    generation: Any = getattr(model, "generation_config", None)
    found: Mapping[str, Any] = {} if generation is None else generation.to_dict()
    return eos_tokens_in(found, model.config.to_dict()).ids
