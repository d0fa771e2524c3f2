"""Modules of ``sdp_lightning.objective`` loaded once more, from changed text."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "sdp_lightning.objective"


def load(patch: pytest.MonkeyPatch, name: str, old: str = "", new: str = "") -> ModuleType:
    """The module ``name`` as it would be with ``new`` for ``old``; later imports get this one."""
    path = Path(str(importlib.import_module(f"{PACKAGE}.{name}").__file__))
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}: let the mutation follow the code"
    fresh = ModuleType(f"{PACKAGE}.{name}")
    patch.setitem(sys.modules, fresh.__name__, fresh)
    exec(compile(text.replace(old, new) if old else text, str(path), "exec"), fresh.__dict__)
    return fresh
