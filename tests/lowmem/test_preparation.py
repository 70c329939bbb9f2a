"""What a streamed model looks for before each forward: adapters added, exchanged or changed since the last."""

import resource
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import lowmem
from lowmem.adapters.dora import FactoredDoraLinear
from tests.lowmem.tiny_training import lora, streamed
from tests.zoo.architectures import build

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def model(tmp_path: Path) -> PeftModel:
    return get_peft_model(streamed(build("llama", tmp_path)), lora(use_dora=True, lora_dropout=0.0))


def variants(model: PeftModel) -> set[type]:
    return {type(variant) for module in model.modules() for variant in getattr(module, "lora_variant", {}).values()}


def test_an_adapter_put_on_again_under_its_name_is_prepared_again(model: PeftModel) -> None:
    model(input_ids=IDS)
    assert variants(model) == {FactoredDoraLinear}
    config = model.peft_config["default"]
    model.add_adapter("other", lora())
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    assert variants(model) != {FactoredDoraLinear}
    model(input_ids=IDS)
    assert variants(model) == {FactoredDoraLinear}


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of the process")
def test_what_an_adapter_was_initialised_with_is_given_back(model: PeftModel) -> None:
    # Freed pieces between some that live: the heap keeps them until it is told to give them back.
    pieces = [torch.ones(1 << 14) for _ in range(2048)]
    kept = pieces[::64]
    del pieces
    before = resident_bytes()
    model(input_ids=IDS)
    assert resident_bytes() < before - (64 << 20)
    assert len(kept) == 32


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of the process")
def test_what_the_last_step_left_is_given_back_before_the_head_runs(tmp_path: Path) -> None:
    """A step's temporaries find new places from time to time; with the last one's kept, peaks grew for 100 steps."""
    model = get_peft_model(streamed(build("llama", tmp_path, changes={"hidden_size": 256})), lora())
    ids = torch.arange(320).view(4, 80) % 80
    model(input_ids=ids, labels=ids).loss.backward()
    pieces = [torch.ones(1 << 14) for _ in range(2048)]
    kept = pieces[::64]
    del pieces
    before = resident_bytes()
    loss = model(input_ids=ids, labels=ids).loss
    assert resident_bytes() < before - (64 << 20)
    assert len(kept) == 32
    loss.backward()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_base_weight_replaced_between_two_steps_is_refused(model: PeftModel) -> None:
    model(input_ids=IDS)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer
    with pytest.raises(lowmem.UnsupportedError, match="replacing or removing the parameter"):
        layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)
    model(input_ids=IDS)


def test_embeddings_are_not_kept_through_the_step(model: PeftModel) -> None:
    """As trainers prepare a model for gradient checkpointing; streamed blocks need none of it."""
    model.enable_input_require_grads()
    embedded: list[weakref.ref[torch.Tensor]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: embedded.append(weakref.ref(output)))
    loss = model(input_ids=IDS, labels=IDS).loss
    assert embedded[0]() is None
    loss.backward()
    trained = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    assert trained
    assert all(grad is not None for grad in trained.values())
