"""What an agent did, as its reward sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdp_lightning.workflows.agent.session import AgentSession
from sdp_lightning.workflows.chat.messages import Message

EndedBy = Literal["agent", "max_turns", "max_total_tokens", "timeout_s", "error"]


@dataclass(frozen=True)
class AgentProcess:
    """How the process of a :class:`CommandAgent` ended. All that it started has ended with it.

    Attributes:
        status: exit status; None if its time ran out.
        folder: folder that it worked in.
        output: the end of what it wrote.
    """

    status: int | None
    folder: Path
    output: str


@dataclass(frozen=True)
class AgentTranscript:
    """What an agent did, for a reward.

    Attributes:
        conversations: the messages of each request with its answer, in the order of the answers.
        returned: what the agent returned; None if it did not return.
        ended_by: ``"agent"`` if it returned, else the budget that ran out, or ``"error"``.
        process: how its process ended, if the agent is a command line.
    """

    conversations: Sequence[Sequence[Message]]
    returned: Any
    ended_by: EndedBy
    process: AgentProcess | None = None

    @property
    def answer(self) -> str:
        """The text of the last answer of the policy."""
        return self.conversations[-1][-1]["content"]


def transcript_of(
    served: AgentSession, returned: Any, ended_by: EndedBy, process: AgentProcess | None
) -> AgentTranscript:
    """The transcript of a session."""
    conversations = [
        [*(request.messages or ()), answer.message] for request, answer in served.answers
    ]
    return AgentTranscript(conversations, returned, ended_by, process)
