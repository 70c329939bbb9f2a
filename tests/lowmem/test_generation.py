"""`generate` on streamed models: the resident model's answer, one pass per token, finished rows left out."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import lowmem
from lowmem.generation.cache import GrowingLayer, KvRoom, StreamedCache
from lowmem.generation.hooks import TokenProgress
from lowmem.streaming.runtime import Runtime, runtime_of
from offload import Budget, BudgetError
from tests.zoo.architectures import build
from tests.zoo.reference import resident

NAMES = (
    "llama",
    "gemma3_text",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("qwen3", "mixtral", "gpt_oss", "gpt2", "bloom", "qwen3_next")
    ),
)
EOS, PAD = 2, 0
NUM_ROWS, NUM_PROMPT_TOKENS = 6, 9


def streamed(folder: Path, *, num_rows: int = NUM_ROWS) -> PreTrainedModel:
    """The streamed model, in the smallest budget in which it generates for so many rows."""
    budget = Budget(device=0, host=0)
    for _ in range(2):
        plan = lowmem.plan(
            folder, task="generate", batch_size=num_rows, seq_len=33, completion_tokens=24, budget=budget, device="cpu"
        )
        budget = Budget(device=plan.smallest_device_bytes, host=0)
    return lowmem.from_pretrained(folder, plan=plan, device="cpu")


def prompts(num_rows: int = NUM_ROWS) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    tokens = torch.randint(3, 128, (num_rows, NUM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    for row in range(num_rows):
        tokens[row, : row % 4], mask[row, : row % 4] = PAD, 0
    return {"input_ids": tokens, "attention_mask": mask}


def settings(**changes: object) -> GenerationConfig:
    """A configuration whose tokens end rows one after the other: every sixteenth token of the vocabulary does."""
    defaults = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": list(range(2, 128, 16)), "pad_token_id": PAD}
    return GenerationConfig(**(defaults | changes))


def generate(model: PreTrainedModel, **changes: object) -> Tensor:
    torch.manual_seed(7)
    answer = model.generate(**prompts(), generation_config=settings(**changes))
    return answer if isinstance(answer, Tensor) else answer.sequences


class Calls:
    """How many rows each block call computed, as seen by an inner module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows: list[int] = []
        norm = next(module for name, module in model.named_modules() if name.endswith("layers.0.input_layernorm"))
        norm.register_forward_pre_hook(lambda module, args: self.rows.append(args[0].shape[0]))


def with_room(runtime: Runtime, **changes: int) -> None:
    hooks = runtime.generation
    assert hooks is not None
    hooks._room = dataclasses.replace(hooks._room, **changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}])
def test_tokens_equal_the_resident_models(name: str, sampling: dict[str, object], tmp_path: Path) -> None:
    build(name, tmp_path)
    want, got = generate(resident(tmp_path), **sampling), generate(streamed(tmp_path), **sampling)
    assert torch.equal(want, got)
    ends = [(row[NUM_PROMPT_TOKENS:] == PAD).float().argmax().item() for row in want]
    assert len(set(ends)) > 1 or not sampling, "rows were to end at different tokens"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    build("llama", tmp_path)
    return tmp_path


def test_finished_rows_are_no_longer_computed(llama: Path) -> None:
    model = streamed(llama)
    calls = Calls(model)
    answer = generate(model)
    lengths = [int((row != PAD).sum()) for row in answer[:, NUM_PROMPT_TOKENS:]]
    # The first call is the prompt's, and a row's last token is not fed back.
    want = [NUM_ROWS] + [sum(length > token for length in lengths) for token in range(1, max(lengths))]
    assert calls.rows == want
    assert want[-1] < NUM_ROWS


