"""The command ``sdp-lightning``.

``--version`` and ``doctor`` answer at once; ``fit``, ``validate`` and ``test`` are Lightning's, for
this package's module and data module.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import metadata

from sdp_lightning.errors import ConfigError

TRAINER_COMMANDS = ("fit", "validate", "test")
HELP = """\
usage: sdp-lightning fit|validate|test --config FILE [--model.X Y] [--data.X Y] [--trainer.X Y]
       sdp-lightning doctor
       sdp-lightning --version

fit        train: sdp-lightning fit --config recipes/arithmetic_cpu/config.yaml
validate   score the prompts in data.val_prompts, with --ckpt_path FILE those weights
test       the same as validate, under Lightning's test loop
doctor     what works on this machine, and what to do about what does not

sdp-lightning fit --help lists every setting, sdp-lightning fit --config FILE --print_config shows
them all as one file. trainer.max_steps counts optimizer steps, not batches.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: the arguments, ``sys.argv[1:]`` if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if command == "--version":
        print(f"sdp-lightning {metadata.version('sdp-lightning')}")
        return 0
    if command == "doctor":
        return doctor()
    if command in TRAINER_COMMANDS:
        return run_trainer(arguments)
    near = difflib.get_close_matches(command, (*TRAINER_COMMANDS, "doctor", "--version"), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    print(
        f"sdp-lightning: there is no command {command!r}.{hint}\n\n{HELP}", end="", file=sys.stderr
    )
    return 2


def doctor() -> int:
    """Print the findings; 1 if something needed is missing."""
    from sdp_lightning.doctor import examine

    findings = examine()
    print("\n".join(map(str, findings)))
    return int(any(finding.state == "problem" for finding in findings))


def run_trainer(arguments: list[str]) -> int:
    """``fit``, ``validate`` or ``test``. A setting that is refused is one line, not a traceback."""
    from sdp_lightning.summary import quiet_logs
    from sdp_lightning.trainer_cli import run

    quiet_logs()
    try:
        run(arguments)
    except ConfigError as error:
        print(f"sdp-lightning: {error}", file=sys.stderr)
        return 2
    return 0
