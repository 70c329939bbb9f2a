"""The Monitor in real training runs: a streamed tiny model under transformers' Trainer."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerControl

from benchmarks.harness import child_environment
from lowmem.monitoring.account import RunFacts
from lowmem.monitoring.monitor import Monitor
from lowmem.monitoring.timeline import read_trace, steps_of
from lowmem.streaming.runtime import Visit, runtime_of
from tests.zoo.architectures import build
from tests.zoo.streamed import streamed

# PEFT asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NUM_BLOCKS = 3
NUM_REAL_TOKENS, NUM_PADDED_TOKENS = 12, 16
STEP_VALUES = {
    f"lowmem/{name}"
    for name in ("step_s", "tokens_per_s", "stall_percent", "read_gb", "disk_gb_per_s", "host_peak_gib")
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(checkpoint: Path) -> Iterator[nn.Module]:
    """A streamed model with a LoRA adapter and a trained head."""
    base = streamed(checkpoint)
    yield adapted(base)
    runtime_of(base).close()


def adapted(base: nn.Module) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], lora_dropout=0.0)
    return get_peft_model(base, config)


@pytest.fixture
def dataset() -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(1, NUM_PADDED_TOKENS + 1)
    mask = (ids <= NUM_REAL_TOKENS).long()
    return [{"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask} for _ in range(32)]


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    values: dict[str, object] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(values | changes))  # type: ignore[arg-type]


def train_logs(state: TrainerState) -> list[dict[str, float]]:
    return [log for log in state.log_history if "loss" in log]


def test_values_land_in_the_history_of_training_steps_only(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = Trainer(model, args, train_dataset=dataset, eval_dataset=dataset[:2], callbacks=[Monitor(progress=False)])
    metrics = trainer.train().metrics
    logs, plan = train_logs(trainer.state), runtime_of(model).plan
    assert len(logs) == 3
    for log in logs:
        assert log.keys() >= STEP_VALUES
        # Two micro-batches of two sequences, padding not counted.
        assert log["lowmem/tokens_per_s"] * log["lowmem/step_s"] == pytest.approx(2 * 2 * NUM_REAL_TOKENS)
        assert 0 <= log["lowmem/stall_percent"] <= 100
        assert log["lowmem/host_peak_gib"] > 0.05
    # What does not change is told once, in what it is compared with: the whole process.
    planned = [log for log in trainer.state.log_history if "lowmem/planned_step_s" in log]
    assert planned == logs[:1]
    assert logs[0]["lowmem/planned_step_s"] == plan.step_s
    whole = plan.host_bytes + plan.device_bytes + plan.framework_bytes
    assert logs[0]["lowmem/planned_host_peak_gib"] == whole / 2**30
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations
    assert all(not STEP_VALUES & log.keys() for log in evaluations)
    assert metrics.keys() >= {name.replace("/", "/train_") for name in STEP_VALUES}
    assert trainer.state.log_history[-1]["lowmem/train_step_s"] == metrics["lowmem/train_step_s"]


def test_bytes_read_are_those_that_the_scheduler_counted(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    scheduler = runtime_of(model).scheduler
    trainer = Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=dataset, callbacks=[Monitor()])
    before = scheduler.counters.bytes_read
    trainer.train()
    logged = sum(log["lowmem/read_gb"] * 1e9 for log in train_logs(trainer.state))
    # Only what was fetched ahead after the last step may be missing.
    read = scheduler.counters.bytes_read - before
    assert read - read / 4 <= logged <= read


def test_a_log_sums_up_all_steps_since_the_one_before(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=4, logging_steps=2), train_dataset=dataset, callbacks=[Monitor()]
    )
    trainer.train()
    for log in train_logs(trainer.state):
        assert log["lowmem/tokens_per_s"] * log["lowmem/step_s"] == pytest.approx(2 * NUM_REAL_TOKENS)


class Reporter(TrainerCallback):
    """What integrations named by `report_to` do: take the logs as they are when they are called."""

    def __init__(self) -> None:
        self.reported: list[dict[str, float]] = []
        self.num_begins = 0

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.num_begins += 1

    def on_log(
        self, args: object, state: object, control: object, logs: dict[str, float] | None = None, **kwargs: object
    ) -> None:
        self.reported.append(dict(logs or {}))


@pytest.mark.parametrize("added_later", [False, True])
def test_callbacks_in_front_of_the_monitor_report_its_values(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path, added_later: bool
) -> None:
    before, after, monitor = Reporter(), type("After", (Reporter,), {})(), Monitor()
    callbacks = [before] if added_later else [before, monitor, after]
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=dataset, callbacks=callbacks)
    if added_later:
        trainer.add_callback(monitor)
        trainer.add_callback(after)
    trainer.train()
    for reporter in (before, after):
        assert reporter.reported[0].keys() >= STEP_VALUES
        # Moving the monitor forward made nobody miss an event or get it twice.
        assert reporter.num_begins == 1


def test_files_are_written_into_the_output_folder(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    Trainer(model, arguments(tmp_path / "out"), train_dataset=dataset, callbacks=[Monitor()]).train()
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} >= {"disk", "compute"}
    computed = [event["name"] for event in events if event.get("cat") == "compute"]
    assert computed[: 2 * NUM_BLOCKS] == [*(f"forward {i}" for i in range(3)), *(f"backward {i}" for i in (2, 1, 0))]
    assert (tmp_path / "out" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    # Headed by model and job, not by the plan's verdict, which is not the run's.
    head = (tmp_path / "out" / "report.html").read_text().partition("<h1>")[2].partition("</h1>")[0]
    assert " tokens | float32 on cpu" in head


def test_files_go_where_they_are_told_or_nowhere(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    monitor = Monitor(tmp_path / "traces" / "run.json", False)
    Trainer(model, arguments(tmp_path / "out"), train_dataset=dataset, callbacks=[monitor]).train()
    assert (tmp_path / "traces" / "run.json").is_file()
    assert not list((tmp_path / "out").glob("*.png"))
    assert not list((tmp_path / "out").glob("*.json"))
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_file_that_cannot_be_written_does_not_cost_the_trained_model(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file where a folder would have to be")
    monitor = Monitor(tmp_path / "taken" / "run.json", False, report=False)
    trainer = Trainer(model, arguments(tmp_path / "out"), train_dataset=dataset, callbacks=[monitor])
    with pytest.warns(UserWarning, match=r"could not write its files.*taken"):
        assert trainer.train().global_step == 3


def test_the_bar_follows_blocks_within_steps(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, disable_tqdm=False)
    monitor = Monitor(False, False, every_s=0)
    Trainer(model, args, train_dataset=dataset, eval_dataset=dataset[:2], callbacks=[monitor]).train()
    shown = capsys.readouterr().err
    for part in ("step 1/3 forward 1/3", "step 3/3 backward 2/3", "no grad 3/3"):
        assert part in shown


def test_a_log_file_has_plain_lines_and_no_control_characters(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, disable_tqdm=True)
    monitor = Monitor(False, False, every_s=0)
    Trainer(model, args, train_dataset=dataset, eval_dataset=dataset[:2], callbacks=[monitor]).train()
    shown = capsys.readouterr()
    ours = [line for line in shown.err.splitlines() if line.startswith("lowmem: step ")]
    assert len(ours) == 3 * 2 * 2 * NUM_BLOCKS  # each start and end of a visit, as often as was asked for
    assert not {"\r", "\x1b"} & set(shown.err + shown.out)


@pytest.mark.parametrize(("progress", "disable_tqdm"), [(False, False), (False, True)])
def test_no_bar_where_it_is_not_wanted(
    model: nn.Module,
    dataset: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    progress: bool,
    disable_tqdm: bool,
) -> None:
    monitor = Monitor(False, False, progress=progress, every_s=0)
    args = arguments(tmp_path, max_steps=1, disable_tqdm=disable_tqdm)
    Trainer(model, args, train_dataset=dataset, callbacks=[monitor]).train()
    assert "forward 1/3" not in capsys.readouterr().err


def test_other_processes_print_nothing_and_write_a_trace_of_their_own(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    state, control = TrainerState(max_steps=1, is_world_process_zero=False), TrainerControl()
    args, monitor = arguments(tmp_path / "out", disable_tqdm=False), Monitor(every_s=0)
    monitor.on_train_begin(args, state, control, model=model)
    monitor.on_step_begin(args, state, control, model=model)
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    monitor.on_step_end(args, state, control, model=model)
    logs = {"loss": 1.0}
    monitor.on_log(args, state, control, logs=logs)
    monitor.on_train_end(args, state, control, model=model)
    assert logs.keys() >= STEP_VALUES
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["trace.rank1.json"]
    assert capsys.readouterr().err == ""


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [streamed.block.module for streamed in runtime_of(model).blocks]


@pytest.mark.parametrize("callbacks", [[], [Monitor()]], ids=["alone", "monitor"])
def test_a_step_that_bypasses_the_blocks_fails_before_the_update(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path, callbacks: list[TrainerCallback]
) -> None:
    for layer in layers_of(model):
        layer.forward = lambda hidden, **kwargs: hidden  # type: ignore[method-assign]
    before = trainable(model)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, callbacks=callbacks)
    with pytest.raises(RuntimeError, match=r"step 1 of a streamed model called none of its 3 blocks"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


@pytest.mark.parametrize("callbacks", [[], [Monitor()]], ids=["alone", "monitor"])
def test_a_step_without_backward_through_trained_blocks_fails(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path, callbacks: list[TrainerCallback]
) -> None:
    for layer in layers_of(model):
        layer.forward = torch.no_grad()(layer.forward)  # type: ignore[method-assign]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, callbacks=callbacks)
    with pytest.raises(RuntimeError, match=r"no backward through any block, although .*lora_A.* of block 0"):
        trainer.train()


def test_training_only_the_head_needs_no_backward_through_blocks(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    for name, param in model.named_parameters():
        param.requires_grad_("lm_head" in name and param.requires_grad)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, callbacks=[Monitor()])
    assert trainer.train().global_step == 3


def test_a_model_that_is_not_streamed_gets_one_warning_and_nothing_else(
    checkpoint: Path, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(checkpoint))
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=dataset, callbacks=[Monitor()])
    with pytest.warns(UserWarning, match="nothing to watch"):
        trainer.train()
    trainer.train()  # a second warning would be an error here
    assert not STEP_VALUES & train_logs(trainer.state)[0].keys()
    assert not list(tmp_path.glob("*.png"))


class Interrupt(TrainerCallback):
    """Raises in the middle of the first step it sees: after its forward and backward."""

    def __init__(self) -> None:
        self.is_armed = True

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.is_armed:
            self.is_armed = False
            raise KeyboardInterrupt


def test_training_can_start_again_after_an_interrupt(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    runtime, monitor = runtime_of(model), Monitor()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, callbacks=[monitor, Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "trace.json").exists(), "also where it was raised between blocks"
    trainer.train()
    for log in train_logs(trainer.state):
        assert log["lowmem/tokens_per_s"] * log["lowmem/step_s"] == pytest.approx(2 * NUM_REAL_TOKENS)
    # Neither run left anything behind.
    assert runtime._listeners == []
    assert runtime.trace._listeners == ()
    assert not model._forward_pre_hooks


def test_files_of_an_interrupted_run_are_there_at_once(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, callbacks=[Monitor(progress=False)])

    def interrupt(visit: Visit) -> None:
        if visit.started and visit.phase == "backward" and trainer.state.global_step == 1:
            raise KeyboardInterrupt

    stop = runtime_of(model).listen(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stop()
    facts = RunFacts.from_dict(read_trace(tmp_path / "trace.json")[1])
    assert facts is not None
    assert (facts.state, [point.step for point in facts.steps]) == ("interrupted", [1])
    assert "interrupted" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "timeline.png").is_file()


PROGRAM = """
import sys, torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from peft import LoraConfig, get_peft_model
import lowmem

