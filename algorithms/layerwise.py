"""One-shot compression, one linear layer at a time: the interface that methods have.

`LayerwiseMethod` compresses weights; `SiteTransform` changes a block without changing what it
computes, so that its weights compress better. `algorithms.walk` takes both over a block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.numerics import relative_error
from algorithms.tensors import CompressedTensor

Statistics = Any  # a pytree of arrays, each method's own


def weight_error(
    w: Float[Array, "o i"], approximation: Float[Array, "o i"], stats: Statistics
) -> Float[Array, ""]:
    """‖W - Ŵ‖² / ‖W‖²; zero for a weight of zeros that stays one."""
    return relative_error(jnp.sum((w - approximation) ** 2), jnp.sum(w**2))


class LayerwiseMethod(NamedTuple):
    """A one-shot method: three pure functions, and how it measures its own error.

    `init(i)` gives empty statistics for a site with i channels, `observe(stats, x[n, i])` adds n
    activations, `compress(w[o, i], stats)` gives the compressed weight, row by row: rows of several
    readers are stacked. A method without `observe` is data-free: its statistics are None and no
    calibration runs. One that draws random numbers is `seeded`: its `compress` takes a key as
    third argument, each site its own. `notes(stats)` are numbers worth recording about a site, such
    as how many of its inputs are dead. `row_block` consecutive rows of a reader belong together
    (None: all); readers are stacked only where each has whole blocks, and only while `stacked`: a
    method that weighs a layer's rows against one another is not. The `observe` of a `paired` method
    takes as third argument what the original model has in the place of x. `compress_sparse(w, mask,
    stats)` is `compress` for a weight of which only a part is left: elsewhere it is zero and stays.
    """

    init: Callable[[int], Statistics] | None
    observe: Callable[..., Statistics] | None
    compress: Callable[..., CompressedTensor]
    error: Callable[[Float[Array, "o i"], Float[Array, "o i"], Statistics], Float[Array, ""]] = (
        weight_error
    )
    seeded: bool = False
    notes: Callable[[Statistics], dict[str, Array]] | None = None
    row_block: int | None = 1
    paired: bool = False
    stacked: bool = True
    compress_sparse: Callable[..., CompressedTensor] | None = None


class SiteTransform(NamedTuple):
    """A function-preserving change of a site: x -> x / s in its producer, W -> W s in its readers.

    `init` and `observe` are as in `LayerwiseMethod`; `scale(w[o, i], stats)` gives s[i] > 0 for the
    stacked weights of the site's readers.
    """

    init: Callable[[int], Statistics]
    observe: Callable[[Statistics, Float[Array, "n i"]], Statistics]
    scale: Callable[[Float[Array, "o i"], Statistics], Float[Array, " i"]]


@functools.partial(jax.jit, static_argnames="observe", donate_argnames="stats")
def add(stats: Statistics, *activations: Float[Array, "*n i"], observe: Any) -> Statistics:
    """Statistics with more activations, however many axes they have; compiled."""
    return observe(stats, *(x.reshape(-1, x.shape[-1]) for x in activations))


class WithOwn(NamedTuple):
    """A wrapper's own statistics, and those of the method within."""

    inner: Statistics
    own: Statistics


def beside(
    method: LayerwiseMethod,
    init: Callable[[int], Statistics],
    observe: Callable[..., Statistics],
) -> LayerwiseMethod:
    """The method as it is, with further statistics: `WithOwn`.

    Where the caller makes it `paired`, its `observe` has all three arguments, the method's own two.
    """
    notes = method.notes

    def both(stats: WithOwn, x: Float[Array, "n i"], *original: Float[Array, "n i"]) -> WithOwn:
        inner = method.observe(stats.inner, x) if method.observe else None
        return WithOwn(inner, observe(stats.own, x, *original))

    return method._replace(
        init=lambda i: WithOwn(method.init and method.init(i), init(i)),
        observe=both,
        compress=lambda w, stats, *key: method.compress(w, stats.inner, *key),
        compress_sparse=None,  # asked of the method itself alone
        error=lambda w, approximation, stats: method.error(w, approximation, stats.inner),
        notes=None if notes is None else lambda stats: notes(stats.inner),
    )
