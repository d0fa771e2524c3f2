"""Old names of modules: each is still imported, with a warning that names the new place.

:func:`accept_old_modules` is called once, where the package is imported. So configs, scripts and
server commands that name a class by its former path go on working.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "sdp_lightning"
# Former name -> present name, below the package.
MOVED_MODULES: Mapping[str, str] = {
    "batch": "training.batch",
    "callbacks": "lightning.weight_sync",
    "datamodule": "lightning.datamodule",
    "engines.base": "engines.protocol",
    "engines.options": "engines.remote.options",
    "engines.server": "engines.servers.managed",
    "engines.server_config": "engines.servers.config",
    "engines.vllm_worker": "engines.servers.vllm_worker",
    "export": "cli.export",
    "loading": "config.import_path",
    "metrics": "training.metrics",
    "module": "lightning.module",
    "progress": "observability.progress.callback",
    "recorder": "observability.recording.recorder",
    "recording": "observability.recording",
    "replay": "observability.recording.replay",
    "report": "observability.report",
    "report.callback": "observability.report.callback",
    "rewards.reasoning": "rewards.reasoning_gym",
    "rollout.capacity": "rollout.groups.ledger",
    "rollout.recompute": "rollout.proximal_recompute",
    "rollout.runner": "rollout.task_runner",
    "rollout.staleness": "rollout.groups.staleness",
    "rows": "prompts",
    "summary": "observability.summary",
    "viewing": "observability.view",
    "watchdog": "lightning.watchdog",
    "weights.gloo": "weights.tcp",
    "workflows.base": "workflows.workflow",
    "workflows.gate": "workflows.send_gate",
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds a module under its former name: one whose attributes are those of the present one."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        package, _, former = fullname.partition(".")
        is_moved = package == _PACKAGE and former in MOVED_MODULES
        return ModuleSpec(fullname, self, is_package=True) if is_moved else None

    def exec_module(self, module: ModuleType) -> None:
        present = f"{_PACKAGE}.{MOVED_MODULES[module.__name__.removeprefix(f'{_PACKAGE}.')]}"
        warnings.warn(
            f"the module {module.__name__} is now {present}. Public classes have short names that "
            f"stay: {_PACKAGE}.WeightSyncCallback, {_PACKAGE}.RunReport, and so on.",
            FutureWarning,
            stacklevel=2,
        )

        def find(name: str) -> object:
            if name.startswith("__"):  # Python asks about this module, not about the present one
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(importlib.import_module(present), name)

        vars(module)["__getattr__"] = find


def accept_old_modules() -> None:
    """Let modules be imported by their former names. A second call changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
