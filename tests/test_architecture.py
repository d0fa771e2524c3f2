"""The rules of the house, read from the source: sizes, layers, errors, things never written."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdp_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted(ROOT.glob("recipes/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# Which room may import which, in the order of the layers; a room is a file or a folder.
CORE = {"errors", "types", "config", "loading"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "explain": {"errors"},
    "display": set(),
    "types": {"display", "errors"},
    "config": {"errors"},
    "rows": {"errors"},
    "loading": {"errors", "rows"},
    "adapters": {"config", "errors"},
    "rewards": {"errors", "loading", "rows"},
    "weights": {"errors"},
    "lifeline": {"errors"},
    "links": set(),
    "ranks": {"errors", "lifeline", "links"},
    "activity": set(),
    "objective": {"config", "errors", "loading"},
    "batch": {"config", "display", "errors", "types"},
    "engines": CORE | {"weights"},
    "scoring": {"types"},
    "echo": {"adapters", "errors", "types"},
    "packing": {"batch", "errors"},
    "forward": {"batch", "errors", "objective", "packing"},
    "metrics": {"batch", "objective"},
    "workflows": CORE | {"engines", "rewards"},
    "rollout": {"config", "engines", "errors", "explain", "ranks", "types", "workflows"},
    "testing": CORE | {"engines"},
    "policy": {"adapters", "config", "errors", "forward", "loading", "weights"},
    "rank_sums": {"ranks"},
    "optimizer": {"config", "errors"},
    "step_values": {"batch", "errors"},
    "batch_advantages": {"batch", "config", "objective"},
    "batch_loss": {"batch", "config", "objective", "rank_sums"},
    "viewing": {"batch", "batch_loss", "config", "display", "errors", "objective", "types"},
    "passes": {"batch", "config", "errors", "forward", "policy"},
    "trainer_checks": {"config", "errors"},
    "module": CORE
    | {"adapters", "batch", "batch_advantages", "batch_loss", "forward", "metrics", "objective"}
    | {"display", "optimizer", "passes", "policy", "rank_sums", "ranks", "scoring"}
    | {"step_values", "trainer_checks", "weights"},
    "recording": {"config", "errors", "types"},
    "loaders": {"activity", "batch", "config", "errors", "ranks", "rollout", "types"}
    | {"workflows"},
    "generation": {"errors", "loaders", "ranks", "rollout", "types", "workflows"},
    "cores": {"engines"},
    "datamodule": CORE
    | {"activity", "batch", "cores", "engines", "generation", "loaders", "module", "ranks"}
    | {"rollout", "workflows"},
    "stopping": {"datamodule", "errors", "loaders"},
    "watchdog": {"datamodule", "errors"},
    "checkpointing": {"errors"},
    "callbacks": {
        "activity",
        "batch",
        "checkpointing",
        "datamodule",
        "echo",
        "errors",
        "module",
        "rollout",
        "stopping",
    },
    "recorder": {"datamodule", "errors", "generation", "module", "recording"},
    "replay": {"batch", "callbacks", "config", "errors", "loaders", "module", "ranks"}
    | {"recording", "types"},
    "progress": {"datamodule", "errors"},
    "report": {"activity", "callbacks", "datamodule", "errors", "metrics", "module", "rollout"}
    | {"types", "viewing"},
    "summary": {"progress"},
    "doctor": {"config", "errors", "loading"},
    "export": {"adapters", "errors", "loading", "weights"},
    "trainer_cli": {"callbacks", "datamodule", "errors", "module", "recorder", "recording"}
    | {"summary", "types"},
    "dry_run": {"datamodule", "errors", "loading", "trainer_cli"},
    "cli": {"doctor", "dry_run", "errors", "explain", "export", "report", "summary"}
    | {"trainer_cli"},
}
# These rooms see only the protocol, never an engine that exists.
KNOW_BASE_ONLY = ("workflows", "rollout")
LIGHTNING = {
    *("module", "loaders", "datamodule", "stopping", "watchdog", "checkpointing", "callbacks"),
    *("dry_run", "generation", "progress", "recorder", "replay", "report", "summary"),
    *("trainer_checks", "trainer_cli"),
}
TRANSFORMERS = {
    *("dry_run", "engines", "export", "forward", "loading", "module", "policy", "summary"),
    "testing",
}
TORCHMETRICS = {"metrics"}
TORCH = {
    *("objective", "batch", "engines", "weights", "forward", "metrics", "scoring", "testing"),
    *("module", "policy", "ranks", "datamodule", "doctor", "echo", "export", "trainer_checks"),
    *("adapters", "batch_advantages", "batch_loss", "checkpointing", "cores", "step_values"),
    *("dry_run", "optimizer", "packing", "passes", "rank_sums"),
    "rollout",  # its checkpoint, tensors only
}

MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS = 350, 60, 8

# Broad handlers that do not raise, and where their error goes instead.
PASSED_ON = {
    ("rollout/executor.py", "_roll_out"): "recorded; raised in take()",
    ("rollout/runner.py", "_serve"): "the thread's death; raised in every waiter",
    ("rollout/runner.py", "_deliver"): "the thread's death; raised in every waiter",
    ("engines/embedded/loop.py", "_run"): "fails every request, present and future",
    ("engines/embedded/loop.py", "_deliver"): "fails the request whose sink raised",
    ("weights/vllm_native.py", "_run"): "raised where the transfer is awaited",
    ("workflows/tools.py", "_run"): "told to the policy that called the tool",
    ("rewards/calling.py", "work"): "raised where the reward is awaited",
    ("rewards/crew.py", "_serve"): "raised where the reward is awaited",
    ("rewards/worker.py", "_attempt"): "sent to the pool, which raises it",
}
# Things of others: model configurations differ by type, callables may have no name.
FOREIGN_ATTRIBUTES = {
    *("forward.py", "engines/embedded/loading.py", "rewards/calling.py"),
    *("rewards/pool.py", "workflows/tools.py"),
    "engines/vllm_worker.py",
}
PRINTING = {"cli.py", "progress.py"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            # ``from sdp_lightning.engines import base`` is an import of engines.base
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES + RECIPES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_functions_and_signatures_are_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path}: {lines} lines"
    for function in functions(path):
        place = f"{path}:{function.lineno} {function.name}"
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= MAX_FUNCTION, f"{place}: {length} lines"
        given = function.args
        names = [a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
        number = len([name for name in names if name not in ("self", "cls")])
        assert number <= MAX_PARAMETERS, f"{place}: {number} parameters"


# Layers -------------------------------------------------------------------------------------------


def test_every_room_has_its_place_in_the_layers() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= set(LAYERS), f"no layer for {sorted(rooms - set(LAYERS))}"


def test_the_layers_have_no_circle() -> None:
    below: set[str] = set()
    for room, allowed in LAYERS.items():
        assert allowed <= below, f"{room} may import {sorted(allowed - below)}, which are above it"
        below.add(room)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down_the_layers(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path):
        if not name.startswith("sdp_lightning."):
            continue
        target = name.split(".")[1]
        assert target == room or target in LAYERS[room], f"{name_of(path)} imports {name}"
        if room in KNOW_BASE_ONLY and target == "engines":
            assert name.startswith("sdp_lightning.engines.base."), f"{name_of(path)}: {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_big_libraries_are_imported_only_where_they_belong(path: Path) -> None:
    places = {
        "lightning": LIGHTNING,
        "transformers": TRANSFORMERS,
        "torchmetrics": TORCHMETRICS,
        "peft": {"adapters"},
        "torch": TORCH,
    }
    for name in imports(path):
        library = name.split(".")[0]
        assert library not in places or room_of(path) in places[library], f"{path}: {name}"


LOADED = """
import json, sys
found = {}
for name in sys.argv[1:]:
    __import__(name)
    found[name] = [m for m in ("torch", "transformers", "lightning") if m in sys.modules]
