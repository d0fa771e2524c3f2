"""Objects named by strings, and libraries that may be missing.

``package.module:name`` or ``path/to/file.py:name`` names anything importable, so that a config file
can point at a list of prompts, a reward function or a function that returns a model's folder.
"""

from __future__ import annotations

import builtins
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sdp_lightning.errors import ConfigError

OBJECT_FORM = "Write 'package.module:name' or 'path/to/file.py:name'."


def load_object(spec: str) -> object:
    """The object that ``spec`` names.

    A file is run once a process, however often it is named. It imports the files beside it as a
    script does, and these are its own: another folder's file of the same name is another module.
    The standard library's names stay its own. Packages beside it are importable while it runs.

    Args:
        spec: ``package.module:name`` or ``path/to/file.py:name`` (relative to the working folder);
            the name may have dots.

    Raises:
        ConfigError: if the form is wrong, or the module, file or name does not exist, or a package
            beside the file has the name of one that is loaded from elsewhere. Errors raised by the
            module itself pass through.
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
    return _run_file(path)


def _run_file(path: Path) -> object:
    key = f"_sdp_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    if key in sys.modules:
        return sys.modules[key]
    module_spec = importlib.util.spec_from_file_location(key, path)
    assert module_spec is not None and module_spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(module_spec)
    # Its own, so that imports within its functions find the files beside it as well.
    module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _importer(path)}
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


def _importer(path: Path) -> Callable[..., object]:
    def import_beside(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> object:
        top = name.partition(".")[0]
        if level == 0 and top not in sys.stdlib_module_names:
            beside = path.with_name(f"{top}.py").resolve()
            package = (path.parent / top / "__init__.py").resolve()
            # foreign: what a module of that name was loaded from, if from a file
            there = getattr(sys.modules.get(top), "__file__", None)
            loaded = Path(there).resolve() if there else None
            if package.is_file():
                if loaded not in (None, package):
                    raise ConfigError(
                        f"{path} imports {package}, and {loaded} is loaded by the name {top!r}. "
                        "Rename one of the two."
                    )
            elif name == top and beside.is_file() and loaded != beside:
                return _run_file(beside)
        return builtins.__import__(name, globals, locals, fromlist, level)

    return import_beside


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
