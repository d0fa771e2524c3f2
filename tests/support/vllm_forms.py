"""What vLLM 0.32 answers, as it was recorded: the forms that the fake server fills in."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
NO_SCALE_OUT = (
    "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
)
TOKEN_NULLS = [
    *("prompt_token_id_logprobs", "prompt_token_ids", "mm_placeholders", "metrics"),
    *("kv_transfer_params", "ec_transfer_params"),
]
TEXT_NULLS = ["service_tier", "kv_transfer_params", "ec_transfer_params", "metrics"]


@dataclass(eq=False)
class Running:
    """A request that is being sampled. ``text``: by the route that answers text and no versions."""

    start: int
    budget: int
    allowed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    aborted: bool = False
    text: bool = False
    interval: int = 1
    sent: int = 0
    chunks: int = 0
    tops: list[dict[int, float]] | None = None
    prompt_logprobs: list[Any] | None = None
    stops: tuple[str, ...] = ()
    written: str = ""
    matched: str | None = None

    def add(self, token: int, logprob: float) -> None:
        """A token that was sampled; its text is that of ``tiny_tokenizer``: 3 is "0", 4 is "1"."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.written += str(token - 3)
        self.matched = next((stop for stop in self.stops if stop in self.written), None)

    @property
    def reason(self) -> str:
        if self.matched is not None:
            return "stop"
        return "abort" if self.aborted else "length"

    @property
    def is_due(self) -> bool:
        """Whether a chunk is, before the last one: the first token, and then ``interval``."""
        wanted = 1 if self.sent == 0 else self.interval
        return self.sent + wanted <= len(self.tokens) < self.budget and self.matched is None

    def choice(self, *, first: int = 0, last: bool = True) -> dict[str, Any]:
        """The tokens from ``first`` on; versions and the reason only if there are no more."""
        tokens, logprobs = self.tokens[first:], self.logprobs[first:]
        tops = self.tops or [{t: v} for t, v in zip(tokens, logprobs, strict=True)]
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": self.reason if last else None,
            "stop_reason": self.matched if last else None,
            "token_ids": tokens,
            "routed_experts": None,
        }
        if not self.text:
            pairs = zip(tokens, logprobs, tops, strict=True)
            content = [entry(t, v) | {"top_logprobs": entries(top)} for t, v, top in pairs]
            choice |= {"weight_versions": self.spans if last and self.tokens else None}
            return choice | {"sampling_mask": None, "logprobs": {"content": content}}
        told = {
            "text_offset": list(range(first, first + len(tokens))),
            "token_logprobs": logprobs,
            "tokens": [f"<{token}>" for token in tokens],
            "top_logprobs": [{f"<{token}>": v for token, v in top.items()} for top in tops],
        }
        choice |= {"text": "".join(told["tokens"]), "logprobs": told, "prompt_token_ids": None}
        return choice | {"prompt_logprobs": self.prompt_logprobs}

    def answer(self, number: int, model: str) -> dict[str, Any]:
        """All of it at once."""
        done = len(self.tokens)
        usage = {"prompt_tokens": self.start, "total_tokens": self.start + done}
        usage |= {"completion_tokens": done}
        told = {"model": model, "created": int(time.time()), "usage": usage}
        if self.text:
            told |= {"id": f"cmpl-{number}", "object": "text_completion"}
            told |= {"system_fingerprint": "vllm-0.32.0-c23c3b3d"} | dict.fromkeys(TEXT_NULLS)
        else:
            told |= {"request_id": f"generate-tokens-{number}", "output_mode": "tokens"}
            told |= {"prompt_logprobs": self.prompt_logprobs} | dict.fromkeys(TOKEN_NULLS)
        return told | {"choices": [self.choice()]}

    def next_chunk(self, number: int, model: str, *, last: bool) -> dict[str, Any]:
        """What was not sent yet."""
        choice = self.choice(first=self.sent, last=last)
        self.sent, self.chunks = len(self.tokens), self.chunks + 1
        if self.text:
            told = {"id": f"cmpl-{number}", "object": "text_completion", "model": model}
        else:
            told = {"request_id": f"generate-tokens-{number}", "output_mode": "tokens"}
            told |= {"usage": None}
        return told | {"choices": [choice]}


def entry(token: int, logprob: float) -> dict[str, Any]:
    return {"token_id": token, "logprob": logprob, "rank": 1}


def entries(top: dict[int, float]) -> list[dict[str, Any]]:
    return [entry(token, logprob) for token, logprob in top.items()]


def prompt_entry(token: int, logprob: float) -> dict[str, Any]:
    return {str(token): {"logprob": logprob, "rank": 1, "decoded_token": f"<{token}>"}}


def event(data: Any) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


def told_error(status: int, message: str, kind: str, param: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error(
    status: int, message: str, kind: str = "InternalServerError", param: Any = None
) -> web.Response:
    return web.json_response(told_error(status, message, kind, param), status=status)


def read_first_values(file: Any) -> dict[str, float]:
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        names = list(tensors.keys())
        if "BF16" not in {tensors.get_slice(name).get_dtype() for name in names}:
            return {name: float(tensors.get_tensor(name).flat[0]) for name in names}
    with safe_open(file, framework="pt") as tensors:  # numpy has no such type
        return {name: float(tensors.get_tensor(name).flatten()[0]) for name in names}