print(json.dumps(found))
"""


def test_importing_the_core_imports_neither_lightning_nor_transformers() -> None:
    """In a fresh interpreter, cheapest first."""
    names = ["sdp_lightning", "sdp_lightning.types", "sdp_lightning.workflows", "sdp_lightning.cli"]
    with_torch = ["sdp_lightning.objective", "sdp_lightning.batch", "sdp_lightning.rollout.factory"]
    output = subprocess.run(
        [sys.executable, "-c", LOADED, *names, *with_torch],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(output)
    assert {name: found[name] for name in names} == {name: [] for name in names}
    assert {name: found[name] for name in with_torch} == {name: ["torch"] for name in with_torch}


# Errors -------------------------------------------------------------------------------------------


def broad_handlers(path: Path) -> Iterator[tuple[str, ast.ExceptHandler]]:
    """(innermost function, handler) of every ``except:``, ``Exception`` and ``BaseException``."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, ast.ExceptHandler]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.ExceptHandler) and is_broad(node.type):
            yield function, node
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    return visit(parse(path), "")


def is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(is_broad(part) for part in kind.elts)
    return kind is None or (isinstance(kind, ast.Name) and "Exception" in kind.id.split("Base"))


def always_raises(handler: ast.ExceptHandler) -> bool:
    """Its last statement raises, and nothing returns or leaves a loop before."""
    leaving = (ast.Return, ast.Break, ast.Continue)
    left = any(isinstance(node, leaving) for node in ast.walk(handler))
    return isinstance(handler.body[-1], ast.Raise) and not left


