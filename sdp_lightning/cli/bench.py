"""``sdp-lightning bench``: runs the scripts of ``recipes/benchmarks/speed``, and writes a report.

Scripts run one after the other, each in a process of its own. Their load is said beside what they
print: numbers of a machine that did other things meanwhile are worth less.
"""

from __future__ import annotations

import ast
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import sdp_lightning
from sdp_lightning.distributed import process_guard
from sdp_lightning.errors import ConfigError

FOLDER = "recipes/benchmarks/speed"
PACKAGES = ("sdp-lightning", "torch", "transformers", "lightning", "numpy", "vllm", "trl")
_GRACE_S, _END_S = 2.0, 30.0  # from SIGTERM to SIGKILL; and until all is gone
BUSY = 0.5  # load of a core before the first script from which on it is said


@dataclass(frozen=True)
class Outcome:
    """What one script did.

    Args:
        name: of the script.
        about: first sentence of its docstring.
        command: words after the interpreter.
        output: what it printed, and the end of its errors if it failed.
        status: exit status; None: it was stopped at its time limit.
        seconds: that it ran.
        load: jobs a core that ran before it began, the last minute's mean.
    """

    name: str
    about: str
    command: Sequence[str]
    output: str
    status: int | None
    seconds: float
    load: float


def scripts() -> dict[str, Path]:
    """The scripts by their names: of the present folder's checkout, or of this package's.

    Raises:
        ConfigError: if neither has any.
    """
    near = Path(sdp_lightning.__file__).parents[1]
    for root in (Path.cwd(), near):
        found = sorted((root / FOLDER).glob("*.py"))
        if found:
            return {path.stem: path for path in found}
    raise ConfigError(
        f"there is no {FOLDER} in {Path.cwd()} or {near}: benchmarks are in the repository and not "
        "in the installed package. Run this in a checkout of it."
    )


def bench(
    names: Sequence[str],
    out: Path,
    *,
    arguments: Sequence[str] = (),
    limit_s: float = 300.0,
    say: Callable[[str], None] = print,
) -> bool:
    """Run the scripts with these names, or all, and write what they printed to ``out``.

    The file is written anew after each script, so that a stop leaves what was measured.

    Args:
        names: of scripts; none is all.
        out: the Markdown file.
        arguments: given to the script, if it is one.
        limit_s: seconds after which a script is stopped.
        say: prints a line of progress.

    Returns:
        Whether all scripts ended well.

    Raises:
        ConfigError: naming an unknown script; or if arguments are given to several, the limit is
            none, or the file cannot be written.
    """
    if not 0 < limit_s < math.inf:
        raise ConfigError(f"--limit-s must be a positive number of seconds, got {limit_s:g}.")
    known = scripts()
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"there is no benchmark {unknown[0]!r}; there are {', '.join(known)}.")
    if arguments and len(names) != 1:
        raise ConfigError(f"arguments are of one benchmark, and {len(names) or 'all'} are to run.")
    outcomes: list[Outcome] = []
    _write(out, outcomes)  # before anything slow
    for name in names or known:
        say(f"{name} ...")
        outcome = run(known[name], arguments, limit_s)
        outcomes.append(outcome)
        _write(out, outcomes)
        say(f"{outcome.output}\n{name}: {_ended(outcome, limit_s)}")
    return all(outcome.status == 0 for outcome in outcomes)


def run(path: Path, arguments: Sequence[str], limit_s: float) -> Outcome:
    """Run a script to its end or its time limit."""
    root = path.parents[3]
    command = [str(path.relative_to(root)), *arguments]
    load, start = os.getloadavg()[0] / (os.cpu_count() or 1), time.monotonic()
    guard = [sys.executable, "-I", "-S", process_guard.__file__, str(_GRACE_S), "-", "0"]
    held, end = os.pipe()  # the guard ends the script, with all that it started, once it is closed
    try:
        script = subprocess.Popen(
            [*guard, sys.executable, *command],
            cwd=root,
            stdin=held,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except BaseException:
        os.close(end)
        raise
    finally:
        os.close(held)
    status: int | None = None
    try:
        output, errors = script.communicate(timeout=limit_s)
        status = script.returncode
    except subprocess.TimeoutExpired:
        os.close(end)
        end = -1
        output, errors = script.communicate(timeout=_GRACE_S + _END_S)
    finally:
        if end >= 0:
            os.close(end)
    if status:
        output += "".join(errors.splitlines(keepends=True)[-20:])
    seconds = time.monotonic() - start
    return Outcome(path.stem, _about(path), command, output.rstrip(), status, seconds, load)


def page(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Lines of the report."""
    yield "# Benchmarks\n"
    yield f"`sdp-lightning bench`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.\n"
    yield "| | |\n|---|---|"
    for name, value in environment().items():
        yield f"| {name} | {value} |"
    yield "\nTimes are of this machine; what is compared ran in the same run, in turn."
    for outcome in outcomes:
        busy = f"; {outcome.load:.1f} jobs a core ran before it" if outcome.load > BUSY else ""
        yield f"\n## {outcome.name}\n\n{outcome.about}\n"
        yield f"`python {shlex.join(outcome.command)}`, {outcome.seconds:.0f} s{busy}\n"
        if outcome.status != 0:
            yield f"**{_ended(outcome, outcome.seconds)}**\n"
        yield f"```text\n{outcome.output}\n```"


def environment() -> dict[str, str]:
    """What the numbers depend on: machine, system, packages, commit."""
    found = {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "GPUs": _first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "none",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    root = str(Path(sdp_lightning.__file__).parent)
    found["commit"] = _first_line("git", "-C", root, "describe", "--always", "--dirty") or "unknown"
    return found


def _write(out: Path, outcomes: Sequence[Outcome]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(page(outcomes)) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"--out: the report cannot be written to {out}: {error}.") from error


def _ended(outcome: Outcome, limit_s: float) -> str:
    if outcome.status is None:
        return f"stopped after {limit_s:.0f} s; --limit-s gives it more"
    how = "done" if outcome.status == 0 else f"failed with status {outcome.status}"
    return f"{how} in {outcome.seconds:.0f} s"


def _about(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0].partition("``")[0].rstrip(": ")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _first_line(*command: str) -> str:
    """The first line that a command prints; nothing if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0] if done.returncode == 0 else ""
