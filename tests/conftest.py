"""What every test shares: one thread, a quiet transformers, a tiny model in a folder."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from sdp_lightning.testing import tiny_model, tiny_tokenizer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # under nohup, or in a script's background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it to what they start

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama and its character tokenizer, saved as transformers saves them."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), seed=0)


def save_tiny(folder: Path, *, seed: int) -> str:
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_model(seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
