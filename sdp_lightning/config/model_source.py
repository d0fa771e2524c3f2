"""The model setting: an id, a folder, or the import path of a function that returns one.

:func:`load_causal_lm` is the one place where weights of a model are read.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdp_lightning.config.import_path import OBJECT_FORM, load_object
from sdp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_NAMED = 4
_CAPPED_SCORES = "attn_logit_softcapping"  # of configurations; transformers' sdpa leaves it out


def resolve_model(model: str | Path) -> str:
    """The model's id or path, from the function at ``file.py:name`` if ``model`` names one.

    Raises:
        ConfigError: if ``model`` is none of these, or a path to no folder.
    """
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"model must be an id, a folder, or the place of a function that returns one; got "
            f"{type(model).__name__}. {OBJECT_FORM}"
        )
    name = str(model)
    if ":" in name and not isinstance(model, Path):
        function = load_object(name)
        if not callable(function):
            raise ConfigError(f"{name!r} is no function, but {type(function).__name__}.")
        name = str(function())
    path = Path(name).expanduser()
    if (isinstance(model, Path) or name[:1] in "/.~") and not path.is_dir():
        raise ConfigError(f"there is no model folder {name!r} (looked for {path.absolute()}).")
    return str(path) if name[:1] == "~" else name


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Context without progress bars and advice of transformers; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its GGUF reader has a bar of its own
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_causal_lm(model_id: str, *, dtype: Any, options: dict[str, Any]) -> PreTrainedModel:
    """The causal LM ``model_id``, each of whose weights comes from its checkpoint.

    A model that caps its attention scores runs with eager attention, unless ``options`` choose
    another: transformers' own choice, sdpa, would leave the cap out.

    Args:
        model_id: id or folder.
        dtype: of the weights, unless ``options`` say otherwise.
        options: passed to ``from_pretrained``.

    Raises:
        ConfigError: if the checkpoint lacks weights of the model, or has others; names them. A head
            that is tied to the embedding is not lacking.
    """
    from transformers import AutoModelForCausalLM

    settings = {"dtype": dtype, **options, "output_loading_info": True}
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(model_id, **settings)
    model, report = loaded
    lacking = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    kind, surplus = type(model).__name__, report["unexpected_keys"]
    if lacking:
        raise ConfigError(
            f"the checkpoint of {model_id!r} lacks weights of {kind}, which would be random: "
            f"{_some(lacking)}. Base models and reward models have no language-model head, and a "
            "folder may be half copied: use the whole checkpoint of a causal LM."
        )
    if surplus:
        raise ConfigError(
            f"the checkpoint of {model_id!r} has weights that {kind} has not, and they would be "
            f"lost: {_some(surplus)}. If they are not needed, load it with AutoModelForCausalLM "
            "and train what its save_pretrained() writes."
        )
    config: Any = model.config.get_text_config(decoder=True)
    # foreign: model configurations differ
    capped = getattr(config, _CAPPED_SCORES, None) is not None
    if capped and "attn_implementation" not in options:
        with quiet_transformers():
            model.set_attn_implementation("eager")
    return model


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - _NUM_NAMED} more" if len(found) > _NUM_NAMED else ""
    return ", ".join(found[:_NUM_NAMED]) + more
