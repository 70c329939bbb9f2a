"""A streamed model saved, loaded, cast, resized, pickled and written to: as a plain one, or refused first."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem
from lowmem.internals.stand_in import StandIn
from tests.lowmem.full_training import batches, full, plain_trainer, resident, weights
from tests.lowmem.tiny_training import adapter_weights
from tests.zoo.architectures import build

WEIGHTS_ARE = {
    "in memory": lowmem.Budget(device="64MiB", host="64MiB"),
    "on disk": lowmem.Budget(device="500KiB", host="0"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(params=list(WEIGHTS_ARE))
def streamed(request: pytest.FixtureRequest, folder: Path) -> PreTrainedModel:
    return opened(folder, request.param)


def opened(folder: Path, where: str = "on disk", *, table_on_disk: bool = False) -> PreTrainedModel:
    budget = WEIGHTS_ARE[where]
    model = lowmem.from_pretrained(folder, budget=budget, device="cpu")
    if table_on_disk:
        plan = lowmem.plan(folder, seq_len=16, budget=budget, device="cpu")
        plan = replace(plan, choice=replace(plan.choice, embedding_on_disk=True))
        model = lowmem.from_pretrained(folder, plan=plan, device="cpu")
        assert isinstance(model.get_input_embeddings().weight, StandIn)
    return model


def projection(model: nn.Module) -> nn.Linear:
    found = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))
    assert isinstance(found, nn.Linear)
    return found


def same_files(ours: Path, plain: Path) -> None:
    """The same tensors under the same names, whatever the shards."""
    stored = [
        {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
        for folder in (ours, plain)
    ]
    assert stored[0].keys() == stored[1].keys()
    for key, value in stored[1].items():
        assert stored[0][key].dtype == value.dtype
        assert torch.equal(stored[0][key], value), key


# Each would change a frozen weight in memory that nobody reads again.
WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "row": lambda layer: layer.weight[5].zero_(),
    "transposed": lambda layer: layer.weight.T.mul_(2),
    "list": lambda layer: torch._foreach_zero_([layer.weight]),
    "data": lambda layer: layer.weight.data[1:].add_(1),
    "detached": lambda layer: layer.weight.detach().fill_(1),
    "new data": lambda layer: setattr(layer.weight, "data", torch.zeros(layer.weight.shape)),
    "state": lambda layer: layer.state_dict()["weight"].zero_(),
    "out": lambda layer: torch.zeros(layer.weight.shape, out=layer.weight),
    "fused": lambda layer: torch._fused_sgd_(
        [layer.weight],
        [torch.ones(layer.weight.shape)],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    ),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "trainable": lambda layer: layer.weight.requires_grad_(True),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(layer.weight.shape))),
    "removed": lambda layer: delattr(layer, "weight"),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    "loaded": lambda layer: layer.load_state_dict({"weight": torch.zeros(layer.weight.shape)}),
    "assigned": lambda layer: layer.load_state_dict({"weight": torch.zeros(layer.weight.shape)}, assign=True),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_frozen_weight_is_not_written_to_in_silence(streamed: PreTrainedModel, write: str) -> None:
    layer = projection(streamed)
    ids, weight = batches(1)[0], layer.weight
    with torch.no_grad():
        before = streamed(input_ids=ids).logits
        with pytest.raises((lowmem.UnsupportedError, RuntimeError), match=r"layers\.1\.mlp\.up_proj\.weight.*frozen"):
            WRITES[write](layer)
        assert torch.equal(streamed(input_ids=ids).logits, before)
    assert layer.weight is weight
    assert not weight.requires_grad
    assert list(layer.state_dict()) == ["weight"]


def test_a_model_loads_the_weights_that_it_has_and_no_others(folder: Path, streamed: PreTrainedModel) -> None:
    state = resident(folder).state_dict()
    streamed.load_state_dict(state)
    streamed.load_state_dict(streamed.state_dict())
    state["model.layers.0.self_attn.q_proj.weight"] += 1
    with pytest.raises((lowmem.UnsupportedError, RuntimeError), match=r"layers\.0\.self_attn\.q_proj\.weight.*frozen"):
        streamed.load_state_dict(state)
    with pytest.raises((lowmem.UnsupportedError, RuntimeError), match=r"replacing .*layers\.0.*frozen"):
        streamed.load_state_dict(state, assign=True)


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "type": lambda model: model.type(torch.float16),
    "block": lambda model: model.get_submodule("model.layers.0").half(),
    "body": lambda model: model.get_submodule("model").to(dtype=torch.float16),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
@pytest.mark.parametrize("tuning", ["adapter", "full"])
@pytest.mark.parametrize("cast", CASTS)
def test_casts_are_refused_before_anything_is_cast(
    folder: Path, tmp_path: Path, cast: str, tuning: str, adapted: bool
) -> None:
    model: nn.Module = opened(folder) if tuning == "adapter" else full(folder, "device", tmp_path)
    if adapted and tuning == "full":
        pytest.skip("adapters are refused there")
    whole = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")) if adapted else model
    dtypes = [tensor.dtype for tensor in (*model.parameters(), *model.buffers())]
    with pytest.raises(lowmem.UnsupportedError, match=r'from_pretrained\(..., dtype="'):
        CASTS[cast](whole if cast not in ("block", "body") else model)
    assert [tensor.dtype for tensor in (*model.parameters(), *model.buffers())] == dtypes
    whole.to("cpu").float().to(torch.float32)


def test_evaluation_in_bf16_is_refused_first(folder: Path, tmp_path: Path) -> None:
    model = opened(folder)
    trainer = plain_trainer(model, tmp_path, bf16_full_eval=True)
    with pytest.raises(lowmem.UnsupportedError, match=r'bf16_full_eval.*dtype="bfloat16"'):
        trainer.evaluate(trainer.train_dataset)
    assert {param.dtype for param in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
def test_pickling_a_model_is_one_clear_sentence(folder: Path, adapted: bool) -> None:
    model: nn.Module = opened(folder)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(lowmem.UnsupportedError, match=r"torch\.save\(model\).*save_pretrained"):
        torch.save(model, io.BytesIO())
    with pytest.raises(lowmem.UnsupportedError, match=r"pickling .*save_pretrained"):
        torch.save(model.state_dict(), io.BytesIO())


@pytest.mark.parametrize("shard", ["2GB", "40KB"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "mixtral", "gpt2", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_a_model_is_saved_as_a_plain_one(name: str, shard: str, tmp_path: Path) -> None:
    folder = Path(build(name, tmp_path / "base"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.save_pretrained(tmp_path / "plain", max_shard_size=shard)
    ours = opened(folder, "in memory")
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    assert len(list((tmp_path / "ours").iterdir())) == len(list((tmp_path / "plain").iterdir()))
    same_files(tmp_path / "ours", tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for key, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


SAVES: dict[str, Callable[[nn.Module, Path, str], object]] = {
    "save_pretrained": lambda model, folder, size: model.save_pretrained(folder, max_shard_size=size),
    "save_pretrained by keyword": lambda model, folder, size: model.save_pretrained(
        save_directory=folder, max_shard_size=size
    ),
    "accelerate": lambda model, folder, size: Accelerator(cpu=True).save_model(model, folder, max_shard_size=size),
}


@pytest.mark.parametrize("way", SAVES)
@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
def test_saving_over_the_checkpoint_that_is_read_is_refused(way: str, adapted: bool, tmp_path: Path) -> None:
    folder = Path(build("llama", tmp_path / "base"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model: nn.Module = opened(folder)
    if adapted:
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        model = wrapped if way == "accelerate" else wrapped.unload()
    with pytest.raises(lowmem.UnsupportedError, match="read from this folder"):
        SAVES[way](model, folder, "10GB")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


class Stopped(BaseException):
    """In place of a kill, which leaves what was written as it is."""


@pytest.mark.parametrize("way", SAVES)
@pytest.mark.parametrize("sizes", [("40KB", "10GB"), ("10GB", "40KB"), ("40KB", "25KB"), ("10GB", "10GB")])
def test_a_save_over_an_older_one_keeps_it_until_the_new_one_is_whole(
    way: str, sizes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = (opened(Path(build("llama", tmp_path / str(seed), seed=seed))) for seed in (0, 1))
    saved, strangers = tmp_path / "saved", ("model_ema.safetensors", "notes.txt", "model-99999-of-99999.safetensors")
    SAVES[way](older, saved, sizes[0])
    if not (saved / "config.json").exists():
        older.config.save_pretrained(saved)
    for name in strangers:
        (saved / name).write_text("ours")
    expected = resident(saved).state_dict()

    def stop(*args: object, **kwargs: object) -> None:
        raise Stopped

    # Amid the new weights, and when they are there and not yet on the disk.
    writer = "safetensors.torch.save_file" if way == "accelerate" else "transformers.modeling_utils.safe_save_file"
    for place in (writer, "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            with pytest.raises(Stopped):
                SAVES[way](newer, saved, sizes[1])
        found = resident(saved).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), place
    SAVES[way](newer, saved, sizes[1])
    found, wanted = resident(saved).state_dict(), resident(tmp_path / "1").state_dict()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    assert all((saved / name).read_text() == "ours" for name in strangers)
    index = saved / "model.safetensors.index.json"
    listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert {file.name for file in saved.glob("*.safetensors")} - set(strangers) == listed
    assert not list(saved.glob(".saving-*"))


def test_an_adapter_of_the_model_itself_is_saved_as_by_a_plain_one(folder: Path, tmp_path: Path) -> None:
    for name, model in {"plain": resident(folder), "ours": opened(folder)}.items():
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
        for _ in range(2):
            model.save_pretrained(tmp_path / name)
    same_files(tmp_path / "ours", tmp_path / "plain")
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("ours", "plain")]
    assert names[0] == names[1]


@pytest.mark.parametrize("place", ["peft.peft_model.safe_save_file", "os.fsync"])
def test_an_adapter_saved_over_an_older_one_keeps_it_until_the_new_one_is_whole(
    place: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise Stopped

    found = {}
    for name, base in {"plain": resident(folder), "ours": opened(folder)}.items():
        torch.manual_seed(0)
        saved = tmp_path / name
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
        model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
        model.save_pretrained(str(saved))
        (saved / "README.md").write_text((saved / "README.md").read_text() + "\nOf our own.\n")
        files = [saved / "adapter_model.safetensors", saved / "other" / "adapter_model.safetensors"]
        before = [file.read_bytes() for file in files]
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(1.0)
        if name == "ours":
            with monkeypatch.context() as patch:
                patch.setattr(place, stop)
                with pytest.raises(Stopped):
                    model.save_pretrained(str(saved))
            assert [file.read_bytes() for file in files] == before
        model.save_pretrained(str(saved))
        assert "Of our own." in (saved / "README.md").read_text()
        assert before[0] != files[0].read_bytes()
        found[name] = {str(file.relative_to(saved)): file.read_bytes() for file in saved.rglob("*.safetensors")}
        names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "other"]
        assert sorted(file.name for file in saved.iterdir()) == names
    assert found["ours"] == found["plain"]


@pytest.mark.parametrize("table_on_disk", [False, True])
def test_an_adapter_on_the_embedding_saves_its_table(folder: Path, tmp_path: Path, table_on_disk: bool) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    for name, base in {
        "plain": resident(folder),
        "ours": opened(folder, "in memory", table_on_disk=table_on_disk),
    }.items():
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        trainer = plain_trainer(model, tmp_path / name, optim="sgd", label_names=["labels"])
        trainer.train()
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            trainer.save_model(str(tmp_path / name))
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain")]
    assert stored[0].keys() == stored[1].keys()
    for key, value in stored[1].items():
        torch.testing.assert_close(stored[0][key], value, rtol=1e-6, atol=1e-6, msg=key)
    assert PeftModel.from_pretrained(resident(folder), tmp_path / "ours") is not None


def test_an_unloaded_model_is_saved_whole(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(opened(folder), LoraConfig(r=2, target_modules="all-linear"))
    model.unload().save_pretrained(tmp_path / "ours")
    resident(folder).save_pretrained(tmp_path / "plain")
    same_files(tmp_path / "ours", tmp_path / "plain")


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
@pytest.mark.parametrize("size", ["10GB", "40KB"])
def test_accelerate_saves_what_it_saves_of_a_plain_model(
    folder: Path, tmp_path: Path, adapted: bool, size: str
) -> None:
    for name, base in {"plain": resident(folder), "ours": opened(folder)}.items():
        torch.manual_seed(0)
        model: nn.Module = base
        if adapted:
            model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
        Accelerator(cpu=True).save_model(model, tmp_path / name, max_shard_size=size)
    same_files(tmp_path / "ours", tmp_path / "plain")
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == sorted(
        file.name for file in (tmp_path / "plain").iterdir()
    )
    index = tmp_path / "ours" / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text()) == json.loads((tmp_path / "plain" / index.name).read_text())
    with pytest.raises(lowmem.UnsupportedError, match="safe_serialization"):
        Accelerator(cpu=True).save_model(model, tmp_path / "pickled", safe_serialization=False)


def test_checkpoints_of_a_trained_head_resume(folder: Path, tmp_path: Path) -> None:
    trained = {}
    for name, make in {"plain": resident, "ours": opened}.items():
        for begun in (None, str(tmp_path / name / "checkpoint-2")):
            model = make(folder)
            model.requires_grad_(False)
            model.lm_head.weight.requires_grad_(True)
            trainer = plain_trainer(model, tmp_path / name, save_strategy="steps", save_steps=2)
            trainer.train(resume_from_checkpoint=begun)
            trained[name, begun is not None] = weights(model)
        assert all(torch.equal(trained[name, True][key], value) for key, value in trained[name, False].items())
    for key, value in trained["plain", True].items():
        torch.testing.assert_close(trained["ours", True][key], value, rtol=1e-6, atol=1e-6, msg=key)
    assert not torch.equal(trained["ours", True]["lm_head.weight"], weights(resident(folder))["lm_head.weight"])


@pytest.mark.parametrize("table_on_disk", [False, True])
def test_added_tokens_train_and_are_saved(folder: Path, tmp_path: Path, table_on_disk: bool) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trained = {}
    bases = {"plain": resident(folder), "ours": opened(folder, "in memory", table_on_disk=table_on_disk)}
    for name, base in bases.items():
        torch.manual_seed(0)
        base.resize_token_embeddings(base.config.vocab_size + 2)
        assert base.get_output_embeddings().weight.shape[0] == base.config.vocab_size
        model = get_peft_model(base, config)
        trainer = plain_trainer(model, tmp_path / name, optim="sgd", label_names=["labels"])
        trainer.train()
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            trainer.save_model(str(tmp_path / name))
        trained[name] = adapter_weights(trainer)  # type: ignore[arg-type]
    assert any("embed_tokens" in key for key in trained["ours"])
    for key, value in trained["plain"].items():
        torch.testing.assert_close(trained["ours"][key], value, rtol=1e-5, atol=1e-6, msg=key)
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain")]
    assert stored[0].keys() == stored[1].keys()
    again = resident(folder)
    again.resize_token_embeddings(again.config.vocab_size + 2)
    assert PeftModel.from_pretrained(again, tmp_path / "ours") is not None


def test_resizing_without_room_or_with_every_weight_trained_is_refused_first(folder: Path, tmp_path: Path) -> None:
    tight = opened(folder, "in memory", table_on_disk=True)
    with pytest.raises(lowmem.UnsupportedError, match=r"embedding table on disk.*Budget\.device"):
        tight.resize_token_embeddings(1_000_000)
    assert isinstance(tight.get_input_embeddings().weight, StandIn)
    tuned = full(folder, "device", tmp_path)
    with pytest.raises(lowmem.UnsupportedError, match=r"resize_token_embeddings.*full"):
        tuned.resize_token_embeddings(200)


@pytest.mark.parametrize("tuning", ["adapter", "full"])
@pytest.mark.parametrize("method", ["save_pretrained", "load_state_dict", "resize_token_embeddings"])
def test_a_model_that_nobody_keeps_says_so(method: str, tuning: str, folder: Path, tmp_path: Path) -> None:
    argument = {"save_pretrained": tmp_path / "saved", "load_state_dict": {}, "resize_token_embeddings": 100}[method]
    model = opened(folder) if tuning == "adapter" else full(folder, "device", tmp_path)
    bound = getattr(model, method)
    if hasattr(bound, "__self__") and bound.__self__ is model:
        pytest.skip("a method of the class holds its model")
    del model
    with pytest.raises(RuntimeError, match=r"keep what lowmem\.from_pretrained returns in a variable"):
        bound(argument)
    assert not (tmp_path / "saved").exists()
