"""Policy and reference in one pass over the weights: the passes that TRL's trainers take, and when it must not be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

import lowmem
from lowmem.streaming import reference as reference_pass
from lowmem.streaming.attach import StreamedForward
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.tiny_trainers import make
from tests.lowmem.tiny_training import lora, resident, streamed
from tests.zoo.architectures import build

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
NUM_BLOCKS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


class Passes:
    """Counts visits of the blocks, in passes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_visits = 0
        runtime_of(model).listen(self._count)

    def _count(self, visit: object) -> None:
        self.num_visits += visit.started  # type: ignore[attr-defined]

    def take(self) -> float:
        taken, self.num_visits = self.num_visits / NUM_BLOCKS, 0
        return taken


class EachStep(TrainerCallback):
    """Passes of each optimizer step."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self.taken: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.taken.append(self._passes.take())


T = 6
STEPS: dict[str, tuple[str, dict[str, object], float, float]] = {
    "dpo": ("dpo", {}, 3, 2),
    "dpo, reference computed before": ("dpo", {"precompute_ref_log_probs": True}, 8, 2),
    "kto": ("kto", {}, 5, 3),
    "grpo": ("grpo", {"beta": 0.1}, T + 3, T + 2),
    "grpo, twice the batch": ("grpo", {"beta": 0.1, "per_device_train_batch_size": 8}, T + 3, T + 2),
    "grpo without a reference": ("grpo", {}, T + 2, T + 2),
    "rloo": ("rloo", {}, T + 4, T + 2),
}


QUICK = ("dpo", "kto", "grpo", "rloo")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in STEPS]
)
def test_a_step_with_its_reference_takes_as_many_passes_as_one_without(case: str, folder: Path, tmp_path: Path) -> None:
    task, options, first, others = STEPS[case]
    model = streamed(folder)
    counted = EachStep(Passes(model))
    generates = {"generation_kwargs": {"min_new_tokens": T}} if task in ("grpo", "rloo") else {}
    make(task, model, tmp_path, callbacks=[counted], max_steps=3, **(generates | options)).train()
    assert counted.taken == [first, others, others]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_an_auxiliary_loss_of_the_policy_does_not_part_it_from_its_reference(tmp_path: Path) -> None:
    model = streamed(build("mixtral", tmp_path / "mixtral"))
    counted = EachStep(Passes(model))
    done = make("dpo", model, tmp_path, callbacks=[counted], max_steps=2, router_aux_loss_coef=0.1)
    assert done.aux_loss_enabled
    done.train()
    assert counted.taken == [3, 2]


def test_a_plan_for_dpo_saves_the_first_reference_too(folder: Path, tmp_path: Path) -> None:
    budget = lowmem.Budget(device="64MiB", host="0")
    plan = lowmem.plan(folder, task="dpo", seq_len=16, batch_size=4, budget=budget, device="cpu")
    model = lowmem.from_pretrained(folder, plan=plan, device="cpu")
    counted = EachStep(Passes(model))
    make("dpo", model, tmp_path, callbacks=[counted], max_steps=2).train()
    assert counted.taken == [2, 2]


class Pair:
    """The same adapted model in memory and streamed, and the streamed one's passes."""

    def __init__(self, folder: Path, **adapter: object) -> None:
        self.resident, self.streamed = (_adapted(load(folder), **adapter) for load in (resident, streamed))
        self.passes = Passes(self.streamed)

    def run(self, what: Callable[[PeftModel], Tensor]) -> float:
        """Run both, compare them, answer the streamed one's passes."""
        torch.manual_seed(5)
        expected = what(self.resident)
        drawn = torch.get_rng_state()
        torch.manual_seed(5)
        torch.testing.assert_close(what(self.streamed), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), drawn)
        return self.passes.take()

    def learn(self, first: Callable[[PeftModel], Tensor], second: Callable[[PeftModel], Tensor]) -> None:
        """Have the streamed model see the two in this order over the same inputs."""
        assert self.run(first) >= 1
        assert self.run(second) >= 1


