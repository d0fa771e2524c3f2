"""Log levels of other libraries for the terminal."""

from __future__ import annotations

import logging
from importlib import import_module


def quiet_logs() -> None:
    """Silence Lightning and transformers below warnings."""
    from transformers.utils import logging as transformers_logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        import_module(name)  # which sets the level of its logger
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
