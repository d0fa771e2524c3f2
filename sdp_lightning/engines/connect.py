"""The factory of engines, from what a user writes as ``engine=``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

from sdp_lightning.config.model_source import ModelObject, ModelSource
from sdp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sdp_lightning.engines.protocol import InferenceEngine, SharedServerEngine
    from sdp_lightning.engines.servers.managed import ServerConfig
    from sdp_lightning.weights.protocol import TransportName

T = TypeVar("T")


def connect_engine(
    url: str | InferenceEngine,
    *,
    model: str | ModelSource | PreTrainedModel | None = None,
    **options: Any,
) -> InferenceEngine:
    """Make an engine for ``url``, not started yet.

    Args:
        url: ``"embedded"`` samples in this process; ``"vllm://h1:8000,https://h2/prefix"`` on
            running servers; ``"vllm://launch?replicas=2"`` starts servers, with the fields of
            :class:`~sdp_lightning.engines.servers.managed.ServerConfig`, and ends them with the
            run; ``"sglang://h1:30000"`` samples on running SGLang servers; ``"vllms://"`` and
            ``"sglangs://"`` speak https; an engine object is returned unchanged.
        model: the model of ``"embedded"`` or of a launched server: a Hugging Face id, a folder or a
            ``ModelSource``; for ``"embedded"`` also a module, which is copied.
        **options: settings of ``EmbeddedEngine``, or of
            :class:`~sdp_lightning.engines.remote.options.RemoteOptions`.

    Raises:
        ConfigError: if the URL is not known, the model is missing, or an option does not apply.
    """
    if not isinstance(url, str):
        if model is not None or options:
            ignored = ", ".join(options if model is None else ["model", *options])
            raise ConfigError(
                f"{type(url).__name__} is an engine already; {ignored} would be ignored. "
                "Pass them to its constructor."
            )
        return url
    if url == "embedded":
        if model is None:
            raise ConfigError("engine 'embedded' needs model=: a model id, a folder or a module.")
        from sdp_lightning.engines.embedded import EmbeddedEngine

        return EmbeddedEngine(model, **options)
    scheme, separator, rest = url.strip().partition("://")
    scheme = scheme.lower()
    if separator and scheme in ("vllm", "vllms", "sglang", "sglangs"):
        return _connect_servers(scheme, rest, model=model, options=options)
    from sdp_lightning.engines.remote.addresses import redacted

    kind = " Say the kind of server: 'vllm://https://host/path'." if "http" in scheme else ""
    raise ConfigError(
        f"engine {redacted(url)!r} is not known. Known are 'embedded', 'vllm://host:port,...', "
        "'vllm://launch?replicas=1', 'sglang://host:port,...' and any object that is an engine."
        + kind
    )


def _connect_servers(
    scheme: str, rest: str, *, model: Any, options: dict[str, Any]
) -> SharedServerEngine:
    from sdp_lightning.engines.remote.addresses import server_urls
    from sdp_lightning.engines.remote.engine import RemoteInfEngine
    from sdp_lightning.engines.remote.options import RemoteOptions
    from sdp_lightning.engines.remote.sglang import SGLangBackend
    from sdp_lightning.engines.remote.vllm import VLLMBackend
    from sdp_lightning.engines.servers.managed import ManagedServers

    settings = _from_fields(RemoteOptions, options)
    if scheme.startswith("sglang"):
        urls = server_urls(scheme, rest, "; SGLang servers are not started from here")
        return RemoteInfEngine(urls, SGLangBackend(), options=settings)
    address, _, query = rest.partition("?")
    if address == "launch" and scheme == "vllm":
        servers = ManagedServers(_server_config(query, model, settings.transport))
    else:
        servers = server_urls(scheme, rest, " or 'vllm://launch?replicas=1'")
    return RemoteInfEngine(servers, VLLMBackend(), options=settings)


def _server_config(query: str, model: Any, transport: TransportName) -> ServerConfig:
    from sdp_lightning.engines.servers.managed import ServerConfig

    values: dict[str, Any] = {"transport": transport}
    kinds = {field.name: str(field.type) for field in dataclasses.fields(ServerConfig)}
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"vllm://launch?{query}: write name=value&name=value.") from error
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"vllm://launch?{query}: {', '.join(twice)} is given twice.")
    for name, text in pairs:
        kind = kinds.get(name, "")
        try:
            if kind.startswith("tuple"):
                values[name] = tuple(text.split(","))
            elif kind.startswith("int"):
                values[name] = int(text)
            elif kind == "bool":
                values[name] = {"true": True, "false": False}.get(text.lower(), text)
            else:
                values[name] = float(text) if kind.startswith("float") else text
        except ValueError as error:
            raise ConfigError(f"vllm://launch: {name}={text!r} is no {kind}.") from error
    if isinstance(model, (str, ModelSource)) and "model" not in values:
        source = ModelSource.of(model, {})[0].resolved()
        if isinstance(source, ModelObject):
            raise ConfigError(
                "vllm://launch starts servers, which read the model from a folder, and this one is "
                "an object of this process: save model and tokenizer with save_pretrained(folder), "
                "and give the module that folder."
            )
        known = {"model": source.name, "tokenizer": source.tokenizer, **source.options}
        values = known | values
    if "model" not in values:
        raise ConfigError("vllm://launch needs a model: an id or a folder.")
    return _from_fields(ServerConfig, values)


def _from_fields(kind: type[T], values: dict[str, Any]) -> T:
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(
            f"{kind.__name__} has no {', '.join(unknown)}. It has {', '.join(known)}."
        )
    return kind(**values)
