"""Entries of transformers' MODEL_FOR_CAUSAL_LM_MAPPING that the zoo leaves out, each with the reason."""

from __future__ import annotations

SKIPPED: dict[str, str] = {
    "emu3": "AutoModelForCausalLM finds none of its text weights in an Emu3 checkpoint (all keys are reported missing)",
    "gemma3n": "its vision tower needs the timm package; its text model is in the zoo as gemma3n_text",
    "gemma4_assistant": "a draft head: its forward wants another model's hidden states and shared keys",
    "gemma4_unified_assistant": "a draft head: its forward wants another model's hidden states and shared keys",
    "git": "its loss drops the positions of an image, so that a batch of text alone does not match its labels",
    "musicgen": "MusicgenForCausalLM cannot be built from the configuration that the mapping names",
    "musicgen_melody": "MusicgenMelodyForCausalLM cannot be built from the configuration that the mapping names",
}
