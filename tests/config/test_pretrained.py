"""Revisions, tokenizers and chat templates of a source; each error is one line with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import sdp_lightning as sdp
from sdp_lightning.cli.dry_run import shrink
from sdp_lightning.cli.export import export_checkpoint
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import load_tokenizer
from sdp_lightning.testing import tiny_model, tiny_tokenizer
from support.exports import load, save_checkpoint
from support.trainers import make_module

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
OLD, NEW = "a" * 40, "b" * 40
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Id of a model in the hub's cache: its branch ``main`` is ``OLD``, its tag ``new`` ``NEW``."""
    cache = tmp_path / "hub" / "models--org--tiny"
    for commit, seed in ((OLD, 1), (NEW, 2)):
        folder = cache / "snapshots" / commit
        tiny_model(seed=seed, hidden_size=8 * seed).save_pretrained(folder)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE.replace("[", f"{seed}:")
        tokenizer.save_pretrained(folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(OLD)
    (cache / "refs" / "new").write_text(NEW)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "org/tiny"


def width(model: Any) -> int:
    return int(model.config.hidden_size)


def test_a_revision_holds_for_trainer_engine_tokenizer_dry_run_and_export(
    hub: str, tmp_path: Path
) -> None:
    source = ModelSource(hub, revision="new")
    module = make_module(source)
    module.configure_model()
    assert width(module.require_policy()) == 16
    assert module.tokenizer.apply_chat_template(CHAT, tokenize=False) == "2:hi]"
    engine = sdp.EmbeddedEngine(source, device="cpu")
    engine.start()
    engine.close()
    assert width(engine._running.model) == 16  # pyright: ignore
    load_tokenizer(ModelSource(str(shrink(source, tmp_path / "small"))))
    settings = {"sdp_model_source": module.source.saved(), "sdp_model_id": hub}
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", module.require_policy(), **settings)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert width(load(tmp_path / "out")) == 16
    with pytest.raises(sdp.ConfigError, match="has shape"):  # of main
        export_checkpoint(checkpoint, tmp_path / "other", model=ModelSource(hub))


def test_a_tokenizer_of_its_own_is_not_looked_for_at_the_model_s_revision(hub: str) -> None:
    source = ModelSource(hub, revision="new", tokenizer=hub)
    assert load_tokenizer(source).apply_chat_template(CHAT, tokenize=False) == "1:hi]"


def test_a_chat_template_is_text_or_a_file(model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    for template in (TEMPLATE, file, str(file)):
        tokenizer = make_module(ModelSource(model_folder, chat_template=template)).tokenizer
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "[hi]"


WRONG = [
    (
        {"chat_template": "gone.jinja"},
        r"chat_template='gone\.jinja' is neither Jinja .* nor a file",
    ),
    ({"chat_template": "{% for %}"}, r"chat_template is no Jinja: .* \(line 1\)"),
    ({"tokenizer": "/gone"}, "there is no tokenizer folder '/gone'"),
    ({"revision": "v1"}, "revision='v1' has no effect on the folder"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_what_cannot_be_read_is_named(
    settings: dict[str, str], message: str, model_folder: str
) -> None:
    with pytest.raises(sdp.ConfigError, match=message) as caught:
        _ = make_module(ModelSource(model_folder, **settings)).tokenizer
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_a_conversation_is_not_refused(model_folder: str) -> None:
    template = "{{ raise_exception('a system message first') }}"
    assert load_tokenizer(ModelSource(model_folder, chat_template=template)).chat_template


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(sdp.ConfigError, match=rf"the tokenizer of '{tmp_path}' cannot be loaded"):
        _ = make_module(str(tmp_path)).tokenizer


def test_a_tokenizer_with_more_ids_than_the_model_embeds_is_refused(
    model_folder: str, tmp_path: Path
) -> None:
    tiny_model(vocab_size=20).save_pretrained(tmp_path)
    module = make_module(ModelSource(str(tmp_path), tokenizer=model_folder))
    with pytest.raises(sdp.ConfigError, match=r"has ids up to 49, and the model .* embeds 20"):
        _ = module.tokenizer


def test_a_type_that_transformers_lacks_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(sdp.ConfigError, match="unheard_of") as caught:
        make_module(str(tmp_path)).configure_model()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 450


def test_a_source_is_the_same_from_a_checkpoint(model_folder: str) -> None:
    source = ModelSource(model_folder, chat_template=TEMPLATE, trust_remote_code=True).resolved()
    path = source.saved()
    assert ModelSource.restored(path | {"later": 1}) == source
    assert all(type(value) in (str, bool, type(None)) for value in path.values())
