"""What runs inside vLLM's workers: ``--worker-extension-cls`` names :class:`WorkerExtension`.

Imported by vLLM in its own process; nothing here is used in the trainer's.
"""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Adds methods to vLLM's worker that ``/collective_rpc`` can call."""

    model_runner: Any

    def sdp_load_folder(self, folder: str) -> None:
        """Load the safetensors files of ``folder`` over the weights that are there.

        On a CPU vLLM packs the head's weight when a model is loaded, and computes with the packed
        copy; a head that is tied to the embedding keeps the old one when weights are reloaded. So
        every embedding and head is packed again.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import (  # type: ignore
            UnquantizedEmbeddingMethod,
        )

        self.model_runner.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(module)
