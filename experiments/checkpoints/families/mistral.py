"""Mistral: every layer has the window, where there is one."""

from typing import Any

from experiments.checkpoints.families.base import Family, decoder_sizes, rotary
from experiments.checkpoints.families.raw import SLIDING, Raw


def config(raw: Raw) -> dict[str, Any]:
    raw.require("hidden_act", "silu", "swish")
    types = [SLIDING] * raw.count("num_hidden_layers")
    return {
        **rotary(raw),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "windows": raw.windows(types, raw.get("sliding_window", 4096)),
    }


MISTRAL = Family(
    name="mistral", architecture="MistralForCausalLM", config=config, sizes=decoder_sizes
)
