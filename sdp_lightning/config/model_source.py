"""The model setting: an id, a folder, or the import path of a function that returns one.

:class:`ModelSource` also says what else is read beside the weights.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sdp_lightning.config.import_path import OBJECT_FORM, load_object
from sdp_lightning.config.validation import check_types
from sdp_lightning.errors import ConfigError


@dataclass(frozen=True)
class ModelSource:
    """What a model is read from: given once to the module, and used by all parts of a run.

    Args:
        name: id of the hub, folder, or import path of a function that returns one.
        revision: branch, tag or commit of the hub's repository ``name``; None is its main branch.
        trust_remote_code: run the Python files that model and tokenizer bring with them.
        tokenizer: id or folder of another tokenizer; None is the model's own.
        chat_template: Jinja text, or the path of a file with it, in place of the tokenizer's own.

    Raises:
        ConfigError: if a setting is of another type.
    """

    name: str | Path
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | Path | None = None
    chat_template: str | Path | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("name", "tokenizer", "chat_template"):
            value: object = getattr(self, name)
            if not isinstance(value, (str, Path)) and (name == "name" or value is not None):
                kind = type(value).__name__
                raise ConfigError(f"{name} of a ModelSource must be a text or path, got {kind}.")

    @classmethod
    def of(
        cls, model: str | Path | ModelSource, options: Mapping[str, Any]
    ) -> tuple[ModelSource, dict[str, Any]]:
        """The source, and ``options`` of ``from_pretrained`` without those that the source has.

        Raises:
            ConfigError: if both give a setting, with unlike values, or ``model`` is no source.
        """
        model = cls.restored(model) if isinstance(model, Mapping) else model  # of hyperparameters
        if not isinstance(model, (str, Path, ModelSource)):
            raise ConfigError(
                "model must be an id, a folder, the place of a function that returns one, or a "
                f"ModelSource; got {type(model).__name__}. {OBJECT_FORM}"
            )
        source = model if isinstance(model, ModelSource) else cls(model)
        others = dict(options)
        for name, unset in (("revision", None), ("trust_remote_code", False)):
            given = others.pop(name, None)
            own = getattr(source, name)
            if given is None or given == own:
                continue
            if own != unset:
                raise ConfigError(
                    f"{name} is {own!r} in ModelSource and {given!r} in model_kwargs. Leave it out "
                    "of model_kwargs."
                )
            source = replace(source, **{name: given})
        return source, others

    def resolved(self) -> ModelSource:
        """The source with an id or folder for each name, and the text of the chat template.

        Raises:
            ConfigError: if there is no such folder, file or function, or a revision of a folder.
        """
        name = resolve_model(self.name)
        if self.revision is not None and Path(name).is_dir():
            raise ConfigError(
                f"revision={self.revision!r} has no effect on the folder {name!r}: only an id of "
                "the hub has revisions. Leave it out."
            )
        own, template = self.tokenizer, self.chat_template
        if own is not None:
            own = _existing_folder(str(own), what="tokenizer", is_path=isinstance(own, Path))
        template = None if template is None else template_text(template)
        return replace(self, name=name, tokenizer=own, chat_template=template)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` beside ``name``, for all that is read of the model."""
        found: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return found if self.revision is None else found | {"revision": self.revision}

    def saved(self) -> dict[str, Any]:
        """Plain values for a checkpoint, with absolute paths; :meth:`restored` reads them."""
        names = {name: getattr(self, name) for name in ("name", "tokenizer")}
        absolute = {n: str(Path(v).absolute()) for n, v in names.items() if v and Path(v).is_dir()}
        return vars(self) | absolute

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> ModelSource:
        """The source of which a checkpoint holds :meth:`saved`."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})


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
    return _existing_folder(name, what="model", is_path=isinstance(model, Path))


def _existing_folder(name: str, *, what: str, is_path: bool) -> str:
    path = Path(name).expanduser()
    if (is_path or name[:1] in "/.~") and not path.is_dir():
        raise ConfigError(f"there is no {what} folder {name!r} (looked for {path.absolute()}).")
    return str(path) if name[:1] == "~" else name


def template_text(template: str | Path) -> str:
    """The Jinja text of a chat template. ``ConfigError`` if it is neither text nor a file."""
    if isinstance(template, str) and "{" in template:  # without it Jinja has nothing to say
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template={str(template)!r} is neither Jinja text, which has braces, nor a file "
            f"that can be read: {error}."
        ) from error


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
