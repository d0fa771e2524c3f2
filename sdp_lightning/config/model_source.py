"""The model setting: an id, a folder, or the import path of a function that returns one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator
from pathlib import Path

from sdp_lightning.config.import_path import OBJECT_FORM, load_object
from sdp_lightning.errors import ConfigError


def resolve_model(model: str | Path) -> str:
    """The model's id or path, from the function at ``file.py:name`` if ``model`` names one.

    Raises:
        ConfigError: if ``model`` is none of these, or a path to no folder.
    """
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"model must be an id, a folder, or the place of a function that returns one; got "
            f"{type(model).__name__}. {OBJECT_FORM}"
        )
    name = str(model)
    if ":" in name and not isinstance(model, Path):
        function = load_object(name)
        if not callable(function):
            raise ConfigError(f"{name!r} is no function, but {type(function).__name__}.")
        name = str(function())
    path = Path(name).expanduser()
    if (isinstance(model, Path) or name[:1] in "/.~") and not path.is_dir():
        raise ConfigError(f"there is no model folder {name!r} (looked for {path.absolute()}).")
    return str(path) if name[:1] == "~" else name


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Context without progress bars and advice of transformers; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its GGUF reader has a bar of its own
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
