"""What tests, the deviceless compilation and the benchmark run an operation on.

Each operation's `shapes.py` has `WORKLOADS`: real layer shapes by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

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


type Workloads = Mapping[str, Workload]
