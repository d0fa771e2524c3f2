"""Log-probs of a prompt on several servers, of which some may not give them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from sdp_lightning.engines.remote.replicas import Replica
from sdp_lightning.engines.remote.server_client import ServerClient
from sdp_lightning.errors import EngineError

logger = logging.getLogger(__name__)


async def score_prompt(
    client: ServerClient, replicas: Sequence[Replica], token_ids: list[int]
) -> dict[str, tuple[float, ...]]:
    """Log-probs of ``token_ids`` but the first on each of ``replicas``, keyed by URL.

    A server that does not give them is left out and stays in service, as it may sample well; the
    log says so once.

    Raises:
        EngineError: if none gives them.
    """
    work = [client.prompt_logprobs(replica, token_ids) for replica in replicas]
    results = await asyncio.gather(*work, return_exceptions=True)
    answers: dict[str, tuple[float, ...]] = {}
    errors: list[EngineError] = []
    for replica, result in zip(replicas, results, strict=True):
        if isinstance(result, EngineError):
            errors.append(result)
            if replica.scores_prompts:
                logger.warning("%s is left out where a prompt is scored: %s", replica.url, result)
            replica.scores_prompts = False
        elif isinstance(result, BaseException):
            raise result
        else:
            answers[replica.url] = result
    if errors and not answers:
        raise EngineError(f"no server scores a prompt: {errors[0]}") from errors[0]
    return answers
