"""Trajectories to look at: tokens colored by the policy version that sampled them.

Pure: from data to HTML or to what rich prints. :func:`view` chooses how; ``data`` in a notebook's
last line, or given to ``rich.print``, is drawn with its defaults.
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
from sdp_lightning.observability.view.token_rows import Section, Viewable, sections_of
from sdp_lightning.observability.view.words import count_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["STYLE", "View", "Viewable", "set_view_tokenizer", "view"]

_default_tokenizer: list[Decoder] = []  # at most one


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """Trajectories, ready to be shown in a notebook, a terminal or a file. Made by :func:`view`."""

    sections: tuple[Section, ...]
    tokenizer: Decoder | None
    max_tokens: int
    num_hidden: int

    def fragment(self) -> str:
        """HTML without its style, for a page that has :data:`STYLE` once: no script, no network."""
        return fragment(
            self.sections,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
            num_hidden=self.num_hidden,
        )

    def html(self) -> str:
        """The fragment with its style."""
        return STYLE + self.fragment()

    def save(self, path: str | Path, *, title: str = "Trajectories") -> Path:
        """Write a page of HTML that needs nothing else."""
        target = Path(path)
        target.write_text(page(self.fragment(), title), encoding="utf-8")
        return target

    def rich(self) -> RenderableType:
        """The same for a terminal."""
        return renderable(
            self.sections,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
            num_hidden=self.num_hidden,
        )

    def show(self, console: Console | None = None) -> None:
        """Draw it in the terminal."""
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
    update: UpdateConfig = UpdateConfig(),
    max_tokens: int = 400,
    max_rows: int = 8,
) -> View:
    """Look at trajectories: which version sampled which token, and what the loss makes of it.

    Tokens tell more when a pointer rests on them: version, lag, log-probs under the behavior,
    segment proximal and proximal policies, and the weight exp(m - b), as far as they are known.

    Args:
        data: a trajectory, a group, a sequence of groups, or a batch.
        tokenizer: makes text of tokens; None takes that of :func:`set_view_tokenizer`, and without
            one token ids are shown.
        version: the policy version that trains, of which lags are counted. A batch knows it.
        loss: says around which policy the trust region lies.
        update: says how advantages come from the rewards of a group. A batch has its own.
        max_tokens: of one trajectory; more are left out in its middle, with a note.
        max_rows: trajectories; a note says how many more there are.

    Raises:
        ConfigError: if there is nothing to show, or room for nothing.
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
    return View(tuple(sections), tokenizer, max_tokens, num_hidden)


def set_view_tokenizer(tokenizer: Decoder | None) -> None:
    """Show trajectories as the text of ``tokenizer`` from now on; None shows token ids again.

    A notebook calls this once, so that data in the last line of a cell is drawn as text. It is the
    only state that drawing has.
    """
    _default_tokenizer[:] = [] if tokenizer is None else [tokenizer]
