"""Which errors of a command are expected: those that some code raised on purpose, over its input.

An error passes at one of two places. While the objects of a config are made, what a ``raise``
statement raises refuses a setting. In the run itself that holds for those of Lightning alone. Any
other error is a fault, and keeps its traceback.
"""

from __future__ import annotations

import dis
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from sdp_lightning.errors import (
    TRACEBACK,
    ConfigError,
    RecordingError,
    SDPError,
    explain,
    message_of,
)

_RAISE = dis.opmap["RAISE_VARARGS"]
_LIGHTNING = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning")
_OF_THE_MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "precision")
_EXPECTED = re.compile(r"^Expected an? (?:<class ')?(.*?)(?:'>)?$", re.DOTALL)
_UNION = "Does not validate against any of the Union subtypes"


def status_of(error: Exception) -> tuple[int, str] | None:
    """Exit status and line of an expected error; None: it shall be raised, with its traceback.

    Status 2: a setting is refused. Status 1: the run ended with an error. With the environment
    variable ``SDP_TRACEBACK`` no error is expected.
    """
    if os.environ.get(TRACEBACK):
        return None
    is_refusal = type(error).__name__ == "MisconfigurationException"
    if isinstance(error, SDPError | OSError) or is_refusal or _raised_by(error, _LIGHTNING):
        is_setting = is_refusal or isinstance(error, ConfigError | RecordingError)
        return 2 if is_setting else 1, explain(error)
    return None


def refusal(error: Exception, trainer: Mapping[str, Any]) -> ConfigError | None:
    """What an error says of the settings that objects were made from; None if it is a fault.

    Args:
        error: raised while the objects were made.
        trainer: the Trainer's settings that differ from their defaults.
    """
    root: BaseException = error
    while root.__cause__ is not None:  # jsonargparse raises from what a class has raised
        root = root.__cause__
    if isinstance(error, SDPError | OSError) or not _raised_by(root):
        return None
    text = " ".join(condensed(message_of(error)).split())
    words = set(re.findall(r"\w+", text.lower()))
    named = [
        name
        for name, value in trainer.items()
        if name in words or (isinstance(value, str) and value.lower() in words)
    ]
    text += "" if text.endswith((".", "!", "?")) else "."
    if set(named) & set(_OF_THE_MACHINE):
        named = [name for name in _OF_THE_MACHINE if name in trainer]
        here = "`auto` takes what this machine has, `sdp-lightning doctor` shows it"
        return ConfigError(f"{text} Change {_written(trainer, named)}: {here}.")
    return ConfigError(f"{text} Change {_written(trainer, named)}." if named else text)


def condensed(text: str) -> str:
    """A message of jsonargparse without the types that a setting could have had as well.

    >>> condensed("the file is not there")
    'the file is not there'
    """
    if _UNION not in text:
        return text
    before, _, after = text.partition(_UNION)
    listed, _, given = after.partition("Errors:")[2].rpartition("Given value type:")
    problems = _bullets(listed)
    told = [part for part in problems if not part.startswith(("Expected a ", "Not a valid "))]
    if told:
        return f"{before.strip()} {condensed(told[0])}".strip()
    wanted = " or ".join(dict.fromkeys(_EXPECTED.sub(r"\1", problem) for problem in problems))
    wanted = wanted.replace("NoneType", "None")
    value = given.rpartition("Given value:")[2].strip()
    return f"{before.strip()} expected {wanted}, got {value}".strip()


def _bullets(listed: str) -> list[str]:
    """Items of the outermost list, with the lines below them."""
    lines = [line for line in listed.splitlines() if line.strip()]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    outer = min(indents, default=0)
    items: list[str] = []
    for line, indent in zip(lines, indents, strict=True):
        if indent == outer and line.lstrip().startswith("- "):
            items.append(line.strip()[2:])
        elif items:
            items[-1] += f"\n{line}"
    return items


def _raised_by(error: BaseException, packages: Collection[str] = ()) -> bool:
    """Whether a ``raise`` statement raised it: one of these packages, or any without."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None or isinstance(error, AssertionError):
        return False
    package = str(at.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    is_raised = at.tb_frame.f_code.co_code[at.tb_lasti] == _RAISE
    return is_raised and (not packages or package in packages)


def _written(trainer: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"trainer.{name}={trainer[name]}" for name in names)
