"""AQLM. Egiazarian, Panferov, Kuznedelev, Frantar, Babenko, Alistarh, ICML 2024, arXiv:2401.06118.
Notes: papers/aqlm.md.

A group of c consecutive weights of a row is a sum of entries of M codebooks, times the row's scale:
    ŵ_g = s Σ_m C_m[b_gm]
For y = W x and G = X Xᵀ, minimise J = tr((W - Ŵ) G (W - Ŵ)ᵀ), in turn over
    b, by beam search over the groups of each row (Sec. 3.2, phase 1),
    C, by conjugate gradients, as J is quadratic in it; s, in closed form (phase 2; there by Adam).
It begins at k-means of the rows divided by their norms, each codebook on what the others left. The
phases are in algorithms/additive.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from algorithms import clustering, hessian
from algorithms.additive import Encoding, fit_codebooks, fit_scales, search_codes, stored
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors.codebook import CodebookTensor, code_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class AQLMConfig:
    """The format, and how long to look for the best encoding in it.

    A weight takes codebooks · codebook_bits / group_size bits, beside scales and codebooks.
    """

    codebooks: int = 2  # M, added up
    codebook_bits: int = 8  # 2^bits entries each
    group_size: int = 8  # c, consecutive weights of a row that share a code
    beam: int = 1  # best encodings of each row that the search keeps
    rounds: int = 10  # of codebooks, scales, codes; the last on values rounded to float16
    tolerance: float = 0.01  # a round that lowers J by less than this part is the last but one
    steps: int = 4  # of conjugate gradients per round
    kmeans_steps: int = 20
    kmeans_points: int | None = 256  # drawn for k-means per entry of a codebook; None: all

    def __post_init__(self) -> None:
        for name in ("codebooks", "group_size", "beam", "rounds", "steps", "kmeans_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if not 1 <= self.codebook_bits <= 16:
            raise ValueError(f"codebook_bits={self.codebook_bits} must be from 1 to 16.")
        if self.beam > self.entries:
            raise ValueError(
                f"beam={self.beam} must be at most the {self.entries} entries of a codebook of "
                f"codebook_bits={self.codebook_bits}."
            )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} must be at least 0 and below 1.")
        if self.kmeans_points is not None and self.kmeans_points < 1:
            raise ValueError(
                f"kmeans_points={self.kmeans_points} must be positive, or null for all."
            )

    @property
    def entries(self) -> int:
        return 2**self.codebook_bits


def aqlm(**config) -> LayerwiseMethod:
    """AQLM without the tuning of whole blocks; the fields of `AQLMConfig` are its settings."""
    settings = AQLMConfig(**config)

    def compress(
        w: Float[Array, "o i"], stats: HessianStats, key: Key[Array, ""]
    ) -> CodebookTensor:
        return quantize_weight(w, stats.gram, key, config=settings)

    return hessian.method(compress, seeded=True)


# One program, eager or not: rounded otherwise, a tie would send the search another way.
@functools.partial(jax.jit, static_argnames="config")
def quantize_weight(
    w: Float[Array, "o i"], gram: Float[Array, "i i"], key: Key[Array, ""], *, config: AQLMConfig
) -> CodebookTensor:
    """Quantize W given X Xᵀ, summed or averaged.

    Raises ValueError if groups do not divide i.
    """
    (o, i), c = w.shape, config.group_size
    if i % c:
        raise ValueError(f"group_size={c} must divide the input dimension of w, {w.shape=}.")
    mean = jnp.mean(jnp.diag(gram))
    gram = gram / jnp.where(mean > 0, mean, 1)
    target = w.T.reshape(i // c, c, o)
    start, walk = jax.random.split(key)
    encoding = _alternate(target, gram, initialize(start, target, config), walk, config)
    dtype = code_dtype(config.entries)
    return CodebookTensor(
        encoding.codes.transpose(2, 0, 1).astype(dtype),
        encoding.codebooks.astype(jnp.float16),
        encoding.scale.astype(jnp.float16),
    )


def initialize(key: Key[Array, ""], target: Float[Array, "g c o"], config: AQLMConfig) -> Encoding:
    """Scales from the rows' norms, codebooks and codes by k-means, each on what is left."""
    g, c, o = target.shape
    scale = jnp.sqrt(jnp.sum(target**2, (0, 1)))
    points = (target / jnp.where(scale > 0, scale, 1)).swapaxes(1, 2).reshape(-1, c)
    wanted = len(points) if config.kmeans_points is None else config.kmeans_points * config.entries

    def add_codebook(residual, key):
        draw, seed = jax.random.split(key)
        some = residual
        if wanted < len(points):
            some = residual[jax.random.permutation(draw, len(points))[:wanted]]
        found = clustering.kmeans(seed, some, config.entries, steps=config.kmeans_steps)
        codes = clustering.nearest(residual, found.centroids)
        return residual - found.centroids[codes], (codes, found.centroids)

    keys = jax.random.split(key, config.codebooks)
    _, (codes, codebooks) = lax.scan(add_codebook, points, keys)
    return Encoding(codes.reshape(-1, g, o).swapaxes(0, 1), codebooks, scale)


def _alternate(target, gram, encoding, key, config):
    """Rounds until one gains too little, then the last, on values as they are stored."""

    def one_round(state):
        encoding, before, left, key = state
        key, draw = jax.random.split(key)
        encoding = fit_codebooks(target, gram, encoding, config.steps)
        encoding = fit_scales(target, gram, encoding)
        encoding = jax.tree.map(functools.partial(jnp.where, left == 1), stored(encoding), encoding)
        order = jax.random.permutation(draw, len(target))
        encoding, rows = search_codes(target, gram, encoding, order, config.beam)
        stalled = rows.sum() >= (1 - config.tolerance) * before
        return encoding, rows.sum(), jnp.where(stalled & (left > 1), 1, left - 1), key

    first = (encoding, jnp.full((), jnp.inf, gram.dtype), jnp.asarray(config.rounds), key)
    return lax.while_loop(lambda state: state[2] > 0, one_round, first)[0]
