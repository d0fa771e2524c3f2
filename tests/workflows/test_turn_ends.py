"""A chat template whose turns end where no completion does is said, before the first step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.cli.doctor.prompt_checks import check_prompts
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.testing import tiny_tokenizer
from support.chat_templates import CHATML, FAMILIES, Family, chatml, tokenizer_of
from support.conversations import Counts

ROW = {"prompt": "1+1="}


def workflow(**settings: Any) -> sdp.RLVRWorkflow:
    given = {"use_chat_template": True, **settings}
    return sdp.RLVRWorkflow("sdp_lightning.rewards:exact_match", **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_of_every_family_is_known(family: str) -> None:
    assert workflow().unstopped(ROW, tokenizer_of(family), ()) == ""


@pytest.mark.parametrize("family", ["qwen 3", "glm 4", "cohere 2", "gemma 2"])
def test_an_end_that_nothing_names_is_said(family: str) -> None:
    tokenizer, end = copy.deepcopy(tokenizer_of(family)), FAMILIES[family].end
    number = tokenizer.convert_tokens_to_ids(end)
    tokenizer.eos_token = "<pad>"
    said = workflow().unstopped(ROW, tokenizer, ())
    assert f"the chat template ends a turn with {end}, and no completion ends there" in said
    assert sdp.MultiTurnWorkflow(Counts).unstopped(ROW, tokenizer, ()) == said
    named = sdp.SamplingParams(stop_token_ids=(number,))
    for known in (workflow(sampling=named), workflow(stop=end), workflow(use_chat_template=False)):
        assert known.unstopped(ROW, tokenizer, ()) == ""
    assert workflow().unstopped(ROW, tokenizer, (number,)) == ""
    ignores = workflow(sampling=sdp.SamplingParams(stop_at_model_eos=False))
    assert ignores.unstopped(ROW, tokenizer, (number,)) == said
    plain = sdp.MultiTurnWorkflow(Counts, turn_format="{observation}")
    assert plain.unstopped(ROW, tokenizer, ()) == ""


def test_doctor_notes_it(tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML)})
    tokenizer.chat_template = Family(chatml(), CHATML, CHATML[1]).template
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "task.py").write_text("rows = [{'prompt': '1+1=', 'answer': '2'}]")
    init = {"reward": "sdp_lightning.rewards:exact_match", "use_chat_template": True}
    made = {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": init}
    data = {"prompts": f"{tmp_path / 'task.py'}:rows", "workflow": made}
    written, ends = check_prompts(ModelSource(str(tmp_path)), data)
    assert (written.state, ends.state) == ("ok", "note")
    assert ends.subject == "prompts, ends of turns" and "with <|im_end|>, and" in ends.text
    (tmp_path / "generation_config.json").write_text(
        f'{{"eos_token_id": {tokenizer.convert_tokens_to_ids(CHATML[1])}}}'
    )
    assert [found.state for found in check_prompts(ModelSource(str(tmp_path)), data)] == ["ok"]
