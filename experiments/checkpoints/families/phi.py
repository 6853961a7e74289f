"""Phi-3 and Phi-4-mini: q, k and v in one matrix, gate and up in another; LongRoPE, on a part of
each head in the fourth.
"""

from typing import Any

from experiments.checkpoints.families.base import (
    Family,
    decoder_sizes,
    rotary,
)
from experiments.checkpoints.families.mistral import settings
from experiments.checkpoints.families.raw import SLIDING, Raw


def config(raw: Raw) -> dict[str, Any]:
    raw.require("hidden_act", "silu", "swish")
    types = [SLIDING] * raw.layers()
    return {
        **rotary(raw, sizes(raw)["head_size"]),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "windows": raw.windows(types, raw.get("sliding_window")),
    }


def sizes(raw: Raw) -> dict[str, Any]:
    return {**decoder_sizes(raw), "norm_epsilon": raw.number("rms_norm_eps", 1e-5)}


PHI3 = Family(
    name="phi3", architecture="Phi3ForCausalLM", config=config, sizes=sizes, settings=settings,
    fused={
        "self_attn.qkv_proj": ("attention.q", "attention.k", "attention.v"),
        "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    },
)  # fmt: skip
