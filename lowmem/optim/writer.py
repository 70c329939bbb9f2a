"""How a changed weight is written back: exactly in fp32, or into bf16 without losing small changes."""

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.optim.randomness import generator, mix
from lowmem.optim.rounding import round_to_bf16
from lowmem.optim.rule import Hyper, State

WRITERS = ("fp32", "stochastic", "kahan", "nearest")
_SALT = 0x57


def check_writable(weight: Tensor) -> None:
    """Refuse a weight of another type than fp32 and bf16.

    Raises:
        UnsupportedError: fp64, fp16 or anything else.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(
            f"a parameter of dtype {weight.dtype}",
            reason="updates are written to fp32 and bf16 weights only",
            instead="load the model in float32 or bfloat16",
        )


def new_writer_state(writer: str, weight: Tensor) -> State:
    """What the writer keeps for a weight: nothing for fp32 weights, which are always written exactly."""
    if weight.dtype == torch.float32 or writer in ("stochastic", "nearest"):
        return {}
    if writer == "kahan":
        return {"compensation": torch.zeros_like(weight, memory_format=torch.contiguous_format)}
    return {"master": weight.detach().to(torch.float32, copy=True)}


def read_weight(weight: Tensor, state: State) -> Tensor:
    """The weight in fp32, as exactly as it is known: the weight itself, its master, or a new tensor."""
    if weight.dtype == torch.float32:
        return weight
    if "master" in state:
        return state["master"]
    exact = weight.float()
    return exact.add_(state["compensation"]) if "compensation" in state else exact


def write_weight(writer: str, weight: Tensor, exact: Tensor, state: State, *, seed: int) -> None:
    """Write the changed fp32 value, which `read_weight` gave, back into the weight."""
    if exact is weight:
        return
    if writer == "stochastic":
        weight.copy_(round_to_bf16(exact, generator(mix(seed, _SALT), exact.device)))
        return
    weight.copy_(exact)  # to nearest: the master, or Kahan's compensation, has the rest
    if writer == "kahan":
        state["compensation"].copy_(exact.sub_(weight))


def descend(weight: Tensor, direction: Tensor, hyper: Hyper) -> None:
    """W <- (1 - lr * weight_decay) W - lr * direction, in fp32 and in place."""
    if hyper.weight_decay:
        weight.mul_(1 - hyper.lr * hyper.weight_decay)
    weight.add_(direction, alpha=-hyper.lr)
