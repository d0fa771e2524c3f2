"""Agents that are a command line: the command, the words that a row makes of it, its environment.

Pure settings: no process is started here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from sdp_lightning.errors import ConfigError, RolloutError, RowsError
from sdp_lightning.types import Row
from sdp_lightning.workflows.agent.gateway import Endpoint

EXIT = "exit"  # value of ``reward_from``
CWD = "cwd"  # a field that is no column: the folder that the run was started in
LONGEST_GRACE_S = 5.0  # a run that is closed waits for it

_OPERATORS = re.compile(r"[|&;<>]+|\d*>+&?\d*|\$\(.*|`.*")  # words that only a shell understands
_CODE_FOLLOWS = re.compile(r"-[a-z]*c")  # sh -c, bash -lc, python -c
_INTERPRETER = re.compile(r"(.*/)?(\w*sh|python[\d.]*)")
_LONGEST_WORD = 32 * 4096 - 1  # bytes, with Linux: MAX_ARG_STRLEN
_SHOWN = 3  # rows in a message
# What an agent has of the trainer's environment; what else it needs is named by ``environment``.
_PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "TMPDIR", "LANG", "LANGUAGE"),
    *("LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)


@dataclass(frozen=True)
class CommandAgent:
    """An agent that is a command line, for :class:`~sdp_lightning.AgentWorkflow`.

    Args:
        command: the words of the command, or a text that is split as a shell does. ``{question}``
            in a word is the field ``question`` of the row, ``{cwd}`` the folder that the run was
            started in; braces of its own are doubled. No shell reads it.
        reward_from: ``"exit"``: 1 if the exit status is 0, else 0. Another text is the name of a
            file in the sample's folder, where the agent leaves a number, or numbers by name, as
            JSON. Empty: the workflow's ``reward`` says.
        statuses: exit statuses that are an end like any other, for a reward to judge; another one
            is as if a function raised.
        environment: variables that the command has besides; None passes on the trainer's own.
        hide: fields that are left out of the file of the row, such as the answer.
        max_processes: most processes of agents at once, on each rank.
        folder: where the folders of samples are made; None is a new one for temporary files.
        keep: number of samples whose folders are kept: the last ones, and as many that failed.
        output_bytes: bytes that are kept of the output of a sample: the first and the last.
        grace_s: seconds that processes have to end after SIGTERM, at most 5.

    Raises:
        ConfigError: if a setting is out of range.
    """

    command: str | Sequence[str]
    reward_from: str = ""
    statuses: Sequence[int] = (0,)
    environment: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    hide: Sequence[str] = ()
    max_processes: int = 64
    folder: str | None = None
    keep: int = 64
    output_bytes: int = 2**20
    grace_s: float = 5.0

    def __post_init__(self) -> None:
        least = {"max_processes": 1, "keep": 1, "output_bytes": 1024}
        values = {name: getattr(self, name) for name in least}
        for name, value in values.items():
            if value < least[name]:
                raise ConfigError(f"{name} must be at least {least[name]}, got {value}.")
        if not 0 <= self.grace_s <= LONGEST_GRACE_S:
            raise ConfigError(f"grace_s must be in [0, {LONGEST_GRACE_S:g}], got {self.grace_s}.")
        if os.path.isabs(self.reward_from) or ".." in self.reward_from.split("/"):
            raise ConfigError(
                f"reward_from must be {EXIT!r} or a file in the sample's folder, got "
                f"{self.reward_from!r}."
            )
        for name in ("statuses", "hide"):
            if isinstance(getattr(self, name), str | int):
                raise ConfigError(f"{name} must be a list, got {getattr(self, name)!r}.")
        if self.reward_from == EXIT and tuple(self.statuses) != (0,):
            raise ConfigError(f"statuses have no effect with reward_from={EXIT!r}: leave them out.")
        for status in self.statuses:
            if not 0 <= status <= 128:  # what is above is a signal's
                raise ConfigError(f"statuses must be in [0, 128], got {status}.")
        for name, value in self.environment.items():
            if not name or set(name) & {"=", "\0"} or not isinstance(value, str | None):
                raise ConfigError(f"environment must have texts by name, got {name!r}: {value!r}.")
        unset = [n for n, v in self.environment.items() if v is None and n not in os.environ]
        if unset:
            raise ConfigError(
                f"environment passes on {', '.join(unset)}, which the trainer does not have: set "
                "it, or leave it out."
            )

    def variables(self, endpoint: Endpoint, row_file: str) -> dict[str, str]:
        """The environment of one sample's processes.

        Args:
            endpoint: address and key of the sample.
            row_file: path of the file of the row.
        """
        own = {name: os.environ[name] for name in _PASSED if name in os.environ}
        own |= {name: text for name, text in os.environ.items() if name.startswith("LC_")}
        return {
            **own,
            "OPENAI_BASE_URL": endpoint.base_url,
            "OPENAI_API_BASE": endpoint.base_url,
            "OPENAI_API_KEY": endpoint.api_key,
            "OPENAI_MODEL": endpoint.model,
            "SDP_MODEL": endpoint.model,
            "ANTHROPIC_BASE_URL": endpoint.base_url.removesuffix("/v1"),  # clients add it
            "ANTHROPIC_API_KEY": endpoint.api_key,
            "SDP_ROW": row_file,
            **{n: os.environ[n] if v is None else v for n, v in self.environment.items()},
        }

    def row_text(self, row: Row) -> str:
        """The file of a row: JSON, without what is hidden and what JSON cannot say.

        Raises:
            RolloutError: naming a field that JSON cannot say.
        """
        shown = {str(name): value for name, value in row.items() if name not in self.hide}
        try:
            return json.dumps(shown)
        except (TypeError, ValueError, RecursionError):
            for name, value in shown.items():
                _json(name, value)
            raise


class CommandLine:
    """The words of a command, some with fields of a row in them.

    Args:
        command: words, or a text.
        path: value of PATH, for the program; None is the trainer's.

    Raises:
        ConfigError: if the command cannot be read, would need a shell, puts fields into code, or
            its program is not there.
    """

    def __init__(self, command: str | Sequence[str], path: str | None = None) -> None:
        words = _split(command) if isinstance(command, str) else [*command]
        if not words or not words[0] or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"a command must be a program and its words, texts; got {command!r}.")
        self._words = [_parse(word) for word in words]
        for number in range(1, len(words)):
            word, before = words[number], words[:number]
            is_code = re.search(r"\s", word) or any(_INTERPRETER.fullmatch(w) for w in before)
            if _CODE_FOLLOWS.fullmatch(before[-1]) and is_code and self._fields(number):
                raise ConfigError(
                    f"the command has fields of a row in code, {word!r}, which would run what a "
                    """row says: make them words of their own, such as ['bash', '-c', """
                    """'agent "$1"', '_', '{question}'], or read the file $SDP_ROW."""
                )
        self._cwd = os.getcwd()
        self.fields = {name for number in range(len(words)) for name in self._fields(number)}
        self.program = words[0]
        if not self._fields(0):
            named = self._word(self._words[0], {})
            found = shutil.which(named, path=path)
            if found is None:
                raise ConfigError(
                    f"the command's program {named!r} is not there, or may not be executed: "
                    "install it, or give its whole path."
                )
            self._words[0] = [(os.path.abspath(found), None)]

    def _fields(self, number: int) -> list[str]:
        return [name for _, name in self._words[number] if name not in (None, CWD)]

    def words(self, row: Row) -> list[str]:
        """The words for a row.

        Raises:
            RolloutError: if the row has not all fields, or one that no word can hold.
        """
        return [self._word(parts, row) for parts in self._words]

    def _word(self, parts: Sequence[tuple[str, str | None]], row: Row) -> str:
        word = ""
        for text, name in parts:
            word += text
            if name == CWD and CWD in row:
                raise RolloutError(
                    f"it has a {CWD!r}, and {{{CWD}}} in the command is the folder of the run: "
                    "give that field another name."
                )
            if name == CWD:
                word += self._cwd
            elif name is not None:
                word += _text_of(name, row)
        return word


def refuse_rows(agent: CommandAgent, line: CommandLine, rows: Iterable[tuple[int, Row]]) -> None:
    """Raise ``RowsError`` if there are rows, with their indices, that no command can be given."""
    faults: dict[int, str] = {}
    for index, row in rows:
        try:
            line.words(row)
            agent.row_text(row)
        except RolloutError as error:
            faults[index] = str(error)
    if faults:
        shown = " ".join(f"row {index}: {faults[index]}" for index in [*faults][:_SHOWN])
        more = f" And {len(faults) - _SHOWN} more." if len(faults) > _SHOWN else ""
        raise RowsError(f"{len(faults)} rows cannot be given to the agent: {shown}{more}", faults)


def _split(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"the command {command!r} cannot be split into words: {error}.") from None
    for word in words:
        if _OPERATORS.fullmatch(word):
            raise ConfigError(
                f"the command has {word!r}, and is run without a shell: give a list of words, such "
                """as ['bash', '-c', 'agent "$1" | tee log', '_', '{question}'] for a shell's."""
            )
    return words


