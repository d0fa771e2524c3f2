"""Keys of servers: read from where a setting says, and left out of what is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdp_lightning.config.server_keys import hide_keys, read_key, without_keys
from sdp_lightning.errors import ConfigError


def test_a_key_is_read_from_a_variable_a_file_or_the_setting_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDP_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("SDP_API_KEY", "sk-1")
    monkeypatch.setenv("MINE", "sk-2")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_text("sk-3\n")
    found = [read_key(s) for s in (None, "env:MINE", f"file:{tmp_path}/key", "file:~/key", "sk-4")]
    assert found == ["sk-1", "sk-2", "sk-3", "sk-3", "sk-4"]


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("env:NOT_SET", "that variable is not set"),
        ("env:", "that variable is not set"),
        ("file:no/such/file", "No such file or directory: 'no/such/file'"),
        ("file:/dev/null", "it is empty"),
        ("", "it is empty"),
    ],
)
def test_a_key_that_is_not_there_is_refused_with_where_it_may_be(setting: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"api_key='{setting}': .*{why}.*env:NAME .* file:PATH"):
        read_key(setting)


def test_every_key_is_left_out_and_nothing_else_is_changed() -> None:
    settings = {
        "api_key": "sk-1",
        "inner": [{"api_key": "sk-2", "n": 1}, {"api_key": "file:/k"}, {"api_key": None}],
        "token_ids": (1, 2),
    }
    assert without_keys(settings) == {
        "api_key": "env:SDP_API_KEY",
        "inner": [
            {"api_key": "env:SDP_API_KEY", "n": 1},
            {"api_key": "file:/k"},
            {"api_key": None},
        ],
        "token_ids": (1, 2),
    }
    assert settings["api_key"] == "sk-1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--data.engine_options.api_key=sk-1", "--data.engine_options.api_key=..."),
        ('{"api_key": "sk-1", "stream": true}', '{"api_key": "...", "stream": true}'),
        ("Namespace(api_key='sk-1')", "Namespace(api_key='...')"),
        ("{'api_key': None}", "{'api_key': None}"),
        ('{"api_key": null}', '{"api_key": null}'),
        ("api_key: file:/k, a: b", "api_key: file:/k, a: b"),
        ("--data.engine_options.api_key=None1", "--data.engine_options.api_key=..."),
        ("{'api_key': 'a b c', 'n': 1}", "{'api_key': '...', 'n': 1}"),
        ("{'api_key': 'cut off", "{'api_key': ... off"),
    ],
)
def test_a_key_in_a_text_is_hidden(text: str, shown: str) -> None:
    assert hide_keys(text) == shown