def test_rows_stay_where_the_caller_could_see_that_they_went(llama: Path) -> None:
    model, plain = streamed(llama), resident(llama)
    calls = Calls(model)
    answers = []
    for each in (model, plain):
        torch.manual_seed(7)
        config = settings(return_dict_in_generate=True, output_logits=True)
        answers.append(each.generate(**prompts(), generation_config=config))
    assert set(calls.rows) == {NUM_ROWS}
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    torch.testing.assert_close(torch.stack(answers[0].logits), torch.stack(answers[1].logits))


@pytest.mark.parametrize(
    "changes", [{"num_beams": 3}, {"use_cache": False}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_other_ways_to_generate_equal_the_resident_models(llama: Path, changes: dict[str, object]) -> None:
    want, got = generate(resident(llama), **changes), generate(streamed(llama, num_rows=12), **changes)
    assert torch.equal(want, got)


def test_every_block_is_visited_once_per_token_whatever_the_batch(llama: Path) -> None:
    model = streamed(llama)
    runtime = runtime_of(model)
    visits: list[int] = []
    runtime.listen(lambda visit: visits.append(visit.block) if visit.started else None)
    answer = generate(model, eos_token_id=None)
    assert visits == [*range(runtime.num_blocks)] * (answer.shape[1] - NUM_PROMPT_TOKENS)


def test_reading_runs_ahead_from_one_token_into_the_next(llama: Path) -> None:
    model = streamed(llama)
    runtime = runtime_of(model)
    generate(model, eos_token_id=None)
    before = sum(runtime.scheduler.counters.num_reads)
    generate(model, eos_token_id=None)
    num_read = sum(runtime.scheduler.counters.num_reads) - before
    # No block is read more often than once per token, the next pass's first ones included.
    assert num_read <= 24 * runtime.num_blocks + runtime.plan.placement.ring_size


def test_expected_order_goes_on_with_the_next_token(llama: Path) -> None:
    model = streamed(llama)
    told: list[list[int]] = []
    runtime = runtime_of(model)
    runtime._order._tell = lambda order: told.append(list(order))
    kept = model(**prompts()).logits  # a graph that nobody has run backward
    generate(model, eos_token_id=None, max_new_tokens=3)
    assert kept is not None
    assert told[-1] == [*range(runtime.num_blocks)] * 2


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_prompts_pass_in_parts_where_they_do_not_fit_whole(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    model = streamed(tmp_path)
    with_room(runtime_of(model), prefill_tokens=2 * NUM_PROMPT_TOKENS)
    calls = Calls(model)
    assert torch.equal(generate(model), generate(resident(tmp_path)))
    if name == "llama":
        assert calls.rows[:4] == [2, 2, 2, *calls.rows[3:4]]
        assert calls.rows[3] > 2


@pytest.mark.parametrize("num_rows", [NUM_ROWS, 1])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_long_prompts_pass_in_chunks(name: str, num_rows: int, tmp_path: Path) -> None:
    build(name, tmp_path)
    model = streamed(tmp_path)
    runtime = runtime_of(model)
    with_room(runtime, prefill_tokens=NUM_PROMPT_TOKENS)
    runtime.choose_split._planned_chunk = 4
    lengths: list[int] = []
    norm = next(module for name, module in model.named_modules() if name.endswith("layers.0.input_layernorm"))
    norm.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    inputs = {key: value[:num_rows] for key, value in prompts().items()}
    answers = [each.generate(**inputs, generation_config=settings()) for each in (model, resident(tmp_path))]
    assert torch.equal(*answers)
    assert lengths[:3] == [4, 4, 1]


def test_keys_and_values_beyond_the_device_budget_wait_on_the_host(llama: Path) -> None:
    model = streamed(llama)
    runtime = runtime_of(model)
    # Keys and values of 2 heads of 8, fp32: 6 rows of 9 + 24 tokens.
    layer_bytes = NUM_ROWS * 33 * 2 * 16 * 4
    with_room(runtime, device_bytes=layer_bytes, host_bytes=2 * layer_bytes)
    held: list[dict[str, int]] = []
    runtime.generation.listen(lambda progress: held.append(runtime.memory()))
    assert torch.equal(generate(model), generate(resident(llama)))
    assert 0 < held[0]["kv_device_bytes"] <= layer_bytes
    assert held[0]["kv_device_bytes"] < held[0]["kv_host_bytes"] <= 2 * layer_bytes
    assert runtime.memory()["kv_device_bytes"] == 0


def test_keys_and_values_that_fit_nowhere_are_refused_before_the_first_token(llama: Path) -> None:
    model = streamed(llama)
    with_room(runtime_of(model), device_bytes=0, host_bytes=100)
    with pytest.raises(BudgetError, match=r"6 sequences of up to 33 tokens.*fewer sequences"):
        generate(model)


def test_continuous_batching_is_refused_by_name(llama: Path) -> None:
    with pytest.raises(lowmem.UnsupportedError, match="continuous batching"):
        streamed(llama).generate_batch([[3, 4, 5]], generation_config=settings())


def test_room_is_what_the_plan_leaves(llama: Path) -> None:
    model = streamed(llama)
    plan = runtime_of(model).plan
    room = KvRoom.of(plan)
    assert 0 < room.device_bytes <= plan.device_budget_bytes
    assert room.host_bytes == 0


def test_growing_layer_holds_what_was_appended_through_growth_rows_and_crop() -> None:
    layer, want = GrowingLayer(max_tokens=700), torch.zeros(3, 2, 0, 4)
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (5, 1, 300, 1, 200, 1):
        new = torch.randn(3, 2, num_tokens, 4, generator=generator)
        want = torch.cat([want, new], dim=-2)
        keys, values = layer.update(new, -new)
        assert torch.equal(keys, want)
        assert torch.equal(values, -want)
    layer.batch_select_indices(torch.tensor([0, 2]))
    layer.crop(-1)
    assert layer.get_seq_length() == want.shape[-2] - 1
    keys, _ = layer.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4))
    assert torch.equal(keys[:, :, :-1], want[[0, 2], :, :-1])


def test_cache_keeps_rows_by_their_first_numbers(llama: Path) -> None:
    cache = StreamedCache(resident(llama).config, max_tokens=8)
    for index in range(len(cache.layers)):
        rows = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 2, 3, 8)
        cache.update(rows, rows, index)
    cache.keep([1, 2, 3])
    cache.keep([1, 3])
    assert cache.rows is not None
    assert cache.rows.tolist() == [1, 3]
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [1.0, 3.0]


