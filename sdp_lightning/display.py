"""How data shows itself in a notebook or a terminal, without knowing what draws it.

Who draws is told to :data:`hooks`: by the package's ``__init__``. So data needs no drawing to be
imported, and arrows between rooms go on pointing down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType


class Decoder(Protocol):
    """The part of a tokenizer that makes tokens readable."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Tokens to text."""
        ...


class Drawn(Protocol):
    """What can be shown in a notebook and in a terminal."""

    def html(self) -> str:
        """A fragment of HTML with its own style."""
        ...

    def rich(self) -> RenderableType:
        """The same for a terminal."""
        ...


class Hooks:
    """Who draws, and which tokenizer is known.

    Attributes:
        draw: makes something that can be shown of a piece of data.
        tokenizer: of the model that was last loaded, or whatever else was put here; None shows
            token ids.
    """

    def __init__(self) -> None:
        self.draw: Callable[[Any], Drawn] | None = None
        self.tokenizer: Decoder | None = None

    def drawn(self, data: object) -> Drawn:
        """``data``, drawn."""
        assert self.draw is not None, "the package's __init__ sets it"
        return self.draw(data)


hooks = Hooks()


class Displayed:
    """Data that shows itself in notebooks, and where rich prints it."""

    def _repr_html_(self) -> str:
        return hooks.drawn(self).html()

    def __rich__(self) -> RenderableType:
        return hooks.drawn(self).rich()
