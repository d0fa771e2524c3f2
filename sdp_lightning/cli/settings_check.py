"""The names of a command's settings, checked before Lightning is imported, which takes seconds.

The signatures of Trainer, module and data module are read from their files. What is inside a
class that a setting names (``data.workflow.init_args``) is left to the real parser, and so is what
is no name at all: this check refuses nothing that the parser would take.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import sdp_lightning.config as config_classes
from sdp_lightning.config.server_keys import hide_keys
from sdp_lightning.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
_ALWAYS = ("config", "print_config", "help", "seed_everything")
_ANY_CLASS = ("help", "class_path", "init_args", "dict_kwargs")
_LOOKED_UP = ("best", "last", "hpc", "registry", "null")
_CONFIG = ("--config", "-c")
_PASSED_OBJECTS = (
    "self",
    "model",
    "datamodule",
    "train_dataloaders",
    "val_dataloaders",
    "dataloaders",
)
Tree = Mapping[str, Any]


def check_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Check the config files and flags of a Trainer's command.

    Args:
        arguments: the command and its arguments.

    Returns:
        The values that flags and files give, by dotted name; those of a file by section.

    Raises:
        ConfigError: if a file is not there or no YAML, or a setting is unknown, with the nearest.
    """
    known = known_settings(arguments[0])
    given: dict[str, Any] = {}
    for name, value in _flags(arguments[1:]):
        if name in _CONFIG:
            tree = read_settings(value) if value is not None else {}
            for key in _names(tree):
                _check(key, known, f" in {value}")
            given |= {key: value for key, value in tree.items() if not isinstance(value, dict)}
            given |= {f"{s}.{k}": v for s, part in tree.items() for k, v in _items(part)}
        elif name.startswith("--"):
            key = name[2:].removesuffix("+")
            _check(key, known, "")
            given[key] = value
    _check_checkpoint(given.get("ckpt_path"))
    return given


def read_settings(file: str) -> dict[str, Any]:
    """The settings of a config file; none if ``file`` is itself YAML, or an address.

    Raises:
        ConfigError: if it cannot be read, or holds no settings.
    """
    import yaml

    path = Path(file)
    if "\n" in file or "{" in file or ": " in file or "://" in file or file == "-":
        return {}
    try:
        read: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no config file {file}. {_near(path, '.y*ml')}") from error
    except OSError as error:
        raise ConfigError(f"the config {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark: Any = vars(error).get("problem_mark")
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = hide_keys(str(vars(error).get("problem") or "it is no UTF-8"))
        raise ConfigError(f"the config {file} is no YAML{place}: {problem}.") from error
    if not isinstance(read, dict):
        found = "nothing" if read is None else f"a {type(read).__name__}"
        raise ConfigError(
            f"the config {file} holds {found} in place of settings: write `trainer:`, `model:` and "
            "`data:`, each with its settings below it."
        )
    return {str(key): value for key, value in cast("dict[object, Any]", read).items()}


@cache
def known_settings(command: str) -> Mapping[str, bool]:
    """Dotted names of the settings of ``command``, and whether more may stand below each."""
    (lightning,) = importlib.util.find_spec("lightning").submodule_search_locations or ()  # type: ignore[union-attr]
    trainer = Path(lightning) / "pytorch" / "trainer" / "trainer.py"
    known: dict[str, bool] = {name: True for name in _ALWAYS}
    own = (_PACKAGE / "cli" / "trainer.py", "RolloutTrainer", "rollout")
    for name in _parameters(*(own if command == "rollout" else (trainer, "Trainer", command))):
        known[name] = True
    for section, file, kind in (
        ("trainer", trainer, "Trainer"),
        ("model", _PACKAGE / "lightning" / "module.py", "SegmentWisePPOModule"),
        ("data", _PACKAGE / "lightning" / "datamodule.py", "RolloutDataModule"),
    ):
        known |= {section: False, f"{section}.help": True}
        for name, annotation in _parameters(file, kind, "__init__").items():
            inner = _fields(annotation)
            known[f"{section}.{name}"] = not inner
            known |= {f"{section}.{name}.{field}": True for field in inner}
    return known


def _check(key: str, known: Mapping[str, bool], where: str) -> None:
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        prefix = ".".join(parts[:length])
        if prefix not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
            hint = f"Did you mean {near[0]}?" if near else "See sdp-lightning fit --help."
            raise ConfigError(f"there is no setting {key}{where}. {hint}")
        if known[prefix]:
            return


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Names and values: of ``--name=value``, and of ``--name value``."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not name.startswith("--") and name not in _CONFIG:
            continue
        following = arguments[index + 1 : index + 2]
        yield name, value if equals else (following[0] if following else None)


def _names(tree: Tree, prefix: str = "") -> Iterator[str]:
    """Dotted names of a file's settings, of sections and what is right below them."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        below = _items(value)
        if below and name.count(".") < 2:
            yield from _names(dict(below), f"{name}.")
        else:
            yield name


def _items(value: object) -> list[tuple[str, Any]]:
    tree = cast("dict[object, Any]", value) if isinstance(value, dict) else {}
    return [(str(key), part) for key, part in tree.items()]


def _parameters(file: Path, kind: str, method: str) -> dict[str, ast.expr | None]:
    """Names and annotations of a method's parameters, read from the source."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (owner,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind)
    (found,) = (n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == method)
    arguments = [*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs]
    passed = _PASSED_OBJECTS if method != "__init__" else ("self",)
    return {a.arg: a.annotation for a in arguments if a.arg not in passed}


def _fields(annotation: ast.expr | None) -> list[str]:
    """Names below a setting whose one type is a class of :mod:`sdp_lightning.config`, or none."""
    nodes = [] if annotation is None else list(ast.walk(annotation))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    kind = vars(config_classes).get(names.pop()) if len(names) == 1 else None
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return []
    return [*(field.name for field in fields(kind)), *_ANY_CLASS]


def _check_checkpoint(path: object) -> None:
    """Refuse a file that is not there; what Lightning looks up by a word is left to the run."""
    if not isinstance(path, str) or "://" in path or path.startswith(_LOOKED_UP):
        return
    if not Path(path).expanduser().exists():
        raise ConfigError(
            f"there is no checkpoint {path}. {_near(Path(path), '.ckpt')} "
            "`--ckpt_path last` takes the newest of this run."
        )


def _near(path: Path, ending: str) -> str:
    """A hint at the file that was meant, among those beside it with that ending."""
    beside = [each.name for each in path.parent.glob(f"*{ending}")]
    if near := difflib.get_close_matches(path.name, beside, n=1):
        return f"Did you mean {path.with_name(near[0])}?"
    return f"{path.parent.absolute()} has {', '.join(sorted(beside)[:5]) or 'none of the kind'}."
