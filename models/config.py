"""What a decoder is made of: sizes, and the conventions in which families differ."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

from models.rope import RopeScaling

type Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
type Norm = Literal["rms", "layer"]
type CacheElement = Literal["fp8", "int8"]
type Positions = Literal["rotary", "learned"]

COUNTS = ("vocabulary", "hidden", "layers", "heads", "kv_heads", "head_size", "feed_forward",
          "context")  # fmt: skip
NUMBERS = ("norm_epsilon", "rope_theta", "local_theta", "qkv_clip", "attention_scale", "logit_cap",
           "attention_cap", "embed_scale", "residual_scale", "logit_scale")  # fmt: skip


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(float(value))


class Layer(NamedTuple):
    """In what the layers of one decoder differ."""

    window: int | None  # tokens that each token sees, itself included; None: all before it
    theta: float | None  # base of the rotary positions; None: no rotation
    scaling: RopeScaling | None
    kv_heads: int  # 0: no attention, which leaves the residual stream as it is
    feed_forward: int  # 0: no MLP; of no meaning where the layer mixes experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """The sizes in which the blocks of one decoder may differ."""

    kv_heads: int  # 0: no attention
    feed_forward: int  # 0: no MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """A mixture of experts in place of the MLP of some layers."""

    count: int
    chosen: int  # experts that a token passes through
    feed_forward: int  # of each expert
    normalized: bool = False  # what the chosen count sums to one
    shared: int = 0  # feed-forward of what every token passes through beside them; 0: none
    layers: tuple[int, ...] | None = None  # that have it; None: all

    def __post_init__(self) -> None:
        sizes = (self.count, self.chosen, self.feed_forward)
        if not all(map(_is_count, sizes)) or not (self.shared == 0 or _is_count(self.shared)):
            raise ValueError(f"{self} has sizes that are no positive whole numbers.")
        if not all(type(n) is int for n in self.layers or ()):
            raise ValueError(f"layers={self.layers} must be whole numbers.")
        if not 0 < self.chosen <= self.count:
            raise ValueError(f"chosen={self.chosen} must be from 1 to count={self.count}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder and the conventions of its family."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    context: int  # the longest sequence the model allows, in tokens
    family: str = "llama"  # under whose names and settings other software knows it
    norm: Norm = "rms"  # "layer": mean subtracted, with a bias
    norm_epsilon: float = 1e-5
    post_norms: bool = False  # norms behind attention and MLP too, before they join the residual
    activation: Activation = "silu"
    gated: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    positions: Positions = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotated: int | None = None  # channels of a head that positions turn, the first; None: all
    local_theta: float | None = None  # base in layers with a window, unscaled, if another
    unrotated: tuple[int, ...] = ()  # layers without positions
    windows: tuple[int | None, ...] | None = None  # sliding window of each layer, None: all see all
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation
    qk_norm_whole: bool = False  # over all heads at once instead
    qkv_clip: float | None = None  # q, k and v stay within ±c
    attention_scale: float | None = None  # of q kᵀ; None: 1 / √head_size
    attention_cap: float | None = None  # scores are c tanh(s / c)
    logit_cap: float | None = None  # so are logits
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    experts: Mixing | None = None
    blocks: tuple[BlockSizes, ...] | None = None  # each block's; None: kv_heads and feed_forward
    cache: CacheElement | None = None  # what keys and values are rounded onto; None: nothing
    # Of encoders:
    causal: bool = True  # a token sees none that follow it
    norms_after: bool = False  # each norm is behind its sum, and none before; one on the embedding
    token_types: int = 0  # kinds of tokens, whose first is added to every embedding
    predicts: bool = True  # the next token; else the model gives its last activations

    def __post_init__(self) -> None:
        self._require_kinds()
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")
        rotated = self.head_size if self.rotated is None else self.rotated
        if self.positions == "rotary" and (rotated % 2 or not 0 < rotated <= self.head_size):
            raise ValueError(
                f"head_size={self.head_size} with rotated={self.rotated}: rotary positions turn an "
                "even number of a head's channels."
            )
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers.")
        if self.blocks is not None:
            self._require_blocks(self.blocks)

    def _require_blocks(self, blocks: tuple[BlockSizes, ...]) -> None:
        if len(blocks) != self.layers:
            raise ValueError(f"blocks has {len(blocks)} entries for {self.layers} layers.")
        for size in blocks:
            for name, value in (("kv_heads", size.kv_heads), ("feed_forward", size.feed_forward)):
                if value != 0 and not _is_count(value):
                    raise ValueError(f"blocks: {name}={value!r} must be a whole number, or 0.")
            if size.kv_heads and self.heads % size.kv_heads:
                raise ValueError(f"blocks: {size} must divide heads={self.heads}.")
        if self.experts is not None or self.norms_after:
            raise ValueError("blocks: neither mixtures of experts nor encoders differ by block.")

    def _require_kinds(self) -> None:
        """Configurations come from files of others: what is no such number or word is refused."""
        for name in COUNTS:
            if not _is_count(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r} must be a positive whole number.")
        for name in NUMBERS:
            optional = type(self).__dataclass_fields__[name].default is None
            if not _is_finite(value := getattr(self, name)) and not (value is None and optional):
                raise ValueError(f"{name}={value!r} must be a finite number.")
        for name, kind in (("norm", Norm), ("activation", Activation), ("positions", Positions)):
            if (value := getattr(self, name)) not in (known := get_args(kind.__value__)):
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}.")
        if self.cache not in (None, *(known := get_args(CacheElement.__value__))):
            raise ValueError(f"cache={self.cache!r} must be one of {', '.join(known)}, or None.")
        windows = [w for w in self.windows or () if w is not None]
        if not all(map(_is_count, [*windows, *([] if self.rotated is None else [self.rotated])])):
            raise ValueError(f"{self.windows=} and {self.rotated=} must be of whole numbers.")
        if not all(type(n) is int for n in self.unrotated) or type(self.token_types) is not int:
            raise ValueError(f"{self.unrotated=} and {self.token_types=} must be whole numbers.")

    def mixes(self, n: int) -> bool:
        """Whether a layer has experts in place of its MLP."""
        if self.experts is None:
            return False
        return self.experts.layers is None or n in self.experts.layers

    def kind(self, n: int) -> tuple[bool, int, int]:
        """What the shapes of a layer's tensors follow from: layers of one kind have the same."""
        own = self.layer(n)
        return self.mixes(n), own.kv_heads, own.feed_forward

    def layer(self, n: int) -> Layer:
        """What is special of one layer."""
        window = None if self.windows is None else self.windows[n]
        sizes = (self.kv_heads, self.feed_forward)
        if self.blocks is not None:
            sizes = (self.blocks[n].kv_heads, self.blocks[n].feed_forward)
        if self.positions == "learned" or n in self.unrotated:
            return Layer(window, None, None, *sizes)
        if window is not None and self.local_theta is not None:
            return Layer(window, self.local_theta, None, *sizes)
        return Layer(window, self.rope_theta, self.rope_scaling, *sizes)
