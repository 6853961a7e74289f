"""Once-for-all. Cai, Gan, Wang, Zhang, Han, "Once-for-All: Train One Network and Specialize it for
Efficient Deployment", ICLR 2020, arXiv:1908.09791. Notes: papers/once_for_all.md.

A network W and a space A of its sub-networks, each of the first units of every dimension:
    min_W  E_{a ∈ A} L(C(W, a)),    then    a* = argmin_{a ∈ A, cost(a) <= budget} L(C(W, a))
C(W, a) is W ⊙ m(a): a weight counts if all of its units do. In the network that is cut out, units
that do not count are missing; what the two compute is the same, and the masks m are arrays, so that
one compiled program serves all of A.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from algorithms.optimizers.groups import path_name

LAYERS, HEADS, KV_HEADS = "layers", "heads", "kv_heads"
type Counts = Mapping[str, Int[Array, ""] | int]  # units of each dimension


class Place(NamedTuple):
    """Where a parameter stands."""

    axes: tuple[str | None, ...]  # the dimension of each, whose units lie one behind the other
    block: int | None = None  # that it is part of, by number


type Places = tuple[tuple[str, Place], ...]  # by the parameters' paths


@dataclasses.dataclass(frozen=True)
class Space:
    """Sub-networks. sizes: of the whole network. choices: in ascending order, the last one the
    whole; of dimensions that are not there, all units stay.
    """

    sizes: tuple[tuple[str, int], ...]
    choices: tuple[tuple[str, tuple[int, ...]], ...]

    def __len__(self) -> int:
        total = 1
        for _, each in self.choices:
            total *= len(each)
        return total

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Each sub-network, by what is chosen."""
        names = [name for name, _ in self.choices]
        for each in itertools.product(*(values for _, values in self.choices)):
            yield dict(zip(names, each, strict=True))

    def smallest(self) -> dict[str, int]:
        return {name: values[0] for name, values in self.choices}

    def drawn(self, key: Key[Array, ""], count: int) -> dict[str, Int[Array, " count"]]:
        """Independent sub-networks, each choice as likely as any other."""
        keys = jax.random.split(key, len(self.choices))
        return {
            name: jax.random.choice(own, jnp.asarray(values), (count,))
            for own, (name, values) in zip(keys, self.choices, strict=True)
        }

    def counts(self, chosen: Counts) -> dict[str, Any]:
        """Units of every dimension. Query heads go with the key-value head that serves them."""
        sizes = dict(self.sizes)
        found = {**sizes, **chosen}
        if KV_HEADS in chosen:
            found[HEADS] = found[KV_HEADS] * (sizes[HEADS] // sizes[KV_HEADS])
        return found


def space(sizes: Mapping[str, int], choices: Mapping[str, Sequence[int] | None]) -> Space:
    """Raises ValueError for choices that a network of these sizes does not have."""
    given = {name: tuple(values) for name, values in choices.items() if values is not None}
    if not given:
        raise ValueError(
            f"{', '.join(choices)} are all null, so that there is one network: give the sizes that "
            "one of them shall have."
        )
    for name, values in given.items():
        _require_choices(name, values, sizes)
    if {HEADS, KV_HEADS} <= given.keys():
        raise ValueError("heads and kv_heads: query heads go with theirs: give one of the two.")
    for heads in given.get(HEADS, ()):
        if heads % sizes[KV_HEADS]:
            raise ValueError(
                f"heads={list(given[HEADS])}: each of the {sizes[KV_HEADS]} key-value heads keeps "
                f"as many query heads, and {heads} is no multiple: choose kv_heads instead."
            )
    ordered = tuple((name, tuple(sorted(values))) for name, values in given.items())
    return Space(tuple(sizes.items()), ordered)


def _require_choices(name: str, values: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    whole = sizes[name]
    if not values or len(set(values)) < len(values) or not all(0 < n <= whole for n in values):
        raise ValueError(
            f"{name}={list(values)} must be different sizes from 1 to the {whole} that there are."
        )
    if whole not in values:
        raise ValueError(
            f"{name}={list(values)} leaves out {whole}, all that there are, and the whole network "
            "is one of its sub-networks: add it."
        )


def unit_masks(counts: Counts, sizes: Mapping[str, int]) -> dict[str, Bool[Array, " _"]]:
    """Which units of each dimension count: the first ones, of heads the first of each group."""
    found = {name: jnp.arange(n) < counts[name] for name, n in sizes.items()}
    if HEADS in sizes:
        each = sizes[HEADS] // sizes[KV_HEADS]
        within = jnp.arange(sizes[HEADS]) % each < counts[HEADS] // counts[KV_HEADS]
        found[HEADS] = within & jnp.repeat(found[KV_HEADS], each)
    return found


def masked(
    x: Float[Array, "..."], place: Place, masks: Mapping[str, Bool[Array, " _"]]
) -> Float[Array, "..."]:
    """A parameter of the whole network as a sub-network has it: zero where a unit does not count.

    In a block that does not run all is zero, so that nothing is added to the residual stream.
    """
    for axis, dimension in enumerate(place.axes):
        if dimension is not None and dimension in masks:
            mask = masks[dimension]
            channels = jnp.repeat(mask, x.shape[axis] // len(mask))
            shape = [-1 if n == axis else 1 for n in range(x.ndim)]
            x = x * channels.reshape(shape).astype(x.dtype)
    if place.block is not None and LAYERS in masks:
        x = x * masks[LAYERS][place.block].astype(x.dtype)
    return x


def subnetwork(model: nnx.Module, chosen: Counts, space: Space, places: Places) -> Any:
    """C(W, a) of the model, whose parameters stay as they are; gradients are those of the model.

    chosen: a, as arrays or numbers.
    """
    masks = unit_masks(space.counts(chosen), dict(space.sizes))
    where = dict(places)

    def of(path: Any, x: Any) -> Any:
        place = where.get(path_name(path))
        return x if place is None else masked(x, place, masks)

    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(of, params), rest, copy=True)