def test_progress_is_told_after_every_token(llama: Path) -> None:
    model = streamed(llama)
    told: list[TokenProgress] = []
    stop = runtime_of(model).generation.listen(told.append)
    answer = generate(model)
    num_tokens = answer.shape[1] - NUM_PROMPT_TOKENS
    assert [progress.num_tokens for progress in told] == [*range(1, num_tokens + 1)]
    assert [progress.num_unfinished for progress in told] == sorted(
        (progress.num_unfinished for progress in told), reverse=True
    )
    assert told[0].left_s is None
    assert told[1].left_s is not None
    assert told[-1].finished
    stop()
    generate(model)
    assert len(told) == num_tokens


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_shows_tokens_rows_and_time_left(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(llama)
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    with lowmem.TokenBar(model):
        generate(model)
    assert "token 1/24, " in shown.getvalue()
    assert " of 6 rows, " in shown.getvalue()
    assert " left " in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    generate(model)
    assert "token" not in shown.getvalue()


def test_a_log_file_gets_no_bar(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lowmem.TokenBar(model := streamed(llama)):
        generate(model)
    assert "token" not in capsys.readouterr().err


@pytest.mark.slow
def test_several_threads_give_the_resident_models_tokens(tmp_path: Path) -> None:
    build("llama", tmp_path, changes={"hidden_size": 1024, "intermediate_size": 1100, "num_hidden_layers": 2})
    torch.set_num_threads(2)
    assert torch.equal(generate(resident(tmp_path)), generate(streamed(tmp_path)))
