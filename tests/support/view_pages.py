"""Trajectories of texts, and the HTML page of a view as a browser reads it."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import sdp_lightning as sdp
from support.rollouts import CodePoints


def text_segment(version: int, text: str, **settings: Any) -> sdp.Segment:
    return sdp.Segment(version, [ord(c) for c in text], [-0.5] * len(text), **settings)


def text_trajectory(*parts: str | tuple[int, str], **settings: Any) -> sdp.Trajectory:
    """Texts are contexts, (version, text) segments."""
    made = [
        sdp.Context([ord(c) for c in part]) if isinstance(part, str) else text_segment(*part)
        for part in parts
    ]
    return sdp.Trajectory(tuple(made), **settings)


class Page(HTMLParser):
    """Elements with their classes, titles and texts, as a browser sees them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self._open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(name for _, name in self._open), data))

    def text(self, name: str) -> str:
        """All text in elements of a class."""
        return "".join(t for names, t in self.texts if any(name in n.split() for n in names))

    def titles(self) -> list[str]:
        return [attrs["title"] or "" for _, attrs in self.tags if "title" in attrs]


def page_of(data: Any, **settings: Any) -> Page:
    return Page(sdp.view(data, tokenizer=CodePoints(), **settings).fragment())
