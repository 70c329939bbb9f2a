"""The tiled head against plain logits and against TRL's own head."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.internals.trl import HeadDispatch, install
from lowmem.planning.limits import HeadTiles
from lowmem.streaming.head import TiledLogProbFunction, _multiplies_bf16

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Three tokens by at most seven words, so that both axes have several tiles and a ragged last one.
SMALL = HeadTiles(num_tokens=3, max_words=7)


def plain_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperature
    log_p = logits.log_softmax(-1)
    return (
        log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        -(log_p.exp() * log_p).sum(-1),
        (2 * log_p).logsumexp(-1),
        logits.mean(-1),
        logits.argmax(-1) == targets,
    )


def inputs(
    *, num_rows: int = 11, vocab: int = 23, width: int = 5, dtype: torch.dtype = torch.float64, with_bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocab, dtype=dtype, requires_grad=True) if with_bias else None
    targets = torch.randint(vocab, (num_rows,))
    targets[0], targets[-1] = 0, vocab - 1
    return hidden, weight, bias, targets


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("temperature", "cap", "scale"), [(1.0, None, 1.0), (0.7, None, 0.3), (1.3, 2.0, 1.5)])
@pytest.mark.parametrize("differentiated", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("tiles", [SMALL, HeadTiles(num_tokens=1, max_bytes=1), HeadTiles()])
def test_outputs_and_gradients_equal_plain_logits_in_fp64(
    with_bias: bool, temperature: float, cap: float | None, scale: float, differentiated: str, tiles: HeadTiles
) -> None:
    hidden, weight, bias, targets = inputs(with_bias=with_bias)
    got = TiledLogProbFunction.apply(hidden, weight, bias, targets, temperature, 32768, cap, scale, OUTPUTS, tiles)
    want = plain_head(hidden, weight, bias, targets, temperature=temperature, cap=cap, scale=scale)
    for value, expected in zip(got[:4], want[:4], strict=True):
        assert relative_error(value, expected) < 1e-12
    assert torch.equal(got[4], want[4])

    rows = torch.randn(2, hidden.shape[0], dtype=torch.float64)
    rows[0] *= differentiated != "entropy"
    leaves = [hidden, weight] + ([] if bias is None else [bias])
    pairs = []
    for values in (got, want):
        used = {"logprobs": [0], "entropy": [1], "both": [0, 1]}[differentiated]
        total = sum((values[i] * rows[i]).sum() for i in used)
        pairs.append(torch.autograd.grad(total, leaves))
    for grad, expected in zip(*pairs, strict=True):
        assert relative_error(grad, expected) < 1e-12


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 4, 33])
def test_few_rows_of_a_large_head_equal_plain_logits(num_rows: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs(
        num_rows=num_rows, vocab=4099, width=257, dtype=torch.float32, with_bias=with_bias
    )
    options = {"temperature": 0.7, "cap": 30.0, "scale": 0.25}
    want = plain_head(*(None if one is None else one.double() for one in (hidden, weight, bias)), targets, **options)
    got = TiledLogProbFunction.apply(hidden, weight, bias, targets, 0.7, 1, 30.0, 0.25, OUTPUTS, None)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(want[0].sum(), hidden)
    (found,) = torch.autograd.grad(got[0].sum(), hidden)
    assert relative_error(found, expected) < 1e-5


def test_outputs_that_are_not_asked_for_are_none_and_the_others_unchanged() -> None:
    hidden, weight, bias, targets = inputs()
    alone = TiledLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 8, None, 1.0, (), SMALL)
    every = TiledLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 8, None, 1.0, OUTPUTS, SMALL)
    assert torch.equal(alone[0], every[0])
    assert alone[1:] == (None, None, None, None)


def test_logged_outputs_do_not_require_grad() -> None:
    hidden, weight, bias, targets = inputs()
    values = TiledLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 8, None, 1.0, OUTPUTS, SMALL)
    assert [value.requires_grad for value in values] == [True, True, False, False, False]


def test_is_top1_is_false_when_an_earlier_word_has_the_same_logit() -> None:
    weight = torch.zeros(20, 4)
    weight[3] = weight[9] = 1.0
    targets = torch.tensor([9, 3, 0])
    values = TiledLogProbFunction.apply(torch.ones(3, 4), weight, None, targets, 1.0, 8, None, 1.0, OUTPUTS, SMALL)
    assert values[4].tolist() == [False, True, False]


def test_rows_without_incoming_gradient_are_not_computed_again() -> None:
    hidden, weight, _, targets = inputs()
    mask = torch.tensor([False, True] * 5 + [False])
    plain = plain_head(hidden, weight, None, targets)[0]
    want = torch.autograd.grad(plain[mask].sum(), [hidden, weight])
    # Were a masked row computed again, 0 * inf would put nan into the weight's gradient.
    poisoned = hidden.detach().masked_fill(~mask.unsqueeze(-1), torch.inf).requires_grad_()
    logprobs = TiledLogProbFunction.apply(poisoned, weight, None, targets, 1.0, 8, None, 1.0, (), SMALL)[0]
    got = torch.autograd.grad(logprobs.masked_fill(~mask, 0).sum(), [poisoned, weight])
    assert not got[0][~mask].any()
    for grad, expected in zip(got, want, strict=True):
        assert relative_error(grad, expected) < 1e-12


def test_all_rows_masked_gives_zero_gradients() -> None:
    hidden, weight, bias, targets = inputs()
    values = TiledLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 8, None, 1.0, (), SMALL)
    grads = torch.autograd.grad((values[0] * 0).sum(), [hidden, weight])
    assert not any(grad.any() for grad in grads)


def test_no_rows_and_no_gradient_are_fine() -> None:
    weight = torch.randn(9, 4)
    hidden = torch.randn(0, 4, requires_grad=True)
    values = TiledLogProbFunction.apply(hidden, weight, None, torch.zeros(0, dtype=torch.long), 1.0, 8)
    assert all(value.shape == (0,) for value in values)
    assert torch.autograd.grad(values[0].sum(), hidden)[0].shape == (0, 4)


def gradients(
    function: type[torch.autograd.Function], hidden: Tensor, weight: Tensor, targets: Tensor, *options: object
) -> tuple[Tensor, ...]:
    values = function.apply(hidden, weight, None, targets, 0.9, 64, None, 1.0, OUTPUTS, *options)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    scale = torch.linspace(-1, 1, hidden.shape[0])
    return (*values[:4], *torch.autograd.grad((values[0] * scale).sum() + values[1].mean(), leaves))


@pytest.mark.parametrize("multiplies_bf16", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_error_against_fp64_is_no_larger_than_that_of_trl(
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    autocast: bool,
    multiplies_bf16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trl.kernels import ChunkedLogProbFunction

    # As on a processor with instructions for it, and on one without.
    if multiplies_bf16 and not _multiplies_bf16():
        pytest.skip("this processor has no instructions for products of bf16")
    monkeypatch.setattr("lowmem.streaming.head._multiplies_bf16", lambda: multiplies_bf16)
    torch.manual_seed(0)
    hidden, weight = torch.randn(67, 48), torch.randn(300, 48) / 3
    if multiplies_bf16:
        # In eighths, sums of products are exact in any order: all kernels round them to the same neighbour.
        hidden, weight = (8 * hidden).round() / 8, (8 * weight).round() / 8
    hidden, weight = hidden.to(hidden_dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_()
    targets = torch.randint(300, (67,))
    exact_hidden, exact_weight = (leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    exact = gradients(TiledLogProbFunction, exact_hidden, exact_weight, targets, HeadTiles())
    tiles = HeadTiles(num_tokens=16, max_words=40)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = gradients(TiledLogProbFunction, hidden, weight, targets, tiles)
        shipped = gradients(ChunkedLogProbFunction, hidden, weight, targets)
    for our, their, true in zip(ours, shipped, exact, strict=True):
        assert our.dtype == their.dtype
        assert relative_error(our, true) <= relative_error(their, true) + 2e-7


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that an operator made, apart from those of given shapes."""

    def __init__(self, *, ignored: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.ignored = ignored
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) not in self.ignored:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


