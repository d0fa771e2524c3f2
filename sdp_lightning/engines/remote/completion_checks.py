"""What a completion must be for its request. Whatever is not is its server's error."""

from __future__ import annotations

from collections.abc import Sequence

from sdp_lightning.engines.protocol import GenerationRequest
from sdp_lightning.engines.remote.backend import Chunk, Completion, assemble, server_stop_texts
from sdp_lightning.engines.remote.replicas import Replica
from sdp_lightning.engines.remote.responses import ServerError, describe, reading_answer
from sdp_lightning.errors import EngineError


def check_length(request: GenerationRequest, replica: Replica) -> None:
    """Refuse a request that is longer than the server allows."""
    assert replica.info is not None
    tokens, budget = int(request.token_ids.size), request.params.max_new_tokens
    if tokens + budget > replica.info.max_length:
        raise EngineError(
            f"a prompt of {tokens} tokens and max_new_tokens={budget} do not fit the "
            f"{replica.info.max_length} tokens of {replica.url}. Shorten one of them, or start the "
            "server with a larger --max-model-len (vLLM) or --context-length (SGLang)."
        )


def assemble_valid(chunks: Sequence[Chunk], version: int, replica: Replica) -> Completion:
    """Join chunks of ``replica``, whose error it is if they do not fit together."""
    with reading_answer(replica.url):
        return assemble(chunks, version)


def check_progress(completion: Completion, replica: Replica) -> None:
    """Refuse an interruption without a token: outside a publish it would be followed by others."""
    if completion.finish_reason == "abort" and not completion.spans:
        raise ServerError(f"{replica.url} ended a request without a token outside a publish.")


def check_budget(completion: Completion, request: GenerationRequest, replica: Replica) -> None:
    """Refuse more tokens than asked, fewer that end by length, none or a text that end at a stop.

    The text is one that was not asked for.
    """
    found = sum(len(span.token_ids) for span in completion.spans)
    asked, reason = request.params.max_new_tokens, completion.finish_reason
    least = {"length": asked, "stop": 1}.get(reason, 0)
    if not least <= found <= asked:
        raise ServerError(
            f"{replica.url} answered {found} tokens that end by {reason!r}, of {asked} asked for."
        )
    text = completion.stop_text
    if text is not None and text not in server_stop_texts(request):
        raise ServerError(
            f"{replica.url} ended a request at {describe(text)}, which is none of its stop texts."
        )


def check_versions(completion: Completion, oldest: int, newest: int, replica: Replica) -> None:
    """Refuse tokens whose version is not among ``oldest`` to ``newest``."""
    possible = {str(version) for version in range(oldest, newest + 1)}
    for span in completion.spans:
        if span.version not in possible:
            raise ServerError(
                f"{replica.url} sampled under version {describe(span.version)} and not under "
                f"{oldest} to {newest}: it was restarted, or another client updates it."
            )
