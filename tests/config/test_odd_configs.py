"""Settings of any kind of value: a config, or one error that names the setting."""

from __future__ import annotations

import math
import random
from dataclasses import fields
from typing import Any

from sdp_lightning.config import (
    LoRAConfig,
    LossConfig,
    OptimizerConfig,
    RolloutConfig,
    UpdateConfig,
)
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.engines.remote.options import RemoteOptions
from sdp_lightning.engines.servers.config import ServerConfig
from sdp_lightning.errors import ConfigError

ODD = [None, True, 0, -1, 2**63, 0.5, math.inf, math.nan, "", "x", "\ud800", b"x", (), [1], ("a",)]
ODD += [{}, object(), 1j, "9" * 5000, 10**5000, [[]], lambda: 1]  # 10**5000 has no repr
KINDS: dict[type, dict[str, Any]] = {
    LossConfig: {},
    ModelSource: {"name": "m"},
    LoRAConfig: {},
    OptimizerConfig: {},
    RemoteOptions: {},
    RolloutConfig: {"batch_size": 2},
    ServerConfig: {"model": "m"},
    UpdateConfig: {},
}


def test_two_thousand_odd_configs_are_made_or_refused_by_a_config_error() -> None:
    """Any other exception fails; the error can be written to any file."""
    chance, refused = random.Random(0), 0
    for _ in range(2000):
        kind = chance.choice(list(KINDS))
        names = [field.name for field in fields(kind)]
        odd = {chance.choice(names): chance.choice(ODD) for _ in range(chance.randint(1, 3))}
        try:
            kind(**(KINDS[kind] | odd))
        except ConfigError as error:
            refused += 1
            str(error).encode()
            assert any(name in str(error) for name in names), error
            assert len(str(error)) < 1000
    assert refused > 1000
