"""A source whose model is read in other coordinates, computing what it did (papers/quarot.md).

Which layers read and write the residual stream is in `models.decoder.Block.sites`: readers of a
site that a norm produces read it, those of a site that a linear layer produces write to it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from algorithms.formats import Format
from algorithms.layerwise import LayerwiseMethod
from algorithms.quantization import quarot as rotations
from experiments import recipes
from experiments.checkpoints.learned_rotation import PER_TOKEN, Learning, learn
from experiments.checkpoints.sources import Source
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from kernels.hadamard import factor
from models.decoder import Block, DecoderConfig

LINEARS = {path for site in Block.sites for path in site.readers}
NORM_OF = {path: site.producer for site in Block.sites if site.producer not in LINEARS
           for path in site.readers}  # fmt: skip
WRITERS = LINEARS - set(NORM_OF)
IN_HEADS = [site for site in Block.sites if site.per_head and site.absorbs_rotation]
VALUES = {site.producer for site in IN_HEADS}
SUMS = {path for site in IN_HEADS for path in site.readers}


class RotatedSource(Source):
    """The model of `source` with its residual turned by R, heads too, and its norms' scales folded
    into what reads them: float32, a tensor at a time. A tied embedding serves no more as head.
    """

    def __init__(self, source: Source, residual: Callable[[], Float[Array, "D D"]], *, heads: bool):
        """residual: gives R when the first tensor is read."""
        self.source, self.heads = source, heads
        self.config = dataclasses.replace(source.config, tied_embeddings=False)
        self.location = source.location
        self._find = residual

    @functools.cached_property
    def residual(self) -> Float[Array, "D D"]:
        return self._find()

    def names(self) -> frozenset[str]:
        return self.source.names() | {"head.weight"}

    def digest(self) -> str:
        return self.source.digest()

    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def read(self, name: str) -> np.ndarray:
        """One tensor of the turned model, read with the norm that it takes in."""
        path, _, field = name.rpartition(".")
        block, within = "", path
        if path.startswith("blocks."):
            layer, within = path.split(".", 2)[1:]
            block = f"blocks.{layer}."
        if within == "norm" or within in NORM_OF.values():
            return np.ones(self.config.hidden, np.float32)
        return np.asarray(self._turned(self._dense(name), block, within, field))

    def _turned(self, x: Array, block: str, path: str, field: str) -> Array:
        h = self.config.head_size
        if path in ("embed", "head"):
            gamma = self._dense("norm.weight") if path == "head" else jnp.ones(x.shape[1])
            return rotations.read_rotated(x, gamma, self.residual)
        if path in NORM_OF and field == "weight":
            gamma = self._dense(f"{block}{NORM_OF[path]}.weight")
            x = rotations.read_rotated(x, gamma, self.residual)
        if path in SUMS and field == "weight" and self.heads:
            x = rotations.rotate_heads(x, h)
        if path in VALUES and self.heads:
            x = rotations.rotate_values(x, h)
        return rotations.write_rotated(x, self.residual) if path in WRITERS else x

    def _dense(self, name: str) -> Float[Array, "..."]:
        tied = name == "head.weight" and self.source.config.tied_embeddings
        return jnp.asarray(self.source.read("embed.weight" if tied else name), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation(recipes.Rotation):
    """How a model is turned: what conf/rotation names."""

    kind: str
    heads: bool
    online: tuple[str, ...]
    seed: int
    learning: Learning | None = None  # how R goes on from where it is drawn

    def __post_init__(self) -> None:
        if self.kind not in rotations.KINDS:
            raise ValueError(f"kind={self.kind!r} must be hadamard or random.")
        for path in self.online:
            if path not in WRITERS:
                known = ", ".join(sorted(WRITERS))
                raise ValueError(
                    f"online={list(self.online)} names {path!r}: expected some of {known}; what "
                    "else a block reads is turned beforehand."
                )
            if path in SUMS and self.heads:
                raise ValueError(
                    f"online={list(self.online)} turns the whole input of {path}, which would turn "
                    "its heads back: set heads=false with it, or leave it out."
                )

    @property
    def descent(self) -> tuple[int, int]:
        return (self.learning.steps, self.learning.tokens) if self.learning else (0, 0)

    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None
    ) -> RotatedSource:
        """The turned model; a learned R is learned from `windows` of tokens at the first read.

        Raises UserError where a width has no Hadamard matrix.
        """
        self._require_hadamard(source.config)
        if self.learning is not None:
            find = functools.partial(self._learned, source, windows)
        else:
            find = functools.partial(self._drawn, source.config)
        return RotatedSource(source, find, heads=self.heads)

    def wrap(self, path: str, method: LayerwiseMethod) -> LayerwiseMethod:
        """The method for a layer whose input is turned as it arrives; path: within the block."""
        return rotations.rotated_inputs()(method) if path in self.online else method

    def _drawn(self, config: DecoderConfig) -> Float[Array, "D D"]:
        return rotations.residual_rotation(jax.random.key(self.seed), config.hidden, self.kind)

    def _learned(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None
    ) -> Float[Array, "D D"]:
        assert self.learning is not None
        if windows is None:
            raise UserError("This rotation is learned, and got no calibration windows to learn on.")
        unturned = RotatedSource(source, lambda: jnp.eye(source.config.hidden), heads=self.heads)
        return learn(
            unturned, self._drawn(source.config), windows, self.learning,
            online=self.online, seed=self.seed,
        )  # fmt: skip

    def _require_hadamard(self, c: DecoderConfig) -> None:
        widths = {"mlp.down": c.feed_forward, "attention.o": c.heads * c.head_size}
        needed = [
            (f"online={path}", widths[path], "leave it out of online") for path in self.online
        ]
        if self.kind == "hadamard":
            needed.append(("the residual", c.hidden, "set kind=random"))
        if self.heads:
            needed.append(("heads=true", c.head_size, "set heads=false"))
        for what, width, remedy in needed:
            try:
                factor(width)
            except ValueError as error:
                raise UserError(
                    f"rotation: {what} wants a Hadamard matrix of order {width}, and there is none "
                    f"here: {remedy}."
                ) from error


def quarot(
    *, kind: str = "hadamard", heads: bool = True, online: Sequence[str] = ("mlp.down",),
    seed: int = 0,
) -> Rotation:  # fmt: skip
    """QuaRot: a rotation drawn once."""
    return Rotation(kind=kind, heads=heads, online=tuple(online), seed=seed)


def spinquant(
    *,
    kind: str = "hadamard",
    heads: bool = True,
    online: Sequence[str] = ("mlp.down",),
    seed: int = 0,
    format: Format = PER_TOKEN,
    steps: int = 50,
    tokens: int = 256,
    learning_rate: float = 1.5,
    momentum: float = 0.0,
    range_gradient: bool = False,
) -> Rotation:
    """SpinQuant: QuaRot's rotation as a start, then learned on calibration windows (`Learning`)."""
    learning = Learning(
        format=format, steps=steps, tokens=tokens, learning_rate=learning_rate,
        momentum=momentum, range_gradient=range_gradient,
    )  # fmt: skip
    return Rotation(kind=kind, heads=heads, online=tuple(online), seed=seed, learning=learning)
