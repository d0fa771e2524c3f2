"""The check before the first step: what would be scored wrong is refused, with its cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import Batch, collate
from sdp_lightning.training.policy.forward import own_logprobs, sequence_logprobs
from sdp_lightning.types import Context, Segment, Trajectory, TrajectoryGroup
from support.odd_models import odd_model
from support.score_runners import runner_of


def siblings(*lengths: int, prompt: int = 20) -> Batch:
    """Rows of one group."""
    rows = [
        Trajectory(
            (
                Context(range(3, 3 + prompt)),
                Segment(0, [(11 * i + k) % 40 + 3 for i in range(n)], [-1.0] * n),
            )
        )
        for k, n in enumerate(lengths)
    ]
    return collate([TrajectoryGroup(tuple(rows))], version=0)


class Added(nn.Module):
    """A function of the hidden units, added to what a module returns."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output + 0.1 * self.function(output)


class ScaledHead(nn.Linear):
    """A head with a rule of its own, which its weight does not tell."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


def with_random_layer() -> Any:
    model = odd_model("llama")
    model.model.layers[0].mlp.register_forward_hook(Added(torch.randn_like))
    return model


def with_batch_norm() -> Any:
    model = odd_model("qwen3")
    model.model.layers[0].mlp.register_forward_hook(Added(lambda x: x.mean(0, keepdim=True)))
    return model


def with_a_scaled_head() -> Any:
    model = odd_model("qwen3", tie_word_embeddings=False)
    head = ScaledHead(32, 50, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def with_weights_that_move() -> Any:
    model = odd_model("llama")

    def move(module: Any, inputs: Any, output: Any) -> None:
        module.up_proj.weight.mul_(1.0)  # gradients are off

    model.model.layers[0].mlp.register_forward_hook(move)
    return model


def with_a_look_ahead() -> Any:
    model = odd_model("llama")
    model.model.layers[0].mlp.register_forward_hook(Added(lambda x: x.mean(1, keepdim=True)))
    return model


def an_encoder() -> Any:
    return odd_model("bert")


def without_caps(*args: Any, softcap: float | None = None, **options: Any) -> Any:
    """Attention as sdpa's of transformers before 5.24, which leaves caps out without a word."""
    return sdpa_attention_forward(*args, **options)


AttentionInterface.register("capless", without_caps)
AttentionMaskInterface.register("capless", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def with_dropped_caps() -> Any:
    model = odd_model("gemma2", attn_logit_softcapping=0.1)
    model.set_attn_implementation("capless")
    return model


CAUSES = [
    (with_random_layer, "'llama' draws random numbers in eval mode.* nats in two passes"),
    (with_batch_norm, "'qwen3' lets rows of a batch see their neighbors.* nats"),
    (with_a_scaled_head, "'qwen3' has other logits than those that its head gives.* nats"),
    (with_a_look_ahead, "'llama' lets tokens see later ones"),
    (an_encoder, "'bert' lets tokens see later ones.*is_decoder=True"),
    (with_dropped_caps, "'gemma2' has other logits under attention 'capless'.*'eager'}"),
    (with_weights_that_move, "'llama' changes its weights in a forward pass"),
]


@pytest.mark.parametrize(("make", "message"), CAUSES, ids=[make.__name__ for make, _ in CAUSES])
@pytest.mark.parametrize("layout", ["auto", "packed"])
def test_wrong_scores_are_refused_with_their_cause(make: Any, message: str, layout: Any) -> None:
    runner = runner_of(make(), layout)
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            runner.logprobs(siblings(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "falcon_h1", "phimoe", "cohere2"])
def test_no_right_model_is_refused(kind: str, dtype: torch.dtype) -> None:
    model, batch = odd_model(kind).to(dtype), siblings(4, 60)
    found = runner_of(model).logprobs(batch)
    gap = (found - own_logprobs(model, batch)[0]).abs()
    assert gap.sum() / batch.num_tokens < (1e-4 if dtype == torch.float32 else 0.05)


def test_auto_does_without_a_layout_whose_trial_raises_anything() -> None:
    model, batch = odd_model("llama"), siblings(6, 6)

    def want_one_row_each(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert kwargs["attention_mask"] is None or kwargs["input_ids"].shape[0] > 1, "one row"

    model.model.register_forward_pre_hook(want_one_row_each, with_kwargs=True)
    torch.testing.assert_close(
        runner_of(model).logprobs(batch), own_logprobs(model, batch)[0].detach()
    )
    with pytest.raises(
        ConfigError, match=r"'llama' cannot be .*'shared_prefix' \(AssertionError: one row"
    ) as info:
        runner_of(model, "shared_prefix").logprobs(batch)
    assert isinstance(info.value.__cause__, AssertionError)


def test_a_window_that_no_setting_names_is_found_when_rows_reach_it() -> None:
    """GPT-Neo's. A completion is far from its prompt where others lie in between."""
    model = odd_model("gpt_neo", window_size=40, max_position_embeddings=512)
    short, long = siblings(4, 4, prompt=6), siblings(12, 12, 12, 12)
    wrong = sequence_logprobs(model, long, layout="shared_prefix").logprobs
    right = own_logprobs(model, long)[0].detach()
    assert (wrong - right).abs().max() > 0.01
    runner = runner_of(model)
    assert runner.layout(short) == "shared_prefix"
    assert runner.layout(long) != "shared_prefix"
    torch.testing.assert_close(runner.logprobs(long), right, rtol=1e-5, atol=2e-5)
    with pytest.raises(ConfigError, match=r"'gpt_neo' does not keep rows apart.*'shared_prefix'"):
        runner_of(model, "shared_prefix").layout(long)


def test_a_trial_is_made_once_for_rows_of_up_to_its_length() -> None:
    model = tiny_model()
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    runner, made = runner_of(model, "padded"), []
    for length in (5, 12, 40, 44, 100, 3):
        runner.layout(siblings(length))
        made.append(max(sizes, default=0) + 1)
        sizes.clear()
    assert made == [32, 1, 64, 1, 128, 1]  # of tokens; the last is not computed
