"""FP8 training. Micikevicius, Stosic, Burgess et al., 2022, arXiv:2209.05433; scaling as in
NVIDIA's TransformerEngine.

All three products of a linear layer are of FP8 numbers, summed in float32: E4M3 for activations and
weights, E5M2 (or E4M3) for gradients,
    y = (x̂ ŵ) / (s_x s_w),   ∂x = (ĝ ŵᵀ) / (s_g s_w),   ∂w = (x̂ᵀ ĝ) / (s_x s_g),   x̂ = fp8(s_x x)
with a scale for each tensor by its largest magnitude, s = peak / amax. Current scaling takes the
tensor's own amax; delayed scaling those of the passes before, s = peak / (2^margin max_τ amax_τ),
over a window of them, so that nothing waits for a maximum. An amax of zero, or that is not finite,
leaves the scale as it was (1 where it has none); a scale above float32 becomes its largest number.

Scales begin at 1, as in TransformerEngine. What a gradient's amax was is known in the backward pass
alone, and leaves it as the cotangent of the layer's memory (`BackwardBuffer`), as in flax.linen.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from algorithms.low_precision.layers import LowPrecisionLinear
from algorithms.minifloat import E4M3, E5M2, MINIFLOATS, Minifloat
from algorithms.parametrization import Parametrization, require_dense
from algorithms.training import BackwardBuffer, Buffer
from kernels import dispatch

DTYPES = {E4M3: jnp.float8_e4m3fn, E5M2: jnp.float8_e5m2}
CAPABILITY = (8, 9)  # of GPUs that multiply FP8
LARGEST = float(np.finfo(np.float32).max)


class Memory(NamedTuple):
    """Of one tensor under delayed scaling."""

    scale: Float[Array, ""]  # of the next pass
    history: Float[Array, " t"]  # amax of those before, the last one first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """window, margin and amax are of delayed scaling."""

    scaling: str = "current"  # or "delayed"
    gradients: str = "e5m2"  # or "e4m3"
    window: int = 1024  # passes whose amax is remembered
    margin: int = 0  # powers of two that the scale stays below
    amax: str = "max"  # of the window; or "most_recent"

    def __post_init__(self) -> None:
        known = {"scaling": ("current", "delayed"), "gradients": ("e5m2", "e4m3"),
                 "amax": ("max", "most_recent")}  # fmt: skip
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name}={value!r} must be {' or '.join(values)}.")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1.")


class FP8Linear(LowPrecisionLinear):
    def __init__(self, linear: nnx.Linear, recipe: Recipe):
        super().__init__(linear)
        self.recipe = recipe
        if recipe.scaling == "delayed":
            self.inputs, self.weights = _memory(Buffer, recipe), _memory(Buffer, recipe)
            self.gradients = _memory(BackwardBuffer, recipe)

    def product(self, x):
        w, recipe = self.kernel[...], self.recipe
        if recipe.scaling == "current":
            one = jnp.ones((), jnp.float32)
            scales = (scale_of(amax(t), one, E4M3, 0) for t in (x, w))
            return fp8_product(recipe, x, w, *scales, None)
        inputs, weights, gradients = (
            Memory(*(v[...] for v in kept)) for kept in (self.inputs, self.weights, self.gradients)
        )
        y = fp8_product(recipe, x, w, inputs.scale, weights.scale, gradients)
        for kept, memory, seen in ((self.inputs, inputs, x), (self.weights, weights, w)):
            for variable, value in zip(
                kept, remembered(memory, amax(seen), E4M3, recipe), strict=True
            ):
                variable[...] = value
        return y


def fp8(
    *,
    scaling: str = "current",
    gradients: str = "e5m2",
    window: int = 1024,
    margin: int = 0,
    amax: str = "max",
    match: str = r"blocks\..*",
) -> Parametrization:
    """Linear layers whose products are of FP8 numbers; the settings are those of `Recipe`.

    match: the regular expression that a layer's whole path matches. Raises ValueError for settings
    outside their choices, and for layers that are not dense.
    """
    recipe = Recipe(scaling=scaling, gradients=gradients, window=window, margin=margin, amax=amax)
    return Parametrization(
        make=lambda layer, key: FP8Linear(require_dense(layer, "fp8"), recipe), match=match
    )


def products() -> str:
    """Whether products are "real", of FP8 numbers, or "emulated": of the same numbers in float32.

    Both are summed in float32, in another order. Kept for a run's record.
    """
    where = dispatch.device()
    capability = tuple(map(int, (where.capability or "0.0").split(".")))
    real = where.platform == "cuda" and capability >= CAPABILITY
    found = "real" if real else "emulated"
    what = "multiplies FP8" if real else "does not multiply FP8"
    dispatch.note("fp8_product", found, f"{where.kind} {what}")
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fp8_product(
    recipe: Recipe,
    x: Float[Array, "n i"],
    w: Float[Array, "i o"],
    x_scale: Float[Array, ""],
    w_scale: Float[Array, ""],
    gradients: Memory | None,
) -> Float[Array, "n o"]:
    """x w in x's dtype. The cotangent of `gradients` is that memory after the pass; None: the
    gradient is scaled by its own amax.
    """
    return _forward(recipe, x, w, x_scale, w_scale, gradients)[0]


def _forward(recipe, x, w, x_scale, w_scale, gradients):
    qx, qw = quantize(x, x_scale, E4M3), quantize(w, w_scale, E4M3)
    y = _unscaled(_dot(qx, qw, 1, 0), x_scale, w_scale).astype(x.dtype)
    return y, (qx, qw, x_scale, w_scale, gradients, jnp.zeros(0, w.dtype))


def _backward(recipe: Recipe, residuals: Any, g: Float[Array, "n o"]):
    qx, qw, x_scale, w_scale, memory, like = residuals
    form, largest = MINIFLOATS[recipe.gradients], amax(g)
    if memory is None:
        scale, after = scale_of(largest, jnp.ones((), jnp.float32), form, 0), None
    else:
        scale, after = memory.scale, remembered(memory, largest, form, recipe)
    qg = quantize(g, scale, form)
    dx = _unscaled(_dot(qg, qw, 1, 1), scale, w_scale).astype(g.dtype)
    dw = _unscaled(_dot(qx, qg, 0, 0), x_scale, scale).astype(like.dtype)
    return dx, dw, jnp.zeros_like(x_scale), jnp.zeros_like(w_scale), after


fp8_product.defvjp(_forward, _backward)


def amax(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.max(jnp.abs(lax.stop_gradient(x))).astype(jnp.float32)


def scale_of(
    amax: Float[Array, ""], before: Float[Array, ""], form: Minifloat, margin: int
) -> Float[Array, ""]:
    """s, by the scale before where amax gives none."""
    s = form.peak / jnp.where(amax > 0, amax, 1) / 2.0**margin
    s = jnp.where((amax > 0) & jnp.isfinite(amax), s, before)
    return jnp.minimum(s, LARGEST)


def remembered(memory: Memory, amax: Float[Array, ""], form: Minifloat, recipe: Recipe) -> Memory:
    """The memory after a pass."""
    newest = amax.astype(memory.history.dtype)
    history = jnp.roll(memory.history, 1).at[0].set(newest)
    by = history.max() if recipe.amax == "max" else newest
    scale = scale_of(by.astype(jnp.float32), memory.scale, form, recipe.margin)
    return Memory(scale.astype(memory.scale.dtype), history)


def quantize(x: Float[Array, "p q"], scale: Float[Array, ""], form: Minifloat) -> Array:
    """fp8(s x), above the peak the peak."""
    codes = form.encode(x.astype(jnp.float32) * scale.astype(jnp.float32))
    return lax.bitcast_convert_type(codes, DTYPES[form])


def _dot(a: Array, b: Array, axis: int, other: int) -> Float[Array, "p q"]:
    """The product over one axis of each; every FP8 number is exact in what emulates it."""
    if products() == "emulated":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dimensions = (((axis,), (other,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _unscaled(y: Float[Array, "p q"], *scales: Float[Array, ""]) -> Float[Array, "p q"]:
    """One by one: the product of two scales may be above float32."""
    for scale in scales:
        y = y * (1 / scale.astype(jnp.float32))
    return y


def _memory(kind: type[Buffer], recipe: Recipe) -> nnx.List:
    return nnx.List([kind(jnp.ones(())), kind(jnp.zeros(recipe.window))])
