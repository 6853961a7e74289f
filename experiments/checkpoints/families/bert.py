"""BERT, as sentence encoders have it: what it gives are its last activations."""

from typing import Any

from experiments.checkpoints.families.base import Family, full_head_sizes
from experiments.checkpoints.families.raw import Raw, activation_name
from models.config import DecoderConfig


def config(raw: Raw) -> dict[str, Any]:
    raw.require("position_embedding_type", "absolute")
    raw.require("is_decoder", False)
    raw.require("add_cross_attention", False)
    return {
        "norm": "layer", "norms_after": True, "activation": raw.activation("hidden_act", "gelu"),
        "gated": False, "positions": "learned", "causal": False, "predicts": False,
        "token_types": raw.count("type_vocab_size", 2), "tied_embeddings": True,
        "qkv_bias": True, "output_bias": True, "mlp_bias": True,
    }  # fmt: skip


def sizes(raw: Raw) -> dict[str, Any]:
    return full_head_sizes(
        raw, feed_forward=raw.count("intermediate_size"),
        norm_epsilon=raw.number("layer_norm_eps", 1e-12),
    )  # fmt: skip


def settings(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocabulary, "hidden_size": c.hidden, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "intermediate_size": c.feed_forward,
        "max_position_embeddings": c.context, "type_vocab_size": c.token_types,
        "hidden_act": activation_name(c.activation), "layer_norm_eps": c.norm_epsilon,
        "position_embedding_type": "absolute",
    }  # fmt: skip


BERT = Family(
    name="bert", architecture="BertModel", config=config, sizes=sizes, settings=settings,
    prefix="encoder.layer.{}.",
    top={
        "embed": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
    },
    block={
        "attention.q": "attention.self.query", "attention.k": "attention.self.key",
        "attention.v": "attention.self.value", "attention.o": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    },
)  # fmt: skip
