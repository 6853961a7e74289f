"""The public function: checks shapes, chooses an implementation."""

from jaxtyping import Array, Float

from kernels import dispatch
from kernels.gram import reference, xla

IMPLEMENTATIONS = {"reference": reference.gram, "xla": xla.gram}


def gram(x: Float[Array, "n i"], *, implementation: str = "auto") -> Float[Array, "i i"]:
    """The symmetric product xᵀ x, accumulated in float32 or x's wider type.

    implementation: see `kernels.dispatch`. Raises ValueError if it cannot run.
    """
    return dispatch.run("gram", IMPLEMENTATIONS, implementation, x)
