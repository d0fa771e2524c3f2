"""What is exported, from one file or from shards, is loaded and sampled by a real vLLM server."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdp_lightning as sdp
from sdp_lightning.cli.main import main
from sdp_lightning.engines.servers.managed import ManagedServers
from support.rank_runs import Launcher
from support.real_vllm import TOLERANCE, make_config, save_model
from support.trainers import make_data, make_module, make_trainer, weights_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

TEXT, NUM_TOKENS = "12+3=", 24


def train(server: Any, base: str, out: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint and the weights that are to be in it."""
    if kind == "shards":
        out.mkdir()
        launcher = Launcher(server, base, out)
        case = {"kind": "rollouts", "steps": 4, "strategy": "fsdp shards", "save_in": str(out)}
        ranks = launcher.run(2, {"it": case})
        launcher.close()
        return out / "step=4.ckpt", ranks[0]["it"]["weights"]
    module, saver = make_module(base), ModelCheckpoint(out, "{step}", every_n_train_steps=4)
    trainer = make_trainer(sdp.WeightSyncCallback(), saver, max_steps=4, enable_checkpointing=True)
    trainer.fit(module, make_data())
    return out / "step=4.ckpt", weights_of(module)


def ask(url: str, path: str, question: dict[str, Any] | None = None) -> Any:
    data = None if question is None else json.dumps(question).encode()
    kind = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, kind), timeout=120) as it:
        return json.load(it)


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_vllm_samples_an_exported_model_with_the_log_probs_of_what_was_trained(
    kind: str, fork_server: Any, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base")
    checkpoint, trained = train(fork_server, base, tmp_path / "run", kind)
    assert checkpoint.is_dir() == (kind == "shards")
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), str(out)]) == 0
    config = make_config(str(out), tmp_path / "logs", startup_timeout_s=900.0)
    servers = ManagedServers(config)
    try:
        (url,) = servers.start()
        model = ask(url, "/v1/models")["data"][0]["id"]
        question = {"model": model, "prompt": TEXT, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        question |= {"temperature": 1.0, "seed": 0, "logprobs": 0, "return_token_ids": True}
        (choice,) = ask(url, "/v1/completions", question)["choices"]
    finally:
        servers.close()
    prompt, sampled = choice["prompt_token_ids"], choice["token_ids"]
    assert prompt == AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    assert len(sampled) == NUM_TOKENS
    tokens = torch.tensor(prompt + sampled)
    found = torch.tensor(choice["logprobs"]["token_logprobs"])

    def logprobs(policy: Any) -> torch.Tensor:
        with torch.no_grad():
            table = policy(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return table.gather(1, tokens[len(prompt) :, None])[:, 0]

    policy: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert (logprobs(policy) - found).abs().max() > 100 * TOLERANCE, "nothing was learned"
    policy.load_state_dict(trained)
    assert (logprobs(policy) - found).abs().max() < TOLERANCE
