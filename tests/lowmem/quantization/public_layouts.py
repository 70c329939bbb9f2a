"""Checkpoints in the public layouts of quantised models, made of plain ones, each beside a plain one of its own values.

Codes are drawn or rounded here and the values are computed from them before anything is packed: nothing of the library
takes part.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]
"""Stored tensors by their whole names, and the values in fp32."""

AWQ_COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def _tiles(name: str, weight: Tensor, tile: tuple[int, int], suffix: str = "_scale_inv") -> Packed:
    rows, columns = weight.shape
    grid = -(-rows // tile[0]), -(-columns // tile[1])
    spread = lambda scales: scales.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns]  # noqa: E731
    scales = torch.rand(grid) * 1e-3 + 1e-3
    codes = (weight / spread(scales)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: codes, name + suffix: scales}, codes.float() * spread(scales)


def fp8(name: str, weight: Tensor) -> Packed:
    """Tiles of 48 x 40, which divide nothing."""
    return _tiles(name, weight, (48, 40))


def fp8_per_row(name: str, weight: Tensor) -> Packed:
    return _tiles(name, weight, (1, weight.shape[1]), "_scale")


def fp8_per_matrix(name: str, weight: Tensor) -> Packed:
    stored, values = _tiles(name, weight, tuple(weight.shape), "_scale")
    stored[f"{name}_scale"] = stored[f"{name}_scale"].reshape(())
    stored[f"{name.removesuffix('weight')}input_scale"] = torch.ones(())
    return stored, values


def mxfp8(name: str, weight: Tensor) -> Packed:
    rows, columns = weight.shape
    exponents = torch.randint(113, 121, (rows, -(-columns // 32)), dtype=torch.uint8)
    scales = torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)[:, :columns]
    codes = (weight / scales).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": exponents}, (codes.double() * scales).float()


def mxfp4(name: str, weight: Tensor) -> Packed:
    """A stack (experts, inputs, outputs)."""
    experts, inputs, outputs = weight.shape
    codes = torch.randint(0, 16, (experts, outputs, inputs), dtype=torch.uint8)
    exponents = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes.long()]
    values = values * torch.exp2(exponents.float() - 127).repeat_interleave(32, 2)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).view(experts, outputs, inputs // 32, 16)
    return {f"{name}_blocks": blocks, f"{name}_scales": exponents}, values.transpose(1, 2).contiguous()


def nf4_stack(name: str, weight: Tensor) -> Packed:
    """A stack whose entries lie one after another, blocks of 64 with absmaxes in fp32."""
    packed, state = functional.quantize_4bit(weight.flatten().view(1, -1), quant_type="nf4", compress_statistics=False)
    state.shape, state.dtype = torch.Size((1, weight.numel())), torch.float32
    values = functional.dequantize_4bit(packed, state).view(weight.shape)
    state.shape = weight.shape
    return {name: packed.view(-1, 1)} | {
        f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()
    }, values


def _words(codes: Tensor) -> Tensor:
    """Codes (rows, 8 n) in the order of their nibbles: int32 (rows, n)."""
    nibbles = codes.view(codes.shape[0], -1, 8).long()
    words = (nibbles << torch.arange(0, 32, 4)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _groups(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (inputs, outputs), zeros and scales (groups, outputs)."""
    outputs, inputs = weight.shape
    groups = -(-inputs // size)
    codes, zeros = torch.randint(0, 16, (inputs, outputs)), torch.randint(1, 16, (groups, outputs))
    return codes, zeros, (torch.rand(groups, outputs) * 0.02 + 0.01).half()


def gptq(*, group_size: int, offset: int, by_activation: bool = False) -> Callable[[str, Tensor], Packed]:
    """GPTQ in its first version (offset 1) or its second (0)."""

    def pack(name: str, weight: Tensor) -> Packed:
        size = weight.shape[1] if group_size == -1 else group_size
        codes, zeros, scales = _groups(weight, size)
        g_idx = torch.arange(len(codes), dtype=torch.int32) // size
        if by_activation:
            g_idx = g_idx[torch.randperm(len(codes))]
        values = (scales[g_idx].float() * (codes - zeros[g_idx]).float()).t().contiguous()
        module = name.removesuffix(".weight")
        return {
            f"{module}.qweight": _words(codes.t().contiguous()).t().contiguous(),
            f"{module}.qzeros": _words(zeros - offset),
            f"{module}.scales": scales,
            f"{module}.g_idx": g_idx,
        }, values

    return pack


def awq(name: str, weight: Tensor) -> Packed:
    codes, zeros, scales = _groups(weight, 32)
    values = scales.repeat_interleave(32, 0)[: len(codes)].float()
    values = (values * (codes - zeros.repeat_interleave(32, 0)[: len(codes)]).float()).t().contiguous()
    order = torch.tensor(AWQ_COLUMN_OF_NIBBLE)

    def words(table: Tensor) -> Tensor:
        return _words(table.view(len(table), -1, 8)[..., order].reshape(len(table), -1))

    module = name.removesuffix(".weight")
    return {
        f"{module}.qweight": words(codes),
        f"{module}.qzeros": words(zeros),
        f"{module}.scales": scales,
    }, values


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether tools quantise a tensor: a linear layer inside a block that is no router."""
    is_router = name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight", ".router.weight"))
    return ".layers." in name and name.endswith(".weight") and tensor.ndim == 2 and not is_router


def is_stack(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a fused stack of experts."""
    return ".experts." in name and tensor.ndim == 3


def quantise(
    folder: Path,
    output: Path,
    pack: Callable[[str, Tensor], Packed],
    settings: dict[str, object],
    *,
    which: Callable[[str, Tensor], bool] = is_linear,
) -> tuple[Path, Path]:
    """Write a quantised checkpoint, and a plain one that holds its values.

    Args:
        folder: A plain checkpoint.
        output: An empty folder.
        pack: Packs one weight.
        settings: What its config.json has as `quantization_config`.
        which: Which tensors are packed.

    Returns:
        The quantised checkpoint and the plain one.
    """
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    for name, tensor in ((name, tensor) for shard in shards for name, tensor in shard.items()):
        if which(name, tensor):
            packed, plain[name] = pack(name, tensor.float())
            stored |= packed
        else:
            stored[name] = plain[name] = tensor
    assert stored.keys() != plain.keys(), "nothing was packed"
    config = json.loads((folder / "config.json").read_text())
    for part, tensors, more in (("quantised", stored, {"quantization_config": settings}), ("plain", plain, {})):
        shutil.copytree(folder, output / part, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, output / part / "model.safetensors", metadata={"format": "pt"})
        (output / part / "config.json").write_text(json.dumps(config | more))
    return output / "quantised", output / "plain"


TILES = {"quant_method": "fp8", "weight_block_size": [48, 40], "activation_scheme": "dynamic", "fmt": "e4m3"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
        }
    },
}
LAYOUTS: dict[str, tuple[Callable[[str, Tensor], Packed], dict[str, object]]] = {
    "fp8": (fp8, TILES),
    "fp8 per row": (fp8_per_row, COMPRESSED),
    "fp8 per matrix": (fp8_per_matrix, {"quant_method": "fp8", "activation_scheme": "static"}),
    "mxfp8": (mxfp8, {"quant_method": "mxfp8"}),
    "nf4 stacks": (
        nf4_stack,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}),
    "gptq": (gptq(group_size=32, offset=1), GPTQ),
    "gptq by activation": (gptq(group_size=32, offset=1, by_activation=True), GPTQ | {"desc_act": True}),
    "gptq v2": (gptq(group_size=-1, offset=0), GPTQ | {"group_size": -1, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
}
"""How a layout is packed, and what its config.json says."""

STACKS = ("mxfp4", "nf4 stacks")
"""Layouts of fused stacks of experts; the others are of linear layers."""


def write_layout(folder: Path, output: Path, layout: str) -> tuple[Path, Path]:
    """Write a plain checkpoint in a layout: `quantise`."""
    pack, settings = LAYOUTS[layout]
    return quantise(folder, output, pack, settings, which=is_stack if layout in STACKS else is_linear)