def _adapted(model: PreTrainedModel, **adapter: object) -> PeftModel:
    made = get_peft_model(model, lora(**({"lora_dropout": 0.0} | adapter)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in made.parameters():
            if param.requires_grad:
                param.copy_(0.2 * torch.randn(param.shape, generator=generator))
    return made.train()


IDS = torch.arange(28).view(4, 7) % 80
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def policy(ids: Tensor = IDS, mask: Tensor = MASK, **options: object) -> Callable[[PeftModel], Tensor]:
    """A forward with adapters and gradients, and its backward: the logits and all gradients in one tensor."""

    def run(model: PeftModel) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        # Padding attends to nothing in particular: both models leave other numbers there.
        real = logits[mask.bool()]
        params = [param for param in model.parameters() if param.requires_grad]
        grads = torch.autograd.grad(real.square().mean(), params, allow_unused=True, materialize_grads=True)
        return torch.cat([real.detach().flatten().sort().values, *(grad.flatten() for grad in grads)])

    return run


def reference(ids: Tensor = IDS, mask: Tensor = MASK, **options: object) -> Callable[[PeftModel], Tensor]:
    """A forward without adapters and gradients."""

    def run(model: PeftModel) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            return model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits[mask.bool()]

    return run


@pytest.fixture
def pair(folder: Path) -> Pair:
    return Pair(folder)


def test_the_reference_after_the_policy_costs_no_pass(pair: Pair) -> None:
    pair.learn(policy(), reference())
    assert pair.run(policy(IDS + 1)) == 2
    assert pair.run(reference(IDS + 1)) == 0


def test_the_policy_after_the_reference_costs_its_backward_only(pair: Pair) -> None:
    pair.learn(reference(), policy())
    assert pair.run(reference(IDS + 1)) == 1
    assert pair.run(policy(IDS + 1)) == 1


def test_sequences_may_come_back_in_another_order(pair: Pair) -> None:
    order = torch.tensor([2, 0, 3, 1])
    pair.learn(reference(), policy())
    assert pair.run(reference(IDS + 1)) == 1
    assert pair.run(policy((IDS + 1)[order], MASK[order])) == 1


def test_other_tokens_get_a_pass_of_their_own(pair: Pair) -> None:
    pair.learn(policy(), reference())
    pair.run(policy(IDS + 1))
    assert pair.run(reference(IDS + 2)) == 1


def test_another_mask_gets_a_pass_of_its_own(pair: Pair) -> None:
    pair.learn(policy(), reference())
    pair.run(policy())
    other = MASK.clone()
    other[1, :2] = 0
    assert pair.run(reference(IDS, other)) == 1


def test_other_positions_get_a_pass_of_their_own(pair: Pair) -> None:
    pair.learn(policy(), reference())
    pair.run(policy())
    positions = torch.arange(7).mul(2)[None]
    assert pair.run(reference(position_ids=positions)) == 1


def test_masks_swapped_between_sequences_are_noticed(pair: Pair) -> None:
    same = IDS[:1].expand(4, 7).contiguous()
    pair.learn(reference(same), policy(same))
    pair.run(reference(same))
    assert pair.run(policy(same, MASK.flip(0))) == 2


@pytest.mark.parametrize("write", [lambda param: param.add_(0.1), lambda param: param.data.add_(0.1)])
def test_changed_adapters_get_a_pass_of_their_own(write: Callable[[Tensor], Tensor], pair: Pair) -> None:
    pair.learn(reference(), policy())
    pair.run(reference())
    for model in (pair.resident, pair.streamed):
        param = next(param for name, param in model.named_parameters() if "lora_B" in name)
        with torch.no_grad():
            write(param)
    assert pair.run(policy()) == 2


def test_another_mode_gets_a_pass_of_its_own(pair: Pair) -> None:
    pair.learn(policy(), reference())
    pair.run(policy())
    for model in (pair.resident, pair.streamed):
        model.eval()
    assert pair.run(reference()) == 1


def test_an_answer_is_given_once(pair: Pair) -> None:
    pair.learn(policy(), reference())
    pair.run(policy())
    assert [pair.run(reference()) for _ in range(2)] == [0, 1]


def test_what_is_not_asked_for_is_not_run_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.learn(policy(), reference())
    followed = []
    original = reference_pass.run_here
    monkeypatch.setattr(reference_pass, "run_here", lambda *args: (followed.append(args[1]), original(*args))[1])
    for shift in range(3):
        pair.run(policy(IDS + shift))
    assert followed == list(range(NUM_BLOCKS))


def test_dropout_draws_what_it_draws_in_memory(folder: Path) -> None:
    pair = Pair(folder, lora_dropout=0.3)
    pair.learn(reference(), policy())
    for shift in (1, 2):
        assert (pair.run(reference(IDS + shift)), pair.run(policy(IDS + shift))) == (1, 2)
    pair = Pair(folder, lora_dropout=0.3)
    pair.learn(policy(), reference())
    for shift in (1, 2):
        assert (pair.run(policy(IDS + shift)), pair.run(reference(IDS + shift))) == (2, 0)


def test_a_frozen_copy_of_the_adapter_is_a_reference_too(folder: Path) -> None:
    pair = Pair(folder)
    for model in (pair.resident, pair.streamed):
        model.add_adapter("ref", lora(lora_dropout=0.0))
        generator = torch.Generator().manual_seed(9)
        for name, param in model.named_parameters():
            if ".ref." in name:
                param.data.copy_(0.2 * torch.randn(param.shape, generator=generator))

    def copied(model: PeftModel) -> Tensor:
        with torch.no_grad(), _active(model, "ref"):
            return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]

    pair.learn(policy(), copied)
    assert (pair.run(policy()), pair.run(copied)) == (2, 0)


@contextmanager
def _active(model: PeftModel, name: str) -> Iterator[None]:
    before = model.active_adapter
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)


