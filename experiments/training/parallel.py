"""Training on many devices, of one machine or several: where each array of a run lies.

Everything is left to JAX: arrays are placed on a mesh once, and the compiler divides the step
(GSPMD). Every process draws the same batches and keeps the shards that are its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from algorithms.optimizers.groups import named
from algorithms.training import Batch
from experiments.errors import UserError
from models.config import DecoderConfig
from models.sharding import AXES, BATCH, fitting, partition, require_divisible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes that train together, each on its own devices (`jax.distributed`)."""

    coordinator: str | None = None  # host:port of the first, which all can reach; None: one alone
    count: int = 1
    number: int = 0  # of this process, from 0
    find: bool = False  # whether the cluster (Slurm, a TPU's, MPI) knows all that

    def begin(self) -> None:
        """Before JAX is used for anything else. Raises UserError if they do not come together."""
        if self.coordinator is None and not self.find:
            return
        try:
            if self.find:
                jax.distributed.initialize()
            else:
                jax.distributed.initialize(self.coordinator, self.count, self.number)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"processes: number {self.number} of {self.count} did not meet the others at "
                f"{self.coordinator} ({str(error).splitlines()[0]}): start all of them, with one "
                "coordinator and numbers from 0."
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """How many devices there are along each axis of the mesh (`models.sharding`)."""

    data: int = 1
    fsdp: int = 1
    model: int = 1

    def mesh(self, config: DecoderConfig | None, batch: int) -> Mesh | None:
        """None where one device is asked for.

        Raises UserError unless the axes take all devices, and divide the batch and the model.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes == [1, 1, 1]:
            return None
        if int(np.prod(sizes)) != jax.device_count():
            raise UserError(
                f"mesh: data={self.data} · fsdp={self.fsdp} · model={self.model} are "
                f"{np.prod(sizes)} devices, and there are {jax.device_count()}: choose sizes with "
                "that product."
            )
        if batch % (self.data * self.fsdp):
            raise UserError(
                f"mesh: data={self.data} · fsdp={self.fsdp} must divide the windows that are "
                f"computed at once, batch / accumulate = {batch}: choose another batch or mesh."
            )
        found = jax.make_mesh(tuple(sizes), AXES, (jax.sharding.AxisType.Auto,) * 3)
        if config is None:
            if self.model > 1 or self.fsdp > 1:
                raise UserError("mesh: a classifier is only split by data: choose mesh.data alone.")
            return found
        try:
            require_divisible(config, found)
        except ValueError as error:
            raise UserError(str(error)) from error
        return found


def layout(
    mesh: Mesh, tree: Any, config: DecoderConfig | None, params: Mapping[str, Any]
) -> tuple[NamedSharding, ...]:
    """Of each leaf of a state: what is like a parameter, such as its moments, lies as it does.

    params: the parameters by their paths.
    """

    def place(name: str, leaf: Any) -> NamedSharding:
        mine = _parameter(name, leaf, params)
        if mine is None or config is None:
            return NamedSharding(mesh, PartitionSpec())
        return fitting(mesh, partition(config, mine, leaf.shape), leaf.shape)

    return tuple(place(name, leaf) for name, leaf in named(tree).items())


def _parameter(name: str, leaf: Any, params: Mapping[str, Any]) -> str | None:
    """The path of the parameter that a leaf of the state is of, if it has its shape."""
    pieces = name.split(".")
    for n in range(len(pieces)):
        path = ".".join(pieces[n:])
        if path in params and params[path].shape == leaf.shape:
            return path
    return None


def put(tree: Any, shardings: tuple[NamedSharding, ...] | None) -> Any:
    """Place a tree whose values every process has."""
    if shardings is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    placed = [_placed(x, s) for x, s in zip(leaves, shardings, strict=True)]
    return jax.tree.unflatten(structure, placed)


def _placed(x: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if _is_key(x):
        numbers = np.asarray(jax.random.key_data(x))
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.random.wrap_key_data(_placed(numbers, everywhere), impl=_generator(x.dtype))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def leads() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def share(tree: Any | None, template: Any, shardings: tuple[NamedSharding, ...] | None) -> Any:
    """The first process' tree on every process' devices; None: it has none. Tree and template are
    of whole host arrays.
    """
    there = multihost_utils.broadcast_one_to_all(np.array(tree is not None))
    if not there:
        return None
    sent = _plain(template if tree is None else tree)
    leaves, structure = jax.tree.flatten(multihost_utils.broadcast_one_to_all(sent))
    keys = [x.dtype if _is_key(x) else None for x in jax.tree.leaves(template)]
    whole = [
        x if key is None else jax.random.wrap_key_data(jnp.asarray(x), impl=_generator(key))
        for x, key in zip(leaves, keys, strict=True)
    ]
    return put(jax.tree.unflatten(structure, whole), shardings)


def gather(tree: Any) -> Any:
    """All of a tree, on every process' host where processes have parts of it."""
    if jax.process_count() == 1:
        return tree

    def whole(x: Any) -> Any:
        if _is_key(x):
            data = multihost_utils.process_allgather(jax.random.key_data(x), tiled=True)
            return jax.random.wrap_key_data(jnp.asarray(data), impl=_generator(x.dtype))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def _plain(tree: Any) -> Any:
    """Keys as the numbers that they are."""
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if _is_key(x) else x), tree)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _generator(dtype: Any) -> Any:
    return jax.random.key_impl(jnp.empty((0,), dtype))


def put_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """Windows over the devices that share them."""
    if mesh is None:
        return batch

    return jax.tree.map(lambda x: _placed(x, fitting_batch(mesh, len(x))), batch)


def fitting_batch(mesh: Mesh, size: int) -> NamedSharding:
    shared = mesh.shape["data"] * mesh.shape["fsdp"]
    return NamedSharding(mesh, BATCH if size % shared == 0 else PartitionSpec())
