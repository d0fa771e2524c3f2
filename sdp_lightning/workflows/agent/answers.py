"""Reads what the policy wrote: its text, and the tools that it calls."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sdp_lightning.types import SamplingParams
from sdp_lightning.workflows.agent.request import AgentRequest, Answer, Call, Tool
from sdp_lightning.workflows.agent.tree import Turn
from sdp_lightning.workflows.completion import completion_text
from sdp_lightning.workflows.environment import Transcript
from sdp_lightning.workflows.tool_calls import ToolCall
from sdp_lightning.workflows.tool_format import find_format
from sdp_lightning.workflows.tool_schema import read_arguments
from sdp_lightning.workflows.workflow import Tokenizer

_ODD_SCHEMA = (TypeError, LookupError, AttributeError, ValueError, RecursionError)
_NUM_BEFORE = 30  # tokens before a turn by which an open thought is known


def read_answer(
    turn: Turn,
    request: AgentRequest,
    params: SamplingParams,
    tokenizer: Tokenizer,
    tool_call_format: str | Mapping[str, Any],
) -> Answer:
    """The answer that a turn is; calls that cannot be read are text.

    Args:
        turn: the sampled turn.
        request: what was asked.
        params: sampling settings with all stops.
        tokenizer: tokenizer of the policy.
        tool_call_format: how the policy writes calls.
    """
    text, calls = _text(turn, request, params, tokenizer), list[ToolCall]()
    if request.tools and request.reads_calls:
        transcript = Transcript(tokenizer, params.stop_token_ids, params.stop_texts)
        transcript.hear(text, turn.sampled, turn.token_ids[: turn.num_read].tolist())
        form = find_format(tool_call_format, transcript, request.tools)
        written = transcript.with_special_tokens(text)
        calls = form.calls(written, transcript.before(_NUM_BEFORE))
        if any(call.error or not isinstance(call.arguments, Mapping) for call in calls):
            calls = []
        if calls:
            mark = form.example.partition("{")[0].partition("name")[0].strip()
            place = text.find(mark) if mark else 0
            text = text[: max(place, 0)].rstrip() if place >= 0 or not mark else ""
    return Answer(
        id=secrets.token_hex(12),
        text=text,
        calls=tuple(_call(call, request.tools) for call in calls),
        turn=turn,
        created=int(time.time()),
    )


def _text(turn: Turn, request: AgentRequest, params: SamplingParams, tokenizer: Tokenizer) -> str:
    """The text of a turn, up to a stop text of the client's, or through one of the run's."""
    whole = tokenizer.decode(turn.sampled, skip_special_tokens=False)
    is_clients = any(stop in whole for stop in request.stop)
    return completion_text(
        *(turn.sampled, tokenizer),
        stop_token_ids=params.stop_token_ids,
        stop_texts=request.stop if is_clients else params.stop_texts,
        include_stop_text=not is_clients,
    )


def _call(call: ToolCall, tools: Sequence[Tool]) -> Call:
    arguments: Mapping[str, Any] = call.arguments
    schema = next((t for t in tools if t.get("function", t).get("name") == call.name), None)
    if call.are_texts and schema is not None:
        with contextlib.suppress(*_ODD_SCHEMA):  # the client checks its arguments itself
            arguments = read_arguments(schema, arguments, are_texts=True)
    return Call(call.id or f"call_{secrets.token_hex(12)}", call.name, arguments)
