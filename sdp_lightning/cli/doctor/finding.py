"""Finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ``"problem"`` means that something needed is missing.
        subject: the thing that was checked.
        text: the result and, unless all is well, the remedy.
    """

    state: Literal["ok", "note", "problem"]
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:8} {self.subject:18} {self.text}"
