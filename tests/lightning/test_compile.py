"""``torch.compile`` of the module, or of the policy in it, changes nothing that is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sdp_lightning as sdp
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.policy.forward import sequence_logprobs
from support.odd_models import odd_model, saved
from support.steps import Batches, assert_same, make_batch
from support.trainers import make_module, make_trainer, weights_of

NOT_A_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
OF_INDUCTOR = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


class CountingBackend:
    """Runs the graphs that it is given as they are."""

    def __init__(self) -> None:
        self.num_matmuls: list[int] = []  # of each graph

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = [node for node in graph.graph.nodes if node.target is nn.functional.linear]
        self.num_matmuls.append(len(calls))
        return graph.forward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tiny_model(num_layers=2), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batch(folder: str) -> Any:
    return make_batch(folder, (2, 1))


@pytest.fixture(scope="module")
def plain(folder: str, batch: Any) -> sdp.SegmentWisePPOModule:
    """A module trained without compilation."""
    return fit(make_module(folder), batch)


def fit(module: Any, batch: Any) -> Any:
    make_trainer(max_steps=2, limit_val_batches=0).fit(module, Batches(batch, batch))
    return module


@NOT_A_LEAF
def test_a_compiled_module_learns_the_same_with_its_layers_compiled(
    folder: str, batch: Any, plain: Any
) -> None:
    module, backend = make_module(folder), CountingBackend()
    fit(torch.compile(module, backend=backend), batch)
    assert_same(weights_of(module), weights_of(plain))
    assert set(backend.num_matmuls) == {7}  # q, k, v, o, gate, up, down: one layer, no head
    assert len(backend.num_matmuls) <= 3  # without gradients, with, and for rows of any length
    assert module._runner.layout(batch) == "padded"  # on a CPU
    assert module.training_step.__func__ is sdp.SegmentWisePPOModule.training_step


@pytest.mark.slow
@NOT_A_LEAF
def test_a_policy_compiled_in_place_learns_the_same(folder: str, batch: Any, plain: Any) -> None:
    module, backend = make_module(folder), CountingBackend()
    module.configure_model()
    module.require_policy().compile(backend=backend)
    assert_same(weights_of(fit(module, batch)), weights_of(plain))
    assert max(backend.num_matmuls) == 14


def test_a_policy_replaced_by_a_compiled_one_is_refused(folder: str, batch: Any) -> None:
    module = make_module(folder)
    module.configure_model()
    module.policy = torch.compile(module.policy, backend="eager")
    with pytest.raises(sdp.ConfigError, match=r"renames all weights\. Use policy\.compile\(\)"):
        fit(module, batch)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_compiled_layers_take_no_packed_rows_on_a_cpu(batch: Any, layout: Any) -> None:
    model: Any = tiny_model()
    sequence_logprobs(model, batch, layout=layout)
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(sdp.ConfigError, match=rf"compiled.*{layout!r}. Use layout='padded'"):
        sequence_logprobs(model, batch, layout=layout)


def test_a_backend_that_fails_is_an_error_of_one_line(folder: str, batch: Any) -> None:
    def without_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\n\nfor pages")

    with pytest.raises(
        sdp.ConfigError, match=r"no compiler\)\. Use it without torch\.compile"
    ) as e:
        fit(torch.compile(make_module(folder), backend=without_compiler), batch)
    assert "\n" not in str(e.value)


@pytest.mark.slow
@NOT_A_LEAF
@OF_INDUCTOR
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_inductor_learns_the_same(kind: str, tmp_path: Path) -> None:
    own = saved(odd_model(kind), tmp_path)
    rows = make_batch(own, (2, 1))
    module, plainly = (
        make_module(own, trainable="weight$", gradient_checkpointing=True) for _ in range(2)
    )
    fit(torch.compile(module), rows)
    assert_same(weights_of(module), weights_of(fit(plainly, rows)), atol=1e-4)


@pytest.mark.slow
@NOT_A_LEAF
@OF_INDUCTOR
def test_a_machine_without_a_compiler_is_an_error_of_one_line(folder: str, batch: Any) -> None:
    from torch._inductor import config

    # A monkeypatch would leave the first of them without a value: it is another setting's alias.
    broken = {"force_disable_caches": True, "cpp.cxx": (None, "/nonexistent/g++")}
    with (
        config.patch(broken),
        pytest.raises(sdp.ConfigError, match=r"No working C\+\+ compiler.*without torch\.com") as e,
    ):
        fit(torch.compile(make_module(folder)), batch)
    assert "\n" not in str(e.value)
