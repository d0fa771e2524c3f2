"""What is read of a model by transformers: configuration, tokenizer and weights, in one place each.

What transformers refuses is a ``ConfigError`` of one line, with the remedy.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdp_lightning.config.model_source import ModelObject, ModelSource, quiet_transformers
from sdp_lightning.config.weights_digest import weights_digest
from sdp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_NAMED = 4
_SHOWN = 300  # characters of an error of transformers
# Of a configuration, what is no part of the model: where it is from, and what a forward returns.
_NO_PART = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict"),
)
_CAPPED_SCORES = "attn_logit_softcapping"  # of configurations; transformers' sdpa leaves it out
# Arguments of from_pretrained that say where the files of a model are.
_PLACES = (
    *("cache_dir", "code_revision", "force_download", "gguf_file", "local_files_only"),
    *("proxies", "subfolder", "token"),
)
# Classes of transformers that generate text, the one that loads most of a checkpoint first.
_AUTO_CLASSES = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")


@contextlib.contextmanager
def _explained(what: str, name: str) -> Generator[None]:
    """Context in which what transformers refuses is a ConfigError of one line."""
    try:
        with quiet_transformers():
            yield
    except (ValueError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        if "trust_remote_code" in str(error):  # the argument that transformers asks for
            raise ConfigError(
                f"{what} of {name!r} comes with Python code of its own, which is not run unless "
                "you trust it. Read it, then give the module ModelSource(..., "
                "trust_remote_code=True)."
            ) from error
        reason = " ".join(str(error).split())
        short = reason if len(reason) <= _SHOWN else f"{reason[:_SHOWN]}..."
        raise ConfigError(f"{what} of {name!r} cannot be loaded: {short}") from error


def load_config(source: ModelSource, options: Mapping[str, Any] | None = None) -> Any:
    """The model's configuration.

    Args:
        source: resolved.
        options: of ``from_pretrained``; those that say where files are have an effect.

    Raises:
        ConfigError: if it cannot be read, or comes with code that is not trusted.
        OSError: if there is no such model.
    """
    if isinstance(source, ModelObject) and source.given is not None:
        return copy.deepcopy(source.given[0].config)

    from transformers import AutoConfig

    where = {name: value for name, value in (options or {}).items() if name in _PLACES}
    with _explained("the configuration", str(source.name)):
        config: Any = AutoConfig.from_pretrained(source.name, **source.options, **where)
    if isinstance(source, ModelObject):
        source.require("config", config_digest(config))
    return config


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of ``source`` (resolved), with its chat template.

    Raises:
        ConfigError: if it cannot be loaded, comes with code that is not trusted, or the chat
            template is no Jinja.
        OSError: if there is no such repository.
    """
    if isinstance(source, ModelObject) and source.given is not None:
        return source.given[1]

    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers import AutoTokenizer

    name = str(source.tokenizer or source.name)
    options = source.options if source.tokenizer is None else replace(source, revision=None).options
    with _explained("the tokenizer", name):
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
    if source.tokenizer is not None:
        _check_vocabulary(tokenizer, source)
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"chat_template is no Jinja: {error.message} (line {error.lineno})."
            ) from error
        except TemplateError:
            pass  # it refuses this conversation, and may write others
    if isinstance(source, ModelObject):
        source.require("tokens", tokens_digest(tokenizer))
    return tokenizer


def config_digest(config: Any) -> str:
    """Digest of a model's configuration, but for where it is from and what training leaves out."""
    settings = {n: v for n, v in config.to_dict().items() if n not in _NO_PART}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def tokens_digest(tokenizer: Any) -> str:
    """Digest of the tokens of a tokenizer; of its class, if it does not list them."""
    # foreign: see count_tokens
    get_vocab = getattr(tokenizer, "get_vocab", None)
    known = type(tokenizer).__name__ if get_vocab is None else sorted(get_vocab().items())
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def count_tokens(tokenizer: Any) -> int | None:
    """Number of token ids up to the last that has a text; None if the tokenizer does not say."""
    # foreign: workflows may be given a tokenizer that is none of transformers
    get_vocab = getattr(tokenizer, "get_vocab", None)
    return None if get_vocab is None else max(get_vocab().values()) + 1


def _check_vocabulary(tokenizer: Any, source: ModelSource) -> None:
    size: int = load_config(source).get_text_config(decoder=True).vocab_size
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ConfigError(
            f"the tokenizer {str(source.tokenizer)!r} has ids up to {largest}, and the model "
            f"{str(source.name)!r} embeds {size} tokens. Use one that it was trained with."
        )