class Interrupt(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt

model = lowmem.from_pretrained(sys.argv[1], budget=lowmem.Budget(device="100MiB", host="0"), device="cpu")
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
ids = torch.arange(1, 9)
args = TrainingArguments(sys.argv[2], max_steps=9, report_to="none", use_cpu=True, dataloader_pin_memory=False)
rows = [{"input_ids": ids, "labels": ids}] * 8
Trainer(model, args, train_dataset=rows, callbacks=[lowmem.Monitor(), Interrupt()]).train()
"""


def test_a_program_that_ends_by_an_interrupt_between_blocks_writes_its_files(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), str(tmp_path / "out")]
    env = {**child_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
    facts = RunFacts.from_dict(read_trace(tmp_path / "out" / "trace.json")[1])
    assert facts is not None
    assert facts.state == "interrupted"
    assert "\x1b" not in done.stdout + done.stderr  # a log file gets no escapes


def test_held_memory_is_told_by_role_and_compared_with_the_plan(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    Trainer(model, arguments(tmp_path), train_dataset=dataset, callbacks=[Monitor(progress=False)]).train()
    facts = RunFacts.from_dict(read_trace(tmp_path / "trace.json")[1])
    assert facts is not None
    rows = {row.role: row for row in facts.memory}
    trained_bytes = sum(param.nbytes for param in model.parameters() if param.requires_grad)
    for role in ("adapters", "adapter gradients"):
        assert rows[role].measured_bytes == trained_bytes
    held = rows["optimizer state"].measured_bytes
    assert held is not None
    assert 2 * trained_bytes <= held < 2.1 * trained_bytes + 4096  # AdamW counts its steps, too
    assert rows["peak"].measured_bytes == facts.peak_bytes > 50 << 20
    assert [point.step for point in facts.losses] == [1, 2, 3]


def test_a_second_run_traces_itself_only(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    monitor = Monitor()
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=dataset, callbacks=[monitor])
    counts = []
    for _ in range(2):
        trainer.train()
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        counts.append(sum(event.get("cat") == "compute" for event in events))
    assert counts == [2 * 2 * NUM_BLOCKS] * 2


class Generates(TrainerCallback):
    """Samples after every step, as people do to see how a model comes along."""

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        model = kwargs["model"]
        assert isinstance(model, nn.Module)
        with torch.no_grad():
            model.eval()
            model.generate(input_ids=torch.arange(1, 5)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
            model.train()


def test_generation_between_steps_is_not_counted_as_training(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    callbacks = [Monitor(every_s=0), Generates()]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, callbacks=callbacks)
    trainer.train()
    block_bytes = sum(streamed.spec.nbytes for streamed in runtime_of(model).blocks)
    for log in train_logs(trainer.state):
        assert log["lowmem/tokens_per_s"] * log["lowmem/step_s"] == pytest.approx(2 * NUM_REAL_TOKENS)
        # Two passes, some alignment; three generated tokens would take three more.
        assert log["lowmem/read_gb"] * 1e9 < 2.5 * block_bytes


def test_resumed_steps_carry_on(model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    Trainer(model, args, train_dataset=dataset, callbacks=[Monitor()]).train()
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[Monitor()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logs = train_logs(trainer.state)
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert all(log.keys() >= STEP_VALUES for log in logs)
    assert traced_steps(tmp_path / "trace.json") == [3, 4]


def traced_steps(file: Path) -> list[int]:
    spans, notes = read_trace(file)
    facts = RunFacts.from_dict(notes)
    assert facts is not None
    return [timeline.step for timeline in steps_of(spans, facts.starts_ns)]


def test_batches_that_are_accumulated_are_one_step_of_the_trace(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    Trainer(model, args, train_dataset=dataset, callbacks=[Monitor(timeline=False)]).train()
    assert traced_steps(tmp_path / "trace.json") == [1, 2, 3]


@pytest.mark.parametrize(("num_rows", "num_steps"), [(32, 4), (6, 3)], ids=["within an epoch", "at its end"])
def test_resuming_behind_the_last_step_does_what_it_does_without_streaming_and_says_so(
    num_rows: int,
    num_steps: int,
    model: nn.Module,
    checkpoint: Path,
    dataset: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plain = adapted(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    for name, trained in (("plain", plain), ("streamed", model)):
        args = arguments(tmp_path / name, save_strategy="steps", save_steps=3)
        callbacks = [Monitor(every_s=0)] if name == "streamed" else []
        Trainer(trained, args, train_dataset=dataset[:num_rows], callbacks=callbacks).train()
        before = (tmp_path / "streamed" / "report.html").read_text() if callbacks else ""
        resumed = Trainer(trained, args, train_dataset=dataset[:num_rows], callbacks=callbacks)
        capfd.readouterr()
        if callbacks:
            with pytest.warns(UserWarning, match=r"has taken all its steps \(3 of 3\): nothing is left to train"):
                resumed.train(resume_from_checkpoint=True)
        else:
            resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == num_steps
    shown = capfd.readouterr().err
    assert ("lowmem: step 4/4" in shown) == (num_steps == 4)
    assert "4/3" not in shown.replace("24/3", "")
    assert "-" not in "".join(line for line in shown.splitlines() if line.startswith("lowmem: "))
    # What the run before has left is there where this one had nothing to show.
    assert ((tmp_path / "streamed" / "report.html").read_text() == before) == (num_steps == 3)


def test_absent_matplotlib_is_an_error_at_the_start_only_where_a_picture_was_asked_for(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what the import system puts there for a barred module
    wanted = Trainer(
        model, arguments(tmp_path), train_dataset=dataset, callbacks=[Monitor(timeline=tmp_path / "step.png")]
    )
    with pytest.raises(ModuleNotFoundError, match=r"lowmem\[plot\]"):
        wanted.train()
    assert wanted.state.global_step == 0
    default = Trainer(model, arguments(tmp_path), train_dataset=dataset, callbacks=[Monitor()])
    with pytest.warns(UserWarning, match=r"draws no timeline.*lowmem\[plot\]"):
        default.train()
    assert (tmp_path / "trace.json").is_file()
    assert not (tmp_path / "timeline.png").exists()


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="every_s: expected seconds >= 0, got -1"):
        Monitor(every_s=-1)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log", "on_save"])
def test_an_interruption_between_blocks_says_how_to_go_on(
    event: str, model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    def interrupt(self: object, args: object, state: object, control: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    callback = type("Interrupts", (TrainerCallback,), {event: interrupt})
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=2, logging_steps=1)
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback, Monitor()])
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert note.startswith("training was interrupted")


def test_an_interruption_says_how_to_go_on(
    model: nn.Module, dataset: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    trainer = Trainer(model, args, train_dataset=dataset)
    num_visits = 0

    def interrupt(visit: Visit) -> None:
        nonlocal num_visits
        num_visits += visit.started and visit.block == 1
        if visit.started and visit.block == 1 and num_visits in (1, 6):
            raise KeyboardInterrupt

    # Inside of a visit, where the signal arrives most of the time.
    runtime_of(model).listen(interrupt)
    with pytest.raises(KeyboardInterrupt) as early:
        trainer.train()
    assert f"there is no checkpoint in {tmp_path} yet: start again" in early.value.__notes__[0]
    with pytest.raises(KeyboardInterrupt) as late:
        trainer.train()
    assert str(tmp_path / "checkpoint-2") in late.value.__notes__[0]
    assert "trainer.train(resume_from_checkpoint=True)" in late.value.__notes__[0]
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
