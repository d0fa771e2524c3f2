"""Screens that show a progress line: a log, a terminal, or a notebook."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, Protocol


class Screen(Protocol):
    """Shows one line at a time."""

    @property
    def is_live(self) -> bool:
        """Whether a line is replaced by the next one."""
        ...

    def show(self, parts: list[str]) -> None:
        """Show one line, of which the first parts are the most important."""
        ...

    def end(self) -> None:
        """Keep the line that is shown; the next one begins below it."""
        ...


class LogScreen:
    """Prints lines without control characters, for a file or a pipe."""

    is_live = False

    def show(self, parts: list[str]) -> None:
        print("  ".join(parts), flush=True)

    def end(self) -> None:
        """Nothing to do: every line has ended already."""


class TerminalScreen:
    """Rewrites one line, at most as wide as the terminal."""

    is_live = True

    def __init__(self) -> None:
        self._open = False  # whether the cursor is at the end of a line to rewrite

    def show(self, parts: list[str]) -> None:
        text = join_within(parts, shutil.get_terminal_size().columns - 1)
        print(f"\r\x1b[2K{text}", end="", flush=True)
        self._open = True

    def end(self) -> None:
        if self._open:
            print(flush=True)
            self._open = False


class NotebookScreen:
    """Replaces one output of the cell."""

    is_live = True

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, parts: list[str]) -> None:
        from IPython.display import display

        data = {"text/plain": "  ".join(parts)}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def end(self) -> None:
        self._handle = None


def find_screen() -> Screen:
    """The screen of this process."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__):
        return NotebookScreen()
    quiet = os.environ.get("TERM") == "dumb" or "CI" in os.environ
    return TerminalScreen() if sys.stdout.isatty() and not quiet else LogScreen()


def join_within(parts: list[str], width: int) -> str:
    """The first parts that fit into ``width`` characters; the very first is cut if it does not.

    >>> join_within(["step 1", "reward 0.500", "lag 1"], 20), join_within(["step 1"], 3)
    ('step 1  reward 0.500', 'ste')
    """
    text = parts[0][:width]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > width:
            break
        text += f"  {part}"
    return text
