"""transformers collects outputs as lowmem.internals.transformers reads them; else a forward is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import output_capturing

from lowmem.errors import UnsupportedError
from lowmem.internals.hooks import is_output_capture
from lowmem.internals.transformers import CollectedOutputs, collected_keys, collecting

IDS = torch.arange(6).view(2, 3)


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
        num_local_experts=2,
        attn_implementation="eager",
    )
    return MixtralForCausalLM(config).eval()


def test_what_a_forward_collects_is_known_inside_it(model: MixtralForCausalLM) -> None:
    seen: list[frozenset[str]] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(collected_keys()))
    model(IDS, output_router_logits=True, output_attentions=True, output_hidden_states=[0])
    handle.remove()
    assert seen == [{"router_logits", "attentions", "hidden_states"}]
    assert collected_keys() == frozenset()


def test_hooks_inside_the_model_collect_into_lists_of_ours(model: MixtralForCausalLM) -> None:
    expected = model(IDS, output_router_logits=True).router_logits
    into: dict[str, list[torch.Tensor]] = {"router_logits": [], "attentions": []}
    with collecting(into):
        model.model.layers[0](
            model.model.embed_tokens(IDS),
            attention_mask=torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -1e30),
            position_embeddings=model.model.rotary_emb(torch.zeros(1, 3, 8), torch.arange(3)[None]),
        )
    assert torch.equal(into["router_logits"][0], expected[0])
    assert into["attentions"][0].shape == (2, 2, 3, 3)
    assert len(into["router_logits"]) == len(into["attentions"]) == 1


def test_collected_outputs_go_through_a_call_by_sequence_and_come_out_as_they_were() -> None:
    lists: dict[str, list[torch.Tensor]] = {"router_logits": [], "attentions": []}
    flat, maps = torch.randn(6, 4), torch.randn(2, 5, 3, 3)
    with collecting(lists):
        collected = CollectedOutputs()

        def forward() -> str:
            collector = output_capturing._active_collector.get()
            collector["router_logits"].append(flat)
            collector["attentions"].append(maps)
            return "output"

        output, by_sequence = collected.run(forward, 2)  # type: ignore[misc]
        assert by_sequence["router_logits"][0].shape == (2, 3, 4)
        assert not lists["attentions"]
        assert collected.give((output, by_sequence)) == "output"
    assert torch.equal(lists["router_logits"][0], flat)
    assert lists["attentions"] == [maps]


def test_hooks_of_transformers_are_told_from_others(model: MixtralForCausalLM) -> None:
    model(IDS, output_router_logits=True)
    hooks = list(model.model.layers[0].mlp.gate._forward_hooks.values())
    assert hooks
    assert all(is_output_capture(hook) for hook in hooks)
    assert not is_output_capture(lambda *_: None)


@pytest.mark.parametrize("use", [collected_keys, CollectedOutputs, lambda: collecting(None).__enter__()])
def test_another_way_of_collecting_is_refused(use: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(output_capturing, "_active_collector")
    with pytest.raises(UnsupportedError, match="transformers 5"):
        use()  # type: ignore[operator]