def import_code(source: ModelSource) -> None:
    """Import the classes that a model's own code has, so that they can be unpickled."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    # foreign: model configurations differ
    remote: Mapping[str, str] = getattr(load_config(source), "auto_map", None) or {}
    for place in remote.values():
        get_class_from_dynamic_module(place, str(source.name), revision=source.revision)


def auto_classes(config: Any) -> list[Any]:
    """Classes of transformers that load a model of ``config``, each for another model class.

    The first has most of the checkpoint: beside a configuration for text there may be others, of a
    vision tower.

    Raises:
        ConfigError: if there is none: no language model.
    """
    import transformers

    # foreign: model configurations differ
    remote: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    found: dict[object, Any] = {}
    for name in _AUTO_CLASSES if config.sub_configs else reversed(_AUTO_CLASSES):
        auto = getattr(transformers, name)
        local: Any = auto._model_mapping
        if name in remote:
            found.setdefault(remote[name], auto)
        elif type(config) in local:
            found.setdefault(local[type(config)], auto)
    if not found:
        raise ConfigError(
            f"model type {config.model_type!r} is no language model: none of "
            f"{', '.join(_AUTO_CLASSES)} loads it. Use a causal LM."
        )
    return list(found.values())


def beside_text(model: Any) -> set[str]:
    """Names of the weights that no text passes through: a vision tower's; none in a text model."""
    if not model.config.sub_configs:
        return set()
    decoder = model.get_decoder()
    parts = (decoder, model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(w) for part in parts if part is not None for w in part.parameters()}
    text -= {id(w) for layer in _idle_layers(model, decoder) for w in layer.parameters()}
    return {name for name, weight in model.named_parameters() if id(weight) not in text}


def _idle_layers(model: Any, decoder: Any) -> list[Any]:
    """Layers that do not run without images, such as those that attend to them.

    One forward pass over a few tokens tells, where layers are of more than one class.
    """
    # foreign: decoders differ
    layers = list(getattr(decoder, "layers", ()))
    if len({type(layer) for layer in layers}) < 2 or model.device.type == "meta":
        return []
    called: set[int] = set()

    def note(module: Any, _: object) -> None:
        called.add(id(module))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        model(input_ids=model.dummy_inputs["input_ids"][:1].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [layer for layer in layers if id(layer) not in called]


def load_causal_lm(
    source: ModelSource | str, *, dtype: Any, options: Mapping[str, Any]
) -> PreTrainedModel:
    """The causal LM of ``source``, each of whose weights comes from its checkpoint.

    A vision-language model is loaded whole, and without images computes as the causal LM that it
    contains. A model that caps its attention scores runs with eager attention, unless ``options``
    choose another: transformers' own choice, sdpa, would leave the cap out.

    Args:
        source: resolved, or an id or folder.
        dtype: of the weights, unless ``options`` say otherwise.
        options: passed to ``from_pretrained``.

    Raises:
        ConfigError: if it is no language model, comes with code that is not trusted, or the
            checkpoint lacks weights of the model, or has others; names them. A head that is tied to
            the embedding is not lacking.
    """
    source = ModelSource(source) if isinstance(source, str) else source
    if isinstance(source, ModelObject):
        options = {"dtype": source.dtype, **options}
        if source.given is not None:
            return _keep_score_cap(copy.deepcopy(source.given[0]), options)
    name = str(source.name)
    settings = {"dtype": dtype, **source.options, **options, "output_loading_info": True}
    refusal: ConfigError | None = None
    for auto in auto_classes(load_config(source, options)):
        try:
            with _explained("the model", name):
                model, report = auto.from_pretrained(name, **settings)
        except (TypeError, AttributeError) as error:
            if not options:
                raise
            text = f"model_kwargs={dict(options)!r} do not fit the model {name!r}: {error}"
            raise ConfigError(text) from error
        lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        found = _refusal_of(name, type(model).__name__, lacking, report["unexpected_keys"])
        if found is None:
            break
        refusal = refusal or found
        if not lacking >= beside_text(model):  # else it may be the text part alone
            raise refusal
    else:
        assert refusal is not None
        raise refusal
    if isinstance(source, ModelObject):
        source.require("weights", weights_digest(model.state_dict()))
    return _keep_score_cap(model, options)


def _keep_score_cap(model: Any, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model with an attention that caps its scores as its configuration says."""
    config: Any = model.config.get_text_config(decoder=True)
    # foreign: model configurations differ
    capped = getattr(config, _CAPPED_SCORES, None) is not None
    if capped and "attn_implementation" not in options:
        with quiet_transformers():
            model.set_attn_implementation("eager")
    return model


def _refusal_of(
    name: str, kind: str, lacking: Iterable[str], surplus: Iterable[str]
) -> ConfigError | None:
    if lacking:
        return ConfigError(
            f"the checkpoint of {name!r} lacks weights of {kind}, which would be random: "
            f"{_some(lacking)}. Base models and reward models have no language-model head, and a "
            "folder may be half copied: use the whole checkpoint of a causal LM."
        )
    if surplus:
        return ConfigError(
            f"the checkpoint of {name!r} has weights that {kind} has not, and they would be "
            f"lost: {_some(surplus)}. If they are not needed, load it with AutoModelForCausalLM "
            "and train what its save_pretrained() writes."
        )
    return None


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - _NUM_NAMED} more" if len(found) > _NUM_NAMED else ""
    return ", ".join(found[:_NUM_NAMED]) + more
