"""Nemotron-NAS (Llama-3.1-Nemotron-51B, Llama-3.3-Nemotron-Super-49B, …): Llama's blocks, each of
its own sizes. `block_configs` says of each what its attention and its feed-forward layer are: a
number of query heads for one key-value head, a width, or nothing (`no_op`).

Widths are multiples of 256 where `ffn_mult` says them, as vLLM, SGLang, llama.cpp's converter and
mlx-lm have it: the least that is not below ⌊2 ffn_mult hidden / 3⌋. vLLM reads any other one from
`intermediate_size` in its place.
"""

from collections.abc import Mapping
from typing import Any

from experiments.checkpoints.families.base import Family, decoder_sizes
from experiments.checkpoints.families.llama import llama_config, llama_settings
from experiments.checkpoints.families.raw import Raw
from experiments.errors import UserError
from models.config import BlockSizes, DecoderConfig

MULTIPLE = 256
ATTENTION = ("no_op", "n_heads_in_group")
FEED_FORWARD = ("no_op", "ffn_mult", "intermediate_size", "hidden_act")


def nemotron_sizes(raw: Raw) -> dict[str, Any]:
    """With the largest block's where a setting is of no one block."""
    blocks = read_blocks(raw)
    most = {
        "num_key_value_heads": max(1, *(each.kv_heads for each in blocks)),
        "intermediate_size": max(1, *(each.feed_forward for each in blocks)),
    }
    said = {key: raw.get(key) or value for key, value in most.items()}
    return decoder_sizes(Raw({**raw.settings, **said}, raw.path))


def nemotron_config(raw: Raw) -> dict[str, Any]:
    blocks, sizes = read_blocks(raw), nemotron_sizes(raw)
    alike = BlockSizes(kv_heads=sizes["kv_heads"], feed_forward=sizes["feed_forward"])
    return {**llama_config(raw), "blocks": None if set(blocks) == {alike} else blocks}


def nemotron_settings(c: DecoderConfig) -> dict[str, Any]:
    own = [c.layer(n) for n in range(c.layers)]
    return {
        **llama_settings(c),
        "block_configs": [
            {"attention": _attention(c, each.kv_heads), "ffn": _ffn(c.hidden, each.feed_forward)}
            for each in own
        ],
    }


def read_blocks(raw: Raw) -> tuple[BlockSizes, ...]:
    layers, said = raw.layers(), raw.get("block_configs")
    if not isinstance(said, list) or len(said) != layers:
        raise UserError(
            f"{raw.path} has no block_configs for each of its {layers} layers: planish runs "
            "DeciLMForCausalLM as Nemotron-NAS has it."
        )
    return tuple(_block(raw, n, each) for n, each in enumerate(said))


def _block(raw: Raw, n: int, said: Any) -> BlockSizes:
    parts = [said.get(key) if isinstance(said, Mapping) else None for key in ("attention", "ffn")]
    attention, ffn = parts
    if not isinstance(attention, Mapping) or not isinstance(ffn, Mapping):
        raise UserError(
            f"{raw.path}: block_configs[{n}] should say what attention and ffn are: fetch the file "
            "again."
        )
    for name, part, known in (("attention", attention, ATTENTION), ("ffn", ffn, FEED_FORWARD)):
        for key, value in part.items():
            if key not in known and value not in (None, False):
                raise UserError(
                    f"{raw.path}: block_configs[{n}] has {name}.{key}={value!r}, which planish "
                    f"does not run: it runs {', '.join(known)}."
                )
    Raw(ffn, raw.path).require("hidden_act", raw.get("hidden_act", "silu"), None)
    kv = 0 if attention.get("no_op") else _kv_heads(raw, n, attention)
    return BlockSizes(kv_heads=kv, feed_forward=0 if ffn.get("no_op") else _width(raw, ffn))


def _kv_heads(raw: Raw, n: int, attention: Mapping[str, Any]) -> int:
    heads = raw.count("num_attention_heads")
    each = Raw(attention, raw.path).count("n_heads_in_group")
    if heads % each:
        raise UserError(
            f"{raw.path}: block_configs[{n}] has n_heads_in_group={each}, which does not divide "
            f"the {heads} heads: fetch the file again."
        )
    return heads // each


def _width(raw: Raw, ffn: Mapping[str, Any]) -> int:
    own = Raw(ffn, raw.path)
    if ffn.get("ffn_mult") is None:
        return own.count("intermediate_size")
    exact = int(2 * own.number("ffn_mult") * raw.count("hidden_size") / 3)
    return -(-exact // MULTIPLE) * MULTIPLE


def _attention(c: DecoderConfig, kv_heads: int) -> dict[str, Any]:
    said = {"no_op": kv_heads == 0, "replace_with_linear": False}
    return {"n_heads_in_group": c.heads // kv_heads if kv_heads else None, **said}


def _ffn(hidden: int, width: int) -> dict[str, Any]:
    said: dict[str, Any] = {"no_op": width == 0, "replace_with_linear": False}
    if width % MULTIPLE:
        return {"intermediate_size": width, **said}
    return {"ffn_mult": round(3 * width / (2 * hidden), 6) if width else None, **said}


NEMOTRON = Family(
    name="nemotron-nas", architecture="DeciLMForCausalLM", config=nemotron_config,
    sizes=nemotron_sizes, settings=nemotron_settings,
)  # fmt: skip
