"""LoRA adapters by path: only an adapter travels, in PEFT's format; servers sample with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Generator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdp_lightning.errors import EngineError
from sdp_lightning.weights.files import WeightFolder
from sdp_lightning.weights.protocol import (
    LoadAdapter,
    LoadFolder,
    ServedType,
    Target,
    Weights,
    WeightStream,
)

ADAPTER = "sdp-adapter"
_PREFIX = "base_model.model."
_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>A|B)(?:\.[^.]+)?\.weight$")


class LoRATransport:
    """Writes the adapter's weights as PEFT does; base weights are sent as files, at a start only.

    Names are those of a PEFT model's ``state_dict``:
    ``base_model.model.<module>.lora_A.<adapter>.weight``, and ``...base_layer.weight`` for the base
    weights below the adapter. Rank and target modules are derived from names and shapes.

    Args:
        alpha: the adapter's ``lora_alpha``; its output is scaled by ``alpha / rank``.
        root: a folder that servers see under the same name; None is this host's shared memory.
    """

    is_live = False

    def __init__(self, alpha: float, *, root: Path | None = None) -> None:
        self._alpha = alpha
        self._files = WeightFolder(root)
        self._number = self._staged = 0  # of the adapter in force, and of the one staged last

    def stage(self, weights: Weights, *, full: bool, dtype: ServedType | None = None) -> int:
        stream = weights if isinstance(weights, WeightStream) else WeightStream.of(weights)
        shapes = {name: tensor for name, tensor in stream.layout.items() if _NAME.match(name)}
        if len(shapes) < len(stream.layout) and not full:
            other = next(_base_name(name) for name in stream.layout if name not in shapes)
            raise EngineError(
                f"{other} changed, but transport='lora' sends an adapter only. Freeze it, or "
                "use another transport."
            )
        self._staged = self._number
        if not shapes and not full:
            return 0  # a skipped step: the adapter stays the same
        config = adapter_config(shapes, self._alpha)
        adapter: dict[str, Tensor] = {}
        folder = self._folder(self._number + 1)
        try:
            shutil.rmtree(folder, ignore_errors=True)  # staged, and never put in force
            folder.mkdir(mode=0o700)
            num_bytes = self._files.stage(_base_of(stream, adapter), full=True)[1] if full else 0
            adapter |= {plain_name(n): tensor.detach().cpu().contiguous() for n, tensor in stream}
            save_file(adapter, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config))
            (folder / "adapter_config.json").chmod(0o600)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise EngineError(f"the adapter cannot be written to {folder}: {error}") from error
        except EngineError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._staged = self._number + 1
        # vLLM may read a folder again at any time: the adapter in force may still be in use.
        shutil.rmtree(self._folder(self._number - 1), ignore_errors=True)
        return num_bytes + sum(tensor.nbytes for tensor in adapter.values())

    def activate(self) -> None:
        self._files.activate()
        self._number = self._staged

    async def deliver(self, target: Target, *, whole: bool) -> None:
        if whole:
            for folder in self._files.folders:
                await target.tell(LoadFolder(str(folder)))
        await target.tell(LoadAdapter(ADAPTER, str(self._folder(self._number))))

    def close(self) -> None:
        self._files.close()

    def _folder(self, number: int) -> Path:
        return self._files.path / f"adapter-{number}"


def _base_of(stream: WeightStream, adapter: dict[str, Tensor]) -> Generator[tuple[str, Tensor]]:
    """Yield the base weights under their plain names; collect the others in ``adapter``."""
    for name, tensor in stream:
        if _NAME.match(name):
            adapter[plain_name(name)] = tensor.detach().cpu().contiguous()
        else:
            yield _base_name(name), tensor


def _base_name(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def plain_name(name: str) -> str:
    """``name`` as PEFT saves it: without the name of the adapter."""
    match = _NAME.match(name)
    if match is None:
        raise EngineError(f"{name} is no weight of a LoRA adapter.")
    module = match["module"] if name.startswith(_PREFIX) else _PREFIX + match["module"]
    return f"{module}.lora_{match['kind']}.weight"


def adapter_config(
    adapter: dict[str, Tensor], alpha: float, *, rank: int | None = None
) -> dict[str, object]:
    """PEFT's ``adapter_config.json``.

    Args:
        adapter: weights by name.
        alpha: their ``lora_alpha``.
        rank: their rank; None is derived from their shapes.

    Raises:
        EngineError: if there are none, or their ranks differ.
    """
    ranks = (
        {rank}
        if rank is not None
        else {
            int(tensor.shape[0 if match["kind"] == "A" else 1])
            for name, tensor in adapter.items()
            if (match := _NAME.match(name)) is not None
        }
    )
    if len(ranks) != 1:
        raise EngineError(
            f"an adapter needs weights named ...lora_A and ...lora_B, of one rank; found "
            f"{len(adapter)} weights of the ranks {sorted(ranks)}."
        )
    modules = {plain_name(name).rsplit(".", 3)[1] for name in adapter}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
    }
