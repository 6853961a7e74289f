"""Qwen2, Qwen2.5 and Qwen3: windows where asked for; biases in the first two, q and k norms in the
third.
"""

from typing import Any

from experiments.checkpoints.families.base import (
    Family,
    decoder_settings,
    decoder_sizes,
    rotary,
)
from experiments.checkpoints.families.raw import FULL, SLIDING, Raw, window_settings
from models.config import DecoderConfig


def _common(raw: Raw) -> dict[str, Any]:
    raw.require("hidden_act", "silu", "swish")
    layers, first = raw.layers(), raw.get("max_window_layers", 28)
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    types = raw.layer_types([FULL if n < first else SLIDING for n in range(layers)])
    return {
        **rotary(raw),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "windows": raw.windows(types, window),
    }


def qwen2_config(raw: Raw) -> dict[str, Any]:
    return {**_common(raw), "qkv_bias": True}


def qwen3_config(raw: Raw) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias"))
    return {**_common(raw), "qk_norm": True, "qkv_bias": bias, "output_bias": bias}


def qwen3_sizes(raw: Raw) -> dict[str, Any]:
    return {**decoder_sizes(raw), "head_size": raw.get("head_dim") or 128}


def settings(c: DecoderConfig) -> dict[str, Any]:
    bias = {"attention_bias": c.output_bias} if c.qk_norm else {}
    return {**decoder_settings(c), **window_settings(c.windows), **bias}


QWEN2 = Family(
    name="qwen2", architecture="Qwen2ForCausalLM", config=qwen2_config, sizes=decoder_sizes,
    settings=settings,
)  # fmt: skip
QWEN3 = Family(
    name="qwen3", architecture="Qwen3ForCausalLM", config=qwen3_config, sizes=qwen3_sizes,
    settings=settings,
)  # fmt: skip
