"""The comparison of optimizers: its text and its search for a learning rate."""

import math

import torch

from benchmarks.library_text import collect
from benchmarks.optimizers import QUICK, Contender, Outcome, base_model, best_lr, contenders, matrices


def test_text_is_real_and_the_same_every_time() -> None:
    texts = [collect(num_docstring_bytes=5000, num_code_bytes=5000, num_held_out_bytes=2000) for _ in range(2)]
    assert torch.equal(texts[0].docstrings, texts[1].docstrings)
    assert [len(tokens) for tokens in (texts[0].docstrings, texts[0].code, texts[0].held_out_code)] == [
        5000,
        5000,
        2000,
    ]
    code = bytes(texts[0].code.tolist()).decode(errors="replace")
    assert "def " in code
    assert '"""' not in code


def test_learning_rates_are_searched_until_the_best_lies_inside() -> None:
    def search(best: float) -> dict[float, Outcome]:
        chosen = Contender(lr=1.0, make=lambda *_: None, adapt=lambda model: model, options={})  # type: ignore[arg-type, return-value]
        return best_lr(chosen, lambda lr: Outcome(abs(math.log(lr / best)), 0))

    assert sorted(search(1.0)) == [1 / 3, 1.0, 3.0]
    assert sorted(search(9.0)) == [1 / 3, 1.0, 3.0, 9.0, 27.0]
    assert min(search(1e-9)) == 1 / 27


def test_contenders_take_a_quarter_of_the_state_on_matrices_at_most() -> None:
    base = base_model(QUICK)
    made = contenders(base, QUICK)
    budget = sum(8 * param.numel() for param in matrices(base)) / 4
    for name in ("GaLore", "Fira", "APOLLO"):
        optimizer = made[name].make(base, 1e-3, 0)
        states = [optimizer.rule_of(param).init(param.detach()) for param in matrices(base)]  # type: ignore[attr-defined]
        taken = sum(value.nbytes for state in states for value in state.values())
        assert 0.8 * budget < taken <= budget
