"""What tests of exports share: a trained checkpoint, and a model whose embeddings are untied."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdp_lightning.testing import tiny_model


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from support.exports import save

    return save(tmp_path_factory.mktemp("untied"), tiny_model(tie_word_embeddings=False))


@pytest.fixture(scope="session")
def trained(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ``model_folder``, as a training run leaves it."""
    from support.exports import fit

    return fit(model_folder, tmp_path_factory.mktemp("trained"))[0]
