"""Passes over the weights per task, as counted on TRL's trainers, and the numbers that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem.planning.job import Job


@pytest.mark.parametrize(
    ("task", "arguments", "passes"),
    [
        ("sft", {}, 2),
        ("sft", {"gradient_accumulation_steps": 4}, 8),
        ("reward", {}, 2),
        ("dpo", {}, 2),
        ("dpo", {"uses_reference": False}, 2),
        ("dpo", {"gradient_accumulation_steps": 2}, 4),
        # The KL completions are a forward of their own, which its reference shares.
        ("kto", {}, 3),
        ("kto", {"uses_reference": False}, 3),
        ("grpo", {"completion_tokens": 10}, 12),
        ("grpo", {"completion_tokens": 10, "uses_reference": True}, 12),
        ("grpo", {"completion_tokens": 10, "uses_reference": True, "has_dropout": True}, 13),
        ("grpo", {"completion_tokens": 10, "gradient_accumulation_steps": 4}, 18),
        ("grpo", {"completion_tokens": 10, "gradient_accumulation_steps": 4, "uses_reference": True}, 22),
        # RLOO always computes the log-probabilities of the policy that generated, and by default a reference's.
        ("rloo", {"completion_tokens": 10}, 12),
        ("rloo", {"completion_tokens": 10, "uses_reference": False}, 12),
        ("rloo", {"completion_tokens": 10, "has_dropout": True}, 13),
        ("rloo", {"completion_tokens": 10, "gradient_accumulation_steps": 2}, 18),
        ("generate", {"completion_tokens": 10}, 10),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_passes_do_not_depend_on_the_batch(task: str, arguments: dict[str, Any], passes: int, batch_size: int) -> None:
    assert Job(task=task, batch_size=batch_size, seq_len=64, **arguments).num_passes == passes


def test_grpo_generates_for_all_accumulated_batches_at_once() -> None:
    job = Job(task="grpo", batch_size=4, seq_len=64, completion_tokens=16, gradient_accumulation_steps=3)
    assert job.num_generated == 12
    assert job.num_prompt_tokens == 48


def test_completions_default_to_what_trl_generates() -> None:
    assert Job(task="grpo", batch_size=1, seq_len=2048).completion_tokens == 256
    assert Job(task="grpo", batch_size=1, seq_len=100).completion_tokens == 50
    assert Job(task="sft", batch_size=1, seq_len=2048).completion_tokens == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "pretrain"}, "task='pretrain': expected one of sft, dpo"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"completion_tokens": 4}, "nothing is generated"),
        ({"task": "grpo", "completion_tokens": 0}, "expected at least 1"),
        ({"task": "grpo", "completion_tokens": 65}, "more than seq_len=64"),
        ({"uses_reference": True}, "task sft has no reference"),
        ({"chunk_tokens": 0}, "chunk_tokens=0: expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    fields = {"task": "sft", "batch_size": 1, "seq_len": 64, **arguments}
    with pytest.raises(ValueError, match=message):
        Job(**fields)


def test_a_job_can_be_made_by_its_fields() -> None:
    assert Job(seq_len=8).num_passes == 2
