"""The command ``sdp-lightning``.

``--version``, ``init``, ``bench`` and ``doctor`` import neither Lightning nor transformers,
``export``, ``report``, ``simulate`` and ``plan`` no Lightning; ``fit``, ``validate``, ``test`` and
``rollout`` run a ``LightningCLI``.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.resources import files

from sdp_lightning.cli.failures import status_of
from sdp_lightning.errors import CheckpointError, ConfigError

TRAINER_COMMANDS = ("fit", "validate", "test", "rollout")
HELP = (files("sdp_lightning.cli") / "help.txt").read_text("utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Args:
        argv: command and arguments; None is ``sys.argv[1:]``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if command == "--version":
        print(f"sdp-lightning {metadata.version('sdp-lightning')}")
        return 0
    if command in TRAINER_COMMANDS:
        return run_trainer(arguments)
    others = {"export": export, "report": report, "doctor": doctor, "init": init}
    others |= {"simulate": simulate, "plan": plan, "bench": bench}
    if command in others:
        return others[command](arguments[1:])
    near = difflib.get_close_matches(command, (*TRAINER_COMMANDS, *others, "--version"), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return refuse(f"there is no command {command!r}.{hint}\n\n{HELP.rstrip()}")


def refuse(reason: object) -> int:
    """Print why a command is refused; returns its exit status."""
    print(f"sdp-lightning: {reason}", file=sys.stderr)
    return 2


def doctor(arguments: Sequence[str]) -> int:
    """Print the findings. Status 1: something that is needed is missing."""
    from sdp_lightning.cli.doctor import examine

    parser = argparse.ArgumentParser(prog="sdp-lightning doctor", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", action="append", default=[])
    parser.add_argument(
        "--gpu-gib", metavar="N", type=float, help="estimate for GPUs with N GiB of memory"
    )
    options = parser.parse_args(arguments)
    findings = examine(options.config, options.gpu_gib)
    print("\n".join(map(str, findings)))
    return int(any(finding.state == "problem" for finding in findings))


def export(arguments: Sequence[str]) -> int:
    """Write a model folder from a checkpoint. Status 2: it is refused."""
    parser = argparse.ArgumentParser(prog="sdp-lightning export", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CKPT", help="a .ckpt file, or a folder of shards")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--model", help="the trained model: id, folder or file.py:name")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: the checkpoint's")
    parser.add_argument(
        "--adapter", action="store_true", help="write the LoRA adapter only, for peft"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is a model folder"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the model's own Python files"
    )
    options = parser.parse_args(arguments)
    from sdp_lightning.cli.export import export_checkpoint

    try:
        print(export_checkpoint(**vars(options)))
    except (CheckpointError, ConfigError) as error:
        return refuse(error)
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write the page of a run. Status 2: there is no run."""
    parser = argparse.ArgumentParser(prog="sdp-lightning report", allow_abbrev=False)
    parser.add_argument("folder", metavar="RUN_DIR", help="folder of the run: its logger's")
    options = parser.parse_args(arguments)
    from sdp_lightning.observability.report import write_report

    try:
        print(write_report(options.folder))
    except ConfigError as error:
        return refuse(error)
    return 0


def init(arguments: Sequence[str]) -> int:
    """Write the folder of a task. Status 2: there is no such template, or something is there."""
    from sdp_lightning.cli.init import TEMPLATES, write_task

    parser = argparse.ArgumentParser(prog="sdp-lightning init", allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help="the new folder of the task")
    parser.add_argument(
        "--from", dest="name", default="sorting", metavar="TEMPLATE", help=", ".join(TEMPLATES)
    )
    options = parser.parse_args(arguments)
    try:
        print(write_task(options.folder, options.name))
    except (ConfigError, OSError) as error:
        return refuse(error)
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Run benchmarks and write their report. Status 1: one failed; status 2: there is no such."""
    from pathlib import Path

    from sdp_lightning.cli.bench import bench as run

    parser = argparse.ArgumentParser(prog="sdp-lightning bench", allow_abbrev=False)
    parser.add_argument("names", metavar="NAME", nargs="*", help="of scripts; none is all")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("RESULTS.md"))
    parser.add_argument(
        "--limit-s", metavar="S", type=float, default=300.0, help="seconds of one script"
    )
    own, more = list(arguments), list[str]()
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    return in_one_line(
        lambda: int(not run(options.names, options.out, arguments=more, limit_s=options.limit_s))
    )


def simulate(arguments: Sequence[str]) -> int:
    """Print what a run would come to. Status 2: an option is refused."""
    from sdp_lightning.cli.simulate import run_simulate

    return in_one_line(lambda: print(run_simulate(arguments)))


def plan(arguments: Sequence[str]) -> int:
    """Print how to split GPUs. Status 2: an option is refused."""
    from sdp_lightning.cli.simulate import run_plan

    return in_one_line(lambda: print(run_plan(arguments)))


def run_trainer(arguments: list[str]) -> int:
    """Run a command of the Trainer; expected errors are printed as one line.

    Status 2: a setting is refused. Status 1: the run ended with an error, or its recording is not
    whole.
    """
    return in_one_line(lambda: _run_trainer(arguments))


def in_one_line(run: Callable[[], int | None]) -> int:
    """Exit status of ``run``. An expected error is printed as one line; others are raised."""
    try:
        return run() or 0
    except Exception as error:
        if (failure := status_of(error)) is None:
            raise
        print(f"sdp-lightning: {failure[1]}", file=sys.stderr)
        return failure[0]


def require_interpreter(engine: str) -> None:
    """Refuse to launch servers with an interpreter that has no vLLM, before anything slow."""
    from urllib.parse import parse_qs

    from sdp_lightning.engines.servers.interpreter import require_vllm

    address, _, query = engine.partition("?")
    if address == "vllm://launch":
        require_vllm(*parse_qs(query).get("python", [])[-1:])


def _run_trainer(arguments: list[str]) -> int:
    from sdp_lightning.cli.settings_check import check_settings
    from sdp_lightning.config.server_keys import hide_keys

    typed = "=".join(arguments)
    if hide_keys(typed) != typed:
        raise ConfigError(
            "everybody on this machine sees the api_key of a command line. Set SDP_API_KEY, or "
            "write env:NAME or file:PATH in place of the key."
        )
    is_dry = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    given = check_settings(arguments)
    if not is_dry and "--print_config" not in arguments:
        require_interpreter(str(given.get("data.engine", "")))

    from sdp_lightning.cli.quiet_logs import quiet_logs  # slow to import, from here on

    quiet_logs()
    if is_dry:
        from sdp_lightning.cli.dry_run import dry_run

        print(dry_run(arguments))
        return 0
    from sdp_lightning.cli.trainer import RolloutCLI, describe, recording_of

    trainer = RolloutCLI(arguments).trainer
    if arguments[0] == "rollout" and trainer.is_global_zero:
        recording = recording_of(trainer)
        print(describe(recording))
        return int(not recording.is_whole)
    return 0
