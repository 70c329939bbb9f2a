"""One call of one block of one runtime, visited for its forward and again for its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lowmem.streaming import own_memory
from lowmem.streaming.block_call import BlockCall
from lowmem.streaming.block_function import RecordedCall, Split
from lowmem.streaming.boundary import Boundary, BoundaryTier, DeviceTier, NoTier

if TYPE_CHECKING:
    from lowmem.streaming.passes import TrainingPass
    from lowmem.streaming.runtime import Runtime


class VisitedCall:
    """One recorded call of one block of one runtime."""

    def __init__(
        self,
        runtime: Runtime,
        index: int,
        call: BlockCall,
        split: Split,
        *,
        beside: Callable[[], None] | None = None,
        keeps: bool = True,
    ) -> None:
        """Prepare a call; nothing is run.

        Args:
            runtime: Lends the block its weights.
            index: Number of the block.
            call: Its arguments.
            split: How it goes through the block.
            beside: What to run in the forward's visit after it.
            keeps: Whether a backward will follow.
        """
        self.device, self.tape, self.workspace = runtime.device, runtime.tape, runtime.chunk_workspace
        self._runtime, self._index = runtime, index
        self._num_tokens = call.num_tokens
        self._block = runtime.blocks[index].block
        self.raw_forward = self._block.raw_forward
        self._recorded, self._beside = RecordedCall(self, call, split=split), beside
        self._tier: BoundaryTier = runtime.boundaries if keeps else NoTier()
        self._pass: TrainingPass | None = None

    def run_forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Visit the block and run the forward, and what is to run beside it."""
        with self._runtime.visit(self._index, "forward", num_tokens=self._num_tokens):
            outputs = self.forward_here(inputs)
            if self._beside is not None:
                self._beside()
        self._beside = None
        if self._index == self._runtime.num_blocks - 1:
            self._runtime.rest()
        return outputs

    def forward_here(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the forward in the visit that is under way."""
        if not isinstance(self._tier, NoTier):
            self._pass = self._runtime.record(self._index)
        return self._recorded.forward(inputs)

    def run_backward(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Visit the block and run the backward."""
        if self._index == self._runtime.num_blocks - 1:
            self._runtime.resume(grads[0])
        with self._runtime.visit(self._index, "backward", num_tokens=self._num_tokens):
            if self._runtime.full is None:
                return self._recorded.backward(grads, params, wanted)
            # Autograd holds the absent weights; what is differentiated are those that this visit has bound.
            bound = self._runtime.trained_weights(self._index)
            keys = list(bound)
            with self._runtime.full.taking_gradients(self._index) as take:
                inputs, _ = self._recorded.backward(
                    grads, list(bound.values()), wanted, take=lambda number, grad: take(keys[number], grad)
                )
            if self.device.type == "cpu":
                # Stand-ins of gradients live on between temporaries as large as weights, which the heap would keep.
                own_memory.give_back_freed()
            return inputs, [None] * len(params)

    def rebuild(self, tensors: Sequence[Tensor]) -> object:
        """The block's output from its tensors."""
        return self._recorded.rebuild(tensors)

    def forward_in_visit(self, arguments: tuple[tuple[object, ...], dict[str, object]]) -> object:
        """Run the block's raw forward; its weights are bound."""
        args, kwargs = arguments
        return self._block.raw_forward(self._block.module, *args, **kwargs)

    def adapter_state(self) -> tuple[object, ...]:
        """Which adapters are active and which modules train: what a recomputation must find unchanged."""
        return tuple(
            (module.training, getattr(module, "_disable_adapters", None), str(getattr(module, "_active_adapter", None)))
            for module in self._block.module.modules()
        )

    def keep(self, value: Tensor) -> Boundary:
        """Put a boundary activation into its tier."""
        return self._tier.keep(value)

    def keep_copy(self, value: Tensor) -> Boundary:
        """The same of a tensor whose memory will be written again."""
        return self._tier.keep(value.clone() if isinstance(self._tier, DeviceTier) else value)


__all__ = ["VisitedCall"]
