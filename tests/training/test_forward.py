"""The forward: all layouts against a plain full forward, values and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import Layout, collate
from sdp_lightning.training.policy.forward import SequenceLogprobs, check_model, sequence_logprobs
from sdp_lightning.training.policy.loading import recompute_activations
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup
from support.plain_forwards import LAYOUTS, build, gradients, plain, random_batch

torch.set_num_threads(1)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(LAYOUTS),
    attention=st.sampled_from(["sdpa", "eager"]),
    tied=st.booleans(),
)
def test_all_layouts_equal_a_forward_row_by_row(
    seed: int, layout: Layout, attention: str, tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied).double()
    model.set_attn_implementation(attention)
    batch = random_batch(seed)
    result = sequence_logprobs(model, batch, layout=layout, chunk_size=5)
    expected, entropy = plain(model, batch)
    # Even in float64 transformers normalises, and eager attention takes its softmax, in float32.
    torch.testing.assert_close(result.logprobs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.entropy, entropy.detach(), rtol=1e-6, atol=1e-6)
    assert not result.entropy.requires_grad
    wanted = gradients(model, expected)
    for name, grad in gradients(model, result.logprobs).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_prefix_equals_padded_in_float32(attention: str) -> None:
    model = tiny_model(num_layers=3)
    model.set_attn_implementation(attention)
    batch = random_batch(1, sizes=(8, 8))
    layouts: tuple[Layout, ...] = ("padded", "shared_prefix")
    results = [sequence_logprobs(model, batch, layout=layout) for layout in layouts]
    torch.testing.assert_close(results[0].logprobs, results[1].logprobs, rtol=1e-5, atol=1e-5)
    grads = [gradients(model, result.logprobs) for result in results]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_other_rows_do_not_leak_into_a_row(layout: Layout) -> None:
    model = tiny_model()
    batch = random_batch(2)
    changed = batch.input_ids.clone()
    columns = torch.arange(changed.shape[1])
    changed[columns >= batch.lengths[:, None]] = 33
    changed[-1, 1:] = 34
    other = dataclasses.replace(batch, input_ids=changed)
    before, after = (sequence_logprobs(model, b, layout=layout).logprobs for b in (batch, other))
    unrelated = batch.group_ids != batch.group_ids[-1]
    torch.testing.assert_close(after[unrelated], before[unrelated])
    assert not torch.allclose(after[-1], before[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_of_a_batch_give_what_the_whole_gives(layout: Layout) -> None:
    model = tiny_model()
    batch = random_batch(3, sizes=(4, 2, 5))
    whole = sequence_logprobs(model, batch, layout=layout).logprobs
    plan = batch.microbatches(25, layout)
    assert len(plan) > 2
    for rows in plan:
        part = sequence_logprobs(model, batch.select(rows), layout=layout).logprobs
        torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-5)


class TokenCounter:
    """Counts the tokens that a decoder is given."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        model.get_decoder().register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        self.tokens += kwargs["input_ids"].numel()
        assert kwargs["use_cache"] is False


def test_a_prompt_is_computed_once_and_last_tokens_not_at_all() -> None:
    # 8 answers of 3 tokens to a prompt of 10. The last token of each is scored from the one before.
    prompt = Context(range(3, 13))
    members = [Trajectory((prompt, Segment(0, [k, 5, 1], [-1.0] * 3))) for k in range(20, 28)]
    batch = collate([TrajectoryGroup(tuple(members))], version=0)
    model = tiny_model()
    counts = {}
    for layout in LAYOUTS:
        counter = TokenCounter(model)
        sequence_logprobs(model, batch, layout=layout)
        counts[layout] = counter.tokens
    assert counts == {"padded": 8 * 12, "packed": 8 * 12, "shared_prefix": 10 + 8 * 2}
    assert batch.microbatches(26, "shared_prefix") == [list(range(8))]
    assert len(batch.microbatches(25, "shared_prefix")) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_idle_batch_gives_zero_with_a_graph_to_every_parameter(layout: Layout) -> None:
    model = tiny_model(tie_word_embeddings=False)
    result = sequence_logprobs(model, random_batch(0).idle(), layout=layout)
    assert not result.logprobs.any()
    result.logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_without_loss_tokens_do_not_disturb_their_siblings(layout: Layout) -> None:
    model = tiny_model()
    batch = random_batch(4, sizes=(3, 2))
    mask = batch.loss_mask.clone()
    mask[0] = False
    mask[3:] = False
    masked = dataclasses.replace(batch, loss_mask=mask)
    expected = sequence_logprobs(model, batch, layout="padded").logprobs
    actual = sequence_logprobs(model, masked, layout=layout).logprobs
    torch.testing.assert_close(actual, torch.where(mask, expected, 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_keep_no_graph(layout: Layout, checkpointing: bool) -> None:
    model = tiny_model(num_layers=3).train()
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_()
    if checkpointing:
        recompute_activations(model)
    graph: list[bool] = []

    def record(module: Any, args: Any, output: Any) -> None:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        graph.append(tensor.requires_grad)

    for layer in model.model.layers:
        layer.register_forward_hook(record)
    result = sequence_logprobs(model, random_batch(0), layout=layout)
    assert graph[:3] == [False, False, True]
    result.logprobs.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_float32_for_a_bfloat16_model_and_under_autocast(layout: Layout) -> None:
    batch = random_batch(0)
    exact = sequence_logprobs(tiny_model(), batch, layout=layout)
    low = sequence_logprobs(tiny_model().bfloat16(), batch, layout=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = sequence_logprobs(tiny_model(), batch, layout=layout)
    for result in (low, mixed):
        assert (result.logprobs.dtype, result.entropy.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(result.logprobs, exact.logprobs, rtol=0.1, atol=0.3)
        result.logprobs.sum().backward()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gpt_neox", "phi", "olmo2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_model_types_score_as_their_own_forward_does(kind: str, layout: Layout) -> None:
    extra = {"sliding_window": None} if kind == "mistral" else {}
    model = build(kind, **extra).eval()
    batch = random_batch(0)
    with torch.no_grad():
        result: SequenceLogprobs = sequence_logprobs(model, batch, layout=layout)
        torch.testing.assert_close(result.logprobs, plain(model, batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layers_with_a_state_are_laid_out_padded_only(layout: Layout) -> None:
    model = tiny_model()
    model.config.layer_types = ["full_attention", "linear_attention"]
    check_model(model, "padded")
    with pytest.raises(
        ConfigError, match=rf"'llama' has .*\(linear_attention\).*'{layout}'.*'padded'"
    ):
        check_model(model, layout)


@pytest.mark.parametrize(
    ("attention", "layout", "message"),
    [
        ("flash_attention_2", "padded", None),
        ("flash_attention_2", "packed", None),
        ("flash_attention_2", "shared_prefix", "takes no mask of its own"),
        ("flex_attention", "packed", "does not keep packed rows apart"),
    ],
)
def test_a_layout_needs_attention_that_can_do_it(
    attention: str, layout: Layout, message: str | None
) -> None:
    model = tiny_model()
    model.config._attn_implementation_internal = attention
    if message is None:
        check_model(model, layout)
    else:
        with pytest.raises(
            ConfigError, match=f"'llama' runs with attention '{attention}'.*{message}"
        ):
            check_model(model, layout)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="'llama' has no language-model head"):
        check_model(tiny_model().model, "padded")
