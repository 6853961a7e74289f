"""GPT-2: learned positions, LayerNorm, biases; matrices kept as [in, out], q, k and v in one."""

from typing import Any

from experiments.checkpoints.families.base import Family, full_head_sizes
from experiments.checkpoints.families.raw import Raw, activation_name
from models.config import DecoderConfig


def config(raw: Raw) -> dict[str, Any]:
    raw.require("scale_attn_weights", True)
    raw.require("scale_attn_by_inverse_layer_idx", False)
    raw.require("add_cross_attention", False)
    return {
        "norm": "layer",
        "activation": raw.activation("activation_function", "gelu_new"),
        "gated": False,
        "positions": "learned",
        "tied_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    }


def sizes(raw: Raw) -> dict[str, Any]:
    return full_head_sizes(
        raw, hidden="n_embd", layers="n_layer", heads="n_head", context="n_positions",
        feed_forward=raw.get("n_inner") or 4 * raw.count("n_embd"),
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
    )  # fmt: skip


def settings(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocabulary, "n_embd": c.hidden, "n_layer": c.layers, "n_head": c.heads,
        "n_inner": c.feed_forward, "n_positions": c.context,
        "activation_function": activation_name(c.activation),
        "layer_norm_epsilon": c.norm_epsilon, "tie_word_embeddings": c.tied_embeddings,
    }  # fmt: skip


GPT2 = Family(
    name="gpt2", architecture="GPT2LMHeadModel", config=config, sizes=sizes, settings=settings,
    prefix="transformer.h.{}.", transposed=True,
    top={
        "embed": "transformer.wte", "positions": "transformer.wpe",
        "norm": "transformer.ln_f", "head": "lm_head",
    },
    block={
        "attention_norm": "ln_1", "attention.o": "attn.c_proj",
        "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    },
    fused={"attn.c_attn": ("attention.q", "attention.k", "attention.v")},
)  # fmt: skip
