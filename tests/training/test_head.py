"""What enters the head, and what a model makes of its logits, found by running it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.policy.forward import sequence_logprobs
from sdp_lightning.training.policy.head import run_to_head
from support.odd_models import odd_model
from support.plain_forwards import TOKENS, gradients, plain, random_batch

# Type, settings, and the scale and cap that its formula gives with them.
KINDS = [
    ("llama", {}, 1.0, None),
    ("gemma2", {"final_logit_softcapping": 0.5}, 1.0, 0.5),
    ("vaultgemma", {"final_logit_softcapping": 0.5}, 1.0, 0.5),
    ("recurrent_gemma", {"logits_soft_cap": 0.5}, 1.0, 0.5),
    ("xlstm", {"output_logit_soft_cap": 2.0}, 1.0, 2.0),
    ("nanochat", {"final_logit_softcapping": 0.5}, 1.0, 0.5),
    ("granite", {"logits_scaling": 0.5}, 2.0, None),
    ("cohere", {"logit_scale": 3.0}, 3.0, None),
    ("hyperclovax", {"logits_scaling": 2.0}, 2.0, None),
    ("falcon_h1", {"lm_head_multiplier": 0.5}, 0.5, None),
    ("inkling_text", {"logits_mup_width_multiplier": 2.0, "unpadded_vocab_size": 41}, 1.0, None),
    ("modernbert-decoder", {}, 1.0, None),
    ("llama4_text", {}, 1.0, None),
]


@pytest.mark.parametrize(("kind", "settings", "scale", "cap"), KINDS, ids=[k for k, *_ in KINDS])
def test_scores_and_gradients_are_those_of_the_model_s_own_logits(
    kind: str, settings: dict[str, Any], scale: float, cap: float | None
) -> None:
    model, batch = odd_model(kind, **settings), random_batch(0)
    found = run_to_head(model, input_ids=TOKENS)
    assert found.transform.scale == pytest.approx(scale, rel=1e-5)
    assert found.transform.softcap == (None if cap is None else pytest.approx(cap, rel=1e-5))
    assert found.weight.shape[0] == settings.get("unpadded_vocab_size", 50)
    expected, entropy = plain(model, batch)
    result = sequence_logprobs(model, batch)
    torch.testing.assert_close(result.logprobs, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(result.entropy, entropy.detach(), rtol=1e-5, atol=1e-4)
    weight = model.get_output_embeddings().weight
    actual, wanted = (
        torch.autograd.grad(logprobs.square().sum(), weight)[0]
        for logprobs in (result.logprobs, expected)
    )
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_all_gradients_pass_through_the_layers_before_the_head() -> None:
    """ModernBERT has a dense layer and a norm there."""
    model, batch = odd_model("modernbert-decoder"), random_batch(1)
    wanted = gradients(model, plain(model, batch)[0])
    assert any("lm_head.dense" in name and grad.any() for name, grad in wanted.items())
    for name, grad in gradients(model, sequence_logprobs(model, batch).logprobs).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + torch.arange(50),
        lambda logits: torch.cat([logits[..., :3] - 1e9, logits[..., 3:]], -1),
        lambda logits: logits.abs(),
        lambda logits: logits.clamp(-5, 5),
        lambda logits: -logits,
        lambda logits: logits * 0.0,
        lambda logits: logits / 0.0,
    ],
    ids=["bias", "masked tokens", "no odd function", "hard cap", "sign", "factor 0", "divisor 0"],
)
def test_any_other_change_of_the_logits_is_refused(change: Any) -> None:
    model = tiny_model()

    def hook(module: Any, inputs: Any, output: Any) -> None:
        output.logits = change(output.logits)

    model.register_forward_hook(hook)
    with pytest.raises(ConfigError, match=r"'llama' changes the logits of its head by more than"):
        run_to_head(model, input_ids=TOKENS)


def test_logits_that_do_not_come_from_the_head_are_refused_and_it_works_afterwards() -> None:
    model, model.training = tiny_model(), False
    own, head = model(TOKENS).logits, model.lm_head
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 50))
    model.set_output_embeddings = lambda new: None
    model.get_output_embeddings = lambda: head
    with pytest.raises(
        ConfigError, match=r"logits of model type 'llama' are not those of its head"
    ):
        run_to_head(model, input_ids=TOKENS)
    model.lm_head = head
    torch.testing.assert_close(model(TOKENS).logits, own)
