"""A model's configuration as a GGUF file's metadata: the inverse of `gguf.read_config`.

llama.cpp knows an architecture by its name and runs it as it is written there, so that what a name
does not say must be what that name implies; anything else is refused. Of "llama" it knows no
sliding window: Mistral's first release is written with its window, which planish reads, and which
llama.cpp ignores.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.errors import UserError
from models import rope
from models.config import DecoderConfig

HELD = (  # fields that some key, tensor or name of an architecture says
    "family", "vocabulary", "hidden", "layers", "heads", "kv_heads", "head_size",
    "feed_forward", "context", "norm_epsilon", "rope_theta", "rope_scaling", "windows",
    "tied_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm",
)  # fmt: skip


def architecture(config: DecoderConfig) -> str:
    """What llama.cpp calls a model of this configuration; raises UserError if it has no name."""
    if config.blocks is not None:
        _refuse("blocks of sizes of their own")
    plain = DecoderConfig(**{name: getattr(config, name) for name in HELD})
    for field in dataclasses.fields(config):
        if getattr(config, field.name) != getattr(plain, field.name):
            _refuse(f"{field.name}={getattr(config, field.name)!r}")
    c, more = config, config.output_bias or config.mlp_bias
    if c.qk_norm:
        name, impossible = "qwen3", {"biases": c.qkv_bias or more}
    elif c.qkv_bias and not more:
        name, impossible = "qwen2", {}
    else:
        windows = c.windows is not None and len(set(c.windows)) > 1
        name, impossible = "llama", {"a sliding window in some layers only": windows}
    if name != "llama":
        scaled = c.rope_scaling is not None and c.rope_scaling.kind == "llama3"
        impossible |= {"sliding windows": c.windows is not None, "Llama 3's rotary scaling": scaled}
    for what, present in impossible.items():
        if present:
            _refuse(f"{what} in the architecture {name}")
    return name


def _refuse(what: str) -> None:
    raise UserError(
        f"A GGUF file cannot say {what}, so llama.cpp would compute something else: export another "
        "format."
    )


def describe(config: DecoderConfig) -> dict[str, Any]:
    """The keys and values of the architecture; numbers in Python's own types."""
    c, a = config, architecture(config)
    found: dict[str, Any] = {
        f"{a}.block_count": c.layers,
        f"{a}.context_length": c.context,
        f"{a}.embedding_length": c.hidden,
        f"{a}.feed_forward_length": c.feed_forward,
        f"{a}.vocab_size": c.vocabulary,
        f"{a}.attention.head_count": c.heads,
        f"{a}.attention.head_count_kv": c.kv_heads,
        f"{a}.attention.key_length": c.head_size,
        f"{a}.attention.value_length": c.head_size,
        f"{a}.attention.layer_norm_rms_epsilon": float(c.norm_epsilon),
        f"{a}.rope.dimension_count": c.head_size,
        f"{a}.rope.freq_base": float(c.rope_theta),
    }
    if c.windows is not None and c.windows[0] is not None:
        found[f"{a}.attention.sliding_window"] = c.windows[0]
    if c.rope_scaling is not None and c.rope_scaling.kind == "linear":
        found[f"{a}.rope.scaling.type"] = "linear"
        found[f"{a}.rope.scaling.factor"] = float(c.rope_scaling.factor)
    return found


def tensors(config: DecoderConfig) -> Mapping[str, np.ndarray]:
    """What the file keeps as tensors though it is configuration: Llama 3's rotary divisors."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return {}
    if scaling != rope.RopeScaling(kind="llama3", factor=scaling.factor):
        _refuse(f"Llama 3's rotary scaling with other constants than Llama 3's, {scaling}")
    f = np.asarray(rope.frequencies(config.head_size, config.rope_theta, None), np.float64)
    kept = rope.stretch(f, scaling) / f  # 1 / factor for the lowest frequencies
    divisors = (1 / kept).astype(np.float32)
    if divisors.max() != np.float32(scaling.factor):
        _refuse(f"Llama 3's rotary scaling by {scaling.factor}, which reaches no frequency")
    return {"rope_freqs.weight": divisors}
