"""Views of trajectories: tokens colored by the policy version that sampled them.

Pure functions from data to HTML or to a rich renderable. :func:`view` has the settings; data in the
last line of a notebook's cell, or given to ``rich.print``, is drawn with its defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdp_lightning.config import LossConfig, UpdateConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.observability.view.html import STYLE, fragment, page
from sdp_lightning.observability.view.terminal import renderable
from sdp_lightning.observability.view.text import Decoder
from sdp_lightning.observability.view.token_rows import (
    Section,
    Viewable,
    advantage_note,
    sections_of,
)
from sdp_lightning.observability.view.words import count_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["STYLE", "View", "Viewable", "set_view_tokenizer", "view"]

_default_tokenizer: list[Decoder] = []  # at most one


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """Trajectories to show in a notebook, a terminal or a file. Made by :func:`view`."""

    sections: tuple[Section, ...]
    tokenizer: Decoder | None
    max_tokens: int
    notes: tuple[str, ...]

    def fragment(self) -> str:
        """HTML without scripts or style, for a page that has :data:`STYLE` once."""
        return fragment(
            self.sections,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
            notes=self.notes,
        )

    def html(self) -> str:
        """The fragment with its style."""
        return STYLE + self.fragment()

    def save(self, path: str | Path, *, title: str = "Trajectories") -> Path:
        """Write a self-contained page of HTML; returns its path."""
        target = Path(path)
        target.write_text(page(self.fragment(), title), encoding="utf-8", errors="backslashreplace")
        return target

    def rich(self) -> RenderableType:
        """A rich renderable for a terminal."""
        return renderable(
            self.sections,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
            notes=self.notes,
        )

    def show(self, console: Console | None = None) -> None:
        """Print the view in the terminal, or on ``console``."""
        from rich.console import Console

        (console or Console()).print(self.rich())

    def __repr__(self) -> str:
        num_rows = sum(len(section.rows) for section in self.sections)
        return f"View({count_of(num_rows, 'trajectory', 'trajectories')})"

    def _repr_html_(self) -> str:
        return self.html()

    def __rich__(self) -> RenderableType:
        return self.rich()


def view(
    data: Viewable,
    *,
    tokenizer: Decoder | None = None,
    version: int | None = None,
    loss: LossConfig = LossConfig(),
    update: UpdateConfig | None = None,
    max_tokens: int = 400,
    max_rows: int = 8,
) -> View:
    """A view of trajectories: the version that sampled each token, and its weight in the loss.

    Hovering over a token shows its version, lag, log-probs under the behavior, segment proximal
    and proximal policies, and the weight exp(m - b), as far as they are known.

    Args:
        data: a trajectory, a group, a sequence of groups, or a batch.
        tokenizer: decodes the tokens; None takes that of :func:`set_view_tokenizer`, and without
            one token ids are shown.
        version: policy version of the trainer, for lags. A batch has its own.
        loss: the run's objective, which defines the weights. Advantages of a group are left out if
            it takes a KL off the reward.
        update: the run's update (``module.update``), which defines the advantages of a group; None
            leaves them out, with a note. A batch has its own.
        max_tokens: tokens of one trajectory to show; more are cut from its middle, with a note.
        max_rows: trajectories to show; a note counts the others.

    Raises:
        ConfigError: if there is nothing to show, or a limit is below 1.
    """
    if max_tokens < 1 or max_rows < 1:
        raise ConfigError(
            f"max_tokens={max_tokens} and max_rows={max_rows} must be 1 or more: else nothing is "
            "shown."
        )
    sections, num_hidden = sections_of(
        data, version=version, loss=loss, update=update, most_rows=max_rows
    )
    if not sections:
        raise ConfigError("there are no trajectories to show.")
    if tokenizer is None and _default_tokenizer:
        tokenizer = _default_tokenizer[0]
    hidden = count_of(num_hidden, "more trajectory", "more trajectories") + " not shown"
    notes = (hidden if num_hidden else "", advantage_note(data, loss=loss, update=update))
    return View(tuple(sections), tokenizer, max_tokens, tuple(note for note in notes if note))


def set_view_tokenizer(tokenizer: Decoder | None) -> None:
    """Show trajectories as text of ``tokenizer`` from now on; None shows token ids again.

    A notebook calls this once, so that data in the last line of a cell is drawn as text.
    """
    _default_tokenizer[:] = [] if tokenizer is None else [tokenizer]
