"""The factored norm against PEFT's own DoRA: values, gradients, accuracy, memory, and PEFT's life around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from lowmem.adapters.dora import FactoredDoraEmbedding, FactoredDoraLinear, base_squares, install, row_norms

IN, OUT, RANK, TOKENS = 48, 80, 4, 10


class Layers(nn.Module):
    """One layer of each kind that DoRA adapts in a language model."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, IN)
        self.linear = nn.Linear(IN, OUT, bias=bias)
        self.conv = Conv1D(IN, OUT)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.conv(torch.tanh(self.linear(self.embed(ids))))
        return hidden


def dora(
    *targets: str,
    dropout: float = 0.0,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    autocast_adapter_dtype: bool = False,
) -> PeftModel:
    """A model with trained-looking DoRA adapters, PEFT's own variant."""
    model = Layers(bias=bias).to(dtype)
    config = LoraConfig(
        use_dora=True,
        r=RANK,
        lora_alpha=12,
        target_modules=list(targets),
        lora_dropout=dropout,
        fan_in_fan_out="conv" in targets and "linear" not in targets,
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    scramble(peft_model)
    return peft_model


def scramble(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.3 * torch.randn_like(param))


def with_factored_norm(model: PeftModel, **options: bool) -> PeftModel:
    ours = copy.deepcopy(model)
    assert install(ours, **options) > 0
    return ours


def run(model: nn.Module, *, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(TOKENS).view(2, -1)
    torch.manual_seed(seed)
    out = model(ids)
    out.float().pow(2).sum().backward() if out.dtype != torch.float64 else out.pow(2).sum().backward()
    return out.detach(), {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def assert_close(ours: Tensor, peft: Tensor, tolerance: float) -> None:
    assert ours.dtype == peft.dtype
    assert (ours - peft).abs().max() <= tolerance * peft.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("targets", [("linear",), ("conv",), ("embed",), ("linear", "embed")])
def test_values_and_gradients_equal_pefts_in_fp64(targets: tuple[str, ...], dropout: float) -> None:
    peft_model = dora(*targets, dropout=dropout, dtype=torch.float64)
    ours_out, ours_grads = run(with_factored_norm(peft_model))
    peft_out, peft_grads = run(peft_model)
    assert_close(ours_out, peft_out, 1e-12)
    assert ours_grads.keys() == peft_grads.keys()
    assert any("magnitude" in name for name in ours_grads)
    for name, grad in peft_grads.items():
        assert_close(ours_grads[name], grad, 1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_values_equal_pefts_in_fp32(bias: bool) -> None:
    peft_model = dora("linear", bias=bias)
    assert_close(run(with_factored_norm(peft_model))[0], run(peft_model)[0], 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("targets", [("linear",), ("conv",), ("embed",)])
def test_bf16_base_with_fp32_adapters_equals_peft(targets: tuple[str, ...], dropout: float) -> None:
    peft_model = dora(*targets, dropout=dropout, dtype=torch.bfloat16, autocast_adapter_dtype=True)
    ours_out, ours_grads = run(with_factored_norm(peft_model))
    peft_out, peft_grads = run(peft_model)
    # One rounding of the layer's bf16 result may fall the other way; what feeds it agrees to fp32.
    assert_close(ours_out.float(), peft_out.float(), 2**-7)
    for name, grad in peft_grads.items():
        assert ours_grads[name].dtype == torch.float32
        assert_close(ours_grads[name], grad, 2**-6)


def test_autocast_leaves_the_norm_in_fp32() -> None:
    peft_model = dora("linear")
    ours = with_factored_norm(peft_model)
    with torch.autocast("cpu", torch.bfloat16):
        ours_out, peft_out = run(ours)[0], run(peft_model)[0]
    exact_out = run(copy.deepcopy(peft_model).double())[0]
    ours_error = (ours_out.double() - exact_out).abs().max()
    peft_error = (peft_out.double() - exact_out).abs().max()
    assert ours_error <= 1.5 * peft_error


@pytest.mark.parametrize("frozen_base", [False, True])
def test_several_active_adapters_and_switching_equal_peft(frozen_base: bool) -> None:
    peft_model = dora("linear", dtype=torch.float64)
    peft_model.add_adapter(
        "second", LoraConfig(use_dora=True, r=2, target_modules=["linear", "embed"], lora_dropout=0.3)
    )
    peft_model.base_model.set_adapter(["default", "second"])
    scramble(peft_model)
    ours = with_factored_norm(peft_model, frozen_base=frozen_base)
    for adapters in (["default", "second"], ["second"], ["second", "default"]):
        for model in (ours, peft_model):
            model.base_model.set_adapter(adapters)
            model.zero_grad()
        ours_out, ours_grads = run(ours)
        peft_out, peft_grads = run(peft_model)
        assert_close(ours_out, peft_out, 1e-12)
        for name, grad in peft_grads.items():
            assert_close(ours_grads[name], grad, 1e-12)


def test_disabled_adapter_gives_the_base_model_bitwise() -> None:
    peft_model = dora("linear", "embed")
    ours = with_factored_norm(peft_model)
    with peft_model.disable_adapter(), ours.disable_adapter(), torch.no_grad():
        assert torch.equal(run_forward(ours), run_forward(peft_model))
        base_out = run_forward(ours)
    assert not torch.equal(run_forward(ours), base_out)


def run_forward(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.arange(TOKENS).view(2, -1))
    return out.detach()


def test_pefts_merge_and_unmerge_still_work() -> None:
    ours = with_factored_norm(dora("linear", "embed", dtype=torch.float64)).eval()
    before = run_forward(ours)
    ours.merge_adapter()
    assert_close(run_forward(ours), before, 1e-12)
    ours.unmerge_adapter()
    assert_close(run_forward(ours), before, 1e-12)
    assert_close(run_forward(ours.merge_and_unload()), before, 1e-12)


def test_without_frozen_base_a_changed_base_weight_is_seen() -> None:
    peft_model = dora("linear", dtype=torch.float64)
    ours = with_factored_norm(peft_model)
    run(ours)
    for model in (ours, peft_model):
        with torch.no_grad():
            model.get_base_model().linear.base_layer.weight.mul_(3)
    assert_close(run_forward(ours), run_forward(peft_model), 1e-12)


def test_saved_adapter_is_pefts_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    peft_model = dora("linear")
    ours = with_factored_norm(peft_model)
    ours.save_pretrained(tmp_path / "ours")
    peft_model.save_pretrained(tmp_path / "peft")
    ours_tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    peft_tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert ours_tensors.keys() == peft_tensors.keys()
    assert all(torch.equal(tensor, peft_tensors[name]) for name, tensor in ours_tensors.items())


def test_install_twice_changes_nothing_and_new_adapters_are_found() -> None:
    model = dora("linear", "embed")
    untouched = dora("linear")
    assert install(model) == 2
    assert install(model) == 0
    model.add_adapter("second", LoraConfig(use_dora=True, r=2, target_modules=["conv"], fan_in_fan_out=True))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["linear"]))
    assert install(model) == 1
    assert isinstance(model.get_base_model().linear.lora_variant["default"], FactoredDoraLinear)
    assert isinstance(model.get_base_model().embed.lora_variant["default"], FactoredDoraEmbedding)
    assert type(untouched.get_base_model().linear.lora_variant["default"]).__module__.startswith("peft.")


def random_factors(dtype: torch.dtype, *, update: float) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(OUT, IN, dtype=torch.float64).to(dtype)
    lora_A = torch.randn(RANK, IN, dtype=torch.float64).to(dtype)
    lora_B = (update * torch.randn(OUT, RANK, dtype=torch.float64)).to(dtype)
    return weight, lora_A, lora_B


def exact_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return torch.linalg.norm(weight.double() + scaling * lora_B.double() @ lora_A.double(), dim=1)


@pytest.mark.parametrize("update", [0.0, 1e-3, 0.1, 1.0, 30.0])
def test_norm_is_as_accurate_as_pefts_in_fp32(update: float) -> None:
    weight, lora_A, lora_B = random_factors(torch.float32, update=update)
    exact = exact_norms(weight, lora_A, lora_B, 0.7)
    ours = row_norms(weight, lora_A, lora_B_OR=lora_B, scaling=0.7)
    pefts = torch.linalg.norm(weight + 0.7 * (lora_B @ lora_A), dim=1)
    ours_error = ((ours.double() - exact) / exact).abs().max()
    pefts_error = ((pefts.double() - exact) / exact).abs().max()
    assert ours_error <= pefts_error + 3e-7


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("remainder", [1.0, 0.1, 1e-3, 1e-5])
def test_norm_survives_cancellation(remainder: float, transposed: bool) -> None:
    lora_A, lora_B = torch.randn(RANK, IN), torch.randn(OUT, RANK)
    weight = -0.7 * (lora_B @ lora_A)
    weight[::2] = torch.randn(OUT // 2, IN)
    weight = (weight + remainder * torch.randn(OUT, IN)).float()
    stored = weight.T.contiguous().T if transposed else weight
    exact = exact_norms(weight, lora_A, lora_B, 0.7)
    ours = row_norms(stored, lora_A, lora_B_OR=lora_B, scaling=0.7)
    pefts = torch.linalg.norm(weight + 0.7 * (lora_B @ lora_A), dim=1)
    ours_error = ((ours.double() - exact) / exact).abs().max()
    pefts_error = ((pefts.double() - exact) / exact).abs().max()
    assert ours_error <= 2 * pefts_error + 2e-6


def test_exactly_cancelled_row_has_norm_zero_and_not_nan() -> None:
    lora_A, lora_B = torch.randn(1, IN), torch.ones(OUT, 1)
    norms = row_norms(-lora_A.expand(OUT, IN).contiguous(), lora_A, lora_B_OR=lora_B, scaling=1.0)
    assert torch.equal(norms, torch.zeros(OUT))


@pytest.mark.parametrize("transposed", [False, True])
def test_bf16_weight_is_converted_in_tiles_with_the_same_result(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, lora_A, lora_B = random_factors(torch.bfloat16, update=0.2)
    stored = weight.T.contiguous().T if transposed else weight
    exact = exact_norms(weight, lora_A, lora_B, 0.7)
    for tile_bytes in (4, 1000, 1 << 20):
        monkeypatch.setattr("lowmem.adapters.dora._TILE_BYTES", tile_bytes)
        norms = row_norms(stored, lora_A, lora_B_OR=lora_B, scaling=0.7)
        assert norms.dtype == torch.float32
        assert ((norms.double() - exact) / exact).abs().max() < 1e-6
        kept = row_norms(stored, lora_A, lora_B_OR=lora_B, scaling=0.7, base_squares_O=base_squares(stored))
        assert torch.equal(kept, norms)


class LargestResult(TorchDispatchMode):
    """Numbers of elements of the largest tensor that any operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.num_elements = max(self.num_elements, leaf.numel())
        return out


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("linear",), ("conv",)])
def test_no_temporary_is_as_large_as_the_weight(
    targets: tuple[str, ...], adapter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.adapters.dora._TILE_BYTES", 4096)
    peft_model = dora(*targets, dropout=0.1, dtype=adapter_dtype, autocast_adapter_dtype=True)
    sizes = []
    for model in (peft_model, with_factored_norm(peft_model)):
        with LargestResult() as largest:
            run(model)
        sizes.append(largest.num_elements)
    assert sizes[0] >= IN * OUT, "PEFT's own DoRA no longer makes a dense temporary: is ours still needed?"
    assert sizes[1] <= max(IN * OUT // 3, TOKENS * OUT)


def test_only_the_frozen_base_keeps_its_norms() -> None:
    for frozen_base, expected in ((False, False), (True, True)):
        model = with_factored_norm(dora("linear"), frozen_base=frozen_base)
        run(model)
        variant = model.get_base_model().linear.lora_variant["default"]
        assert (variant._kept is not None) == expected
