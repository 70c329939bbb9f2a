"""TRL's SFTTrainer, unmodified, on a streamed model: the same losses, gradient norms and adapters as in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from lowmem.streaming.runtime import runtime_of
from tests.lowmem.tiny_training import (
    adapter_weights,
    chats,
    logged,
    lora,
    prompts,
    resident,
    streamed,
    texts,
    trained,
    trainer,
)
from tests.zoo.architectures import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


CASES: dict[str, tuple[Callable[[], Dataset], dict[str, object]]] = {
    "defaults": (texts, {}),
    "no checkpointing": (texts, {"activation_checkpointing": False}),
    "accumulation, no clipping": (texts, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}),
    "packing": (texts, {"packing": True, "max_length": 48}),
    "padding free": (texts, {"padding_free": True, "max_length": None}),
    "completion only": (prompts, {}),
    "assistant only": (chats, {"assistant_only_loss": True}),
    "dft loss": (texts, {"loss_type": "dft"}),
    "weight decay, cosine": (texts, {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 1}),
    "evaluation during training": (texts, {"eval_strategy": "steps", "eval_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_adapters_equal_training_in_memory(case: str, folder: Path, tmp_path: Path) -> None:
    dataset, options = CASES[case]
    done = []
    for load in (resident, streamed):
        done.append(trained(load(folder), tmp_path, dataset=dataset(), **options))
    expected, got = done
    assert len(logged(got)) == 4
    torch.testing.assert_close(logged(got), logged(expected), rtol=1e-5, atol=1e-6)
    weights = adapter_weights(got)
    for name, weight in adapter_weights(expected).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    ],
)
def test_other_adapters_equal_training_in_memory(adapter: dict[str, object], folder: Path, tmp_path: Path) -> None:
    expected, got = (trained(load(folder), tmp_path, adapter=lora(**adapter)) for load in (resident, streamed))
    torch.testing.assert_close(logged(got), logged(expected), rtol=2e-5, atol=1e-6)


def test_micro_batches_give_the_gradients_of_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    adapter = lora(lora_dropout=0.0)
    whole = trained(streamed(folder), tmp_path, adapter=adapter)
    split = trained(streamed(folder, micro_batch=1), tmp_path, adapter=adapter)
    torch.testing.assert_close(logged(split), logged(whole), rtol=1e-5, atol=1e-6)


def test_weights_pass_twice_per_step_whatever_the_batch(folder: Path, tmp_path: Path) -> None:
    read = []
    for batch_size in (1, 8):
        model = streamed(folder)
        scheduler = runtime_of(model).scheduler
        done = trainer(model, tmp_path, per_device_train_batch_size=batch_size, max_steps=3)
        counts: list[int] = []

        class Count(TrainerCallback):
            def on_step_end(
                self, *args: object, counts: list[int] = counts, scheduler=scheduler, **kwargs: object
            ) -> None:  # type: ignore[no-untyped-def]
                counts.append(scheduler.counters.bytes_read)

        done.add_callback(Count())
        done.train()
        assert scheduler.counters.num_visits >= 2 * scheduler.num_blocks * 3
        read.append(counts[2] - counts[1])
    assert (
        read[0] == read[1] <= 2 * sum(streamed_block.spec.nbytes + 8192 for streamed_block in runtime_of(model).blocks)
    )


def test_resuming_gives_the_losses_of_the_uninterrupted_run(folder: Path, tmp_path: Path) -> None:
    whole = trainer(streamed(folder), tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(streamed(folder), tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    for name, weight in adapter_weights(whole).items():
        assert torch.equal(adapter_weights(resumed)[name], weight), name


def test_generation_and_evaluation_equal_the_resident_model(folder: Path, tmp_path: Path) -> None:
    done = [trained(load(folder), tmp_path) for load in (resident, streamed)]
    ids = torch.tensor([[90, 90, 3, 4], [5, 6, 7, 8]])
    mask = (ids != 90).long()
    answers = []
    for run in done:
        run.model.eval()
        answers.append(run.model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
    assert torch.equal(*answers)
    losses = [run.evaluate(run.train_dataset)["eval_loss"] for run in done]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
