"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ``"problem"`` means that something needed is missing.
        subject: what was looked at.
        text: what was found and, unless all is well, what to do.
    """

    state: Literal["ok", "note", "problem"]
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:8} {self.subject:18} {self.text}"
