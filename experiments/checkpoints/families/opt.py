"""OPT: learned positions, of which the first two rows are not used, LayerNorm, ReLU, biases."""

from typing import Any

from experiments.checkpoints.families.base import Family, full_head_sizes
from experiments.checkpoints.families.raw import Raw
from models.config import DecoderConfig


def config(raw: Raw) -> dict[str, Any]:
    raw.require("do_layer_norm_before", True)
    raw.require("_remove_final_layer_norm", False)
    raw.require("layer_norm_elementwise_affine", True)
    raw.require("word_embed_proj_dim", raw.count("hidden_size"), None)
    bias = bool(raw.get("enable_bias", True))
    return {
        "norm": "layer",
        "activation": raw.activation("activation_function", "relu"),
        "gated": False,
        "positions": "learned",
        "tied_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
    }


def sizes(raw: Raw) -> dict[str, Any]:
    return full_head_sizes(raw, feed_forward=raw.count("ffn_dim"), norm_epsilon=1e-5)


def settings(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocabulary, "hidden_size": c.hidden, "word_embed_proj_dim": c.hidden,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "ffn_dim": c.feed_forward,
        "max_position_embeddings": c.context, "activation_function": c.activation,
        "do_layer_norm_before": True, "enable_bias": c.qkv_bias,
        "tie_word_embeddings": c.tied_embeddings,
    }  # fmt: skip


OPT = Family(
    name="opt", architecture="OPTForCausalLM", config=config, sizes=sizes, settings=settings,
    prefix="model.decoder.layers.{}.", unused_rows={"positions": 2},
    top={
        "embed": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions",
        "norm": "model.decoder.final_layer_norm", "head": "lm_head",
    },
    block={
        "attention_norm": "self_attn_layer_norm",
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj", "attention.o": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2",
    },
)  # fmt: skip
