"""The command line: what each command prints, its exit status, and errors in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowmem
from lowmem import cli, doctor
from lowmem.machines.rates import Pace, Stopwatch, probe_copy
from offload import Trace, probe_scratch
from tests.lowmem.test_report import facts
from tests.zoo.architectures import build

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


class Run:
    """Runs the command line in this process, through its real entry."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        self._monkeypatch.setattr(sys, "argv", ["lowmem", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        self.out, self.err = self._capsys.readouterr()
        return int(exited.value.code or 0)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.splitlines()]


def small(*more: object) -> Sequence[object]:
    return ("--seq-len", 16, "--device", "2MiB", "--host", "0", "--lora-r", 4, *more)


def test_plan_prints_the_table(run: Run, llama: Path) -> None:
    assert run("plan", llama, *small("--batch-size", 2)) == 0
    assert run.out.splitlines()[0].startswith("FITS: device")
    assert "LoRA r=4 on all-linear" in run.out
    assert run.err == ""


@pytest.mark.parametrize("options", [["--lora-r", 0], ["--dora", "--lora-r", 0], ["--dora", "--tuning", "full"]])
def test_a_plan_without_an_adapter_does_not_plan_one(options: list[object], run: Run, llama: Path) -> None:
    assert run("plan", llama, "--seq-len", 16, *options) == 2
    assert run.err.startswith(f"lowmem: {options[0]}")
    assert run.out == ""


def test_plan_prints_json_that_can_be_read_back(run: Run, llama: Path) -> None:
    from lowmem.planning.plan import Plan

    assert run("plan", llama, *small("--json", "--task", "grpo", "--completion-tokens", 8)) == 0
    (line,) = run.lines()
    plan = Plan.from_dict(line)
    assert (plan.task, plan.passes, plan.seq_len) == ("grpo", 10, 16)


def test_plan_exits_with_1_where_nothing_fits_and_says_what_would(run: Run, llama: Path) -> None:
    assert run("plan", llama, "--seq-len", 16, "--device", "1KiB", "--host", "0") == 1
    assert "DOES NOT FIT" in run.out
    assert "smallest device budget that fits" in run.out


def test_plan_passes_adapter_options_on(run: Run, llama: Path) -> None:
    adapter = ("--dora", "--target-modules", "q_proj,v_proj", "--lora-dropout", 0.1)
    assert run("plan", llama, *small(*adapter)) == 0
    assert "DoRA r=4 on q_proj, v_proj, dropout 0.1" in run.out


def test_plan_of_full_tuning_in_chunks_needs_no_adapter(run: Run, llama: Path) -> None:
    given = ("--seq-len", 16, "--device", "4MiB", "--host", "4MiB", "--tuning", "full", "--chunk-tokens", 8, "--json")
    assert run("plan", llama, *given) == 0
    (line,) = run.lines()
    assert (line["job"]["tuning"], line["choice"]["chunk_tokens"]) == ("full", 8)


def test_plan_counts_masters_and_moments_as_they_are_kept(run: Run, llama: Path) -> None:
    full = ("--tuning", "full", "--json", "--seq-len", 16, "--device", "32MiB", "--host", "0", "--on", "cpu")
    assert run("plan", llama, *full, "--masters", "bf16", "--state-dtype", "8bit") == 0
    (found,) = run.lines()
    adamw = partial(lowmem.optim.AdamW, state_dtype="8bit", writer="stochastic")
    budget, job = lowmem.Budget(device="32MiB", host="0"), {"seq_len": 16, "device": "cpu"}
    planned = lowmem.plan(llama, tuning="full", masters="bf16", optimizer=adamw, budget=budget, **job)  # type: ignore[arg-type]
    assert found == planned.to_dict()
    assert planned.compute_dtype == "bfloat16"
    assert run("plan", llama, *full, "--state-dtype", "8bit", "--optimizer", "galore") == 2
    assert "only AdamW" in run.err


def test_plan_is_told_of_runs_without_autocast(run: Run, llama: Path) -> None:
    found = []
    for option in ("--no-autocast", "--autocast"):
        assert run("plan", llama, *small("--dtype", "bfloat16", "--on", "cpu", option, "--json")) == 0
        found += run.lines()
    alone, usual = found
    assert (alone["job"]["autocast"], usual["job"]["autocast"]) == (False, True)
    assert alone["smallest_device_bytes"] > usual["smallest_device_bytes"]
    assert run("plan", llama, *small("--dtype", "bfloat16", "--on", "cpu", "--no-autocast")) == 0
    assert "bfloat16 without autocast on cpu" in run.out


