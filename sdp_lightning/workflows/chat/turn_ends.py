"""Whether a completion ends where the chat template ends a turn."""

from __future__ import annotations

from sdp_lightning.errors import ConfigError, RolloutError
from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.chat.messages import as_messages
from sdp_lightning.workflows.chat.rendering import RefusedError
from sdp_lightning.workflows.chat.settings import ChatSettings
from sdp_lightning.workflows.chat.tokens import encode_after, is_special
from sdp_lightning.workflows.workflow import Tokenizer


def unstopped_turn(tokenizer: Tokenizer, settings: ChatSettings, params: SamplingParams) -> str:
    """What is wrong if no completion ends where the chat template ends a turn; empty if one does.

    A turn ends with the last special token of the template's, or with the first one that follows,
    as of the next speaker.

    Args:
        tokenizer: tokenizer of the policy.
        settings: how turns are written.
        params: sampling settings with all stops.
    """
    template = settings.template(tokenizer)
    try:
        closing = template.closing(tokenizer)
        header = template.between(as_messages("?"), tokenizer).header
    except (RefusedError, RolloutError, ConfigError):  # turns are never written, or that is said
        return ""
    own, following = (
        [token for token in encode_after((), text, tokenizer) if is_special(token, tokenizer)]
        for text in (closing, header)
    )
    ends = [*own, *following[:1]]
    is_text = any(text in closing or text in header for text in params.stop_texts)
    if not ends or is_text or set(ends) & set(params.stop_token_ids):
        return ""
    text = tokenizer.decode((own or following)[-1 if own else 0 :][:1], skip_special_tokens=False)
    return (
        f"the chat template ends a turn with {text}, and no completion ends there, as neither the "
        "tokenizer nor the model's folder names it: the policy may write on to max_new_tokens. "
        "Add it to eos_token_id of generation_config.json, or to stop."
    )
