"""Text that every file can hold: a lone surrogate has no place in UTF-8, and models write them."""

from __future__ import annotations


def storable(text: str) -> str:
    r"""``text`` with each lone surrogate as its escape; all other text is unchanged.

    >>> storable("row \ud800"), storable("Zürich")
    ('row \\ud800', 'Zürich')
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
