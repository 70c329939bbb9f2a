"""transformers' Trainer: the list of callbacks that every one of them starts with.

`lowmem.from_pretrained` returns a model, not a trainer, and a Trainer asks its model nothing before the first forward.
What has to be said before that, or in front of the reporters, is said by a callback that no script has to pass.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from lowmem.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import TrainerCallback


_LIST = "DEFAULT_CALLBACKS"


def add_default_callback(callback: type[TrainerCallback]) -> None:
    """Have every Trainer that is made from now on start with a callback, in front of reporters and of the user's own.

    Each Trainer makes an object of its own. May be called again with the same class.

    Args:
        callback: The class; its objects do nothing for trainers that do not concern them.

    Raises:
        UnsupportedError: This Trainer has no such list, or does not read it.
    """
    from transformers import trainer

    callbacks = getattr(trainer, _LIST, None)
    if not isinstance(callbacks, list) or _LIST not in trainer.Trainer.__init__.__code__.co_names:
        raise UnsupportedError(
            f"transformers {version('transformers')}",
            reason=f"its Trainer does not begin with transformers.trainer.{_LIST}, so options that a streamed model "
            "cannot honour would pass",
            instead="a version of transformers that this one of lowmem names in its metadata",
        )
    if callback not in callbacks:
        callbacks.append(callback)


__all__ = ["add_default_callback"]
