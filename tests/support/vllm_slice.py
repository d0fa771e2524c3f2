"""vLLM's weight-transfer package without the rest of vLLM, for GPUs on which vLLM is not installed.

The transfer engines are vLLM's own files; what they import of its other parts is replaced by the
little that they use. ``SDP_VLLM_PACKAGE`` names the folder ``vllm`` of a wheel, of any device.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from support.paths import ROOT


def find() -> Path | None:
    """The folder, if it is there."""
    given = os.environ.get("SDP_VLLM_PACKAGE")
    beside = ROOT / ".venv-vllm" / "lib"
    folders = [Path(given)] if given else sorted(beside.glob("python3*/site-packages/vllm"))
    return next((folder for folder in folders if folder.is_dir()), None)


def install() -> None:
    """Make ``vllm.distributed.weight_transfer`` importable here, unless vLLM is installed."""
    folder = find()
    if importlib.util.find_spec("vllm") is not None:
        return
    assert folder is not None
    sys.modules.setdefault("pybase64", base64)
    _package("vllm", folder)
    _package("vllm.distributed", folder / "distributed")
    _module("vllm.envs", VLLM_ALLOW_INSECURE_SERIALIZATION=True)
    _module("vllm.config")
    _module("vllm.config.parallel", ParallelConfig=object)
    _module("vllm.config.weight_transfer", WeightTransferConfig=object)
    _module("vllm.logger", init_logger=_nothing)
    _module("vllm.utils")
    _module("vllm.utils.nccl", unpinned_nccl_env=None)
    _module("vllm.distributed.device_communicators")
    _module("vllm.distributed.device_communicators.pynccl_wrapper", NCCL_UNIQUE_ID_BYTES=128)
    _module("vllm.model_executor")
    _module("vllm.model_executor.model_loader")
    _module(
        "vllm.model_executor.model_loader.reload",
        initialize_layerwise_reload=_nothing,
        finalize_layerwise_reload=_nothing,
    )
    _module(
        "vllm.model_executor.model_loader.mtp_validation",
        disable_mtp_completeness_check=_Nothing,
    )


def _nothing(*arguments: object) -> None: ...


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _module(name: str, **contents: Any) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = []
    module.__dict__.update(contents)
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


def _package(name: str, folder: Path) -> None:
    """Its files are imported from ``folder``, its own ``__init__`` is not run."""
    _module(name).__path__ = [str(folder)]
