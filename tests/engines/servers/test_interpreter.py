"""An interpreter that cannot start a server is named before anything is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdp_lightning.engines.servers.interpreter import require_vllm
from sdp_lightning.errors import ConfigError


def test_an_interpreter_without_vllm_is_refused_and_an_unclear_one_is_not(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # without site-packages
    other.chmod(0o755)
    with pytest.raises(ConfigError, match=f"{other} has no vLLM: pip install 'vllm>=0.32' there"):
        require_vllm(str(other))
    with pytest.raises(ConfigError, match="gone is not there: make that environment"):
        require_vllm(str(tmp_path / "gone"))
    require_vllm("/bin/sh")  # its own start says what is wrong


def test_an_interpreter_with_vllm_is_taken(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    require_vllm(str(other))
