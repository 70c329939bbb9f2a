"""Final loss per optimizer at the same optimizer memory: a small model really fine-tuned on real text.

    python -m benchmarks.optimizers [--quick] [--method GaLore ...]

A Llama-shaped model over bytes is first trained with AdamW on the docstrings of the standard library. From that one
base every method trains it on the library's code (without docstrings and comments), for the same steps on the same
batches. Ranks are the largest whose state on the blocks' matrices takes at most a quarter of AdamW's there. Learning
rates: three values a factor of 3 apart with the first seed, further in the better direction while the best is at the
edge; then two more seeds (other batches, other random bases) at the best. The loss is that of held-out files after the
last step. LoRA and BAdam are run with embedding and head trained, as the others do, and LoRA also without.
"""

import argparse
import bisect
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowmem.optim
from benchmarks.harness import Value, emit
from benchmarks.library_text import Texts, collect
from lowmem.optim.optimizer import RuleOptimizer

BENCHMARK = "optimizers"
STATE_SHARE = 0.25
LR_FACTOR = 3.0
MAX_EXTENSIONS = 2
WEIGHT_DECAY = 0.01
Kind = Callable[..., RuleOptimizer]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of the model and of its training."""

    hidden: int = 96
    mlp: int = 256
    num_blocks: int = 4
    seq_len: int = 128
    batch_size: int = 4
    num_base_steps: int = 600
    num_steps: int = 150
    num_warmup_steps: int = 10
    num_held_out: int = 128
    gap: int = 50
    max_grad_norm: float = 1.0
    num_seeds: int = 3


QUICK = Setting(hidden=64, mlp=172, num_base_steps=40, num_steps=20, num_held_out=16, gap=5, num_seeds=1)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method as it is compared."""

    lr: float
    """Where the search starts."""
    make: Callable[[nn.Module, float, int], torch.optim.Optimizer]
    """Optimizer from model, learning rate and seed."""
    adapt: Callable[[nn.Module], nn.Module]
    """What happens to the model first."""
    options: Mapping[str, Value]
    """What is reported of it."""


@dataclass(frozen=True)
class Outcome:
    """One run."""

    loss: float
    """Held-out loss; infinite if the run diverged."""
    state_bytes: int
    """Bytes of the optimizer's state at its largest, and of adapters."""


def base_model(setting: Setting) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setting.hidden,
        intermediate_size=setting.mlp,
        num_hidden_layers=setting.num_blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=setting.seq_len,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(tokens: Tensor, setting: Setting, *, num: int, seed: int) -> Iterator[Tensor]:
    """Random windows, (batch_size, seq_len)."""
    source = torch.Generator().manual_seed(seed)
    for _ in range(num):
        starts = torch.randint(len(tokens) - setting.seq_len, (setting.batch_size,), generator=source)
        yield torch.stack([tokens[start : start + setting.seq_len] for start in starts.tolist()])


