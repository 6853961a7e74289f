"""What a family of decoders is, to other software: a declaration, by which models are read and
written.

Between a family's tensors and ours lie names, parts of a matrix that hold several of ours one below
the other, matrices kept as [in, out], rows that are not used, and norms kept as their distance
from one. All of it is said here, and undone by `Place`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from algorithms.kv_cache import SCALES
from experiments.checkpoints.families.raw import Raw, scaling_settings
from experiments.checkpoints.sources import shapes
from models.config import DecoderConfig

LLAMA_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


class Place(NamedTuple):
    """Where one of our tensors lies among theirs."""

    name: str
    rows: tuple[int, int]  # the first and the one after the last, of the matrix as [out, in]
    shape: tuple[int, ...]  # of the whole tensor, as it is stored
    transposed: bool
    offset: float  # ours is larger by so much

    def take(self, x: np.ndarray) -> np.ndarray:
        """Ours, from the whole of theirs: a view, if it needs no arithmetic."""
        x = (x.T if self.transposed else x)[slice(*self.rows)]
        return x if self.offset == 0 else x.astype(np.float32) + np.float32(self.offset)

    @property
    def alone(self) -> bool:
        """Whether ours is all of theirs, as it is."""
        rows = self.shape[-1] if self.transposed else self.shape[0]
        return self.rows == (0, rows) and self.offset == 0

    def put(self, whole: np.ndarray, ours: np.ndarray) -> None:
        """Ours, into the whole of theirs."""
        rows = (whole.T if self.transposed else whole)[slice(*self.rows)]
        rows[...] = ours if self.offset == 0 else ours.astype(np.float32) - np.float32(self.offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family. Names are of modules, without "weight" or "bias"."""

    name: str  # its model_type
    architecture: str
    config: Callable[[Raw], Mapping[str, Any]]  # arguments of DecoderConfig beside the sizes
    sizes: Callable[[Raw], Mapping[str, Any]]
    settings: Callable[[DecoderConfig], Mapping[str, Any]]  # the way back: what config.json says
    top: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_TOP)
    block: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_BLOCK)
    prefix: str = "model.layers.{}."  # of a block's names
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # theirs: ours
    transposed: bool = False  # matrices of blocks are [in, out]
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # ours: theirs, by number
    unused_rows: Mapping[str, int] = dataclasses.field(default_factory=dict)  # the first, of ours
    norm_offset: float = 0.0

    def read(self, raw: Raw) -> DecoderConfig:
        """Our configuration. Raises UserError or ValueError for what planish cannot run."""
        return DecoderConfig(family=self.name, **{**self.sizes(raw), **self.config(raw)})

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """A config.json's content, which `read` makes this configuration of, but for the cache,
        which is the layout's to say.

        Raises ValueError for a configuration that the family has no settings for.
        """
        config = dataclasses.replace(config, cache=None)
        raw = {"architectures": [self.architecture], "model_type": self.name}
        raw |= self.settings(config)
        told = self.read(Raw(raw, Path("config.json")))
        for field in dataclasses.fields(config):
            ours, theirs = getattr(config, field.name), getattr(told, field.name)
            if not _same(ours, theirs):
                raise ValueError(
                    f"{self.architecture} has no setting for {field.name}={ours!r}: other software "
                    f"would run the model with {theirs!r}."
                )
        return raw

    def places(self, config: DecoderConfig, name: str) -> list[Place]:
        """Where one of our tensors lies: one place, or one for each expert."""
        path, _, field = name.rpartition(".")
        prefix, ours = "", path
        if path.startswith("blocks."):
            layer, ours = path.split(".", 2)[1:]
            prefix = self.prefix.format(layer)
        shape = shapes(config)[name]
        if field in SCALES:  # of the module that the attention's layers are in
            theirs = self.block["attention.o"].rpartition(".")[0]
            return [Place(f"{prefix}{theirs}.{field}", (0, 1), shape, False, 0.0)]
        if ours in self.experts:
            names = [self.experts[ours].format(n) for n in range(shape[0])]
            return [
                Place(f"{prefix}{theirs}.{field}", (0, shape[1]), shape[1:], False, 0.0)
                for theirs in names
            ]
        return [self._place(config, name, prefix, ours, field)]

    def stored(
        self, config: DecoderConfig, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Their tensors from ours, all parts of each among them; rows that are not used are 0."""
        found: dict[str, np.ndarray] = {}
        for name, x in tensors.items():
            each = x if x.ndim == 3 else x[None]
            for place, ours in zip(self.places(config, name), each, strict=True):
                if place.alone:  # no copy: it may be large, and a view of a file
                    found[place.name] = ours.T if place.transposed else ours
                    continue
                if place.name not in found:
                    found[place.name] = np.zeros(place.shape, x.dtype)
                place.put(found[place.name], ours)
        return found

    def _place(self, config: DecoderConfig, name: str, prefix: str, ours: str, field: str) -> Place:
        whole = next(((t, parts) for t, parts in self.fused.items() if ours in parts), None)
        theirs, parts = whole or ((self.block if prefix else self.top)[ours], (ours,))
        every, stem = shapes(config), name.removesuffix(f"{ours}.{field}")
        lengths = [every[f"{stem}{part}.{field}"][0] for part in parts]
        unused = self.unused_rows.get(ours, 0)
        start = sum(lengths[: parts.index(ours)]) + unused
        shape = (sum(lengths) + unused, *every[name][1:])
        transposed = self.transposed and bool(prefix) and len(shape) == 2
        return Place(
            f"{prefix}{theirs}.{field}",
            (start, start + every[name][0]),
            shape[::-1] if transposed else shape,
            transposed,
            self.norm_offset if ours.endswith("norm") and field == "weight" else 0.0,
        )


def _same(ours: Any, theirs: Any) -> bool:
    """Settings are told as their inverses, or squared: to the last digits alone."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def decoder_sizes(raw: Raw) -> dict[str, Any]:
    """The sizes that most families give under the same names."""
    heads, hidden = raw.count("num_attention_heads"), raw.count("hidden_size")
    return {
        "vocabulary": raw.count("vocab_size"),
        "hidden": hidden,
        "layers": raw.layers(),
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_size": raw.get("head_dim") or hidden // heads,
        "feed_forward": raw.count("intermediate_size"),
        "context": raw.count("max_position_embeddings"),
        "norm_epsilon": raw.number("rms_norm_eps", 1e-6),
    }


def full_head_sizes(
    raw: Raw,
    *,
    feed_forward: int,
    norm_epsilon: float,
    hidden: str = "hidden_size",
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    context: str = "max_position_embeddings",
) -> dict[str, Any]:
    """Of families whose query heads all have keys of their own, under their names for them."""
    count, width = raw.count(heads), raw.count(hidden)
    return {
        "vocabulary": raw.count("vocab_size"),
        "hidden": width,
        "layers": raw.layers(layers),
        "heads": count,
        "kv_heads": count,
        "head_size": width // count,
        "feed_forward": feed_forward,
        "context": raw.count(context),
        "norm_epsilon": norm_epsilon,
    }


def decoder_settings(c: DecoderConfig) -> dict[str, Any]:
    """The way back from `decoder_sizes` and what most families have beside them.

    Spellings are the older ones (`rope_theta`), which every transformers of today reads.
    """
    return {
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "intermediate_size": c.feed_forward,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied_embeddings,
        "vocab_size": c.vocabulary,
        **rotary_settings(c),
    }


def rotary_settings(c: DecoderConfig) -> dict[str, Any]:
    said: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_scaling": None}
    if c.rope_scaling is not None:
        said["rope_scaling"] = scaling_settings(c.rope_scaling)
    if c.rotated is not None:
        said["partial_rotary_factor"] = c.rotated / c.head_size
    if c.rope_scaling is not None and c.rope_scaling.kind == "longrope":
        said["original_max_position_embeddings"] = c.rope_scaling.original_context
    return said


def rotary(raw: Raw, head_size: int | None = None, **options: Any) -> dict[str, Any]:
    """Rotary positions; head_size: where a part of each head alone may be turned."""
    rope = raw.rope(**options)
    if head_size is None:
        if rope.share != 1:
            raise ValueError(f"partial_rotary_factor={rope.share} is not of this family.")
        return {"rope_theta": rope.theta, "rope_scaling": rope.scaling}
    turned = int(head_size * rope.share)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "rotated": None if turned == head_size else turned,
    }
