"""What a checkpoint holds of the module: its hyperparameters, and an adapter without its base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
from transformers import PreTrainedModel

from sdp_lightning.config import LoRAConfig, LossConfig, OptimizerConfig, UpdateConfig
from sdp_lightning.config.plain_settings import config_of, plain
from sdp_lightning.lightning.trainer_checks import refuse_both
from sdp_lightning.training.policy.lora_checkpoint import (
    AdapterRecord,
    check_adapter,
    leave_out_base,
)


class SavedModule(L.LightningModule):
    """A module whose ``hparams`` are its arguments as plain values, which make it again."""

    _adapter: AdapterRecord | None = None

    def take_settings(
        self,
        *,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        update: UpdateConfig,
        lora: LoRAConfig | None,
        **others: Any,
    ) -> None:
        """Keep the arguments of the module; of a checkpoint's they are mappings.

        Raises:
            ConfigError: if settings contradict each other.
        """
        self.loss, self.update = config_of(LossConfig, loss), config_of(UpdateConfig, update)
        self.optimizer = config_of(OptimizerConfig, optimizer)
        self.lora = lora and config_of(LoRAConfig, lora)
        refuse_both(others["trainable"], self.lora)
        own = {"loss": self.loss, "optimizer": self.optimizer, "update": self.update}
        self.save_hyperparameters(plain(others | own | {"lora": self.lora}))
        if self.lora is not None:
            self.register_state_dict_post_hook(leave_out_base)

    @abstractmethod
    def require_policy(self) -> PreTrainedModel:
        """The model. ``ConfigError`` before :meth:`configure_model`."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights, and the model first if there is none: ``ddp_notebook`` loads so early.

        Of a LoRA run that is the adapter: base weights of an earlier version must be the model's.
        """
        self.configure_model()
        if self._adapter is not None:
            state_dict = self._adapter.adapter_in(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict and self._adapter is None, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._adapter is not None:
            self._adapter.write(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_adapter(checkpoint, self.lora)
        if self.lora is not None:
            self.configure_model()
        if self._adapter is not None:
            self._adapter.check(checkpoint, self.require_policy())
