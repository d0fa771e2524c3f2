"""Former names of modules go on working, with a warning that names the new one."""

from __future__ import annotations

import importlib
import sys

import pytest

import sdp_lightning as sdp
from sdp_lightning.config.import_path import load_object
from sdp_lightning.config.renamed import MOVED_MODULES
from sdp_lightning.engines.remote.options import RemoteOptions


@pytest.fixture(autouse=True)
def forget() -> None:
    for former in MOVED_MODULES:
        sys.modules.pop(f"sdp_lightning.{former}", None)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("callbacks.WeightSyncCallback", "WeightSyncCallback"),
        ("progress.ProgressLine", "ProgressLine"),
        ("report.callback.RunReport", "RunReport"),
        ("summary.RunSummary", "RunSummary"),
        ("summary.ProgressLine", "ProgressLine"),
        ("datamodule.RolloutDataModule", "RolloutDataModule"),
        ("module.SegmentWisePPOModule", "SegmentWisePPOModule"),
        ("recorder.Recorder", "Recorder"),
        ("replay.ReplayDataModule", "ReplayDataModule"),
        ("watchdog.Watchdog", "Watchdog"),
    ],
)
def test_a_class_path_of_an_older_config_is_the_present_class(path: str, name: str) -> None:
    module, _, attribute = path.rpartition(".")
    with pytest.warns(FutureWarning, match="is now sdp_lightning"):
        former = importlib.import_module(f"sdp_lightning.{module}")
    assert getattr(former, attribute) is getattr(sdp, name)


@pytest.mark.filterwarnings("ignore:the module sdp_lightning:FutureWarning")
@pytest.mark.parametrize("former", MOVED_MODULES)
def test_every_former_module_leads_to_one_that_exists(former: str) -> None:
    present = importlib.import_module(f"sdp_lightning.{MOVED_MODULES[former]}")
    module = importlib.import_module(f"sdp_lightning.{former}")
    names = [name for name in vars(present) if not name.startswith("_")]
    assert names and all(getattr(module, name) is getattr(present, name) for name in names)


def test_a_reward_is_found_under_its_former_place() -> None:
    with pytest.warns(FutureWarning, match=r"is now sdp_lightning\.rewards\.reasoning_gym\."):
        former = load_object("sdp_lightning.rewards.reasoning:line_reward")
    assert former is load_object("sdp_lightning.rewards.reasoning_gym:line_reward")


def test_what_never_existed_is_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sdp_lightning.callback")


def test_a_former_name_of_a_transport_is_accepted() -> None:
    with pytest.warns(FutureWarning, match=r"transport='gloo' is now 'tcp'"):
        assert RemoteOptions(transport="gloo").transport == "tcp"  # type: ignore[arg-type]