def test_all_hidden_states_can_be_asked_for(pair: Pair) -> None:
    def hidden(model: PeftModel) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            found = model(input_ids=IDS, attention_mask=MASK, use_cache=False, output_hidden_states=True)
            return torch.stack(found.hidden_states)[:, MASK.bool()]

    pair.learn(policy(), reference())
    pair.run(policy())
    assert pair.run(hidden) == 1


def test_a_failing_block_leaves_nothing_behind(pair: Pair) -> None:
    pair.learn(policy(), reference())
    original = reference_pass.run_here

    def failing(*args: object) -> object:
        if args[1] == 1:
            raise OSError("injected")
        return original(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reference_pass, "run_here", failing)
        with pytest.raises(OSError, match="injected"):
            policy(IDS + 1)(pair.streamed)
    pair.passes.take()
    assert pair.run(reference(IDS + 2)) == 1
    assert (pair.run(policy(IDS + 3)), pair.run(reference(IDS + 3))) == (2, 0)


def test_blocks_that_were_replayed_run_after_all_where_a_later_one_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kinds of masks: sequences whose windows agree and whose full masks do not."""
    folder = build("gemma3_text", tmp_path)
    pair = Pair(folder)
    pair.learn(policy(), reference())
    pair.run(policy())
    original = StreamedForward.call

    def other_positions(streamed: StreamedForward, index: int, args: object, kwargs: dict[str, object]) -> object:
        if index == 1:
            cos, sin = kwargs["position_embeddings"]  # type: ignore[misc]
            kwargs = kwargs | {"position_embeddings": (cos.clone(), sin * 1.5)}
        return original(streamed, index, args, kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamedForward, "call", other_positions)
    got = reference()(pair.streamed)
    assert pair.passes.take() == runtime_of(pair.streamed).num_blocks / NUM_BLOCKS
    with torch.no_grad():
        assert torch.equal(got, reference()(pair.streamed))


def test_blocks_that_are_skipped_at_random_are_never_replayed(tmp_path: Path) -> None:
    pair = Pair(build("opt", tmp_path, changes={"layerdrop": 0.4}))
    for shift in range(6):
        for forward in (policy(IDS + shift), reference(IDS + shift)):
            assert pair.run(forward) > 0
