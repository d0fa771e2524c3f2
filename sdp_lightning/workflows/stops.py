"""How a completion ends: the stops of its sampling settings, and its text up to a stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sdp_lightning.errors import ConfigError
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.workflow import Tokenizer

_BEFORE = "a"  # what a stop text follows, where it is one token in context only


def with_stops(
    params: SamplingParams,
    tokenizer: Tokenizer,
    stop: str | Iterable[str] = (),
    eos_token_ids: Sequence[int] = (),
) -> SamplingParams:
    """Sampling settings that also stop at the end of text and at the texts of ``stop``.

    Args:
        params: settings that name further stops.
        tokenizer: tokenizer of the policy, whose end of text is added.
        stop: a text, or several; one that is a token of its own is added as such, too.
        eos_token_ids: those of the model's folder (``RolloutSession.eos_token_ids``), added unless
            ``params.stop_at_model_eos`` is off.

    Raises:
        ConfigError: if a text is empty, or no completion can hold it.
    """
    tokens = dict.fromkeys(params.stop_token_ids)
    if tokenizer.eos_token_id is not None:
        tokens[tokenizer.eos_token_id] = None
    if params.stop_at_model_eos:
        tokens |= dict.fromkeys(eos_token_ids)
    texts = dict.fromkeys((*params.stop_texts, *stop_texts(stop)))
    for text in texts:
        if (token := _as_token(text, tokenizer)) is not None:
            tokens[token] = None
    return replace(params, stop_token_ids=tuple(tokens), stop_texts=tuple(texts))


def stop_texts(stop: str | Iterable[str]) -> tuple[str, ...]:
    """The texts that ``stop`` is. ``ConfigError`` if one is empty."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    return SamplingParams(stop_texts=texts).stop_texts


def _as_token(text: str, tokenizer: Tokenizer) -> int | None:
    """The token that is ``text``, where it follows other text if not alone; None: there is none.

    Raises:
        ConfigError: if what the tokenizer writes never holds the text, such as an unknown one.
    """
    alone = tokenizer.encode(text, add_special_tokens=False)
    before = tokenizer.encode(_BEFORE, add_special_tokens=False)
    whole = tokenizer.encode(_BEFORE + text, add_special_tokens=False)
    written = [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in (alone, whole)]
    if not any(text in each for each in written):
        raise ConfigError(
            f"the tokenizer writes the stop text {text!r} as {written[0]!r}, so no completion ends "
            "with it. Leave it out, or use what is written."
        )
    if len(alone) != 1:
        alone = whole[-1:] if whole[:-1] == before else []
    is_token = bool(alone) and text in tokenizer.decode(alone, skip_special_tokens=False)
    return alone[0] if is_token else None


def cut_at_stop(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    stop_texts: Sequence[str],
    *,
    keep_special_tokens: bool,
    include_stop_text: bool,
) -> str | None:
    """The text of a completion up to the first stop text in it; None if there is none.

    Args:
        tokens: of a completion; the last one completes the stop text.
        tokenizer: tokenizer of the policy.
        stop_texts: texts that end a completion.
        keep_special_tokens: whether special tokens are part of the text.
        include_stop_text: whether the stop text itself is part of it.
    """
    if not stop_texts:
        return None
    kept = list(tokens)
    text = tokenizer.decode(kept, skip_special_tokens=False)
    ends = [(text.index(stop) + len(stop), stop) for stop in stop_texts if stop in text]
    if not ends:
        return None
    end, stop = min(ends, key=lambda found: found[0])
    text = text[: end if include_stop_text else end - len(stop)]
    if keep_special_tokens:
        return text
    # The tokens that hold the text, and what the last of them has beyond it.
    while kept and tokenizer.decode(kept[:-1], skip_special_tokens=False).startswith(text):
        kept.pop()
    beyond = tokenizer.decode(kept, skip_special_tokens=False)[len(text) :]
    plain = tokenizer.decode(kept, skip_special_tokens=True)
    if not beyond or not tokenizer.decode(kept[-1:], skip_special_tokens=True):
        return plain
    return plain[: len(plain) - len(beyond)]