@pytest.mark.parametrize(("num_rows", "vocab"), [(64, 500), (640, 500), (64, 5000)])
def test_no_buffer_grows_with_tokens_or_vocabulary(num_rows: int, vocab: int) -> None:
    tiles = HeadTiles(num_tokens=16, max_bytes=16 * 1024)
    hidden, weight, _, targets = inputs(num_rows=num_rows, vocab=vocab, width=4, dtype=torch.float32)
    stored = weight.detach().bfloat16()
    # The head's inputs and the gradient are of these shapes; so are views of them.
    with LargestTensor(ignored={tuple(hidden.shape), tuple(stored.shape)}) as largest:
        values = TiledLogProbFunction.apply(hidden, stored, None, targets, 1.0, 8, 30.0, 1.0, OUTPUTS, tiles)
        values[0].sum().backward()
    assert largest.nbytes <= 16 * 1024


@pytest.mark.parametrize("field", ["num_tokens", "max_bytes", "max_words"])
def test_tiles_that_hold_nothing_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"HeadTiles.{field} is 0"):
        HeadTiles(**{field: 0})


class OwnHead(nn.Module):
    """A model as far as the dispatch looks at one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 23, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Spy:
    """A head that only says it was called."""

    def __init__(self) -> None:
        self.num_calls = 0

    def apply(self, hidden: Tensor, *_: object) -> tuple[Tensor, None, None, None, None]:
        self.num_calls += 1
        return hidden.sum(-1), None, None, None, None


def in_small_tiles(*args: object) -> tuple[Tensor, ...]:
    return TiledLogProbFunction.apply(*args, *(None, 1.0, OUTPUTS)[len(args) - 6 :], SMALL)


def test_only_heads_of_registered_models_are_computed_in_tiles() -> None:
    shipped = Spy()
    dispatch = HeadDispatch(shipped, head=in_small_tiles)
    ours, other = OwnHead(), OwnHead()
    dispatch.register(ours)
    hidden, targets = torch.randn(3, 5), torch.tensor([0, 1, 2])
    dispatch.apply(hidden, ours.head.weight, None, targets, 1.0, 8)
    assert shipped.num_calls == 0
    dispatch.apply(hidden, other.head.weight, None, targets, 1.0, 8)
    assert shipped.num_calls == 1


def test_a_head_that_was_replaced_after_registration_is_still_ours() -> None:
    dispatch = HeadDispatch(Spy(), head=in_small_tiles)
    model = OwnHead()
    dispatch.register(model)
    before = model.head.weight
    model.head = nn.Linear(5, 23)
    assert dispatch.is_registered(model.head.weight)
    assert not dispatch.is_registered(before)


def test_registration_does_not_keep_a_model_alive() -> None:
    dispatch = HeadDispatch(Spy(), head=in_small_tiles)
    model = OwnHead()
    weight = model.head.weight
    dispatch.register(model)
    del model
    gc.collect()
    assert not dispatch.is_registered(weight)


def test_fused_head_of_trl_gives_the_same_loss_and_gradients_once_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.utils as trl_utils
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=97, head_dim=8
    )
    model = LlamaForCausalLM(config)
    trl_utils.add_fused_lm_head(model, outputs=OUTPUTS)
    ids = torch.randint(97, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.4, -100)

    def step() -> tuple[Tensor, ...]:
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        grads = torch.autograd.grad(output.loss, [model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight])
        return output.loss, output.entropy, output.mean_logits, *grads

    found = trl_utils._ChunkedLogProbFunction
    shipped = found.shipped if isinstance(found, HeadDispatch) else found
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", shipped)
    want = step()
    dispatch = install(in_small_tiles)
    assert install(TiledLogProbFunction.apply) is dispatch
    assert dispatch.head is in_small_tiles
    dispatch.register(model)
    for value, expected in zip(step(), want, strict=True):
        assert relative_error(value, expected) < 1e-6
