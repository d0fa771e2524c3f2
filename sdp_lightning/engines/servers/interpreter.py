"""The interpreter of servers that this process starts: whether it is there and has vLLM."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

from sdp_lightning.errors import ConfigError

_HAS_NONE = 77  # exit status of the question, which no fault of an interpreter has
_ASK = f"import importlib.util as u, sys; sys.exit(0 if u.find_spec('vllm') else {_HAS_NONE})"
_ANSWER_S = 30.0


def require_vllm(python: str = sys.executable) -> None:
    """Refuse an interpreter that cannot start a vLLM server; an unclear answer is none.

    Raises:
        ConfigError: if it is not there, or has no vLLM.
    """
    if shutil.which(python) is None:
        raise ConfigError(
            f"{python} is not there: make that environment and install vLLM there, or change "
            "python= in data.engine."
        )
    if python == sys.executable:
        lacks = importlib.util.find_spec("vllm") is None
    else:
        try:
            asked = subprocess.run([python, "-c", _ASK], timeout=_ANSWER_S, capture_output=True)
        except (OSError, subprocess.TimeoutExpired):
            return  # its own start says more
        lacks = asked.returncode == _HAS_NONE
    if lacks:
        raise ConfigError(
            f"{python} has no vLLM: pip install 'vllm>=0.32' there, or name an interpreter that "
            "has it with python= in data.engine: vllm://launch?python=/path/to/venv/bin/python."
        )
