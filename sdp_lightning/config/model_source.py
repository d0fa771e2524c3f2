"""The model setting: an id, a folder, or the import path of a function that returns one.

:class:`ModelSource` also says what else is read beside the weights.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdp_lightning.config.import_path import OBJECT_FORM, load_object
from sdp_lightning.config.validation import check_types
from sdp_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIVE_AGAIN = (
    "A model object cannot be made again from a checkpoint: give it, "
    "load_from_checkpoint(path, model=ModelSource(model, tokenizer=tokenizer)); to export, save it "
    "with save_pretrained() and give that folder as --model."
)
_PATHS = ("name", "tokenizer", "chat_template")


@dataclass(frozen=True)
class ModelSource:
    """What a model is read from: given once to the module, and used by all parts of a run.

    Args:
        name: id of the hub, folder, or import path of a function that returns one; or a model
            object of transformers, of which every part of a run gets a copy.
        revision: branch, tag or commit of the hub's repository ``name``; None is its main branch.
        trust_remote_code: run the Python files that model and tokenizer bring with them.
        tokenizer: id or folder of another tokenizer, or beside a model object a tokenizer object;
            None is the model's own.
        chat_template: Jinja text, or the path of a file with it, in place of the tokenizer's own.

    Raises:
        ConfigError: if a setting is of another type.
    """

    name: str | Path | Any
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | Path | Any = None
    chat_template: str | Path | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("chat_template",) if is_model(self.name) else _PATHS:
            value: object = getattr(self, name)
            if not isinstance(value, (str, Path)) and (name == "name" or value is not None):
                kind = type(value).__name__
                raise ConfigError(f"{name} of a ModelSource must be a text or path, got {kind}.")

    @classmethod
    def of(
        cls, model: str | Path | ModelSource | PreTrainedModel, options: Mapping[str, Any]
    ) -> tuple[ModelSource, dict[str, Any]]:
        """The source, and ``options`` of ``from_pretrained`` without those that the source has.

        Raises:
            ConfigError: if both give a setting, with unlike values, or ``model`` is no source.
        """
        model = cls.restored(model) if isinstance(model, Mapping) else model  # of hyperparameters
        if not (isinstance(model, (str, Path, ModelSource)) or is_model(model)):
            raise ConfigError(
                "model must be an id, a folder, the place of a function that returns one, a "
                "PreTrainedModel of transformers, or a ModelSource of one of these; got "
                f"{type(model).__name__}. {OBJECT_FORM}"
            )
        source = model if isinstance(model, ModelSource) else cls(model)
        others = dict(options)
        if is_model(source.name):
            if others:
                raise ConfigError(
                    f"model_kwargs are of from_pretrained, and {type(source.name).__name__} is a "
                    f"model object, which was made already: leave out {', '.join(others)}."
                )
            from sdp_lightning.config.model_object import object_source

            return object_source(source), others
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
        kind = ModelObject if saved.get("digests") else ModelSource
        known = {each.name for each in fields(kind)} - {"given"}
        return kind(**{name: value for name, value in saved.items() if name in known})


@dataclass(frozen=True)
class ModelObject(ModelSource):
    """A model object, or what a checkpoint says of one, which is made again from its ``name``.

    Args:
        digests: of its ``config``, ``tokens`` and ``weights``; what is made again has the same.
        dtype: of its weights, such as ``"float32"``.
        eos_token_ids: tokens that end its completions.
        given: the model and its tokenizer; None if they are made again.
    """

    digests: Mapping[str, str] = field(default_factory=dict[str, str])
    dtype: str = "float32"
    eos_token_ids: Sequence[int] = ()
    given: tuple[PreTrainedModel, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        pass  # its parts were checked

    def resolved(self) -> ModelSource:
        """The same. ``ConfigError`` if it is to be made again, and was read from nowhere."""
        if self.given is None and not self.name:
            raise ConfigError(f"the model object was read from nowhere. {GIVE_AGAIN}")
        return self if self.given is not None else super().resolved()

    def saved(self) -> dict[str, Any]:
        return super().saved() | {"given": None}

    def require(self, what: str, digest: str) -> None:
        """Refuse a part that was made again and is not that of the object.

        Raises:
            ConfigError: naming what to give in its place.
        """
        if digest != self.digests[what]:
            raise ConfigError(
                f"the {what} of {str(self.name)!r} are not those of the model object that was "
                f"trained. {GIVE_AGAIN}"
            )


def is_model(value: object) -> bool:
    """Whether ``value`` is a model object of transformers."""
    transformers: Any = sys.modules.get("transformers")
    return transformers is not None and isinstance(value, transformers.PreTrainedModel)


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
