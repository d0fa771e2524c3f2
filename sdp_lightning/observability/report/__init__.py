"""A page about a run: what it did, where its time went, and what to change.

``callback`` keeps what the page needs while a run goes on; ``page`` makes it of the files, with no
model, tokenizer or Lightning at hand. ``account``, ``advice``, ``charts``, ``markup`` and
``sections`` are pure functions of metrics.
"""

from sdp_lightning.observability.report.page import write_report

__all__ = ["write_report"]