def _parse(word: str) -> list[tuple[str, str | None]]:
    """Texts of a word, each with the name of the field behind it."""
    try:
        parts = list(Formatter().parse(word))
    except ValueError as error:
        raise ConfigError(f"the command's {word!r} cannot be read: {error}. {_BRACES}") from None
    for _, name, form, conversion in parts:
        if name == "" or form or conversion:
            raise ConfigError(f"the command's {word!r} has a field that is no name. {_BRACES}")
    return [(text, name) for text, name, _, _ in parts]


_BRACES = "Write {question} for the field 'question' of a row, and {{ or }} for a brace."


def _text_of(name: str, row: Row) -> str:
    if name not in row:
        raise RolloutError(f"it has no {name!r}, which the command needs; it has {sorted(row)}.")
    value = row[name]
    if value is None:
        raise RolloutError(f"its {name!r} is None, which is no word of a command.")
    text = value if isinstance(value, str) else _json(name, value)
    try:
        num_bytes = len(os.fsencode(text))
    except UnicodeEncodeError:
        raise RolloutError(f"its {name!r} has half a character: {text[:50]!r}.") from None
    if "\0" in text:
        raise RolloutError(f"its {name!r} has a NUL, which no word of a command can hold.")
    if num_bytes >= _LONGEST_WORD:
        raise RolloutError(
            f"its {name!r} has {num_bytes} bytes, and a word of a command holds {_LONGEST_WORD}: "
            "let the agent read the file $SDP_ROW."
        )
    return text


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise RolloutError(
            f"its {name!r}, a {type(value).__name__}, cannot be written as JSON: hide=[{name!r}] "
            "leaves it out."
        ) from None
