"""The public function: checks shapes, chooses an implementation."""

from jaxtyping import Array, Float

from kernels.gram import reference, xla

IMPLEMENTATIONS = {"reference": reference.gram, "xla": xla.gram}


def gram(x: Float[Array, "n i"], *, implementation: str = "auto") -> Float[Array, "i i"]:
    """The symmetric product xᵀ x, accumulated in float32 or x's wider type.

    "auto" is "xla" until a faster implementation has been measured. Raises ValueError for an
    unknown implementation.
    """
    chosen = "xla" if implementation == "auto" else implementation
    if chosen not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation={implementation!r} is not one of {known}.")
    return IMPLEMENTATIONS[chosen](x)