def held_out_loss(model: nn.Module, tokens: Tensor, setting: Setting) -> float:
    """Mean loss over consecutive windows of files that were not trained on."""
    model.eval()
    windows = tokens[: setting.num_held_out * setting.seq_len].view(-1, setting.batch_size, setting.seq_len)
    with torch.no_grad():
        losses: list[float] = [model(input_ids=window, labels=window).loss.item() for window in windows]
    model.train()
    return sum(losses) / len(losses)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, setting: Setting, *, num_steps: int, seed: int
) -> int | None:
    """Train with warm-up, cosine decay and clipping; the largest state in bytes, or None if the gradient overflowed."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / setting.num_warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * step / num_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    largest = 0
    for batch in batches(tokens, setting, num=num_steps, seed=seed):
        model(input_ids=batch, labels=batch).loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), setting.max_grad_norm)
        if not torch.isfinite(norm):
            return None
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        largest = max(largest, state_bytes(optimizer))
    return largest


def run(chosen: Contender, base: nn.Module, texts: Texts, setting: Setting, *, lr: float, seed: int) -> Outcome:
    torch.manual_seed(seed)
    model = chosen.adapt(copy.deepcopy(base))
    optimizer = chosen.make(model, lr, seed)
    largest = train(model, optimizer, texts.code, setting, num_steps=setting.num_steps, seed=seed)
    if largest is None:
        return Outcome(math.inf, 0)
    adapters = sum(param.nbytes for name, param in model.named_parameters() if "lora_" in name)
    return Outcome(held_out_loss(model, texts.held_out_code, setting), largest + adapters)


def matrices(model: nn.Module) -> list[Tensor]:
    """The matrices of the blocks."""
    return [param for name, param in model.named_parameters() if ".layers." in name and param.ndim == 2]


def largest_rank(model: nn.Module, bytes_at: Callable[[int], int]) -> int:
    """The largest rank whose state on the blocks' matrices is at most a quarter of AdamW's."""
    budget = STATE_SHARE * sum(8 * param.numel() for param in matrices(model))
    return bisect.bisect_right(range(1, 129), budget, key=bytes_at)


def contender(
    kind: Kind, lr: float, adapt: Callable[[nn.Module], nn.Module] | None = None, **options: Value
) -> Contender:
    """A method with fixed options, weight decay as everywhere."""

    def make(model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
        return kind(model, lr=lr, weight_decay=WEIGHT_DECAY, seed=seed, **options)

    return Contender(lr=lr, make=make, adapt=adapt or (lambda model: model), options=options)


def contenders(base: nn.Module, setting: Setting) -> dict[str, Contender]:
    """Every method at about a quarter of AdamW's state, AdamW itself, and those that take what they take."""
    optim, gap = lowmem.optim, setting.gap
    galore, apollo = _rank_of(optim.GaLore, base), _rank_of(optim.APOLLO, base)
    # Weights and two moments of both factors; A and B of an m x n matrix have r (m + n) values.
    lora = largest_rank(base, lambda rank: sum(12 * rank * sum(param.shape) for param in matrices(base)))
    outside = ["embed_tokens", "lm_head"]
    return {
        "AdamW": contender(optim.AdamW, 3e-3),
        "AdamW 8-bit": contender(optim.AdamW, 3e-3, state_dtype="8bit"),
        f"LoRA r={lora}": contender(optim.AdamW, 1e-2, adapt=lambda model: _with_lora(model, lora, whole=outside)),
        f"LoRA r={lora}, blocks only": contender(
            optim.AdamW, 1e-2, adapt=lambda model: _with_lora(model, lora, whole=[])
        ),
        "GaLore": contender(optim.GaLore, 1e-2, rank=galore, update_proj_gap=gap),
        "GaLore, rotated moments": contender(optim.GaLore, 1e-2, at_refresh="rotate", rank=galore, update_proj_gap=gap),
        "Fira": contender(optim.Fira, 1e-2, rank=galore, update_proj_gap=gap),
        "FRUGAL": contender(optim.FRUGAL, 3e-3, density=STATE_SHARE, update_gap=gap, inactive_lr_scale=0.1),
        "APOLLO": contender(optim.APOLLO, 1e-2, rank=apollo, update_proj_gap=gap),
        "APOLLO-Mini": contender(optim.APOLLOMini, 3e-3, update_proj_gap=gap),
        "BAdam": contender(
            optim.BAdam, 3e-3, switch_block_every=gap // 4, include_embedding=True, include_lm_head=True
        ),
        "LISA": contender(optim.LISA, 3e-3, activated_layers=1, interval_steps=gap // 5),
        "AdaLomo": contender(optim.AdaLomo, 3e-2),
    }


def _rank_of(kind: Kind, base: nn.Module) -> int:
    def bytes_at(rank: int) -> int:
        optimizer = kind(base, lr=0.0, rank=rank)
        states = (optimizer.rule_of(param).init(param.to("meta")) for param in matrices(base))
        return sum(value.nbytes for state in states for value in state.values())

    return largest_rank(base, bytes_at)


def _with_lora(model: nn.Module, rank: int, *, whole: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=whole)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def best_lr(chosen: Contender, attempt: Callable[[float], Outcome]) -> dict[float, Outcome]:
    """Outcomes by learning rate, searched until the best has both neighbours, or twice beyond the first three."""
    found = {lr: attempt(lr) for lr in (chosen.lr / LR_FACTOR, chosen.lr, chosen.lr * LR_FACTOR)}
    for _ in range(MAX_EXTENSIONS):
        best = min(found, key=lambda lr: found[lr].loss)
        if min(found) < best < max(found):
            break
        lr = best / LR_FACTOR if best == min(found) else best * LR_FACTOR
        found[lr] = attempt(lr)
    return found


def compare(name: str, chosen: Contender, base: nn.Module, texts: Texts, setting: Setting) -> None:
    """Tune, repeat with other seeds, print."""
    found = best_lr(chosen, lambda lr: run(chosen, base, texts, setting, lr=lr, seed=0))
    best = min(found, key=lambda lr: found[lr].loss)
    others = [run(chosen, base, texts, setting, lr=best, seed=seed) for seed in range(1, setting.num_seeds)]
    outcomes = [found[best], *others]
    emit(
        BENCHMARK,
        name,
        losses=[outcome.loss for outcome in outcomes],
        mean_loss=sum(outcome.loss for outcome in outcomes) / len(outcomes),
        lr=best,
        tuning={f"{lr:.2e}": outcome.loss for lr, outcome in sorted(found.items())},
        best_lr_is_inside=min(found) < best < max(found),
        state_bytes=max(outcome.state_bytes for outcome in outcomes),
        options=chosen.options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs; the numbers mean nothing")
    parser.add_argument("--method", action="append", help="again for several; all if not given")
    arguments = parser.parse_args()
    setting = QUICK if arguments.quick else Setting()
    num_base_bytes = 200_000 if arguments.quick else 1_200_000
    texts = collect(
        num_docstring_bytes=num_base_bytes,
        num_code_bytes=400_000,
        num_held_out_bytes=setting.num_held_out * setting.seq_len,
    )
    base = base_model(setting)
    optimizer = lowmem.optim.AdamW(base, lr=3e-3, weight_decay=0.1)
    train(base, optimizer, texts.docstrings, setting, num_steps=setting.num_base_steps, seed=0)
    emit(
        BENCHMARK,
        "base",
        mean_loss=held_out_loss(base, texts.held_out_code, setting),
        setting={name: getattr(setting, name) for name in Setting.__dataclass_fields__},
        num_parameters=sum(param.numel() for param in base.parameters()),
        num_block_parameters=sum(param.numel() for param in matrices(base)),
    )
    chosen = contenders(base, setting)
    for name in arguments.method or chosen:
        compare(name, chosen[name], base, texts, setting)


if __name__ == "__main__":
    main()
