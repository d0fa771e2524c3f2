"""Answers recorded from vLLM 0.32.0, and variations of them."""

from __future__ import annotations

import copy
from typing import Any

from sdp_lightning.engines.remote.backend import (
    RemoteInfBackend,
    ServerInfo,
)
from sdp_lightning.engines.remote.vllm import VLLMBackend

BACKEND: RemoteInfBackend = VLLMBackend()


INFO = ServerInfo(model="m", max_length=256)


def recorded_token(token: int, logprob: float) -> dict[str, Any]:
    top = {"token_id": token, "logprob": logprob, "rank": 1}
    return top | {"top_logprobs": [top]}


COMPLETION: dict[str, Any] = {
    "request_id": "generate-tokens-85",
    "model": "m",
    "created": 1795397237,
    "usage": {"prompt_tokens": 3, "total_tokens": 7, "completion_tokens": 4},
    "output_mode": "tokens",
    "choices": [
        {
            "index": 0,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [14, 31, 50, 59],
            "weight_versions": [{"version": "default", "start": 0, "end": 4}],
            "logprobs": {
                "content": [
                    recorded_token(14, -0.657286524772644),
                    recorded_token(31, -1.5),
                    recorded_token(50, -2.25),
                    recorded_token(59, -0.125),
                ]
            },
        }
    ],
}


TEXT: dict[str, Any] = {
    **{"id": "cmpl-8969e6d2806df74e", "object": "text_completion", "created": 1795403497},
    "model": "policy",
    "choices": [
        {
            "index": 0,
            "text": "//0",
            "logprobs": {
                "text_offset": [0, 1, 2],
                "token_logprobs": [-1.0715653896331787, -1.405820608139038, -2.549502372741699],
                "tokens": ["/", "/", "0"],
                "top_logprobs": [
                    {"/": -1.0715653896331787},
                    {"/": -1.405820608139038},
                    {"0": -2.549502372741699, "/": -1.369066834449768},
                ],
            },
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [43, 43, 3],
            "prompt_logprobs": None,
            "prompt_token_ids": [1, 2, 3, 4, 5, 6],
            "routed_experts": None,
        }
    ],
    **{"service_tier": None, "system_fingerprint": "vllm-0.32.0-c23c3b3d", "metrics": None},
    "usage": {"prompt_tokens": 6, "total_tokens": 9, "completion_tokens": 3},
}


def completion(**changes: Any) -> dict[str, Any]:
    answer = copy.deepcopy(COMPLETION)
    answer["choices"][0] |= changes
    return answer


def span(version: str, start: int, end: int) -> dict[str, Any]:
    return {"version": version, "start": start, "end": end}


def probed(*logprobs: float) -> dict[str, Any]:
    top = [{"token_id": n, "logprob": v, "rank": n + 1} for n, v in enumerate(logprobs)]
    return {"choices": [{"logprobs": {"content": [{"token_id": 0, "top_logprobs": top}]}}]}
