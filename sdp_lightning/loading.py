"""Objects and rows named by strings, folders that are built once, transformers kept quiet.

``package.module:name`` or ``path/to/file.py:name`` names anything importable, so that a config file
can point at a list of prompts, a reward function or a function that returns a model's folder.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

from sdp_lightning.errors import ConfigError
from sdp_lightning.rows import find_rows

_FORM = "Write 'package.module:name' or 'path/to/file.py:name'."


def load_object(spec: str) -> object:
    """The object that ``spec`` names.

    A file is run once a process, however often it is named; its folder is importable while it runs,
    so that a recipe's files can import each other as they do when they are run as scripts.

    Args:
        spec: ``package.module:name`` or ``path/to/file.py:name`` (relative to the working folder);
            the name may have dots.

    Raises:
        ConfigError: if the form is wrong, or the module, file or name does not exist. Errors raised
            by the module itself pass through.
    """
    place, colon, name = spec.rpartition(":")
    if not (place and colon and name) or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{spec!r} does not name an object. {_FORM}")
    found: object = _load_file(place) if place.endswith(".py") else _load_module(place, spec)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigError(f"{place} has no {name!r}.{_near(part, dir(found))}") from error
    return found


def resolve_model(model: str | Path) -> str:
    """An id or path as it is; a ``file.py:name`` or ``package.module:name`` is called for one.

    Raises:
        ConfigError: if it is neither, or a path to no folder.
    """
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"model must be an id, a folder, or the place of a function that returns one; got "
            f"{type(model).__name__}. {_FORM}"
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


def load_rows(source: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Dataset rows: as they are, or those that a string names, or that the named function returns.

    A string is ``"package.module:name"``, ``"path/to/file.py:name"``, or one of the forms of
    :func:`~sdp_lightning.rows.find_rows`: ``"rows.jsonl"``, ``"rows.parquet"``,
    ``"reasoning_gym:task?size=500"``, ``"datasets:name?split=train"``.

    Raises:
        ConfigError: if they have no length or no order: a generator, a single row, None.
    """
    found: object = source
    if isinstance(source, str):
        rows = find_rows(source)
        found = load_object(source) if rows is None else rows
        if callable(found):
            found = found()
    if not isinstance(found, Sized) or isinstance(found, (Mapping, str)):
        raise ConfigError(
            "prompts must be a sequence of rows, such as a list of mappings or a datasets.Dataset; "
            f"got {type(found).__name__}. Make a list of it."
        )
    return cast(Sequence[Mapping[str, Any]], found)


def cache_folder() -> Path:
    """Where this package keeps files: ``$XDG_CACHE_HOME/sdp_lightning``, or under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdp_lightning"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder ``name`` in the cache; ``build`` fills it if it is not there.

    A folder with its final name is always complete. Of several processes that call this at the same
    time one builds and the others wait; what an interrupted build left is thrown away.
    """
    from filelock import FileLock

    target = cache_folder() / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):
            if not target.is_dir():
                work = target.with_name(f".{name}.part")
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                build(work)
                work.rename(target)
    return target


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Keeps progress bars and advice of transformers off the terminal; errors still raise."""
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


def _load_file(place: str) -> object:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        others = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(
            f"there is no file {place!r} (looked for {path}).{_near(path.name, others)}"
        )
    key = f"_sdp_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    if key in sys.modules:
        return sys.modules[key]
    module_spec = importlib.util.spec_from_file_location(key, path)
    assert module_spec is not None and module_spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[key] = module  # before it runs: dataclasses and pickle look it up
    sys.path.insert(0, str(path.parent))
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def _load_module(place: str, spec: str) -> object:
    if not all(part.isidentifier() for part in place.split(".")):
        raise ConfigError(f"{spec!r} does not name an object. {_FORM}")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # the module exists and misses one of its own imports
        raise ConfigError(
            f"there is no module {error.name!r}, named in {spec!r}. {_FORM}"
        ) from error


def _near(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""
