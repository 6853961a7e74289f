"""Gemma 2 and the text models of Gemma 3: norms around attention and MLP, kept as their distance
from one, and windows that alternate; soft caps in the second, q and k norms in the third.
"""

import math
from typing import Any

from experiments.checkpoints.families.base import (
    LLAMA_BLOCK,
    Family,
    decoder_settings,
    decoder_sizes,
    rotary,
)
from experiments.checkpoints.families.raw import (
    FULL,
    SLIDING,
    Raw,
    activation_name,
    scaling_settings,
    window_settings,
)
from models.config import DecoderConfig

BLOCK = LLAMA_BLOCK | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def _common(raw: Raw, every: int) -> dict[str, Any]:
    """every: of so many layers the last sees everything."""
    raw.require("use_bidirectional_attention", None, False)
    bias = bool(raw.get("attention_bias"))
    types = [FULL if (n + 1) % every == 0 else SLIDING
             for n in range(raw.layers())]  # fmt: skip
    return {
        "post_norms": True,
        "activation": raw.activation("hidden_activation", "gelu_pytorch_tanh"),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "qkv_bias": bias,
        "output_bias": bias,
        "windows": raw.windows(raw.layer_types(types), raw.get("sliding_window", 4096)),
        "embed_scale": math.sqrt(raw.count("hidden_size")),
        "attention_scale": raw.number("query_pre_attn_scalar", 256.0) ** -0.5,
    }


def gemma2_config(raw: Raw) -> dict[str, Any]:
    return {
        **_common(raw, every=2),
        **rotary(raw),
        "attention_cap": raw.get("attn_logit_softcapping", 50.0),
        "logit_cap": raw.get("final_logit_softcapping", 30.0),
    }


def gemma3_config(raw: Raw) -> dict[str, Any]:
    local = raw.get("rope_local_base_freq", 10000.0)
    if isinstance((raw.get("rope_parameters") or {}).get(SLIDING), dict):
        local = raw.rope(theta=local, kind=SLIDING).theta
    return {
        **_common(raw, every=raw.count("sliding_window_pattern", 6)),
        **rotary(raw, theta=1e6, kind=FULL),
        "local_theta": float(local),
        "qk_norm": True,
        "attention_cap": raw.get("attn_logit_softcapping"),
        "logit_cap": raw.get("final_logit_softcapping"),
    }


def sizes(raw: Raw) -> dict[str, Any]:
    return {**decoder_sizes(raw), "head_size": raw.count("head_dim", 256)}


def _settings(c: DecoderConfig) -> dict[str, Any]:
    assert c.attention_scale is not None
    windows = window_settings(c.windows)
    return {
        **decoder_settings(c),
        "hidden_activation": activation_name(c.activation),
        "attention_bias": c.qkv_bias,
        "query_pre_attn_scalar": round(c.attention_scale**-2, 6),
        "sliding_window": windows.get("sliding_window"),
        "layer_types": windows.get("layer_types", [FULL] * c.layers),
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
    }


def gemma3_settings(c: DecoderConfig) -> dict[str, Any]:
    """In the spelling of transformers 5, where each kind of layer has its own positions."""
    said = {k: v for k, v in _settings(c).items() if k not in ("rope_theta", "rope_scaling")}
    scaling = (
        {"rope_type": "default"} if c.rope_scaling is None else scaling_settings(c.rope_scaling)
    )
    return {**said, "rope_parameters": {
        FULL: {**scaling, "rope_theta": c.rope_theta},
        SLIDING: {"rope_type": "default", "rope_theta": c.local_theta},
    }}  # fmt: skip


GEMMA2 = Family(
    name="gemma2", architecture="Gemma2ForCausalLM", config=gemma2_config, sizes=sizes,
    settings=_settings, block=BLOCK, norm_offset=1.0,
)  # fmt: skip
GEMMA3 = Family(
    name="gemma3_text", architecture="Gemma3ForCausalLM", config=gemma3_config, sizes=sizes,
    settings=gemma3_settings, block=BLOCK, norm_offset=1.0,
)  # fmt: skip
