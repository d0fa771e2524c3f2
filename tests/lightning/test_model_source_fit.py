"""Code, tokenizer and chat template of a model: given once, they hold from fit to export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdp_lightning as sdp
from sdp_lightning.cli.dry_run import shrink
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.cli.main import main
from support.model_sources import TEMPLATE, other_tokenizer, own_code
from support.plain_forwards import logits
from support.trainers import Recorder, make_data, make_module, make_trainer

CHAT = [{"prompt": [{"role": "user", "content": f"{i}+{i}"}]} for i in range(4)]
UNTRUSTED = r"Python code of its own.*Read it, then give the module ModelSource.*trust_remote_code"


@dataclass(frozen=True)
class Run:
    """A finished fit: its settings, checkpoint, batches, policy and tokenizer."""

    source: sdp.ModelSource
    checkpoint: Path
    recorder: Recorder
    module: sdp.SegmentWisePPOModule


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One step with the embedded engine, which is told nothing of the model."""
    place = tmp_path_factory.mktemp("own")
    (place / "chat.jinja").write_text(TEMPLATE)
    source = sdp.ModelSource(
        own_code(place / "model"),
        trust_remote_code=True,
        tokenizer=other_tokenizer(place / "tokenizer"),
        chat_template=place / "chat.jinja",
    )
    keep, recorder = (
        ModelCheckpoint(place / "run", filename="step", every_n_train_steps=1),
        Recorder(),
    )
    trainer = make_trainer(
        sdp.WeightSyncCallback(weight_check_every=1, weight_check_tolerance=1e-4),
        keep,
        recorder,
        max_steps=1,
        enable_checkpointing=True,
    )
    module = make_module(source, lr=1e-2)
    trainer.fit(module, datamodule=make_data(rows=CHAT))
    return Run(source, place / "run" / "step.ckpt", recorder, module)


def test_rollouts_are_of_the_own_class_tokenizer_and_template(run: Run) -> None:
    policy = run.module.require_policy()
    assert type(policy).__name__ == "OwnLM"
    tokenizer = AutoTokenizer.from_pretrained(run.source.tokenizer, trust_remote_code=True)
    assert type(run.module.tokenizer) is type(tokenizer)
    asked = {g.trajectories[0].parts[0].token_ids.tobytes() for g in run.recorder.steps[0].groups}
    texts = [f"user:{row['prompt'][0]['content']};ai:" for row in CHAT]
    ids = [torch.tensor(tokenizer.encode(text)).numpy().tobytes() for text in texts]
    assert asked <= set(ids) and len(asked) == 2
    assert run.recorder.engine_versions == [0, 1]  # and the weight check found no difference


def test_an_export_has_all_of_it(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run.checkpoint), str(out)]) == 0
    code = {"modeling_own.py", "scale_own.py", "tokenization_own.py"}
    assert code | {"chat_template.jinja"} <= {path.name for path in out.iterdir()}
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnLM"
    assert torch.equal(logits(loaded.eval()), logits(run.module.require_policy()))
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizerFast"
    assert tokenizer.encode("1+2") == run.module.tokenizer.encode("1+2")
    assert tokenizer.chat_template == TEMPLATE


def test_a_checkpoint_loads_into_a_new_module(run: Run) -> None:
    loaded = sdp.SegmentWisePPOModule.load_from_checkpoint(
        run.checkpoint, model=run.source, weights_only=True
    )
    assert torch.equal(logits(loaded.require_policy()), logits(run.module.require_policy()))


def test_another_model_folder_keeps_the_rest_of_what_the_checkpoint_says(
    run: Run, tmp_path: Path
) -> None:
    moved = own_code(tmp_path / "moved")
    export_checkpoint(run.checkpoint, tmp_path / "out", model=moved)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer.chat_template == TEMPLATE


def config_file(source: sdp.ModelSource, file: Path, **changes: Any) -> str:
    settings = {name: str(value) for name, value in vars(source).items() if value is not None}
    workflow = {
        "class_path": "sdp_lightning.RLVRWorkflow",
        "init_args": {
            "reward": "support.trainers:weigh_letters",
            "group_size": 2,
            "sampling": {"max_new_tokens": 4},
        },
    }
    config = {
        "model": {"model": settings | {"trust_remote_code": True} | changes},
        "trainer": {"max_steps": 1},
        "data": {"prompts": CHAT, "workflow": workflow, "rollout": {"batch_size": 2}},
    }
    file.write_text(yaml.safe_dump(config))
    return f"--config={file}"


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_config_file_runs_dry_with_all_of_it(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", config_file(run.source, tmp_path / "a.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("dry run: 2 batches of 2 groups trained")
    config = config_file(run.source, tmp_path / "b.yaml", trust_remote_code=False)
    assert main(["fit", config, "--dry-run"]) == 2
    assert "ModelSource" in capsys.readouterr().err


def test_the_doctor_looks_at_all_of_it(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", config_file(run.source, tmp_path / "a.yaml")])
    told = capsys.readouterr().out
    assert "modeling_own.py of the model is run." in told
    assert f"{len(TEMPLATE)} characters" in told
    changes = {"trust_remote_code": False, "tokenizer": "/gone", "chat_template": "gone.jinja"}
    assert main(["doctor", config_file(run.source, tmp_path / "b.yaml", **changes)]) == 1
    told = capsys.readouterr().out
    assert "there is no /gone" in told and "gone.jinja" in told
    assert "set model.model.trust_remote_code" in told


ASKED: dict[str, Any] = {
    "trainer": lambda folder, run, tmp_path: make_module(folder).configure_model(),
    "tokenizer": lambda folder, run, tmp_path: (
        make_module(sdp.ModelSource(folder, tokenizer=run.source.tokenizer)).tokenizer
    ),
    "engine": lambda folder, run, tmp_path: sdp.EmbeddedEngine(folder, device="cpu").start(),
    "dry run": lambda folder, run, tmp_path: shrink(folder, tmp_path),
    "export": lambda folder, run, tmp_path: export_checkpoint(
        run.checkpoint, tmp_path, model=sdp.ModelSource(folder)
    ),
}


@pytest.mark.parametrize("part", ASKED)
def test_code_that_is_not_trusted_is_refused_in_one_line_with_the_remedy(
    part: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(sdp.ConfigError, match=UNTRUSTED) as caught:
        ASKED[part](str(run.source.name), run, tmp_path)
    assert "\n" not in str(caught.value)


def test_model_kwargs_say_the_same(run: Run) -> None:
    """As they did before there was a ModelSource; the engine hears of it."""
    module = make_module(str(run.source.name), model_kwargs={"trust_remote_code": True})
    assert module.source.trust_remote_code
    with pytest.raises(
        sdp.ConfigError, match=r"revision is 'a' in ModelSource and 'b' in model_kw"
    ):
        make_module(sdp.ModelSource("org/model", revision="a"), model_kwargs={"revision": "b"})
