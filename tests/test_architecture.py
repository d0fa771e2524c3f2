"""The rules of the house, read from the source: sizes, layers, errors, things never written."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "sdp_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted(ROOT.glob("recipes/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# The rooms of the package, from the ground up: each imports only those before it.
ROOMS = (
    *("errors", "types", "config", "distributed", "objective", "weights", "engines", "training"),
    *("prompts", "rewards", "workflows", "rollout", "lightning", "observability", "cli"),
    "testing",
)
MAX_ENTRIES = 18  # modules and rooms at the package's root
# Where each big library may be imported; elsewhere it would slow what needs none of it.
LIBRARIES = {
    "lightning": {"lightning", "observability", "cli"},
    "transformers": {"config", "engines", "training", "workflows", "lightning", "observability"}
    | {"cli", "testing"},
    "torchmetrics": {"training"},
    "peft": {"training"},
    "torch": set(ROOMS) - {"errors", "types", "config", "prompts", "rewards", "workflows"},
}
# These rooms see only the protocol, never an engine that exists.
PROTOCOL_ONLY = ("workflows", "rollout")

MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS = 350, 55, 8
WIDER = {"segment_wise_ppo_loss": 9}  # six tensors of the same tokens, in a public form

PRINTING = {"cli", "observability"}
FOREIGN = "# foreign:"  # marks a line that asks somebody else's object what it has, and says whose


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those below ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from at_run_time(node)


def imports(path: Path) -> Iterator[str]:
    for node in at_run_time(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            # ``from sdp_lightning.engines import protocol`` is an import of engines.protocol
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
        assert number <= WIDER.get(function.name, MAX_PARAMETERS), f"{place}: {number} parameters"


# Layers -------------------------------------------------------------------------------------------


def test_every_room_has_its_place_and_the_root_stays_small() -> None:
    entries = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert entries <= set(ROOMS), f"no place among ROOMS for {sorted(entries - set(ROOMS))}"
    assert len(entries) + 2 <= MAX_ENTRIES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    below = ROOMS[: ROOMS.index(room) + 1]
    for name in imports(path):
        if not name.startswith("sdp_lightning."):
            continue
        target = name.split(".")[1]
        assert target in below, f"{name_of(path)} imports {name}, which is above it"
        if room in PROTOCOL_ONLY and target == "engines":
            assert name.startswith("sdp_lightning.engines.protocol."), f"{name_of(path)}: {name}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Only what runs when a file is imported counts, not what a function imports."""
    modules = {module_of(path): path for path in FILES}
    ways = {
        module: {near for name in top_level_imports(path) if (near := nearest(name, modules))}
        for module, path in modules.items()
        if module != "sdp_lightning"  # its public names load nothing
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for target in ways.get(module, set()) - {module}:
                visit(target, (*way, module))
            done.add(module)

    for module in ways:
        visit(module, ())


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def top_level_imports(path: Path) -> Iterator[str]:
    for node in parse(path).body:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def nearest(name: str, modules: Mapping[str, Path]) -> str | None:
    """The module of this package that an import of ``name`` runs."""
    return next((n for n in (name, name.rpartition(".")[0]) if n in modules), None)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_big_libraries_are_imported_only_where_they_belong(path: Path) -> None:
    for name in imports(path):
        rooms = LIBRARIES.get(name.split(".")[0])
        assert rooms is None or room_of(path) in rooms, f"{path}: {name}"


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
    names = [
        "sdp_lightning",
        "sdp_lightning.types",
        "sdp_lightning.workflows",
        "sdp_lightning.cli.main",
    ]
    with_torch = [
        "sdp_lightning.objective",
        "sdp_lightning.training.batch",
        "sdp_lightning.rollout.factory",
    ]
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


def passes_its_error_on(handler: ast.ExceptHandler) -> bool:
    """Whether its error goes somewhere else than into a log."""
    logged = {
        inner
        for node in ast.walk(handler)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")
        for inner in ast.walk(node)
    }
    return any(
        isinstance(node, ast.Name) and node.id == handler.name and isinstance(node.ctx, ast.Load)
        for statement in handler.body
        for node in ast.walk(statement)
        if node not in logged
    )


def test_a_broad_except_raises_or_passes_its_error_on() -> None:
    for path in FILES:
        for function, handler in broad_handlers(path):
            place = f"{path}:{handler.lineno} {function}"
            assert always_raises(handler) or passes_its_error_on(handler), f"{place} swallows"


def test_the_check_for_swallowed_exceptions_finds_them() -> None:
    def judge(body: str, kind: str = "Exception as error") -> bool:
        tree = ast.parse(f"try:\n    f()\nexcept {kind}:\n    {body}\n")
        handler = next(node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))
        return not is_broad(handler.type) or always_raises(handler) or passes_its_error_on(handler)

    assert judge("raise")
    assert judge("raise ValueError from error", "BaseException as error")
    assert judge("pass", "ValueError")
    assert not judge("pass")
    assert judge("tell(error)", "(ValueError, Exception) as error")
    assert not judge("logger.error(error)", "(ValueError, Exception) as error")
    assert not judge("pass", "BaseException")
    assert not judge("if wanted:\n        raise")


def test_nothing_is_suppressed_broadly() -> None:
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                assert not any(is_broad(argument) for argument in node.args), f"{path}"


# What is never written ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_our_own_objects_are_never_asked_what_they_have(path: Path) -> None:
    lines = path.read_text().splitlines()
    asked = [*calls(path, "hasattr"), *(c for c in calls(path, "getattr") if len(c.args) == 3)]
    for call in asked:
        marked = any(FOREIGN in lines[n - 1] for n in (call.lineno - 1, call.lineno))
        assert marked, f"{path}:{call.lineno}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    printed = list(calls(path, "print"))
    assert not printed or room_of(path) in PRINTING, f"{path}:{printed[0].lineno}"


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)
def test_no_test_mocks(path: Path) -> None:
    for name in imports(path):
        assert "mock" not in name.lower().split("."), f"{path} imports {name}"
    assert not [c for word in ("Mock", "MagicMock") for c in calls(path, word)], path
