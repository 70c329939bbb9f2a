"""What a streamed model's adapters need before its blocks run: the check, and DoRA's factored norm."""

from __future__ import annotations

import torch
from torch import nn


class AdapterPreparation:
    """Checks a model's adapters and installs the factored DoRA norm; call it before the first block of each forward.

    Adapters arrive after the model was made, may be added, replaced and removed at any time, and the model is not told.
    A forward without gradients looks again only when the set of adapters has changed.

    Args:
        model: The streamed model that adapters are injected into.
        frozen_base: Its base weights come from an immutable checkpoint: each DoRA layer computes their norms once.
    """

    def __init__(self, model: nn.Module, *, frozen_base: bool) -> None:
        self._model, self._frozen_base = model, frozen_base
        self._seen: tuple[tuple[str, int], ...] = ()

    def __call__(self) -> None:
        """Prepare the adapters there are now.

        Raises:
            UnsupportedError: One of them cannot be trained exactly.
        """
        configs = getattr(self._model, "peft_config", None) or {}
        seen = tuple((name, id(config)) for name, config in configs.items())
        if not seen or (seen == self._seen and not torch.is_grad_enabled()):
            return
        # PEFT is there already: somebody made these configurations with it.
        from lowmem.adapters.dora import install
        from lowmem.adapters.support import check_peft_model

        check_peft_model(self._model)
        install(self._model, frozen_base=self._frozen_base)
        self._seen = seen


__all__ = ["AdapterPreparation"]
