"""The base class of callbacks that need their Trainer, which the Trainer's events do not pass."""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import BlueprintError


class JoiningCallback(TrainerCallback):
    """A callback that knows its Trainer: given one, or the Trainer that it is added to.

    Both `Trainer(..., callbacks=[callback])` and `trainer.add_callback(callback)` work. The Trainer is found on the call
    stack when it is made, or when training begins. Subclasses extend `_join`, which is called once for each Trainer.

    Args:
        trainer: the Trainer, to be checked against at once; by default the one that the callback is added to.

    Raises:
        BlueprintError: if it is not a Trainer.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        if trainer is not None and not isinstance(trainer, Trainer):
            name = type(self).__name__
            raise BlueprintError(
                f"trainer must be a Trainer, got {type(trainer).__name__}. Leave it out: "
                f"Trainer(..., callbacks=[{name}(...)]), or trainer.add_callback({name}(...))."
            )
        self._trainer = trainer

    @property
    def trainer(self) -> Trainer:
        """The Trainer of this callback.

        Raises:
            BlueprintError: if it was not added to one yet.
        """
        if self._trainer is None:
            name = type(self).__name__
            raise BlueprintError(f"{name} has no Trainer yet. Add it: Trainer(..., callbacks=[{name}(...)]).")
        return self._trainer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Join the Trainer that is being made."""
        self._find()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Join the Trainer that begins to train, unless it was joined before."""
        self._find()

    def _find(self) -> None:
        """Join the Trainer whose method called this event."""
        frame = sys._getframe(1)
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, Trainer) and self in caller.callback_handler.callbacks:
                if caller is not self._trainer:
                    self._trainer = caller
                    self._join(caller)
                return
            frame = frame.f_back  # type: ignore[assignment]
        if self._trainer is None:
            name = type(self).__name__
            raise BlueprintError(
                f"{name} was called by {sys._getframe(2).f_code.co_qualname} and found no Trainer. Pass it: "
                f"{name}(trainer=trainer)."
            )

    def _join(self, trainer: Trainer) -> None:
        """Check the callback's arguments against a Trainer, and read its settings."""
