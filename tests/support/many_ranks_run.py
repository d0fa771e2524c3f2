"""Training runs on several ranks, and the process that their ranks are forked from.

Run as a script, it reads orders from its standard input, one JSON object a line: ``folder`` (the
tiny model's), ``out``, ``size``, ``limit_s`` and ``cases``, each ``[name, settings]``. It forks
``size`` ranks, which run all cases one after the other in one process group of torch.distributed,
and answers with their exit codes, the seconds it took and whether anything of them was left. What
rank r saw of each case is in ``out/r.pt``, what it printed in ``out/r.log``. Itself it runs no
tensor operation, so a fork finds no thread that it would have to go without. With an order as its
argument it runs that as rank 0, and Lightning starts the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (loaded here, once)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (loaded here, once)

from support.rank_environment import free_port, rank_environment
from support.rank_place import Place
from support.recorded_on_ranks import recorded
from support.rollouts_on_ranks import rollouts

CASES = {"recorded": recorded, "rollouts": rollouts}


# Ranks ------------------------------------------------------------------------------------------


def be_rank(order: Mapping[str, Any], rank: int, port: int) -> None:
    out = Path(order["out"])
    log = os.open(out / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ |= rank_environment(rank, order["size"], port)
    torch.save(run_cases(order, rank), out / f"{rank}.pt")


def run_cases(order: Mapping[str, Any], rank: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    place = Place(order["folder"], rank, order["size"])
    results = {}
    for name, settings in order["cases"]:
        settings = dict(settings)
        kind = settings.pop("kind")
        results[name] = CASES[kind](place, **settings)
    return results


def fork_rank(order: Mapping[str, Any], rank: int, port: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        be_rank(order, rank, port)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def obey(order: Mapping[str, Any]) -> dict[str, Any]:
    start, port = time.monotonic(), free_port()
    pids = [fork_rank(order, rank, port) for rank in range(order["size"])]
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < len(pids) and time.monotonic() - start < order["limit_s"]:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            ended[pid] = os.waitstatus_to_exitcode(status), time.monotonic() - start
        else:
            time.sleep(0.01)
    late = [rank for rank, pid in enumerate(pids) if pid not in ended]
    for pid in set(pids) - set(ended):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {
        "codes": [ended[pid][0] if pid in ended else None for pid in pids],
        "seconds": [ended[pid][1] if pid in ended else None for pid in pids],
        "late": late,
    }


def main() -> None:
    if len(sys.argv) > 1:  # an order: Lightning itself starts the other ranks, as this script
        run_cases(json.loads(sys.argv[1]), int(os.environ.get("LOCAL_RANK", "0")))
        return
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
