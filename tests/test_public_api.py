"""The names that users rely on, their forms, and that both engines are engines."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.engines.protocol import InferenceEngine, SharedServerEngine
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.remote.vllm import VLLMBackend
from sdp_lightning.objective.loss import PolicyLoss
from sdp_lightning.testing import FakeEngine

# Checked by ``pyright tests/test_public_api.py``: each line is an error if the protocol is broken.
FAKE: InferenceEngine = FakeEngine()
EMBEDDED: InferenceEngine = EmbeddedEngine("model")
REMOTE: SharedServerEngine = RemoteInfEngine(["http://127.0.0.1:8000"], VLLMBackend())

# DESIGN section 7.
PROMISED = {
    "Batch",
    "InferenceEngine",
    "LossConfig",
    "MultiTurnWorkflow",
    "RLVRWorkflow",
    "RolloutConfig",
    "RolloutDataModule",
    "RolloutWorkflow",
    "SDPError",
    "SamplingParams",
    "Segment",
    "SegmentWisePPOModule",
    "Trajectory",
    "TrajectoryGroup",
    "WeightSyncCallback",
    "WorkflowExecutor",
    "connect_engine",
    "create_staleness_strategy",
    "create_workflow_executor",
    "segment_wise_ppo_loss",
}
ERRORS = (
    *("CheckpointError", "ConfigError", "EngineError", "HangError", "RankError", "RecordingError"),
    *("RolloutError", "RolloutTimeout", "VersionError"),
)


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_every_promised_name_is_public() -> None:
    assert set(sdp.__all__) >= PROMISED


def test_all_is_sorted_and_is_what_can_be_imported() -> None:
    assert sorted(sdp.__all__) == dir(sdp)
    assert len(set(sdp.__all__)) == len(sdp.__all__)
    for name in sdp.__all__:
        found = getattr(sdp, name)
        assert found.__name__ == name
        assert found.__module__.startswith("sdp_lightning.")
    with pytest.raises(AttributeError, match="has no attribute 'segment_wise_loss'"):
        _ = sdp.segment_wise_loss  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(sdp.__file__)).read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imported = [
        (f"{node.module}", alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(name for _, name in imported) == sorted(sdp.__all__)
    for module, name in imported:
        assert getattr(sdp, name) is getattr(sys.modules[module], name)


@pytest.mark.parametrize("name", sdp.__all__)
def test_every_public_object_says_what_it_is(name: str) -> None:
    text = inspect.getdoc(getattr(sdp, name)) or ""
    assert len(text.split()) >= 4 and not text.startswith(f"{name}("), f"{name}: {text!r}"


@pytest.mark.parametrize("name", ERRORS)
def test_one_except_catches_every_error(name: str) -> None:
    assert issubclass(getattr(sdp, name), sdp.SDPError)


def test_errors_are_also_what_python_would_raise() -> None:
    assert issubclass(sdp.ConfigError, ValueError)
    assert issubclass(sdp.VersionError, ValueError)
    assert issubclass(sdp.RolloutTimeout, TimeoutError)


def test_the_loss_has_its_form() -> None:
    signature = inspect.signature(sdp.segment_wise_ppo_loss)
    assert list(signature.parameters) == [
        "target_logprobs",
        "proximal_logprobs",
        "segment_logprobs",
        "behavior_logprobs",
        "advantages",
        "loss_mask",
        "config",
        "num_tokens",
        "lags",
    ]
    assert signature.parameters["config"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.parameters["lags"].default is None
    assert signature.parameters["num_tokens"].default is None
    fields = {field.name for field in dataclasses.fields(PolicyLoss)}
    assert fields >= {"loss", "kept", "clipped"}


def test_settings_have_their_names_and_defaults() -> None:
    loss = dataclasses.asdict(sdp.LossConfig())
    promised = {
        "clip_epsilon": 0.2,
        "clip_epsilon_high": None,
        "dual_clip": None,
        "behavior_weight_cap": 5.0,
        "behavior_weight_floor": None,
        "rejection_on": "drift",
        "trust_region": "segment",
        "bridge_exponent": 1.0,
        "bridge_cap": None,
    }
    assert loss.items() >= promised.items()
    rollout = sdp.RolloutConfig(batch_size=4, max_head_lag=2, max_concurrent=8)
    assert rollout.enable_segment_wise_ppo is True
    assert rollout.missing_proximal == "behavior" and rollout.on_overdue == "drop"


@pytest.mark.parametrize(
    "settings",
    [sdp.LossConfig(), sdp.RolloutConfig(), sdp.OptimizerConfig(), sdp.UpdateConfig()],
    ids=lambda settings: type(settings).__name__,
)
def test_settings_are_frozen_and_picklable(settings: Any) -> None:
    assert pickle.loads(pickle.dumps(settings)) == settings
    name = dataclasses.fields(settings)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, name, None)


def test_constructors_have_their_forms() -> None:
    assert parameters(sdp.StalenessManager) == [
        "max_concurrent",
        "batch_size",
        "max_head_lag",
        "modifiers",
    ]
    assert set(parameters(sdp.SegmentWisePPOStrategy)) >= {"max_head_lag", "missing_proximal"}
    assert parameters(sdp.Segment)[:3] == ["version", "token_ids", "logprobs"]
    assert parameters(sdp.Context) == ["token_ids"]
    assert parameters(sdp.Trajectory)[:2] == ["parts", "reward"]
    assert parameters(sdp.TrajectoryGroup)[0] == "trajectories"
    assert parameters(sdp.RLVRWorkflow)[:3] == ["reward", "group_size", "sampling"]
    assert parameters(sdp.RolloutDataModule)[:3] == ["prompts", "workflow", "engine"]
    assert parameters(sdp.SegmentWisePPOModule)[:2] == ["model", "loss"]
    assert sdp.WeightSyncCallback().version == 0  # all settings are optional
    assert parameters(sdp.Watchdog)[0] == "timeout_s"
    assert parameters(sdp.create_staleness_strategy) == ["config"]
    assert parameters(sdp.AsyncTaskRunner.submit) == ["function", "args"]
    assert parameters(sdp.AsyncTaskRunner.wait) == ["count", "timeout"]
    assert parameters(sdp.StalenessManager.capacity) == ["version"]
    assert parameters(sdp.SegmentWisePPOStrategy.is_stale) == ["group", "version"]
    for name in ("submitted", "accepted", "rejected", "failed", "dropped", "consumed"):
        method = inspect.signature(getattr(sdp.StalenessManager, f"on_{name}"))
        assert method.parameters["n"].default == 1


@pytest.mark.parametrize(
    ("engine", "protocol"),
    [(FAKE, InferenceEngine), (EMBEDDED, InferenceEngine), (REMOTE, SharedServerEngine)],
    ids=["fake", "embedded", "remote"],
)
def test_an_engine_has_every_member_of_its_protocol(engine: InferenceEngine, protocol: type):
    """Parameters are compared here, types by pyright."""
    members = {name for name in dir(protocol) if not name.startswith("_")}
    assert {"version", "generate", "pause", "update_weights", "resume", "close"} <= members
    assert isinstance(engine, SharedServerEngine) == (protocol is SharedServerEngine)
    for name in members:
        wanted, found = inspect.getattr_static(protocol, name), getattr(engine, name)
        if inspect.isfunction(wanted):
            assert inspect.iscoroutinefunction(wanted) == inspect.iscoroutinefunction(found)
            assert parameters(wanted) == parameters(found)


@pytest.mark.slow
def test_pyright_agrees_that_both_engines_are_engines() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyright", __file__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
