"""How many weights of each matrix are alive, when a fraction of all of them is.

Uniform: the same fraction of each. ERK: Erdős–Rényi (Mocanu et al. 2018, arXiv:1707.04780), in
which a matrix of i inputs and o outputs has the density ε (i + o) / (i o), with ε such that the sum
is that of uniform densities, and a matrix whose density would be above one is dense. Evci et al.,
arXiv:1911.11134, Sec. 3, extend it to the kernels of convolutions, which are not here.
"""

import math
from collections.abc import Callable, Mapping

type Shapes = Mapping[str, tuple[int, ...]]
DISTRIBUTIONS = ("uniform", "erk")


def distributed(sparsity: float, distribution: str) -> Callable[[Shapes], dict[str, int]]:
    """Of leaves [*b, in, out] by name, how many weights of each of their matrices are alive.

    Raises ValueError for a sparsity outside [0, 1) and an unknown distribution.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be from 0 to below 1.")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} must be {' or '.join(DISTRIBUTIONS)}.")

    def alive(shapes: Shapes) -> dict[str, int]:
        if distribution == "uniform" or sparsity == 0:
            return {name: _size(shape) - _zeros(shape, sparsity) for name, shape in shapes.items()}
        return {
            name: _size(shapes[name]) - _zeros(shapes[name], 1 - density)
            for name, density in erk_densities(shapes, sparsity).items()
        }

    return alive


def erk_densities(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The fraction of each leaf's matrices that is alive."""
    dense: set[str] = set()
    raw = {name: sum(shape[-2:]) / _size(shape) for name, shape in shapes.items()}
    while True:
        wanted = weight = 0.0
        for name, shape in shapes.items():
            copies, zeros = math.prod(shape[:-2]), _zeros(shape, sparsity)
            if name in dense:
                wanted -= copies * zeros
            else:
                wanted += copies * (_size(shape) - zeros)
                weight += copies * raw[name] * _size(shape)
        epsilon = wanted / weight
        largest = max(r for name, r in raw.items() if name not in dense)
        if epsilon * largest <= 1:
            return {name: 1.0 if name in dense else epsilon * r for name, r in raw.items()}
        dense |= {name for name, r in raw.items() if r == largest}


def _size(shape: tuple[int, ...]) -> int:
    """Of one matrix."""
    return math.prod(shape[-2:])


def _zeros(shape: tuple[int, ...], sparsity: float) -> int:
    return math.floor(sparsity * _size(shape))
