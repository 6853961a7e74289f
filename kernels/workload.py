"""What tests, the deviceless compilation and the benchmark run an operation on.

Each operation's `shapes.py` has `WORKLOADS`: real layer shapes by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

type Arrays = tuple[Any, ...]  # or of None, where an argument is left out


class Cost(NamedTuple):
    """The least that an operation can do, whatever computes it."""

    bytes: int  # read and written, each once
    operations: int  # of products: a multiplication and an addition are two
    unit: str = "bfloat16"  # whose rate bounds them: bfloat16, int8, float8 or float32


class Workload(NamedTuple):
    """An operation on arguments of certain shapes."""

    arguments: Callable[[Key[Array, ""]], Arrays]  # random ones, never zeros
    run: Callable[..., Any]  # run(*arguments, implementation=…): the public function
    cost: Cost
    bucket: str = ""  # of `kernels.measured`
    plain: Callable[..., Any] | None = (
        None  # plain(*arguments): what it takes the place of, in bf16
    )
    plain_arguments: Callable[[Key[Array, ""]], Arrays] | None = None  # where they are others
    temporary: int | None = (
        None  # bytes that the kernel's form may hold beside what goes in and out
    )
    tolerance: float = 4e-3  # ‖found - exact‖ / ‖exact‖


def shapes(workload: Workload) -> Arrays:
    """The arguments' shapes and types alone."""
    return jax.eval_shape(lambda: workload.arguments(jax.random.key(0)))


def widened(arguments: Arrays) -> Arrays:
    """The same numbers with floats as float64; codes and the small floats of scales stay as they
    are. Under `jax.enable_x64`.
    """
    wide = (jnp.float32, jnp.bfloat16, jnp.float16)
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype in wide else x, arguments)


def distance(found: Any, exact: Any) -> Float[Array, ""]:
    """‖found - exact‖ / ‖exact‖ over all arrays of a result, where they are finite; infinite where
    other values are not. Under `jax.enable_x64`.
    """
    off = norm = jnp.zeros((), jnp.float64)
    alike = jnp.array(True)
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        ours, other = (x.astype(jnp.float64) for x in (ours, other))
        finite = jnp.isfinite(other)
        same = (ours == other) | (jnp.isnan(ours) & jnp.isnan(other))
        alike &= ((jnp.isfinite(ours) == finite) & (same | finite)).all()
        off += jnp.sum(jnp.where(finite, ours - other, 0.0) ** 2)
        norm += jnp.sum(jnp.where(finite, other, 0.0) ** 2)
    return jnp.where(alike, jnp.sqrt(off / jnp.where(norm > 0, norm, 1)), jnp.inf)


type Workloads = Mapping[str, Workload]
