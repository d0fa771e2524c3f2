"""A surrogate of the user's own stands in the loss as those of the library do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.config import LossConfig
from sdp_lightning.objective import PolicyLoss

MASK = torch.tensor([[False, True, True, True]])
ADVANTAGES = torch.tensor([[0.0, 1.0, -2.0, 0.5]])
SOURCE = """
import torch
from sdp_lightning.objective.surrogates import unclipped

def mine(target, log_weight, log_ratio, advantages, kept, config):
    return unclipped(log_weight + log_ratio, advantages, kept)

def everywhere(target, log_weight, log_ratio, advantages, kept, config):
    return torch.full_like(target, 7.0) + 0 * target, torch.ones_like(kept)

def lonely(target, log_weight, log_ratio, advantages, kept, config):
    return target

number = 3
"""


@pytest.fixture
def place(tmp_path: Path) -> str:
    path = tmp_path / "my_loss.py"
    path.write_text(SOURCE)
    return str(path)


def loss(config: LossConfig, target: Tensor) -> tuple[PolicyLoss, Tensor]:
    target = target.clone().requires_grad_()
    others = [target.detach() - shift for shift in (0.1, 0.2, 0.3)]
    found = sdp.segment_wise_ppo_loss(target, *others, ADVANTAGES, MASK, config=config)
    found.loss.backward()
    assert target.grad is not None
    return found, target.grad


def test_the_library_s_own_function_named_by_its_place_gives_the_same_loss(place: str) -> None:
    target = torch.tensor([[0.0, -1.0, -2.0, -0.5]])
    named, grad = loss(LossConfig(surrogate="unclipped", trust_region="behavior"), target)
    own, own_grad = loss(LossConfig(surrogate=f"{place}:mine", trust_region="behavior"), target)
    assert torch.equal(named.loss, own.loss) and torch.equal(grad, own_grad)


def test_what_it_says_of_masked_tokens_has_no_effect(place: str) -> None:
    found, _ = loss(LossConfig(surrogate=f"{place}:everywhere"), torch.full((1, 4), -1.0))
    assert found.loss.item() == -7.0  # three tokens of 7 each over three, not four
    assert found.clipped.tolist() == MASK.tolist()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("lonely", r"must return \(value, bounded\), two tensors of \(1, 4\); it returned Tensor"),
        ("number", "is no function, but int"),
        ("mien", "has no 'mien'. Did you mean mine"),
    ],
)
def test_what_is_no_surrogate_is_refused_by_name(place: str, name: str, error: str) -> None:
    with pytest.raises(sdp.ConfigError, match=error):
        loss(LossConfig(surrogate=f"{place}:{name}"), torch.zeros(1, 4))


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(sdp.ConfigError, match=r"surrogate.*ppo.*cispo.*unclipped"):
        LossConfig(surrogate="pop")
