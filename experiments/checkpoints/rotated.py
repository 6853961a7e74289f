"""A source whose model is read in other coordinates, computing what it did (papers/quarot.md).

Which layers read and write the residual stream is in `models.decoder.sites`: readers of a
site that a norm produces read it, those of a site that a linear layer produces write to it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

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
from models.config import DecoderConfig
from models.decoder import sites

WRITERS = ("attention.o", "mlp.down")  # layers whose input a rotation can turn as it arrives
SUMS = ("attention.o",)  # those of them that read sums within heads


class Wiring(NamedTuple):
    """A block's linear layers by how they meet the residual stream and the heads."""

    norm_of: Mapping[str, str]  # of those that read the residual stream, the norm between
    writers: frozenset[str]  # those that write to it
    values: frozenset[str]  # those whose output is summed within a head,
    sums: frozenset[str]  # and those that read the sums


@functools.cache
def wiring(config: DecoderConfig, layer: int) -> Wiring:
    found = sites(config, layer)
    linears = {path for site in found for path in site.readers}
    norm_of = {path: site.producer for site in found if site.producer not in linears
               for path in (*site.readers, *site.others)}  # fmt: skip
    in_heads = [site for site in found if site.per_head and site.absorbs_rotation]
    return Wiring(
        norm_of,
        frozenset(linears - set(norm_of)),
        frozenset(site.producer for site in in_heads),
        frozenset(path for site in in_heads for path in site.readers),
    )


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
        if path == "norm":
            return np.ones(self.config.hidden, np.float32)
        if path in ("embed", "head"):
            return np.asarray(self._end(self._dense(name), path))
        layer, within = path.split(".", 2)[1:]
        if within in wiring(self.config, int(layer)).norm_of.values():
            return np.ones(self.config.hidden, np.float32)
        return np.asarray(self._turned(self._dense(name), int(layer), within, field))

    def _end(self, x: Array, path: str) -> Array:
        gamma = self._dense("norm.weight") if path == "head" else jnp.ones(x.shape[1])
        return rotations.read_rotated(x, gamma, self.residual)

    def _turned(self, x: Array, layer: int, path: str, field: str) -> Array:
        wired, h = wiring(self.config, layer), self.config.head_size
        if path in wired.norm_of and field == "weight":
            gamma = self._dense(f"blocks.{layer}.{wired.norm_of[path]}.weight")
            x = rotations.read_rotated(x, gamma, self.residual)
        if path in wired.sums and field == "weight" and self.heads:
            x = rotations.rotate_heads(x, h)
        if path in wired.values and self.heads:
            x = rotations.rotate_values(x, h)
        return rotations.write_rotated(x, self.residual) if path in wired.writers else x

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
                known = ", ".join(WRITERS)
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
        require_turnable(source.config)
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
        own = {c.layer(n).feed_forward for n in range(c.layers)} - {0}
        widths = {"mlp.down": sorted(own), "attention.o": [c.heads * c.head_size]}
        needed = [
            (f"online={path}", width, "leave it out of online")
            for path in self.online for width in widths[path]
        ]  # fmt: skip
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


def require_turnable(config: DecoderConfig, step: str = "rotation") -> None:
    """What a turned residual stream computes is the same only between norms without a direction.

    step: of the recipe, which would turn it. Raises UserError.
    """
    what = {
        "norms that subtract a mean": config.norm == "layer",
        "norms behind attention and MLP": config.post_norms,
        "learned positions": config.positions == "learned",
    }
    if found := [name for name, here in what.items() if here]:
        raise UserError(
            f"{step}: a model of family {config.family} has {' and '.join(found)}, which do not "
            "commute with a turn of its residual stream: leave it out "
            f"({step.partition('=')[0]}=none)."
        )


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
