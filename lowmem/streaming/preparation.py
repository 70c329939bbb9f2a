"""What happens before the first block of a forward: adapters are checked and prepared, TRL's head becomes ours."""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Preparation:
    """Called before block 0 of each forward, because PEFT and TRL change a model after it was made.

    A forward without gradients looks for new configurations only. A training forward looks at every module (some
    milliseconds): adapters may be taken off and put on again under the same name and configuration.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Watch a model, weakly."""
        self._model = weakref.ref(model)
        self._adapters: tuple[object, ...] = ()
        self._has_head = False
        self._warned = False

    def __call__(self) -> None:
        """Check and prepare what is new.

        Raises:
            UnsupportedError: An adapter that cannot be trained exactly on a streamed model.
        """
        model = self._model()
        if model is None:
            return
        configs = getattr(model, "peft_config", None) or {}
        adapters = tuple((name, id(config)) for name, config in configs.items())
        if adapters != self._adapters or (configs and torch.is_grad_enabled()):
            self._prepare_adapters(model)
            self._adapters = adapters
        # TRL looks its head up after the blocks have run, so the first forward is soon enough; without TRL, no import.
        if not self._has_head and "trl.trainer.utils" in sys.modules:
            from lowmem.streaming.trl_head import install

            install().register(model)
            self._has_head = True

        if not self._warned and torch.is_autocast_enabled("cpu") and model.device.type == "cpu" and not has_fast_bf16():
            self._warned = True
            warnings.warn(
                "bf16 autocast on a processor without bf16 instructions: matrix products are up to a hundred times "
                "slower than in fp32; give SFTConfig(bf16=False), which TRL's default is not",
                stacklevel=2,
            )

    def _prepare_adapters(self, model: torch.nn.Module) -> None:
        from lowmem.adapters.dora import install as install_dora
        from lowmem.adapters.support import check_peft_model

        check_peft_model(model)
        install_dora(model, frozen_base=True)


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices with instructions of its own."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


__all__ = ["Preparation", "has_fast_bf16"]
