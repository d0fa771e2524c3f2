"""A config as Python objects: the same run as on the command line, and errors as exceptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from support.paths import ROOT

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
CONFIG = "recipes/tiny_cpu/config.yaml"


@pytest.fixture
def small(model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Overrides of the tiny recipe, in a working directory of its own."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # the config names files from the root
    monkeypatch.chdir(tmp_path)
    return {
        "model.model": model_folder,
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "trainer.callbacks": None,
        "data.rollout.batch_size": 2,
    }


def test_a_config_with_overrides_is_a_trainer_a_module_and_their_data(
    small: dict[str, Any],
) -> None:
    trainer, model, data = sdp.from_config(CONFIG, small)
    assert (trainer.max_steps, data.rollout.batch_size, data.rollout.max_head_lag) == (2, 2, 2)
    assert any(isinstance(c, sdp.WeightSyncCallback) for c in trainer.callbacks)  # type: ignore
    trainer.fit(model, data)
    assert trainer.global_step == 2
    assert not list(Path("runs").rglob("config.yaml")), "what it was made of is the caller's"


def test_the_last_of_several_files_decides(small: dict[str, Any]) -> None:
    Path("more.yaml").write_text("data: {rollout: {max_head_lag: 5}}\nckpt_path: null\n")
    _, _, data = sdp.from_config([CONFIG, "more.yaml"], small)
    assert (data.rollout.max_head_lag, data.rollout.max_concurrent) == (5, 4)


def test_a_text_of_the_overrides_is_a_text_and_a_number_where_the_type_is_one(
    small: dict[str, Any],
) -> None:
    texts = {"a": "3", "b": "null", "c": "[1]", "d": "-3", "e": "plain"}
    options = {f"data.engine_options.{key}": text for key, text in texts.items()}
    more = {"trainer.max_steps": "4", "trainer.default_root_dir": "12"} | options
    trainer, _, data = sdp.from_config(CONFIG, small | more)
    assert dict(data.hparams)["engine_options"] == texts
    assert (trainer.max_steps, trainer.default_root_dir) == (4, "12")
    _, _, data = sdp.from_config(
        CONFIG, [f"--{k}={v}" for k, v in small.items() if v] + ["--data.engine_options.a=3"]
    )
    assert dict(data.hparams)["engine_options"] == {"a": 3}


def test_a_row_inline_may_have_a_field_of_the_name_class_path(small: dict[str, Any]) -> None:
    rows = [{"prompt": "1+1=", "class_path": "os.path", "init_args": {"a": "3"}}] * 2
    _, _, data = sdp.from_config(CONFIG, small | {"data.prompts": rows})
    data._rows.load("predict", None, data.rollout, None)
    assert data._rows.used == {"prompts": rows}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"data.rollout.max_head_lagg": 3},
            "Did you mean data.rollout.max_head_lag",
        ),
        ({"data.rollout.max_head_lag": "two"}, "max_head_lag"),
        ({"data.rollout.batch_size": -1}, "batch_size"),
        ({"seed_everything": -1}, r"seed_everything=-1: NumPy takes 0 to 4294967295\. Choose"),
        ({"data.engine_options.a": "-1e3"}, r"'-1e3' of data.engine_options.a begins as a flag"),
        ({"ckpt_path": "last.ckpt"}, r"ckpt_path='last.ckpt'.*pass it to trainer.fit"),
    ],
    ids=[
        "unknown setting",
        "wrong type",
        "refused value",
        "a seed",
        "a text with a dash",
        "a checkpoint",
    ],
)
def test_a_refused_config_is_an_exception(
    small: dict[str, Any],
    overrides: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(sdp.ConfigError, match=message):
        sdp.from_config(CONFIG, small | overrides)
    assert not capsys.readouterr().err


def test_a_file_that_is_not_there_is_an_exception_that_names_it(small: dict[str, Any]) -> None:
    with pytest.raises(sdp.ConfigError, match=r"none\.yaml"):
        sdp.from_config("none.yaml", small)
