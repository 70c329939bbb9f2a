"""AdaLomo: a factored second moment, no first moment, and updates in proportion to the weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.limiter import limit_update_rms, norm_of_matrices
from lowmem.optim.randomness import mix
from lowmem.optim.rule import Hyper, Payload, Rule, State, Update, counter
from lowmem.optim.writer import check_writable, descend, new_writer_state, read_weight, write_weight


@dataclass(frozen=True, kw_only=True)
class AdaLomoRule(Rule):
    """AdaLomo (arXiv 2310.10195, algorithm 1), with Adafactor's factors and schedule of beta (arXiv 1804.04235).

    u = g / sqrt(v), v the outer product of the row and column means of g^2; then
    W <- (1 - lr * weight_decay) W - lr * max(eps[1], RMS(W)) * u / max(1, RMS(u) / clip_threshold).
    """

    eps: tuple[float, float]
    """Added to g^2; smallest RMS of a weight."""
    clip_threshold: float
    """Largest RMS of u."""
    decay_rate: float
    """beta_t = 1 - t^decay_rate."""
    writer: str = "stochastic"
    seed: int = 0

    @property
    def needs_full_gradient(self) -> bool:
        """The payload is the gradient."""
        return True

    @property
    def payload_is_linear(self) -> bool:
        """The payload is the gradient."""
        return True

    def init(self, weight: Tensor) -> State:
        """Row and column means for matrices and stacks of them; the whole second moment for vectors."""
        check_writable(weight)
        state: State = {"step": counter()}
        if weight.ndim >= 2:
            *batch, num_rows, num_columns = weight.shape
            state["exp_avg_sq_row"] = torch.zeros((*batch, num_rows, 1), device=weight.device)
            state["exp_avg_sq_col"] = torch.zeros((*batch, 1, num_columns), device=weight.device)
        else:
            state["exp_avg_sq"] = torch.zeros(weight.shape, device=weight.device)
        return state | new_writer_state(self.writer, weight)

    def reduce(self, gradient: Tensor, state: State) -> Payload:
        """The gradient itself."""
        return {"gradient": gradient}

    def solve(self, payload: Payload, state: State, hyper: Hyper) -> Update:
        """u, limited, before the factor that depends on the weight."""
        gradient = payload["gradient"].float()
        state["step"] += 1
        weight_of_new = float(state["step"]) ** self.decay_rate
        squares = gradient.square().add_(self.eps[0])
        if "exp_avg_sq" in state:
            second = state["exp_avg_sq"].lerp_(squares, weight_of_new)
        else:
            rows = state["exp_avg_sq_row"].lerp_(squares.mean(dim=-1, keepdim=True), weight_of_new)
            columns = state["exp_avg_sq_col"].lerp_(squares.mean(dim=-2, keepdim=True), weight_of_new)
            second = rows * columns / rows.mean(dim=-2, keepdim=True)
        return {"direction": limit_update_rms(gradient / second.sqrt(), self.clip_threshold)}

    def apply(self, weight: Tensor, update: Update, state: State, hyper: Hyper) -> None:
        """Scale by the weight's RMS and descend."""
        exact = read_weight(weight, state)
        num_values = weight.shape[-2:].numel()
        size = (norm_of_matrices(exact) / num_values**0.5).clamp_min_(self.eps[1])
        descend(exact, update["direction"] * size, hyper)
        write_weight(self.writer, weight, exact, state, seed=mix(self.seed, hyper.clock))
