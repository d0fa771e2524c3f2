"""Objects named by strings, and libraries that may be missing.

``package.module:name`` or ``path/to/file.py:name`` names anything importable, so that a config file
can point at a list of prompts, a reward function or a function that returns a model's folder.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from sdp_lightning.errors import ConfigError

OBJECT_FORM = "Write 'package.module:name' or 'path/to/file.py:name'."


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
    path, colon, name = spec.rpartition(":")
    if not (path and colon and name) or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{spec!r} does not name an object. {OBJECT_FORM}")
    target: object = _load_file(path) if path.endswith(".py") else _load_module(path, spec)
    for part in name.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            raise ConfigError(f"{path} has no {name!r}.{_near(part, dir(target))}") from error
    return target


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
        raise ConfigError(f"{spec!r} does not name an object. {OBJECT_FORM}")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # the module exists and misses one of its own imports
        raise ConfigError(
            f"there is no module {error.name!r}, named in {spec!r}. {OBJECT_FORM}"
        ) from error


def _near(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def require(module: str, package: str, use: str) -> None:
    """Raise ``ConfigError`` with pip's command if ``module`` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{use} needs {package}, which is not installed: pip install {package}")
