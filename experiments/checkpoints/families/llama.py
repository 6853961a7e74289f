"""Llama 1 to 3 and SmolLM2; SmolLM3 and Granite, which differ in little."""

from typing import Any

from experiments.checkpoints.families.base import (
    Family,
    decoder_settings,
    decoder_sizes,
    rotary,
)
from experiments.checkpoints.families.raw import FULL, SLIDING, Raw, window_settings
from models.config import DecoderConfig


def llama_config(raw: Raw) -> dict[str, Any]:
    raw.require("hidden_act", "silu", "swish")
    bias = bool(raw.get("attention_bias"))
    return {
        **rotary(raw),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(raw.get("mlp_bias")),
    }


def smollm3_config(raw: Raw) -> dict[str, Any]:
    """Every fourth layer has no positions; it may have a window."""
    layers, every = raw.layers(), raw.count("no_rope_layer_interval", 4)
    turned = raw.get("no_rope_layers") or [int((n + 1) % every != 0) for n in range(layers)]
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    types = raw.layer_types([SLIDING if window and not here else FULL for here in turned])
    return {
        **llama_config(raw),
        **rotary(raw, theta=2e6),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "unrotated": tuple(n for n, here in enumerate(turned) if not here),
        "windows": raw.windows(types, window),
    }


def granite_config(raw: Raw) -> dict[str, Any]:
    return {
        **llama_config(raw),
        "embed_scale": raw.number("embedding_multiplier", 1.0),
        "attention_scale": raw.number("attention_multiplier", 1.0),
        "residual_scale": raw.number("residual_multiplier", 1.0),
        "logit_scale": 1 / raw.number("logits_scaling", 1.0),
    }


def llama_settings(c: DecoderConfig) -> dict[str, Any]:
    return {**decoder_settings(c), "attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def smollm3_settings(c: DecoderConfig) -> dict[str, Any]:
    turned = [int(n not in c.unrotated) for n in range(c.layers)]
    return {**llama_settings(c), **window_settings(c.windows), "no_rope_layers": turned}


def granite_settings(c: DecoderConfig) -> dict[str, Any]:
    return {
        **llama_settings(c),
        "embedding_multiplier": c.embed_scale,
        "attention_multiplier": c.head_size**-0.5 if c.attention_scale is None
        else c.attention_scale,
        "residual_multiplier": c.residual_scale,
        "logits_scaling": 1 / c.logit_scale,
    }  # fmt: skip


LLAMA = Family(
    name="llama", architecture="LlamaForCausalLM", config=llama_config, sizes=decoder_sizes,
    settings=llama_settings,
)  # fmt: skip
SMOLLM3 = Family(
    name="smollm3", architecture="SmolLM3ForCausalLM", config=smollm3_config, sizes=decoder_sizes,
    settings=smollm3_settings,
)  # fmt: skip
GRANITE = Family(
    name="granite", architecture="GraniteForCausalLM", config=granite_config, sizes=decoder_sizes,
    settings=granite_settings,
)  # fmt: skip
