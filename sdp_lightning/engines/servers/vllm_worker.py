"""The extension of vLLM's workers: ``--worker-extension-cls`` names :class:`WorkerExtension`.

vLLM imports it in its own process; the trainer does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class WorkerExtension:
    """Adds methods to vLLM's worker that ``/collective_rpc`` can call."""

    model_runner: Any
    vllm_config: Any
    rank: int
    _sdp_kept: dict[str, Tensor] | None = None  # the trained weights as they were sent, in order

    def sdp_hello(self) -> list[str]:
        """Confirm that the extension is installed; the types of the model's floats, by name."""
        weights: list[Tensor] = list(self.model_runner.get_model().parameters())
        kinds = {w.dtype for w in weights if w.is_floating_point()}
        return sorted(str(kind).removeprefix("torch.") for kind in kinds)

    def sdp_load_folder(self, folder: str) -> None:
        """Load the safetensors files of ``folder``; other weights stay as they are."""
        self._sdp_kept = None
        self._sdp_reload(weights_path=folder)

    def sdp_load_anchor(self, folder: str) -> None:
        """Load the files of ``folder``, and keep a copy for deltas."""
        self._sdp_use(_read(folder), "anchor")

    def sdp_apply_delta(self, folder: str) -> None:
        """Change the copy by the delta in ``folder``, and load it."""
        self._sdp_use(_read(folder), "delta")

    def sdp_receive(
        self,
        host: str,
        port: int,
        key: str,
        num_workers: int,
        timeout_s: float,
        use: Literal["load", "anchor", "delta"] = "load",
    ) -> None:
        """Load weights that the trainer sends; see :mod:`sdp_lightning.weights.tcp`."""
        from sdp_lightning.weights.protocol import Receive
        from sdp_lightning.weights.tcp import receive

        parallel = self.vllm_config.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + self.rank
        # All are received before the first is loaded: an interrupted load destroys the model.
        weights = list(receive(Receive(host, port, key, num_workers, timeout_s), worker))
        self._sdp_use(dict(weights), use)

    def _sdp_use(self, sent: dict[str, Tensor], use: str) -> None:
        """Load what was sent, by its use; the copy stays only if it is what the model has."""
        kept, self._sdp_kept = self._sdp_kept, None
        if use == "delta":
            from sdp_lightning.weights.delta import apply

            if kept is None:
                raise RuntimeError("a delta came to a worker that has kept no weights to change.")
            apply(kept, sent)
            sent = kept
        self._sdp_reload(weights_iterator=iter(sent.items()))
        if use == "anchor":
            kept = {name: tensor.clone() for name, tensor in sent.items()}
        self._sdp_kept = None if use == "load" else kept

    def _sdp_reload(self, **source: Any) -> None:
        """Load weights; after a failure the model mixes old and new ones, and loads again."""
        try:
            with self._sdp_packed_experts(), _kept_copies(self.model_runner.get_model()):
                self.model_runner.reload_weights(**source)
        except Exception:
            self._sdp_end_reload()
            raise
        self._sdp_pack_heads()

    def _sdp_end_reload(self) -> None:
        """Finish a failed load: vLLM leaves layers empty, which no later load can fill."""
        from vllm.model_executor.model_loader.reload import layerwise  # type: ignore

        model = self.model_runner.get_model()
        for layer in model.modules():
            info: Any = layerwise.get_layerwise_info(layer)
            if info.can_load():  # without the tensors kept for it, it gets its old weights back
                info.loaded_weights.clear()
                info.load_numel = 0
        with self._sdp_packed_experts():
            layerwise.finalize_layerwise_reload(model, self.vllm_config.model_config)

    @contextmanager
    def _sdp_packed_experts(self) -> Generator[None]:
        """Context in which loaded experts are packed for the kernel that computes with them.

        vLLM lets a kernel pack (and pad) the weights of its layer when it makes the kernel. At a
        reload it keeps the kernel, and copies unpacked weights to where it expects packed ones.
        """
        with ExitStack() as stack:
            for module in self.model_runner.get_model().modules():
                # foreign: vLLM's modules differ
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:  # foreign: only experts have it
                    stack.enter_context(_packing_anew(method))
            yield

    def _sdp_pack_heads(self) -> None:
        """Pack the weights of every embedding and head again.

        On a CPU vLLM packs the head's weight when a model is loaded, and computes with the packed
        copy; a head that is tied to the embedding keeps the old one when weights are reloaded.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import (  # type: ignore
            UnquantizedEmbeddingMethod,
        )

        for module in self.model_runner.get_model().modules():
            # foreign: vLLM's modules differ
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(module)


def _read(folder: str) -> dict[str, Tensor]:
    """The weights in the safetensors files of ``folder``, in order."""
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@contextmanager
def _packing_anew(method: Any) -> Generator[None]:
    """Context in which ``method`` lets its kernel pack the weights of a layer that it processes."""
    experts = method.moe_kernel.fused_experts
    pack: Callable[[Any], None] = experts.process_weights_after_loading
    process: Callable[[Any], None] = method.process_weights_after_loading
    packed: list[Any] = []

    def pack_and_note(layer: Any) -> None:
        packed.append(layer)
        pack(layer)

    def process_and_pack(layer: Any) -> None:
        packed.clear()
        process(layer)
        # A version of vLLM that packs, or makes another kernel, has packed.
        if not packed and method.moe_kernel.fused_experts is experts:
            pack(layer)

    experts.process_weights_after_loading = pack_and_note
    method.process_weights_after_loading = process_and_pack
    try:
        yield
    finally:
        del experts.process_weights_after_loading
        del method.process_weights_after_loading


@contextmanager
def _kept_copies(model: Any) -> Generator[None]:
    """Context in which weights arrive that ``model`` copies into its parameters by itself.

    For a reload vLLM makes all parameters empty, and fills those whose ``weight_loader`` is called.
    A model that calls ``copy_`` instead (gpt-oss) keeps its old weights, without a word.
    """
    try:
        from vllm.model_executor.model_loader.reload import layerwise  # type: ignore
        from vllm.model_executor.model_loader.reload.layerwise import (  # type: ignore
            get_numel_loaded as count,  # type: ignore
            materialize_layer as fill,  # type: ignore
        )
    except ImportError:  # a version of vLLM that reloads in another way
        yield
        return
    copies, load = _Copies(model, layerwise), model.load_weights

    def load_and_finish(*args: Any, **kwargs: Any) -> Any:
        with copies:
            loaded = load(*args, **kwargs)
        copies.finish()
        return loaded

    def count_aside(*args: Any, **kwargs: Any) -> Any:
        copies.in_loader = True  # what a loader copies, vLLM keeps itself
        try:
            return count(*args, **kwargs)
        finally:
            copies.in_loader = False

    def fill_all(layer: Any, info: Any) -> None:
        fill(layer, info)
        copies.apply(layer)

    model.load_weights = load_and_finish
    layerwise.get_numel_loaded, layerwise.materialize_layer = count_aside, fill_all
    try:
        yield
    finally:
        del model.load_weights
        layerwise.get_numel_loaded, layerwise.materialize_layer = count, fill


class _Copies(TorchDispatchMode):
    """Keeps what is copied into empty parameters until their layer has room."""

    def __init__(self, model: Any, layerwise: Any) -> None:
        super().__init__()
        self.in_loader = False
        self._model, self._layerwise = model, layerwise
        # By a parameter's storage: its layer, its name, and itself, so that no other has its place.
        self._owners: dict[int, tuple[Any, str, Tensor]] | None = None
        self._kept: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta and not self.in_loader:
            self._keep(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _keep(self, target: Tensor, source: Tensor) -> None:
        if self._owners is None:
            self._owners = {
                _storage_of(tensor): (layer, name, tensor)
                for layer in self._model.modules()
                if not self._layerwise.is_deferred_attention_layer(layer)
                for name, tensor in self._layerwise.get_layer_tensors(layer).items()
                if tensor.is_meta
            }
        layer, name, _ = self._owners.get(_storage_of(target), (None, "", target))
        info: Any = None if layer is None else self._layerwise.get_layerwise_info(layer)
        if info is None or not info.can_load():
            return
        self._kept.setdefault(layer, []).append((name, target, source))
        info.load_numel += source.numel()
        if info.load_numel >= info.load_numel_total:
            self._layerwise._layerwise_process(layer, info)

    def apply(self, layer: Any) -> None:
        """Copy what was kept into the parameters of ``layer``, which now exist."""
        for name, target, source in self._kept.pop(layer, ()):
            whole: Tensor = getattr(layer, name).data
            size, stride, offset = target.size(), target.stride(), target.storage_offset()
            whole.as_strided(size, stride, offset).copy_(source)

    def finish(self) -> None:
        """Let layers use what they have, of which a part was not sent: padding."""
        for layer in list(self._kept):
            self._layerwise._layerwise_process(layer, self._layerwise.get_layerwise_info(layer))


def _storage_of(tensor: Tensor) -> int:
    """Identity of the storage, which views share; empty ones have no address."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata
