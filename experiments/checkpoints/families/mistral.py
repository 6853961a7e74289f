"""Mistral: every layer has the window, where there is one."""

from typing import Any

from experiments.checkpoints.families.base import (
    Family,
    decoder_settings,
    decoder_sizes,
    rotary,
)
from experiments.checkpoints.families.raw import SLIDING, Raw
from models.config import DecoderConfig


def config(raw: Raw) -> dict[str, Any]:
    raw.require("hidden_act", "silu", "swish")
    types = [SLIDING] * raw.layers()
    return {
        **rotary(raw),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "windows": raw.windows(types, raw.get("sliding_window", 4096)),
    }


def settings(c: DecoderConfig) -> dict[str, Any]:
    return {**decoder_settings(c), "sliding_window": None if c.windows is None else c.windows[0]}


MISTRAL = Family(
    name="mistral", architecture="MistralForCausalLM", config=config, sizes=decoder_sizes,
    settings=settings,
)  # fmt: skip
