"""What a checkpoint holds of a LoRA run: the adapter, and which base model it lies on.

The base model's weights do not change, so they are not saved. Its digest says whether another run,
or an export, has the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sdp_lightning.config import LoRAConfig
from sdp_lightning.config.weights_digest import weights_digest
from sdp_lightning.errors import ConfigError
from sdp_lightning.training.policy.lora import is_adapter, merged_name
from sdp_lightning.training.policy.lora_targets import Targets
from sdp_lightning.training.policy.sharding import is_sharded

LORA_KEY = "sdp_lora"  # where a checkpoint says what adapter it holds
BASE_KEY = "sdp_lora_base"  # where it says what the adapter lies on, if it holds no base weights
PLACES_KEY = "sdp_lora_places"  # where it says on which weights
_NUM_NAMED = 3


@dataclass(frozen=True)
class BaseModel:
    """The model below an adapter.

    Args:
        model: id, or absolute path.
        revision: its commit or branch, where it is known.
        dtype: dtype of its weights, such as ``"float32"``.
        digest: :func:`base_digest` of them.
    """

    model: str
    revision: str | None
    dtype: str
    digest: str

    def require(self, found: BaseModel) -> None:
        """Refuse another model than the one that an adapter was trained over.

        Raises:
            ConfigError: naming both.
        """
        if found.digest == self.digest:
            return
        revision = "" if self.revision is None else f" at {self.revision}"
        change = "and its weights differ" if self.dtype == found.dtype else f"in {found.dtype}"
        raise ConfigError(
            f"the checkpoint's adapter was trained over the base model {self.model}{revision} in "
            f"{self.dtype}, and this is {found.model}, {change}: over another base it means "
            "something else. Give it the model, revision and dtype that it was trained over."
        )


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter, where it lies, and the model below it."""

    config: LoRAConfig
    targets: Targets
    base: BaseModel

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Add what the adapter is, and on what it lies, to Lightning's checkpoint."""
        checkpoint[LORA_KEY] = adapter_settings(self.config)
        checkpoint[BASE_KEY] = asdict(self.base)
        places = {kind: list(names) for kind, names in vars(self.targets).items()}
        checkpoint[PLACES_KEY] = places

    def check(self, checkpoint: Mapping[str, Any], policy: nn.Module) -> None:
        """Refuse to go on from a checkpoint over another base model, or of other places.

        Args:
            checkpoint: Lightning's checkpoint.
            policy: the model, into which a sharded strategy has loaded the checkpoint's weights.

        Raises:
            ConfigError: naming both.
        """
        saved = saved_adapter(checkpoint)
        if saved is not None and saved.base is not None:
            saved.base.require(self.base)
        elif is_sharded(policy):  # an earlier version's may have brought its own base weights
            self._require_own(base_digest(policy.state_dict()))
        if saved is not None and saved.targets is not None:
            _require_same({*_names(saved.targets)}, {*_names(self.targets)})

    def adapter_in(self, state: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
        """The adapter in a module's ``state``, without base weights, which must be this run's.

        Args:
            state: a ``state_dict``, of the adapter alone or of an earlier version.
            own: names of the module's own ``state_dict``: its adapter.

        Raises:
            ConfigError: if weights of the adapter are missing or left over, or base weights are not
                those of the model.
        """
        adapter = {name: value for name, value in state.items() if is_adapter(name)}
        _require_same(set(adapter), set(own))
        base = {name.partition(".")[2]: v for name, v in state.items() if name not in adapter}
        if base:
            self._require_own(base_digest(base))
        return adapter

    def _require_own(self, digest: str) -> None:
        own = replace(self.base, model="that the checkpoint holds itself", digest=digest)
        own.require(self.base)


def base_of(policy: PreTrainedModel, model: str, revision: str | None = None) -> BaseModel:
    """The identity of a model without an adapter, which was loaded from ``model``."""
    path, dtype = Path(model), str(policy.dtype).removeprefix("torch.")
    # foreign: configurations of models from the hub know their commit
    revision = getattr(policy.config, "_commit_hash", None) or revision
    name = str(path.absolute()) if path.is_dir() else model
    return BaseModel(name, revision, dtype, base_digest(policy.state_dict()))


@dataclass(frozen=True)
class SavedAdapter:
    """The adapter in a checkpoint.

    Args:
        config: its settings.
        targets: where it lies; None if the checkpoint does not say so.
        base: the model below it; None if the checkpoint holds the weights of that.
    """

    config: LoRAConfig
    targets: Targets | None
    base: BaseModel | None


def saved_adapter(checkpoint: Mapping[Any, Any]) -> SavedAdapter | None:
    """The adapter in Lightning's checkpoint, if there is one."""
    lora, base, places = (checkpoint.get(key) for key in (LORA_KEY, BASE_KEY, PLACES_KEY))
    if lora is None:
        return None
    names = lora["target_modules"]
    config = LoRAConfig(lora["rank"], lora["alpha"], None if names is None else tuple(names))
    targets = places and Targets(tuple(places["layers"]), tuple(places["stacks"]))
    return SavedAdapter(config, targets, base and BaseModel(**base))


def leave_out_base(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook of ``state_dict()``: leave out the weights of an adapter's base model."""
    for name in [name for name in state if name.startswith(prefix) and not is_adapter(name)]:
        del state[name]


def _require_same(saved: set[str], own: set[str]) -> None:
    if different := sorted(saved ^ own):
        raise ConfigError(
            f"the checkpoint's adapter does not lie where this run's lies: "
            f"{', '.join(different[:_NUM_NAMED])} ({len(different)} in all) are in one of them "
            "only. Give the module the model, and as target_modules the places, of the checkpoint."
        )


def base_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of a base model, by :func:`weights_digest`.

    Args:
        state: its ``state_dict``, with or without an adapter.
    """
    return weights_digest({merged_name(n): w for n, w in state.items() if not is_adapter(n)})


def adapter_settings(config: LoRAConfig) -> dict[str, Any]:
    """``config`` as plain types, for a checkpoint."""
    targets = config.target_modules
    return asdict(config) | {"target_modules": None if targets is None else sorted(targets)}


def check_adapter(checkpoint: Mapping[str, Any], config: LoRAConfig | None) -> None:
    """Refuse to resume from a checkpoint with another adapter: its alpha is in no weight.

    Args:
        checkpoint: Lightning's checkpoint.
        config: adapter that is trained now; None without one.

    Raises:
        ConfigError: naming both.
    """
    saved, wanted = checkpoint.get(LORA_KEY), None if config is None else adapter_settings(config)
    if saved != wanted:
        raise ConfigError(
            f"the checkpoint was written with lora={saved}, and this run has lora={wanted}. Set "
            "it as it was; to start from what an adapter has learnt, export it and train that."
        )


def _names(targets: Targets) -> list[str]:
    return [*targets.layers, *targets.stacks]
