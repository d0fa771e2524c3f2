"""Rows one after another equal rows on their own, and what would not is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import Batch, Layout, collate
from sdp_lightning.training.policy.forward import sequence_logprobs
from sdp_lightning.training.policy.loading import recompute_activations
from sdp_lightning.training.policy.packing import Pack, PackMask
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup
from support.plain_forwards import LAYOUTS, build, gradients, plain, random_batch
from support.score_runners import runner_of
from support.trainers import make_module

torch.set_num_threads(1)
PACKED: tuple[Layout, ...] = ("packed", "shared_prefix")


def attend_by_position(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """What flash attention does with a pack on a GPU: rows begin where positions are 0."""
    assert attention_mask is None and query.shape[0] == 1
    starts = (options["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], query.shape[2]]
    rows = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(t[:, :, row] for t in (query, key, value)), is_causal=True, enable_gqa=True
        )
        for row in rows
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("flash_like", attend_by_position)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_like"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_equal_separate_ones_with_gradients(
    kind: str, attention: str, checkpointing: bool
) -> None:
    model = build(kind, initializer_range=0.2).train()
    batch = random_batch(7)
    expected, entropy = plain(model, batch)
    wanted = gradients(model, expected)
    model.config._attn_implementation_internal = attention
    if checkpointing:
        recompute_activations(model)
    result = sequence_logprobs(model, batch, layout="packed")
    torch.testing.assert_close(result.logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy, entropy.detach(), rtol=1e-5, atol=1e-5)
    for name, grad in gradients(model, result.logprobs).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-5 * grad.abs().max())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", PACKED)
def test_packed_rows_equal_separate_ones_under_autocast_up_to_rounding(
    kind: str, layout: Layout
) -> None:
    model, batch = build(kind, initializer_range=0.1), random_batch(7)
    expected, _ = plain(model, batch)
    wanted = gradients(model, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = sequence_logprobs(model, batch, layout=layout)
    assert (result.logprobs - expected).abs()[batch.loss_mask].mean() < 0.03
    for name, grad in gradients(model, result.logprobs).items():
        assert (grad - wanted[name]).norm() < 0.05 * wanted[name].norm(), name


# The settings that are wrong in silence -----------------------------------------------------------


class Spy:
    """What a decoder was given."""

    def __init__(self, model: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        model.get_decoder().register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        self.calls.append(kwargs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_or_a_mask_of_ones_mixes_rows_and_we_pass_neither(attention: str) -> None:
    model, batch = tiny_model(), random_batch(7)
    model.set_attn_implementation(attention)
    spy = Spy(model)
    with torch.no_grad():
        for layout in LAYOUTS:
            sequence_logprobs(model, batch, layout=layout)
        given = dict(spy.calls[LAYOUTS.index("packed")])
        mask = given["attention_mask"]
        right = model.get_decoder()(**given).last_hidden_state
        ones = torch.ones_like(given["input_ids"])
        for wrong in ({"use_cache": True, "attention_mask": None}, {"attention_mask": ones}):
            hidden = model.get_decoder()(**given | wrong).last_hidden_state
            assert (hidden - right).abs().max() > 1, wrong
        for form in (mask.long(), mask.view(1, -1)):  # in which models pass it on
            hidden = model.get_decoder()(**given | {"attention_mask": form}).last_hidden_state
            torch.testing.assert_close(hidden, right)
    ours = spy.calls[: len(LAYOUTS)]
    assert [call["use_cache"] for call in ours] == [False] * 3
    assert isinstance(mask, PackMask) and bool(mask.all())
    assert (given["position_ids"] == 0).sum() == len(batch)


def test_attention_within_spans_is_attention_under_their_mask() -> None:
    batch = random_batch(3)
    attend = nn.functional.scaled_dot_product_attention
    for shared in (False, True):
        pack = Pack.of(batch, shared=shared)
        q, k, v = torch.randn(3, 1, 2, pack.row.numel(), 4)
        mask = pack.span_mask()
        assert mask.shape == (1, 1, *pack.dense_mask().shape) and mask.dtype == torch.bool
        assert len(mask.spans) == (3 if shared else 8)  # groups, or rows
        found = attend(q, k, v, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(found, attend(q, k, v, attn_mask=pack.dense_mask(), scale=0.3))


def test_a_model_that_computes_with_its_mask_computes_with_all_of_it() -> None:
    pack = Pack.of(random_batch(0), shared=False)
    mask, dense = pack.span_mask(), pack.dense_mask()[None, None]
    for use in (lambda m: ~m, lambda m: m[:, :, :2], lambda m: torch.where(m, 0.0, 1.0)):
        torch.testing.assert_close(use(mask), use(dense))
    for change in (lambda m: m.fill_(True), lambda m: m.__setitem__(0, True)):
        with pytest.raises(ConfigError, match=r"changes its attention mask.*'padded'"):
            change(mask)


# Which layouts a model can do ---------------------------------------------------------------------


def uneven() -> Batch:
    """Cheapest packed."""
    rows = [
        Trajectory((Context([k, 4]), Segment(0, [5] * n, [-1.0] * n)))
        for k, n in ((3, 240), (4, 10), (5, 240), (6, 20))
    ]
    return collate([TrajectoryGroup((row,)) for row in rows], version=0)


def mix_rows(model: Any) -> Spy:
    """Let a model forget where packed rows begin, as under a mask of ones."""
    spy = Spy(model)

    def forget(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs["input_ids"].shape[0] == 1:
            kwargs = kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])}
        return args, kwargs

    model.get_decoder().register_forward_pre_hook(forget, with_kwargs=True)
    return spy


def test_auto_takes_the_cheapest_layout() -> None:
    passes = runner_of(tiny_model(hidden_size=128), "auto")
    assert passes.layout(uneven()) == "packed"
    assert passes.layout(random_batch(1, sizes=(8, 8))) == "shared_prefix"
    assert passes.layout(random_batch(1, sizes=(1,))) == "padded"


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("scale", [0.001, 0.02, 0.2])  # 0.02 is a model before its training
def test_a_model_that_mixes_rows_is_found_out_whatever_its_weights(
    layout: Layout, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama", initializer_range=scale)
    spy = mix_rows(model)
    message = f"'llama' does not keep rows apart in the layout '{layout}': log-probs differ by "
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            runner_of(model, layout).layout(uneven())
    passes, before = runner_of(model, "auto"), len(spy.calls)
    with caplog.at_level(logging.DEBUG, "sdp_lightning.training.policy.score_check"):
        assert passes.layout(uneven()) == passes.layout(uneven()) == "padded"
    # Once: padded rows, each of three alone, the short ones, and each of two layouts.
    assert len(spy.calls) == before + 1 + 3 + 1 + 2
    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    assert message in caplog.text


def test_each_layout_is_tried_once_and_padding_always() -> None:
    model = tiny_model()
    spy = Spy(model)
    for layout, calls in (("padded", 5), ("packed", 6), ("shared_prefix", 6), ("auto", 7)):
        spy.calls.clear()
        passes = runner_of(model, layout)
        for _ in range(3):
            passes.layout(random_batch(0))
        assert len(spy.calls) == calls
        assert all(call["input_ids"].numel() <= 8 * 32 for call in spy.calls)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi", "gpt_neox", "olmo2"])
def test_the_trial_refuses_no_model_that_is_right(kind: str, scale: float, precision: str) -> None:
    model = build(kind, initializer_range=scale).eval()
    if precision == "bfloat16":
        model = model.bfloat16()
    for layout in PACKED:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            assert runner_of(model, layout).layout(random_batch(0)) == layout


def test_explicit_packing_of_states_is_refused_by_name_where_the_module_runs(
    model_folder: str,
) -> None:
    module = make_module(model_folder, update=sdp.UpdateConfig(layout="packed"))
    module.configure_model()
    policy: Any = module.policy
    policy.config.layer_types = ["linear_attention"]
    row = Trajectory((Context([3]), Segment(0, [4], [-1.0])))
    with pytest.raises(ConfigError, match=r"linear_attention.*'packed'"):
        module.score([row])


# Edges --------------------------------------------------------------------------------------------


def rows_of(*prompts_and_answers: tuple[int, int]) -> Batch:
    """One group whose members differ in their prompts, from the first token on."""
    members = [
        Trajectory((Context(range(3 + i, 3 + i + prompt)), Segment(0, [7] * n, [-1.0] * n)))
        for i, (prompt, n) in enumerate(prompts_and_answers)
    ]
    return collate([TrajectoryGroup(tuple(members))], version=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "rows",
    [[(1, 1)], [(9, 30)], [(1, 1), (1, 1)], [(5, 2), (1, 9), (3, 3)]],
    ids=["a single token", "a single row", "nothing of their own", "unequal prompts in a group"],
)
def test_small_and_odd_batches_equal_separate_rows(
    layout: Layout, rows: list[tuple[int, int]]
) -> None:
    model, batch = tiny_model(), rows_of(*rows)
    expected, _ = plain(model, batch)
    for budget in (1, 8, 1000):  # also below a row: it goes alone
        pieces = batch.microbatches(budget, layout)
        assert sorted(row for piece in pieces for row in piece) == list(range(len(rows)))
        for piece in pieces:
            found = sequence_logprobs(model, batch.select(piece), layout=layout).logprobs
            torch.testing.assert_close(found, expected[piece], rtol=1e-5, atol=1e-5)
