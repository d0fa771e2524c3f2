"""Old names of modules: each is still imported, with a warning that names the new place.

:func:`accept_old_modules` is called once, where the package is imported. So configs, scripts and
server commands that name a class by its former path go on working.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
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
    "workflows.base": "workflows.workflow",
    "workflows.gate": "workflows.send_gate",
}


class _MovedModule(ModuleType):
    """A module that has everything of the one at its new place, and nothing of its own."""

    moved_to: str

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # Python's own questions are about this module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(self.moved_to), name)


class _MovedLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _MovedModule(spec.name)
        module.moved_to = f"{_PACKAGE}.{MOVED_MODULES[spec.name.removeprefix(f'{_PACKAGE}.')]}"
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, _MovedModule)
        warnings.warn(
            f"the module {module.__name__} is now {module.moved_to}. Public classes have short "
            f"names that stay: {_PACKAGE}.WeightSyncCallback, {_PACKAGE}.RunReport, and so on.",
            FutureWarning,
            stacklevel=2,
        )


class _MovedFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        former = fullname.removeprefix(f"{_PACKAGE}.")
        if former == fullname or former not in MOVED_MODULES:
            return None
        return ModuleSpec(fullname, _MovedLoader(), is_package=True)


def accept_old_modules() -> None:
    """Let modules be imported by their former names. A second call changes nothing."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