@pytest.mark.parametrize("option", ["--use-reference", "--no-use-reference"])
def test_plan_counts_the_reference_as_asked(run: Run, llama: Path, option: str) -> None:
    assert run("plan", llama, *small("--task", "dpo", option, "--json")) == 0
    (line,) = run.lines()
    assert line["job"]["uses_reference"] is (option == "--use-reference")


def test_the_version_is_printed_by_the_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "lowmem", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{lowmem.__version__}\n"


def test_plan_measures_when_asked(run: Run, llama: Path) -> None:
    assert run("plan", llama, *small("--measure")) == 0
    assert "measured" in run.out
    assert "assumed" not in run.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "pretrain"], "--task pretrain: expected one of sft"),
        (["--device", "12XB"], "--device: expected bytes"),
        (["--tuning", "half"], "--tuning half is not supported"),
        (["--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["--on", "mps"], "--on mps is not supported"),
        (["--disk-gbps", "0"], "--disk-gbps 0.0: expected a number above 0"),
        (["--examples", "0"], "--examples 0: expected at least 1\n"),
        (["--micro-batch", "0"], "--micro-batch 0: expected at least 1 sequence; leave it out to let lowmem choose\n"),
        (["--num-steps", "3", "--examples", "3"], "give --num-steps or --examples, not both"),
        (["--epochs", "nan", "--examples", "10"], "--epochs nan: expected a number above 0"),
        (["--epochs", "3"], "--epochs 3.0 without --examples"),
        (["--tflops", "nan", "--gpu", "T4"], "--tflops nan: expected a number above 0"),
        (["--tflops", "100"], "--tflops 100.0 without --gpu"),
        (["--pcie-gbps", "10"], "--pcie-gbps 10.0 belongs to a card; give --gpu too"),
        (["--vram", "24GiB"], "--vram 24GiB belongs to a card; give --gpu too"),
        (["--gpu", "Foo", "--tflops", "3"], "with its numbers: --vram, --tflops and --pcie-gbps."),
        (["--gpu", "RTX 4060", "--device", "400GiB"], "--device 400GiB is more than the RTX 4060 has, 8.00 GiB"),
        (["--gpu", "RTX 4060", "--on", "cpu"], "--on cpu with --gpu or another machine's numbers"),
        (["--ram", "8GiB", "--measure"], "--measure with --gpu or another machine's numbers: it is of this one"),
        (["--lora-dropout", "nan"], "--lora-dropout nan: expected at least 0"),
        (["--search", "--batch-size", "8"], "--batch-size 8 with --search, which finds the batch"),
        (["--target-modules", "nothing_like_it"], "nothing_like_it"),
    ],
)
def test_bad_options_are_one_line_and_status_2(run: Run, llama: Path, arguments: list[str], message: str) -> None:
    assert run("plan", llama, "--seq-len", 16, *arguments) == 2
    assert run.err.startswith("lowmem: ")
    assert message in run.err
    assert run.err.count("\n") == 1
    assert "Traceback" not in run.err


