"""From what a user writes as ``engine=`` to an object that samples."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

from sdp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sdp_lightning.engines.base import InferenceEngine
    from sdp_lightning.engines.server import ServerConfig

T = TypeVar("T")

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def connect_engine(
    url: str | InferenceEngine, *, model: str | PreTrainedModel | None = None, **options: Any
) -> InferenceEngine:
    """An engine for ``url``, not started yet.

    Args:
        url: ``"embedded"`` samples in this process; ``"vllm://h1:8000,h2:8000"`` on servers that
            run; ``"vllm://launch?replicas=2&max_model_len=512"`` starts servers, with the fields of
            :class:`~sdp_lightning.engines.server.ServerConfig`, and ends them with the run; an
            engine object is returned as it is.
        model: what ``"embedded"`` or a launched server loads: a Hugging Face id or a folder; for
            ``"embedded"`` also a module, which is copied.
        **options: of ``EmbeddedEngine``, or of
            :class:`~sdp_lightning.engines.remote.RemoteOptions`.

    Raises:
        ConfigError: if the URL means nothing here, or goes with no model or no options.
    """
    if not isinstance(url, str):
        if model is not None or options:
            given = list(options) if model is None else ["model", *options]
            raise ConfigError(
                f"{type(url).__name__} is an engine already; {', '.join(given)} would be ignored. "
                "Pass them to its constructor."
            )
        return url
    if url == "embedded":
        if model is None:
            raise ConfigError("engine 'embedded' needs model=: a model id, a folder or a module.")
        from sdp_lightning.engines.embedded import EmbeddedEngine

        return EmbeddedEngine(model, **options)
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "vllm":
        return _connect_vllm(rest, model=model, options=options)
    raise ConfigError(
        f"engine {url!r} is not known. Known are 'embedded', 'vllm://host:port,...', "
        "'vllm://launch?replicas=1' and any object that is an engine."
    )


def _connect_vllm(rest: str, *, model: Any, options: dict[str, Any]) -> InferenceEngine:
    from sdp_lightning.engines.options import RemoteOptions
    from sdp_lightning.engines.remote import RemoteInfEngine
    from sdp_lightning.engines.server import ManagedServers
    from sdp_lightning.engines.vllm import VLLMBackend

    settings = _from_fields(RemoteOptions, options)
    place, _, query = rest.partition("?")
    if place == "launch":
        servers = ManagedServers(_server_config(query, model))
        return RemoteInfEngine(servers, VLLMBackend(), options=settings)
    hosts = [host for host in place.rstrip("/").split(",") if host]
    if not hosts or query or not all(host.rpartition(":")[2].isdigit() for host in hosts):
        raise ConfigError(
            f"'vllm://{rest}' does not name servers. Write 'vllm://host:port,host:port' or "
            "'vllm://launch?replicas=1'."
        )
    if len(set(hosts)) < len(hosts):
        raise ConfigError(f"'vllm://{rest}' names a server twice.")
    far = [host for host in hosts if host.rpartition(":")[0] not in _LOOPBACK]
    if far and settings.api_key is None:
        raise ConfigError(
            f"{', '.join(far)} is on another host: whoever reaches it can change its weights. "
            "Start it with --api-key and pass api_key."
        )
    return RemoteInfEngine([f"http://{h}" for h in hosts], VLLMBackend(), options=settings)


def _server_config(query: str, model: Any) -> ServerConfig:
    from sdp_lightning.engines.server import ServerConfig

    values: dict[str, Any] = {}
    kinds = {field.name: str(field.type) for field in dataclasses.fields(ServerConfig)}
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"vllm://launch?{query}: write name=value&name=value.") from error
    for name, text in pairs:
        kind = kinds.get(name, "")
        try:
            if kind.startswith("tuple"):
                values[name] = tuple(text.split(","))
            elif kind.startswith("int"):
                values[name] = int(text)
            else:
                values[name] = float(text) if kind.startswith("float") else text
        except ValueError as error:
            raise ConfigError(f"vllm://launch: {name}={text!r} is no {kind}.") from error
    if isinstance(model, str):
        values.setdefault("model", model)
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
