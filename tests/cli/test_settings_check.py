"""The quick check of names refuses nothing that the command line's own parser takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdp_lightning.cli.settings_check import check_settings, known_settings
from sdp_lightning.cli.trainer import RolloutCLI
from sdp_lightning.errors import ConfigError


class _Parser(RolloutCLI):
    """The parser of a command, which parses nothing."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _Made(parser)


class _Made(Exception):
    pass


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
)
@pytest.mark.parametrize("command", ["fit", "validate", "rollout"])
def test_every_setting_of_the_parser_is_known_and_no_other(command: str) -> None:
    with pytest.raises(_Made) as made:
        _Parser([command])
    parser: Any = made.value.args[0]._subcommands_action._name_parser_map[command]
    flags = {f for action in parser._actions for f in action.option_strings if f[:2] == "--"}
    names = {flag[2:].removesuffix("+") for flag in flags} - {"optimizer", "lr_scheduler"}
    for name in names:
        check_settings([command, f"--{name}=last"] if name != "config" else [command])
    below = {name.rpartition(".")[0] for name in names}
    known = {n for n in known_settings(command) if n.rpartition(".")[2] not in _OF_ANY_CLASS}
    known = {n for n in known if not n.startswith("model.lora.")}  # has one flag: it may be null
    assert sorted(known - names - below) == [], "the parser has no such setting"


_OF_ANY_CLASS = ("help", "class_path", "init_args", "dict_kwargs")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("trainer.acelerator", "trainer.accelerator"),
        ("model.lora.rnk", "model.lora.rank"),
        ("data.promts", "data.prompts"),
        ("modle.model", "model.model"),
        ("data.rollout.batch_size.x", None),
        ("ckpt_pth", "ckpt_path"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_one(key: str, near: str | None) -> None:
    if near is None:  # a value that is too deep is the parser's
        assert check_settings(["fit", f"--{key}", "3"]) == {key: "3"}
        return
    with pytest.raises(ConfigError, match=rf"no setting {key}\. Did you mean {near}\?"):
        check_settings(["fit", f"--{key}", "3"])


def test_a_file_s_settings_are_named_with_the_file_and_flags_come_after_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed_everything: 3\ndata: {engine: embedded, workflow: {any: {thing: 1}}}\n")
    given = check_settings(["fit", "-c", str(file), "--data.engine=vllm://a:1"])
    assert given["data.engine"] == "vllm://a:1" and given["seed_everything"] == 3
    file.write_text("model: {update: {num_minibatch: 2}}\n")
    with pytest.raises(ConfigError, match=r"model\.update\.num_minibatch in .*run\.yaml\. Did you"):
        check_settings(["fit", "--config", str(file)])


def test_yaml_in_place_of_a_file_is_left_to_the_parser() -> None:
    assert check_settings(["fit", "--config={trainer: {max_steps: 2}}"]) == {}