@pytest.mark.parametrize("command", ["plan", "doctor", "bench"])
def test_a_model_that_is_not_there_is_one_line_and_status_2(run: Run, command: str, tmp_path: Path) -> None:
    assert run(command, tmp_path / "none") == 2
    assert (
        run.err
        == f"lowmem: {tmp_path / 'none'}: no such folder; give a local folder or a hub id of the form owner/name\n"
    )


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_what_is_neither_here_nor_on_the_hub_says_what_is_beside_it(
    run: Run, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(command, "models/nothere") == 2
    assert run.err == (
        "lowmem: models/nothere: neither a local folder (models has small) nor a hub repository that can be reached: "
        "HF_HUB_OFFLINE is set, so that the hub was not asked, and its cache does not have it\n"
    )
    assert run(command, "bad/nothere") == 2
    assert "bad/nothere: neither a local folder nor a hub repository that can be reached: HF_HUB_OFFLINE" in run.err


def test_damaged_files_are_one_line_and_status_2(run: Run, llama: Path, tmp_path: Path) -> None:
    damage(llama, tmp_path)
    assert run("plan", tmp_path, *small()) == 2
    assert run.err.startswith(f"lowmem: {tmp_path}")


def damage(source: Path, target: Path) -> Path:
    """Copy a checkpoint and cut its last shard short."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    shard = max(target.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    return shard


def test_our_own_bugs_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_doctor_finds_this_machine_fit(run: Run, llama: Path) -> None:
    assert run("doctor", llama, "--json") == 0
    checks = {line["name"]: line for line in run.lines()}
    for name in ("torch", "transformers", "RAM", "memory limit", "GPU", "defaults", "files", "architecture", "disk"):
        assert checks[name]["finding"]
        assert not checks[name]["is_broken"]
    assert "LlamaForCausalLM, 3 blocks" in str(checks["architecture"]["finding"])
    assert "GB/s" in str(checks["disk"]["finding"])


def test_doctor_prints_a_line_for_each_check(run: Run) -> None:
    assert run("doctor") == 0
    assert all(line.startswith(("ok ", "note", "    ")) for line in run.out.splitlines())


def test_doctor_exits_with_1_and_names_a_damaged_shard(run: Run, llama: Path, tmp_path: Path) -> None:
    shard = damage(llama, tmp_path)
    assert run("doctor", tmp_path) == 1
    assert "FAIL  files" in run.out
    assert shard.name in run.out


def test_doctor_names_an_architecture_that_cannot_be_streamed(run: Run, llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    assert run("doctor", tmp_path) == 1
    assert "FAIL  architecture" in run.out


def test_doctor_names_an_old_or_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=99.1", 'trl>=1.0; extra == "train"'])
    found = {check.name: check for check in doctor.examine(None)}
    assert found["torch"].is_broken
    assert found["torch"].remedy == "pip install -U 'torch>=99.1'"
    assert not found["trl"].is_broken


def test_plan_for_another_machine_searches_its_batch(run: Run, llama: Path) -> None:
    machine = ("--gpu", "rtx 4090", "--ram", "64GiB", "--disk-gbps", 7)
    assert run("plan", llama, "--seq-len", 16, "--search", "--examples", 1000, "--epochs", 2, *machine) == 0
    lines = run.out.splitlines()
    assert lines[0].startswith("FITS: device")
    assert re.search(r" per step of batch \d+ x 16 tokens, weights in bfloat16, .* tokens/s, limited by", lines[1])
    assert lines[2].startswith("2 x 1,000 examples: ")
    assert run("plan", llama, "--seq-len", 16, "--gpu", "RTX 9999") == 2
    assert "not in the table of cards" in run.err


def test_bench_prints_one_json_line_for_each_measurement(run: Run, llama: Path) -> None:
    assert run("bench", llama) == 0
    lines = run.lines()
    assert {line["probe"] for line in lines} == {"disk", "copy", "compute", "blocks", "pace", "kept"}
    assert sum(bool(line.get("is_chosen")) for line in lines) == 1
    measured = [line for line in lines if line["probe"] in ("disk", "copy", "compute")]
    rates = [line.get("gb_per_s", line.get("gflop_per_s")) for line in measured]
    assert all(isinstance(rate, float) and rate > 0 for rate in rates)


@pytest.mark.parametrize("slower", [1.0, 1.1, 1.4])
def test_bench_says_where_the_machine_was_slower_for_a_while(
    run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    took_s = iter([0.01, 0.01 * slower, 0.01, 0.01])
    monkeypatch.setattr(Pace, "look", lambda pace: pace.looks_s.append(next(took_s)))
    assert run("bench", llama) == 0
    (line,) = [line for line in run.lines() if line["probe"] == "pace"]
    assert line["slowest_over_fastest"] == slower
    assert ("1.40 times as slow" in run.err) is (slower == 1.4)


def test_bench_says_where_the_machine_was_slower_all_the_while_and_keeps_the_rates_of_before(
    run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took_s = 0.01
    monkeypatch.setattr(Pace, "look", lambda pace: pace.looks_s.append(took_s))
    assert run("bench", llama) == 0
    assert run.err == ""
    before = lowmem.plan(llama, seq_len=8, device="cpu", budget=lowmem.Budget(device="64MiB", host=0)).rates
    took_s = 0.034
    assert run("bench", llama) == 0
    assert "a fixed product took 3.4 times as long as it has here before" in run.err
    assert "the rates that were kept before stay" in run.err
    (pace, kept) = run.lines()[-2:]
    assert (pace["slower_than_before"], pace["is_disturbed"], kept["is_of_before"]) == (3.4, True, True)
    assert lowmem.plan(llama, seq_len=8, device="cpu", budget=lowmem.Budget(device="64MiB", host=0)).rates == before


def test_pace_is_a_products_and_changes_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    ticks = iter(range(1000))
    pace = Pace(Stopwatch(torch.device("cpu"), lambda: next(ticks) * 0.05))
    assert pace.look() == pytest.approx(0.05)
    assert pace.slowest_over_fastest == pytest.approx(1.0)
    assert torch.equal(torch.rand(4), expected)


def test_bench_measures_what_is_written_and_read_back_where_it_is_told_to(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.machines.bench.probe_scratch", partial(probe_scratch, max_bytes=1 << 26))
    (tmp_path / "state").mkdir()
    assert run("bench", llama, "--disk", tmp_path / "state") == 0
    (line,) = [line for line in run.lines() if line["probe"] == "written and read back"]
    assert line["gb_per_s"] > 0
    job = {"tuning": "full", "device": "cpu", "seq_len": 8}
    budget = lowmem.Budget(device="64MiB", host=0, disk=tmp_path / "state")
    kept = lowmem.plan(llama, budget=budget, **job).rates
    assert kept.scratch_bytes_per_s is not None
    assert kept.scratch_bytes_per_s / 1e9 == pytest.approx(line["gb_per_s"], abs=1e-3)
    # One that is not told where leaves what is known.
    assert run("bench", llama) == 0
    assert lowmem.plan(llama, budget=budget, **job).rates.scratch_bytes_per_s == kept.scratch_bytes_per_s


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        ("file", "is a file; give a folder"),
        ("absent", "no such folder; make it first"),
        ("-5", "no such folder; make it first"),
        ("", "got an empty path"),
        ("closed", "cannot be written to"),
    ],
)
def test_bench_refuses_what_is_no_folder_to_write_to_before_it_measures(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    if disk == "closed":
        # Root may write everywhere.
        monkeypatch.setattr("lowmem.machines.bench.os.access", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    assert run("bench", llama, "--disk", disk) == 2
    assert message in run.err
    assert (run.out, run.err.count("\n")) == ("", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file"]


def test_copies_are_measured_in_bytes_written() -> None:
    assert probe_copy(torch.device("cpu")) > 1e7


def test_merge_writes_a_checkpoint(run: Run, llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    peft_model.save_pretrained(tmp_path / "adapter")
    assert run("merge", llama, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged") == 0
    assert run.out == f"{tmp_path / 'merged'}\n"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    expected = peft_model.merge_and_unload().state_dict()
    changed = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[changed], expected[changed], atol=1e-2, rtol=1e-2)
    untouched = "model.layers.0.self_attn.k_proj.weight"
    stored = {name: value for file in llama.glob("*.safetensors") for name, value in load_file(file).items()}
    assert torch.equal(merged[untouched], stored[untouched].float())


@pytest.mark.filterwarnings("default:rounding to:UserWarning")
def test_merge_says_what_rounding_loses(run: Run, llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    for name, param in peft_model.named_parameters():
        param.data.mul_(1e-4 if "lora_B" in name else 1.0)
    peft_model.save_pretrained(tmp_path / "adapter")
    merge = ["merge", llama, "--adapter", tmp_path / "adapter", "--dtype"]
    assert run(*merge, "bfloat16", "--output", tmp_path / "merged") == 0
    (said,) = [line for line in run.err.splitlines() if line.startswith("lowmem: ")]
    assert said.startswith("lowmem: rounding to bfloat16 lost ")
    assert "--dtype float32" in said
    assert run(*merge, "float32", "--output", tmp_path / "exact") == 0
    assert "lowmem: " not in run.err


def test_merge_into_a_full_folder_is_refused(run: Run, llama: Path) -> None:
    assert run("merge", llama, "--adapter", llama, "--output", llama) == 2
    assert run.err.startswith("lowmem: ")


def save_trace(path: Path, *, num_steps: int = 3) -> Path:
    """Steps of 10 s: a read and a forward, then a backward; each step a second longer than the one before."""
    trace = Trace()
    second, now = 10**9, 5 * 10**9
    trace.add("disk", "resident", start_ns=0, end_ns=second, nbytes=7)
    for step in range(num_steps):
        length = (10 + step) * second
        trace.add("disk", "block 0", start_ns=now, end_ns=now + 2 * second, nbytes=10**9)
        trace.add("compute", "forward 0", start_ns=now, end_ns=now + 5 * second, nbytes=0)
        trace.add("compute", "forward 1", start_ns=now + 5 * second, end_ns=now + 6 * second, nbytes=0)
        trace.add("compute", "backward 1", start_ns=now + 6 * second, end_ns=now + 7 * second, nbytes=0)
        trace.add("compute", "backward 0", start_ns=now + 7 * second, end_ns=now + length, nbytes=0)
        now += length
    trace.save(path)
    return path


def test_trace_sums_up_each_step(run: Run, tmp_path: Path) -> None:
    assert run("trace", save_trace(tmp_path / "trace.json")) == 0
    lines = run.out.splitlines()
    assert lines[0] == "step 1: 10.000 s, compute 100%, disk 20%, 1.00 GB read"
    assert [line.split(":")[0] for line in lines[:3]] == ["step 1", "step 2", "step 3"]
    assert "Where the 11.000 s of step 2 went" in lines  # the one of median length


def test_trace_of_a_runs_folder_tells_waits_by_cause(run: Run, tmp_path: Path) -> None:
    trace, second = Trace(), 10**9
    trace.add("stall", "block 0", 0, 4 * second)
    trace.add("disk", "block 0", 0, 2 * second, nbytes=10**9)
    trace.add("copy", "block 0", second, 3 * second, nbytes=10**9)
    trace.add("compute", "forward 0", 4 * second, 6 * second)
    trace.add("compute", "backward 0", 6 * second, 9 * second)
    trace.add("disk", "block 1", 9 * second, 10 * second, nbytes=1)
    trace.save(tmp_path / "trace.json")
    assert run("trace", tmp_path) == 0
    text = run.out
    # What lies before the first forward belongs to no step.
    assert "Where the 6.000 s of step 1 went" in text
    assert "computing: forward" in text

    shifted = Trace()
    for lane, name, start, end in (
        ("compute", "forward 0", 0, 1),
        ("stall", "block 1", 1, 5),
        ("disk", "block 1", 1, 3),
        ("copy", "block 1", 2, 4),
        ("compute", "forward 1", 5, 7),
        ("compute", "backward 1", 7, 8),
        ("compute", "backward 0", 8, 10),
    ):
        shifted.add(lane, name, start * second, end * second, nbytes=1)
    shifted.save(tmp_path / "trace.json")
    assert run("trace", tmp_path) == 0
    numbers = {line.split("  ")[1].strip(): line.split() for line in run.out.splitlines() if " s  " in line}
    assert numbers["waiting: reading from disk"][-3:] == ["2.000", "s", "20.0%"]
    assert numbers["waiting: copying to the device"][-3:] == ["1.000", "s", "10.0%"]
    assert numbers["waiting: nothing under way"][-3:] == ["1.000", "s", "10.0%"]
    assert "waited longest for: block 1 4.000 s" in run.out


@pytest.mark.parametrize(("arguments", "step"), [([], 2), (["--step", "3"], 3)])
def test_trace_draws_the_median_step_or_the_one_asked_for(
    run: Run, tmp_path: Path, arguments: list[str], step: int
) -> None:
    png = tmp_path / "step.png"
    assert run("trace", save_trace(tmp_path / "trace.json"), "--png", png, *arguments) == 0
    assert f"step {step} drawn: {png}" in run.out
    assert png.read_bytes()[:4] == PNG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not a trace file"),
        ("[]", "no list of traceEvents"),
        ('{"traceEvents": []}', "holds no spans"),
        ('{"traceEvents": [{"ph": "X", "ts": 1}]}', "an event is not one of ours"),
    ],
)
def test_files_that_are_no_traces_are_one_line_and_status_2(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    assert run("trace", tmp_path / "trace.json") == 2
    assert message in run.err
    assert run.err.count("\n") == 1


def test_a_report_is_told_from_a_trace_and_named_where_there_is_no_trace(run: Run, tmp_path: Path) -> None:
    assert run("trace", tmp_path) == 2
    assert "report.html" not in run.err
    (tmp_path / "report.html").write_text("<!doctype html>")
    assert run("trace", tmp_path / "report.html") == 2
    assert "this is the report of a run: open it in a browser" in run.err
    assert "trace.json" in run.err
    # Of a run that was killed.
    assert run("trace", tmp_path) == 2
    assert "no such file; give the output folder of a run" in run.err
    assert f"{tmp_path / 'report.html'} is there" in run.err


def test_planned_and_measured_compute_are_of_the_same_things(run: Run, tmp_path: Path) -> None:
    trace, second = Trace(), 10**9
    for lane, name, start, end in (
        ("compute", "forward 0", 0, 2),
        ("stall", "block 0", 3, 4),
        ("compute", "backward 0", 4, 7),
        ("compute", "forward 0", 10, 11),
    ):
        trace.add(lane, name, start * second, end * second, nbytes=0)
    known = facts(num_points=1).to_dict()
    known["lowmem_run"]["starts_ns"] = [(1, 0)]  # type: ignore[index]
    trace.save(tmp_path / "trace.json", notes=known)
    assert run("trace", tmp_path) == 0
    (row,) = [line for line in run.out.splitlines() if line.strip().startswith("compute, all")]
    # All but the second of waiting: the head, the loss and the optimizer run between the blocks' spans.
    assert row.split()[-4:] == ["1.5", "s", "10", "s"]


def test_a_step_that_the_trace_does_not_have_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("trace", save_trace(tmp_path / "trace.json"), "--step", 9) == 2
    assert "steps 1 to 3" in run.err


@pytest.mark.parametrize(
    ("starts_s", "steps"),
    [
        # Each forward that follows a backward: at 5, 15 and 26 s.
        (None, {1: 10.0, 2: 11.0, 3: 12.0}),
        ([(7, 4), (8, 14), (9, 25)], {7: 10.0, 8: 11.0, 9: 12.0}),
        # Two batches are accumulated in step 7.
        ([(7, 4), (8, 25)], {7: 21.0, 8: 12.0}),
        # The beginning of earlier ones is not kept.
        ([(8, 14), (9, 25)], {8: 11.0, 9: 12.0}),
    ],
)
def test_steps_have_the_numbers_that_they_have_in_the_run(
    run: Run, tmp_path: Path, starts_s: list[tuple[int, int]] | None, steps: dict[int, float]
) -> None:
    file = save_trace(tmp_path / "trace.json")
    if starts_s is not None:
        document = json.loads(file.read_text())
        known = facts(num_points=9).to_dict()
        known["lowmem_run"]["starts_ns"] = [(step, second * 10**9) for step, second in starts_s]  # type: ignore[index]
        file.write_text(json.dumps({**document, "otherData": known}))
    assert run("trace", file) == 0
    seen = re.findall(r"^step (\d+): ([\d.]+) s", run.out, re.MULTILINE)
    assert {int(number): float(took) for number, took in seen} == steps
    assert run("trace", file, "--png", tmp_path / "step.png", "--step", max(steps)) == 0
    assert f"step {max(steps)} drawn" in run.out
    assert run("trace", file, "--png", tmp_path / "step.png", "--step", max(steps) + 1) == 2
    assert f"the trace has steps {min(steps)} to {max(steps)}" in run.err


def test_a_trace_without_steps_is_shown_whole(run: Run, tmp_path: Path) -> None:
    trace = Trace()
    trace.add("disk", "block 0", start_ns=0, end_ns=10**9, nbytes=1)
    trace.save(tmp_path / "trace.json")
    assert run("trace", tmp_path / "trace.json") == 0
    assert run.out.startswith("step 1: 1.000 s, disk 100%")


def test_refusals_name_options_as_they_are_typed() -> None:
    for said, typed in (
        ("raise Budget.host or give Budget(disk=...), or a device", "raise --host or give --disk, or a device"),
        ('use tuning="full", dtype=torch.float32.', "use --tuning full, --dtype float32."),
        (
            "use_reference=False for /a/tuning=x/device and model.device",
            "--no-use-reference for /a/tuning=x/device and model.device",
        ),
        ("hidden_size=48 and optimizer_state", "hidden_size=48 and optimizer_state"),
    ):
        assert cli._as_typed(said) == typed


def test_help_loads_no_training_libraries() -> None:
    program = (
        "import sys; sys.argv = ['lowmem', '--help']\n"
        "import lowmem.cli\n"
        "try: lowmem.cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'transformers', 'trl', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "doctor" in done.stdout
