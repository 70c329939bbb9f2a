"""AdamW on the whole gradient: torch's own kernel, with moments and weights in the types that were asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowmem.optim.moments import new_moment, read_moment, write_moment
from lowmem.optim.randomness import mix
from lowmem.optim.rule import Hyper, Payload, Rule, State, Update
from lowmem.optim.writer import check_writable, new_writer_state, read_weight, write_weight


@dataclass(frozen=True, kw_only=True)
class AdamWRule(Rule):
    """AdamW (arXiv 1711.05101), bitwise torch's where state and weights are as torch has them."""

    state_dtype: str | None = None
    """"fp32", "bf16" (stochastic rounding) or "8bit"; None: the weight's own type, as torch does it."""
    writer: str = "nearest"
    """How bf16 weights are written; see `lowmem.optim.writer`."""
    fused: bool = True
    """torch's fused kernel (what transformers' Trainer uses), or its plain loop of operations."""
    seed: int = 0
    """Seed of stochastic rounding."""

    @property
    def needs_full_gradient(self) -> bool:
        """The payload is the gradient."""
        return True

    @property
    def payload_is_linear(self) -> bool:
        """The payload is the gradient."""
        return True

    def init(self, weight: Tensor) -> State:
        """The `step` of torch (fp32), `exp_avg` and `exp_avg_sq`, and what the writer keeps."""
        check_writable(weight)
        state: State = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            if self.state_dtype is None:
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            else:
                moment = new_moment(
                    name, weight.shape, state_dtype=self.state_dtype, signed=signed, device=weight.device
                )
                state.update(moment)
        return state | new_writer_state(self.writer, weight)

    def reduce(self, gradient: Tensor, state: State) -> Payload:
        """The gradient itself."""
        return {"gradient": gradient}

    def solve(self, payload: Payload, state: State, hyper: Hyper) -> Update:
        """The gradient: torch's kernel computes and applies the update in one pass over memory."""
        return payload

    def apply(self, weight: Tensor, update: Update, state: State, hyper: Hyper) -> None:
        """One AdamW step."""
        gradient = update["gradient"]
        if self.state_dtype is None and self.writer == "nearest":
            self._step(weight, gradient.to(weight.dtype), state["exp_avg"], state["exp_avg_sq"], state, hyper)
            return
        exact = read_weight(weight, state)
        moments = [read_moment(state, name, weight.shape).float() for name in ("exp_avg", "exp_avg_sq")]
        self._step(exact, gradient.float(), moments[0], moments[1], state, hyper)
        seed = mix(self.seed, int(state["step"]))
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            write_moment(state, name, moment, seed=seed)
        write_weight(self.writer, weight, exact, state, seed=seed)

    def _step(
        self, weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, state: State, hyper: Hyper
    ) -> None:
        # torch's fused kernel wants the counter where the weights are; a copy is a launch, the counter stays on the
        # CPU.
        step = state["step"].to(weight.device) if self.fused else state["step"]
        adamw(
            [weight],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            foreach=False,
            fused=self.fused,
            amsgrad=False,
            beta1=hyper.betas[0],
            beta2=hyper.betas[1],
            lr=hyper.lr,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            maximize=False,
        )
        if step is not state["step"]:
            state["step"].add_(1)
