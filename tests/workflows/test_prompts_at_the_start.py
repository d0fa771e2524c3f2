"""One prompt of each kind is written before the first step: at fit, in doctor and in a dry run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.cli.doctor.config_checks import check_rows
from sdp_lightning.cli.doctor.prompt_checks import check_prompts
from sdp_lightning.cli.dry_run import few_rows
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.errors import ConfigError
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from sdp_lightning.workflows.chat.row_kinds import MOST_KINDS, first_of_each_kind
from support.chat_templates import tokenizer_of
from support.trainers import make_data, make_module, make_trainer

ASK: dict[str, Any] = {"role": "user", "content": "1+1?"}
LOST: dict[str, Any] = {"role": "critic", "content": "no"}
USERS_ONLY = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}{% endfor %}"


def rows(*prompts: Any) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]


def test_rows_are_of_one_kind_if_their_prompts_have_one_shape() -> None:
    prompts = ["1+1=", "2+2=", [ASK], [{**ASK, "content": "2?"}], [ASK, ASK], [{**ASK, "x": None}]]
    found = first_of_each_kind(enumerate(rows(*prompts)), "prompt")
    assert [index for index, _ in found] == [0, 2, 4, 5]
    parts = [[{"role": "user", "content": [{"type": "text", "text": t}]}] for t in ("a", "b", "")]
    assert [i for i, _ in first_of_each_kind(enumerate(rows(*parts)), "prompt")] == [0, 2]


def test_a_large_data_set_costs_a_few_prompts() -> None:
    read: list[int] = []

    def many() -> Iterator[tuple[int, Any]]:
        for index in range(10**6):
            read.append(index)
            yield index, {"prompt": [ASK] * (index + 1)}

    assert len(list(first_of_each_kind(many(), "prompt"))) == MOST_KINDS == len(read) - 1


def test_a_fit_ends_before_its_first_step_with_the_row_and_the_message(
    model_folder: str,
) -> None:
    module = make_module(model_folder)
    module.tokenizer.chat_template = USERS_ONLY
    data = make_data(rows=rows(*["1+1="] * 5, [ASK], [ASK, LOST]))
    with pytest.raises(ConfigError, match=r"row 'r6': .* leaves out message 1 \(critic\)"):
        make_trainer(sdp.WeightSyncCallback(), max_steps=1).fit(module, datamodule=data)


class Asks(sdp.Environment):
    """Begins as its row says; the row may ask for an error."""

    def reset(self, row: Any) -> Any:
        return [ASK, LOST] if row["prompt"] == "critic" else 1 / 0

    def step(self, completion: str) -> Any:
        return "?", 0.0, True


def test_prompts_of_environments_are_written_too(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = USERS_ONLY
    workflow = sdp.ShapedWorkflow(sdp.MultiTurnWorkflow(Asks))
    given = [*rows("fails"), {"id": "r1", "prompt": "critic", "more": 1}]
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ConfigError, match=r"row 'r1': .* leaves out message 1 \(critic\)"),
    ):
        workflow.check_prompts(enumerate(given), tokenizer)
    assert "row 'r0' gave no prompt to look at" in caplog.text, "which the run counts"


def test_a_template_that_hides_turns_is_refused_before_a_conversation_begins() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    workflow = sdp.MultiTurnWorkflow("support.conversations:Counts")
    with pytest.raises(ConfigError, match="does not show what an assistant said"):
        workflow.check_prompts(enumerate(rows("1+1=")), tokenizer)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("1+1=", "chat_template_kwargs has no effect: the prompts are plain text"),
        ([ASK], "enable_thinking=True changes nothing of the first prompt"),
    ],
    ids=["no chat", "the default"],
)
def test_arguments_that_change_nothing_are_said(
    prompt: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    workflow = sdp.RLVRWorkflow(len, chat_template_kwargs={"enable_thinking": True})
    with caplog.at_level(logging.WARNING):
        workflow.check_prompts(enumerate(rows(prompt)), tokenizer_of("qwen 3"))
    assert said in caplog.text


def test_doctor_writes_one_prompt_of_each_kind(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = USERS_ONLY
    tokenizer.save_pretrained(tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    file = tmp_path / "task.py"
    good, bad = ({"prompt": prompt, "answer": "2"} for prompt in ([ASK], [ASK, LOST]))
    file.write_text(f"good = {[good]}\nbad = {[good, bad]}")
    init = {"reward": "sdp_lightning.rewards.text:exact_match", "sampling": {"max_new_tokens": 4}}
    workflow = {"class_path": "sdp_lightning.RLVRWorkflow", "init_args": init}
    data = {"prompts": f"{file}:good", "val_prompts": f"{file}:bad", "workflow": workflow}
    source = ModelSource(str(tmp_path))
    written = check_prompts(source, data)  # of the rows that can be trained on
    assert [finding.state for finding in written] == ["ok", "ok"]
    found, lost = (check_rows(name, data, source) for name in ("prompts", "val_prompts"))
    assert (found.state, lost.state) == ("ok", "problem"), found.text
    assert "row 1: the chat template" in lost.text and "leaves out message 1 (critic)" in lost.text
    [broken] = check_prompts(source, {"prompts": f"{file}:good", "workflow": {"class_path": "No"}})
    assert broken.state == "note" and "not tried" in broken.text
    assert check_prompts(ModelSource("/not/here"), data) == []


def test_a_dry_run_has_a_row_of_each_kind() -> None:
    given = rows(*["1+1="] * 20, [ASK])
    assert few_rows(given) == [*given[:8], given[20]]
