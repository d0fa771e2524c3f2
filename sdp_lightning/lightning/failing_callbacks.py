"""Users' callbacks, which end no training by an error: one that raises is named and set aside.

Only from the first training batch on, since before it nothing is lost, and on one rank only: on
several a callback may hold collectives, in which the other ranks would wait for this one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping

from sdp_lightning.errors import HangError
from sdp_lightning.lightning.observer import HOOKS, ROLLOUT_HOOK, Observer, say_set_aside

FailingCallbacks: TypeAlias = Literal["set_aside", "raise"]

_MARKS = {"setup", "on_train_batch_start", "teardown"}  # where a guard begins and ends
_NOT_USERS = {"lightning", "pytorch_lightning", "sdp_lightning"}
_LOST = (
    "what the callback does from here on, and its state in checkpoints; "
    "WeightSyncCallback(failing_callbacks='raise') ends the run instead"
)


def guard_hooks(trainer: L.Trainer, failing: FailingCallbacks) -> None:
    """Guard the hooks of users' callbacks for the run that begins; ``"raise"`` takes guards away.

    ``on_exception`` is guarded by :func:`~sdp_lightning.lightning.ending.guard_callbacks` always.
    """
    for callback in _callbacks(trainer):
        for name, guard in list(_guards(callback)):
            setattr(callback, name, guard.own)
        own = {name: getattr(callback, name) for name in HOOKS - {"on_exception"}}
        if (hook := getattr(callback, ROLLOUT_HOOK, None)) is not None:  # foreign: few have it
            own[ROLLOUT_HOOK] = hook
        codes = {
            name: getattr(hook, "__func__", hook)  # foreign: a hook may be a plain function
            for name, hook in own.items()
        }
        changed = {name for name in own if codes[name] is not vars(Callback).get(name)}
        if failing == "set_aside" and _is_users(callback, [codes[name] for name in changed]):
            place = _Place(type(callback).__name__, is_alone=trainer.world_size == 1)
            for name in changed | _MARKS:
                setattr(callback, name, _HookGuard(own[name], name, place))


def num_set_aside(trainer: L.Trainer) -> int:
    """Callbacks of ``trainer`` that failed and are set aside, this package's observers included."""
    return sum(
        callback.is_set_aside
        if isinstance(callback, Observer)
        else any(guard.place.failed for _, guard in _guards(callback))
        for callback in _callbacks(trainer)
    )


@dataclass
class _Place:
    """What the guards of one callback know together."""

    name: str
    is_alone: bool
    has_begun: bool = False  # whether training has begun, and not ended
    failed: bool = False


class _HookGuard:
    """A hook of a user's callback.

    ``teardown`` is called also if the callback is set aside: it may hold threads and files.
    """

    def __init__(self, own: Any, name: str, place: _Place) -> None:
        functools.update_wrapper(self, own)  # Lightning looks whether a hook is overridden
        self.own, self.place, self._name = own, place, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place, nothing = self.place, {} if self._name == "state_dict" else None
        if self._name == "setup":
            place.has_begun = place.failed = False
        place.has_begun |= self._name == "on_train_batch_start"
        if place.failed and self._name != "teardown":
            return nothing
        try:
            return self.own(*args, **kwargs)
        except HangError:
            raise
        except Exception as error:
            where = f"{self._name} of {place.name}"
            if not (place.has_begun and place.is_alone):
                error.add_note(f"It was raised in {where}, a callback.")
                raise
            place.failed = True
            say_set_aside(where, error, _LOST)
            return nothing
        finally:
            place.has_begun &= self._name != "teardown"


def _is_users(callback: Any, codes: list[Any]) -> bool:
    """Whether a callback runs a user's code, and neither saves, nor stops, nor is of this package.

    The hooks decide, not the class: Lightning's LambdaCallback runs what a user gave it.
    """
    kinds = {kind.__module__.partition(".")[0] for kind in type(callback).__mro__}
    if isinstance(callback, Checkpoint | EarlyStopping) or "sdp_lightning" in kinds:
        return False
    return any(str(code.__module__).partition(".")[0] not in _NOT_USERS for code in codes)


def _guards(callback: Any) -> Iterator[tuple[str, _HookGuard]]:
    for name, hook in vars(callback).items():
        if isinstance(hook, _HookGuard):
            yield name, hook


def _callbacks(trainer: L.Trainer) -> list[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