def reads_its_error(handler: ast.ExceptHandler) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == handler.name and isinstance(node.ctx, ast.Load)
        for statement in handler.body
        for node in ast.walk(statement)
    )


def test_a_broad_except_raises_or_passes_its_error_on() -> None:
    passed_on: set[tuple[str, str]] = set()
    for path in FILES:
        for function, handler in broad_handlers(path):
            if always_raises(handler):
                continue
            place = name_of(path), function
            assert place in PASSED_ON, f"{path}:{handler.lineno} swallows an exception"
            assert reads_its_error(handler), f"{path}:{handler.lineno} drops its error"
            passed_on.add(place)
    assert passed_on == set(PASSED_ON), "the list names handlers that are gone"


def test_the_check_for_swallowed_exceptions_finds_them() -> None:
    def judge(body: str, kind: str = "Exception as error") -> bool:
        tree = ast.parse(f"try:\n    f()\nexcept {kind}:\n    {body}\n")
        handler = next(node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))
        return not is_broad(handler.type) or always_raises(handler)

    assert judge("raise")
    assert judge("raise ValueError from error", "BaseException as error")
    assert judge("pass", "ValueError")
    assert not judge("pass")
    assert not judge("log(error)", "(ValueError, Exception) as error")
    assert not judge("pass", "BaseException")
    assert not judge("if error.args:\n        raise")


def test_nothing_is_suppressed_broadly() -> None:
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                assert not any(is_broad(argument) for argument in node.args), f"{path}"


# What is never written ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_our_own_objects_are_never_asked_what_they_have(path: Path) -> None:
    asked = [*calls(path, "hasattr"), *(c for c in calls(path, "getattr") if len(c.args) == 3)]
    assert not asked or name_of(path) in FOREIGN_ATTRIBUTES, f"{path}:{asked[0].lineno}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    printed = list(calls(path, "print"))
    assert not printed or name_of(path) in PRINTING, f"{path}:{printed[0].lineno}"


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)
def test_no_test_mocks(path: Path) -> None:
    for name in imports(path):
        assert "mock" not in name.lower().split("."), f"{path} imports {name}"
    assert not [c for word in ("Mock", "MagicMock") for c in calls(path, word)], path
