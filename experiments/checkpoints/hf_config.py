"""A decoder as a config.json of transformers: the inverse of `huggingface.read_config`.

The family follows from the features. Spellings are the older ones (`rope_theta`, `torch_dtype`),
which every transformers of today reads.
"""

import dataclasses
from typing import Any

from models.decoder import DecoderConfig

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def to_raw(config: DecoderConfig) -> dict[str, Any]:
    """A config.json's content; raises ValueError for a decoder that no family is."""
    c, family = config, _family(config)
    raw: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "intermediate_size": c.feed_forward,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_epsilon,
        "rope_theta": c.rope_theta,
        "rope_scaling": _scaling(c),
        "tie_word_embeddings": c.tied_embeddings,
        "vocab_size": c.vocabulary,
    }
    if family == "llama":
        raw |= {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}
    if family == "qwen3":
        raw |= {"attention_bias": c.qkv_bias}
    if family == "mistral":
        raw |= {"sliding_window": c.window(0)}
    if family in ("qwen2", "qwen3"):
        raw |= _windows(c)
    return raw


def _family(c: DecoderConfig) -> str:
    """The one whose features these are; what is left over must fit it."""
    windows = set(c.windows or [None])
    if c.qk_norm:
        family, fits = "qwen3", c.qkv_bias == c.output_bias and not c.mlp_bias
    elif c.qkv_bias and not c.output_bias:
        family, fits = "qwen2", not c.mlp_bias
    elif windows != {None}:
        plain = not (c.qkv_bias or c.output_bias or c.mlp_bias)
        family, fits = "mistral", plain and len(windows) == 1
    else:
        family, fits = "llama", c.qkv_bias == c.output_bias
    if not fits or len(windows - {None}) > 1:
        features = ("qk_norm", "qkv_bias", "output_bias", "mlp_bias")
        said = ", ".join(f"{name}={getattr(c, name)}" for name in features)
        raise ValueError(
            f"No architecture of transformers has {said} with windows of {_said(windows)}: "
            f"{', '.join(CLASSES.values())} are written."
        )
    return family


def _said(windows: set[int | None]) -> str:
    return " and ".join(sorted("all tokens" if w is None else f"{w} tokens" for w in windows))


def _windows(c: DecoderConfig) -> dict[str, Any]:
    if c.windows is None or set(c.windows) == {None}:
        return {"use_sliding_window": False}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in c.windows]
    window = next(w for w in c.windows if w is not None)
    first = kinds.index("sliding_attention")  # of older readers, which know no list
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def _scaling(c: DecoderConfig) -> dict[str, Any] | None:
    if c.rope_scaling is None:
        return None
    s = dataclasses.asdict(c.rope_scaling)
    if s["kind"] == "linear":
        return {"rope_type": "linear", "factor": s["factor"]}
    return {
        "rope_type": "llama3",
        "factor": s["factor"],
        "low_freq_factor": s["low_frequency_factor"],
        "high_freq_factor": s["high_frequency_factor"],
        "original_max_position_embeddings": s["original_context"],
    }
