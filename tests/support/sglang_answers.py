"""Answers of the form that the source of SGLang 0.5.23 gives."""

from __future__ import annotations

import copy
from typing import Any

from sdp_lightning.engines.remote.backend import (
    RemoteInfBackend,
)
from sdp_lightning.engines.remote.sglang import SGLangBackend

BACKEND: RemoteInfBackend = SGLangBackend()


MODEL = {
    "model_path": "Qwen/Qwen2.5-0.5B",
    "served_model_name": "Qwen/Qwen2.5-0.5B",
    "tokenizer_path": "Qwen/Qwen2.5-0.5B",
    "is_generation": True,
    "preferred_sampling_params": None,
    "weight_version": "default",
    "load_format": "auto",
    "model_type": "qwen2",
}


SERVER = {
    "model_path": "Qwen/Qwen2.5-0.5B",
    "context_length": None,
    "tp_size": 1,
    "incremental_streaming_output": False,
    "status": "ready",
    "max_total_num_tokens": 912312,
    "max_req_input_len": 32762,
    "internal_states": [{"last_gen_throughput": 0.0}],
    "version": "0.5.23",
}


INFO = BACKEND.read_description([MODEL, SERVER])


DELTAS = BACKEND.read_description([MODEL, SERVER | {"incremental_streaming_output": True}])


LENGTH = {"type": "length", "length": 4}


STOP = {"type": "stop", "matched": 59}


ABORT = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


GENERATED: dict[str, Any] = {
    "text": " a b c d",
    "output_ids": [14, 31, 50, 59],
    "meta_info": {
        "id": "0f3c0d0c4e0e4a59a5d7a5d1e4a4b3b2",
        "finish_reason": LENGTH,
        "prompt_tokens": 3,
        "weight_version": "7",
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [
            [-0.657286524772644, 14, None],
            [-1.5, 31, None],
            [-2.25, 50, None],
            [-0.125, 59, None],
        ],
        "output_token_logprobs_length": 4,
        "reasoning_tokens": 0,
        "completion_tokens": 4,
        "cached_tokens": 1,
        "weight_versions": [{"version": "7", "start": 0, "end": 4}],
        "e2e_latency": 0.061,
    },
}


def generated(output_ids: Any = None, *, without: str = "", **meta: Any) -> dict[str, Any]:
    answer = copy.deepcopy(GENERATED)
    if output_ids is not None:
        answer["output_ids"] = output_ids
    answer["meta_info"] |= meta
    answer["meta_info"].pop(without, None)
    return answer
