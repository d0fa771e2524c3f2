"""Modules of ``sdp_lightning.objective`` loaded once more, with one expression changed.

A mutation names a function and an expression in it, which is found in the syntax tree. Line breaks
and parentheses do not matter. A single capital letter stands for any expression, so the name of a
local variable does not matter either.
"""

from __future__ import annotations

import ast
import copy
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "sdp_lightning.objective"


@dataclass(frozen=True)
class Mutation:
    """One wrong expression.

    Args:
        place: module and function, as ``"surrogates.ppo"``.
        old: the expression, or a ``return`` statement; capital letters match any expression.
        new: what replaces it; capital letters stand for what they matched.
        nth: which match in the function, in the order of the text; None: there is only one.
    """

    place: str
    old: str
    new: str
    nth: int | None = None

    @property
    def module(self) -> str:
        return self.place.split(".")[0]

    def __str__(self) -> str:
        number = "" if self.nth is None else f" #{self.nth}"
        return f"{self.place}{number}: {self.old} -> {self.new}"


def load(patch: pytest.MonkeyPatch, name: str, mutation: Mutation | None = None) -> ModuleType:
    """The module ``name`` with the mutation, if it is one of this module; later imports get it."""
    path = Path(str(importlib.import_module(f"{PACKAGE}.{name}").__file__))
    tree = ast.parse(path.read_text())
    if mutation is not None and mutation.module == name:
        mutate(tree, mutation)
    fresh = ModuleType(f"{PACKAGE}.{name}")
    patch.setitem(sys.modules, fresh.__name__, fresh)
    exec(compile(tree, str(path), "exec"), fresh.__dict__)
    return fresh


def mutate(tree: ast.Module, mutation: Mutation) -> None:
    """Change the tree in place."""
    name = mutation.place.split(".")[1]
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    assert functions, f"there is no function {mutation.place}: let the mutation follow the code"
    replacer = _Replacer(_parsed(mutation.old), _parsed(mutation.new), mutation.nth)
    replacer.visit(functions[0])
    number = replacer.num_matches
    is_clear = number > mutation.nth if mutation.nth is not None else number == 1
    assert is_clear, f"{mutation} matches {number} times: let the mutation follow the code"
    ast.fix_missing_locations(tree)


class _Replacer(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST, nth: int | None) -> None:
        self._old, self._new, self._nth = old, new, nth or 0
        self.num_matches = 0

    def visit(self, node: ast.AST) -> ast.AST:
        bound: dict[str, ast.AST] = {}
        if _matches(self._old, node, bound):
            self.num_matches += 1
            if self.num_matches == self._nth + 1:
                return _filled(self._new, bound)
        return self.generic_visit(node)


def _parsed(text: str) -> ast.AST:
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _is_letter(node: object) -> bool:
    return isinstance(node, ast.Name) and len(node.id) == 1 and node.id.isupper()


def _matches(pattern: object, node: object, bound: dict[str, ast.AST]) -> bool:
    if _is_letter(pattern):
        assert isinstance(pattern, ast.Name)
        if not isinstance(node, ast.expr):
            return False
        return ast.dump(bound.setdefault(pattern.id, node)) == ast.dump(node)
    if isinstance(pattern, list) and isinstance(node, list):
        pairs = zip(pattern, node, strict=False)
        return len(pattern) == len(node) and all(_matches(p, n, bound) for p, n in pairs)
    if not isinstance(pattern, ast.AST):
        return pattern == node
    return type(pattern) is type(node) and all(
        _matches(getattr(pattern, field), getattr(node, field), bound) for field in pattern._fields
    )


def _filled(pattern: ast.AST, bound: dict[str, ast.AST]) -> ast.AST:
    class Filler(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return copy.deepcopy(bound[node.id]) if _is_letter(node) else node

    return Filler().visit(copy.deepcopy(pattern))
