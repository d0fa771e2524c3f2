"""Where progress is shown: a log, a terminal line, a notebook."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, Protocol


class Screen(Protocol):
    """Where the line is shown."""

    @property
    def is_live(self) -> bool:
        """Whether what is shown is replaced by what is shown next."""
        ...

    def show(self, parts: list[str]) -> None:
        """Show one line, most important parts first."""
        ...

    def end(self) -> None:
        """Leave what is shown where it is; what comes next begins a new line."""
        ...


class LogScreen:
    """A file or a pipe: lines, no control characters."""

    is_live = False

    def show(self, parts: list[str]) -> None:
        print("  ".join(parts), flush=True)

    def end(self) -> None:
        """Every line has ended already."""


class TerminalScreen:
    """A line that is rewritten, as wide as the terminal at most."""

    is_live = True

    def __init__(self) -> None:
        self._open = False  # whether the cursor is behind a line that may be rewritten

    def show(self, parts: list[str]) -> None:
        text = fitting(parts, shutil.get_terminal_size().columns - 1)
        print(f"\r\x1b[2K{text}", end="", flush=True)
        self._open = True

    def end(self) -> None:
        if self._open:
            print(flush=True)
            self._open = False


class NotebookScreen:
    """An output of the cell that is replaced."""

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
    """The one that this process has."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__):
        return NotebookScreen()
    quiet = os.environ.get("TERM") == "dumb" or "CI" in os.environ
    return TerminalScreen() if sys.stdout.isatty() and not quiet else LogScreen()


def fitting(parts: list[str], width: int) -> str:
    """As many of the first parts as fit in ``width`` characters; a first that does not is cut.

    >>> fitting(["step 1", "reward 0.500", "lag 1"], 20), fitting(["step 1"], 3)
    ('step 1  reward 0.500', 'ste')
    """
    text = parts[0][:width]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > width:
            break
        text += f"  {part}"
    return text
