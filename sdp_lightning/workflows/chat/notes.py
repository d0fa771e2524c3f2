"""What is said once, in the log, of how a chat template takes conversations."""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)

# What is said once of an arrangement; the others change the form alone.
_SAID = {
    "system_first": "takes one system message at the head: later ones are joined with it",
    "tools_in_system": "does not describe the tools: the system message does",
    "system_as_user": "does not show the system: its message is the beginning of the user's next",
    "calls_as_text": "does not show calls of tools: they are written as text",
    "results_as_user": "does not show what answers the assistant in another role than the user's, "
    "such as 'tool': it is written as the user's",
    "thoughts": "leaves out %s, as it does with those of earlier turns",
}


class Notes:
    """Says each thing once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, changes: Sequence[str], *details: str) -> None:
        """Warn of those of ``changes`` that are more than form, and were not said yet."""
        for change in changes:
            if change in _SAID and change not in self._said:
                self._said.add(change)
                logger.warning(f"the chat template {_SAID[change]}", *details)
