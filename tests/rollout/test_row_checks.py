"""Rows that cannot be trained on: all of them are named before a run, or left out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.errors import ConfigError, RowsError
from sdp_lightning.prompts.checks import SeenIds
from sdp_lightning.prompts.stream import PromptStream
from sdp_lightning.rewards.text import exact_match
from sdp_lightning.rollout import row_checks
from sdp_lightning.rollout.row_checks import RowChecks, RowJudge
from sdp_lightning.testing import FakeEngine, tiny_tokenizer
from support.trainers import Recorder, make_data, make_module, make_trainer, make_workflow

CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = CHAT
WORKFLOW = sdp.RLVRWorkflow(exact_match, sampling=sdp.SamplingParams(max_new_tokens=10))
GOOD = [{"id": f"good{i}", "prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(3)]
BAD: dict[str, Any] = {
    "no mapping": ["1+1="],
    "no prompt": [
        {"question": "1+1=", "answer": "2"},
        {"id": "none", "prompt": None, "answer": "2"},
    ],
    "empty prompt": [
        {"id": "blank", "prompt": " \n", "answer": "2"},
        {"id": "asks nothing", "prompt": [{"role": "user", "content": ""}], "answer": "2"},
        {"prompt": [], "answer": "2"},
        {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": ""}]},
    ],
    "prompt refused": [
        {"id": "a number", "prompt": 11, "answer": "2"},
        {"prompt": [{"role": "tool", "content": "2"}], "answer": "2"},
    ],
    "prompt too long": [{"id": "long", "prompt": "7" * 21, "answer": "2"}],
    "null id": [
        {"id": None, "prompt": "1+1=", "answer": "2"},
        {"id": float("nan"), "prompt": "1+1=", "answer": "2"},
        {"id": "", "prompt": "1+1=", "answer": "2"},
    ],
    "duplicate id": [{"id": "good1", "prompt": "8+8=", "answer": "16"}],
    "no score": [{"id": "no answer", "prompt": "1+1="}],
}
LIMIT = 30  # tokens of a sequence: 20 are left for the prompt


def checks_of(rows: Sequence[Any], workflow: Any = WORKFLOW, **settings: Any) -> RowChecks:
    return RowChecks(rows, workflow, TOKENIZER, **{"max_length": LIMIT} | settings)


@pytest.mark.parametrize("cause", BAD)
def test_a_row_that_cannot_be_trained_on_is_refused_by_its_cause(cause: str) -> None:
    for bad in BAD[cause]:
        (fault,) = checks_of([*GOOD, bad, *GOOD[:0]]).faults
        assert (fault.index, fault.cause) == (3, cause)
        name = bad.get("id", 3) if isinstance(bad, dict) and cause not in ("null id",) else 3
        assert str(3 if cause == "duplicate id" else name) in fault.text


def test_all_are_refused_together_with_their_counts_and_the_first_of_them() -> None:
    rows = [*GOOD, *(row for rows in BAD.values() for row in rows)]
    text = (
        r"^15 of 18 rows of prompts cannot be used \(4 empty prompt, 3 null id, 2 no prompt, "
        r"2 prompt refused, 1 no mapping, .*\): row 3 is str; rows must be mappings\. row 4: row "
        r"has no 'prompt'; its keys are \['answer', 'question'\]\. .* And 10 more\. Correct these "
        r"rows, or leave them out with prompts_check='drop'"
    )
    with pytest.raises(ConfigError, match=text):
        checks_of(rows).kept()
    assert list(checks_of(GOOD).kept()) == GOOD


def test_dropped_rows_are_counted_and_the_others_keep_order_and_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [{"prompt": "", "answer": "0"}, *GOOD, *BAD["no score"], {"prompt": "?", "answer": "1"}]
    with caplog.at_level(logging.WARNING):
        kept = checks_of(rows, mode="drop").kept()
    assert list(kept) == [*GOOD, {"id": 5, "prompt": "?", "answer": "1"}]
    (said,) = caplog.messages
    assert said.startswith("2 of 6 rows of prompts cannot be used (1 empty prompt, 1 no score)")
    assert said.endswith("They are left out (prompts_check='drop'): 4 are left.")
    lazy = checks_of(Lazy(rows), mode="drop").kept()
    assert [lazy[i] for i in range(len(lazy))] == list(kept) == lazy[:]
    stream = PromptStream(kept, num_epochs=1, shuffle=False)
    assert [stream.read(0, i).row_id for i in range(4)] == ["good0", "good1", "good2", "5"]
    with pytest.raises(ConfigError, match=r"1 of 1 rows .* No row is left\."):
        checks_of(BAD["no score"], mode="drop").kept()


class Lazy(Sequence[Any]):
    """Rows that are made when they are read; one of them cannot be."""

    def __init__(self, rows: Sequence[Any], broken: int | None = None) -> None:
        self.rows, self.broken, self.num_read = rows, broken, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        self.num_read += 1
        if index == self.broken:
            raise KeyError("page 7")
        return self.rows[index]


def test_rows_of_the_validation_may_be_repeated() -> None:
    assert list(checks_of(GOOD * 2, what="val_prompts").kept()) == GOOD * 2
    assert list(checks_of(GOOD * 2, mode="drop").kept()) == GOOD


def test_a_row_that_cannot_be_read_is_named_and_no_rows_are_refused() -> None:
    (fault,) = checks_of(Lazy(GOOD, broken=1)).faults
    assert fault.cause == "not readable" and "row 1: reading it failed: KeyError" in fault.text
    with pytest.raises(ConfigError, match="val_prompts is empty"):
        checks_of([], what="val_prompts")


def test_reading_ends_in_time_where_a_fault_is_an_error_and_never_where_rows_are_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_checks, "_ROWS_S", -1.0)
    rows = [*GOOD, *BAD["no score"]]
    with caplog.at_level(logging.WARNING):
        assert checks_of(rows).faults == []
    assert "only 0 of 4 rows of prompts were checked" in caplog.text
    assert list(checks_of(rows, mode="drop").kept()) == GOOD


def test_ranks_read_a_part_each_and_know_all_faults(make_world: Callable[..., Any]) -> None:
    rows = Lazy([*GOOD, *BAD["duplicate id"], *BAD["no score"], *BAD["prompt too long"]])
    alone = checks_of(rows).faults
    rows.num_read = 0
    found = make_world(3).run(lambda ranks: checks_of(rows, ranks=ranks, mode="drop").kept())
    assert [fault.index for fault in alone] == [3, 4, 5]
    assert [list(part) for part in found] == [GOOD] * 3
    assert rows.num_read <= 3 * len(rows) + 3 * 3, "not every rank checks every row"


def test_every_reward_of_a_workflow_names_its_rows() -> None:
    class Two(sdp.RLVRWorkflow):
        def check_rows(self, rows: Any) -> None:
            found = {index: row["id"] for index, row in rows}
            for reward, bad in (("a", "good0"), ("b", "good2")):
                if faults := {i: f"{reward} refuses it." for i, n in found.items() if n == bad}:
                    raise RowsError(f"not by {reward}", faults)

    assert [fault.text for fault in checks_of(GOOD, Two(exact_match), max_length=None).faults] == [
        "row 'good0': a refuses it.",
        "row 'good2': b refuses it.",
    ]


def test_a_workflows_own_error_goes_on() -> None:
    class Own(sdp.RLVRWorkflow):
        def check_rows(self, rows: Any) -> None:
            raise ConfigError("these rows need a judge")

    with pytest.raises(ConfigError, match="need a judge"):
        checks_of(GOOD, Own(exact_match), mode="drop")


def test_a_row_of_a_stream_is_judged_alone() -> None:
    judge = RowJudge(WORKFLOW, TOKENIZER)
    assert judge.fault_of(7, GOOD[0], LIMIT) is None
    causes = ("no mapping", "no prompt", "empty prompt", "prompt too long", "null id", "no score")
    for cause in causes:
        for row in BAD[cause]:
            fault = judge.fault_of(7, row, LIMIT)
            assert fault is not None and (fault.index, fault.cause) == (7, cause)


def test_ids_are_known_of_the_last_rows_alone() -> None:
    seen = SeenIds(most=2)
    found = [seen.fault_of(0, n, {"id": name}) for n, name in enumerate("abaca")]
    assert [fault is not None for fault in found] == [False, False, True, False, False]


def add(a: int, b: int) -> int:
    """Sum."""
    return a + b


class OwnTools(sdp.ToolEnvironment):
    """Begins in a way of its own, which nobody must try before the run."""

    def reset(self, row: Any) -> Any:
        raise AssertionError("begun")


@pytest.mark.parametrize(
    ("total", "engine", "longest"),
    [
        (None, None, None),
        (None, 50, 40),  # 10 tokens of a turn
        (45, None, 44),  # one token
        (45, 50, 44),
        (45, 45, 44),
        (60, 50, 40),
        (45, 44, 34),
    ],
)
def test_the_longest_prompt_of_a_conversation_leaves_room_for_a_turn(
    total: int | None, engine: int | None, longest: int | None
) -> None:
    workflow = sdp.MultiTurnWorkflow(
        lambda: OwnTools([add], lambda text, row: 0.0),
        sampling=sdp.SamplingParams(max_new_tokens=10),
        max_total_tokens=total,
    )
    assert workflow.longest_prompt(engine) == longest
    assert sdp.ShapedWorkflow(workflow).longest_prompt(engine) == longest
    assert checks_of(GOOD, workflow, max_length=engine).faults == []


def test_the_prompt_of_a_tool_environment_has_its_tools() -> None:
    def workflow(total: int) -> Any:
        environment: Callable[[], Any] = lambda: sdp.ToolEnvironment([add], lambda t, r: 0.0)  # noqa: E731
        return sdp.MultiTurnWorkflow(environment, max_total_tokens=total)

    rows = [{"prompt": "1+1="}, {"prompt": "2+2?"}, {"question": "?"}]
    (fault,) = checks_of(rows, workflow(1000), max_length=None).faults
    assert (fault.index, fault.cause) == (2, "no prompt")
    assert [fault.cause for fault in checks_of(rows[:2], workflow(40), max_length=None).faults] == [
        "prompt too long"
    ] * 2


# In a run -----------------------------------------------------------------------------------------


def test_prompts_too_long_for_the_engine_end_a_fit_before_its_first_rollout(
    model_folder: str,
) -> None:
    rows = [{"id": "short", "prompt": "1="}, {"id": "long", "prompt": "1" * 30}]
    data = make_data(rows=rows, engine_options={"device": "cpu", "max_length": 32})
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=1)
    text = r"1 of 2 rows of prompts .*row 'long': its prompt has 30 tokens, and 26 leave room .* 32"
    with pytest.raises(ConfigError, match=text):
        trainer.fit(make_module(model_folder), data)
    assert trainer.global_step == 0


def test_a_fit_never_asks_dropped_rows(model_folder: str) -> None:
    asked: set[str] = set()

    def reward(text: str, row: Mapping[str, Any]) -> float:
        asked.add(str(row["id"]))
        return float(len(text))

    good = [{"id": f"r{i}", "prompt": f"{i}="} for i in range(4)]
    bad = [{"id": "empty", "prompt": ""}, {"id": "long", "prompt": "1" * 30}]
    recorder = Recorder()
    data = make_data(
        make_workflow(reward),
        rows=[bad[0], *good[:2], bad[1], *good[2:]],
        val_prompts=[bad[1], {"id": "v", "prompt": "3="}],
        engine_options={"device": "cpu", "max_length": 32},
        prompts_check="drop",
        num_epochs=1,
    )
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, max_steps=9, val_check_interval=1)
    trainer.fit(make_module(model_folder), data)
    assert asked == {"r0", "r1", "r2", "r3", "v"} and trainer.global_step == 2
    assert {name for step in recorder.steps for name in step.row_ids} == {"r0", "r1", "r2", "r3"}


def test_rows_that_are_only_generated_are_checked_too(model_folder: str, tmp_path: Path) -> None:
    data = make_data(rows=[{"prompt": "1="}, {"question": "2="}], engine=FakeEngine())
    trainer = make_trainer(sdp.WeightSyncCallback(), limit_predict_batches=1)
    with pytest.raises(ConfigError, match=r"row 1: row has no 'prompt'"):
        trainer.predict(make_module(model_folder), datamodule=data)
