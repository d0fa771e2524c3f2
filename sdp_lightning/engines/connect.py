"""From what a user writes as ``engine=`` to an object that samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sdp_lightning.engines.base import InferenceEngine

_REMOTE = ("vllm", "sglang")


def connect_engine(
    url: str | InferenceEngine, *, model: str | PreTrainedModel | None = None, **options: Any
) -> InferenceEngine:
    """An engine for ``url``, not started yet.

    Args:
        url: ``"embedded"`` samples in this process; an engine object is returned as it is.
        model: what ``"embedded"`` loads: a Hugging Face id, a folder, or a module, which is copied.
        **options: of the engine's constructor.

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
    if url.partition("://")[0] in _REMOTE:
        raise ConfigError(
            f"engine {url!r}: this version samples in the trainer's process only, it connects to "
            "no server. Use engine='embedded'."
        )
    raise ConfigError(
        f"engine {url!r} is not known. Known are 'embedded' and any object that is an engine."
    )
