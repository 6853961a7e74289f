"""LSQ. Esser, McKinstry, Bablani, Appuswamy, Modha, ICLR 2020, arXiv:1902.08153.
LSQ+. Bhalgat, Lee, Nagel, Blankevoort, Kwak, CVPR Workshops 2020, arXiv:2004.09576.

The step s of a grid is learned with the weights, and by LSQ+ where it begins, β:
    LSQ     v̂ = s round(clip(v / s, -Q_n, Q_p)),             Q_n = 2^(b-1), Q_p = 2^(b-1) - 1
    LSQ+    v̂ = s round(clip((v - β) / s, -Q_n, Q_p)) + β,   Q_n = 0, Q_p = 2^b - 1
    ∂v̂/∂s = round(x) - x within, -Q_n or Q_p beyond;   ∂v̂/∂v = 1 within, 0 beyond;   ∂v̂/∂β the other
with x what is clipped. Gradients of s and β are divided by √(N Q_p), N the numbers that share them.
LSQ begins at s = 2 E|v| / √Q_p; LSQ+ at max|μ ± 3σ| / 2^(b-1) for weights, and for inputs at what
the first batch covers.

This differs from the papers in:
1. Each group of the format has a step; for N the papers take the layer's weights.
2. Steps are rounded to what the format stores, and β to its zero point: both count as the
   identity. Of weights only an asymmetric format has a β; with a symmetric one LSQ+ and LSQ differ
   in where they begin.
3. Small floats and quantiles begin at the range that covers the weights: Q_p has no such meaning.
4. N of an input is its channels, as in the paper; codes elsewhere count the batch too.
5. A layer that is quantized begins at its own grid.
6. LSQ+ fits the first step of inputs to the squared error; here it covers the first batch.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms import straight_through
from algorithms.elements import Element, Integer, SmallFloat
from algorithms.formats import Format, Grid
from algorithms.numerics import through
from algorithms.parametrization import Parametrization
from algorithms.quantization import aware
from algorithms.quantization.aware import AwareLinear, LearnedGrid, Start
from algorithms.straight_through import Quantized
from algorithms.tensors import CompressedTensor, QuantizedInput
from algorithms.tensors.quantized import load_scale
from algorithms.training import Buffer, exact


def lsq(
    *, format: Format | None = None, input_bits: int | None = None, match: str = r"blocks\..*"
) -> Parametrization:
    """Learned steps of weights, and of inputs to integers of `input_bits`; None: inputs stay.

    format: None keeps what a quantized layer has.
    """
    return _parametrization(format, input_bits, match, offset=False)


def lsq_plus(
    *, format: Format | None = None, input_bits: int | None = None, match: str = r"blocks\..*"
) -> Parametrization:
    """Learned steps and offsets; else as `lsq`."""
    return _parametrization(format, input_bits, match, offset=True)


def _parametrization(
    format: Format | None, input_bits: int | None, match: str, *, offset: bool
) -> Parametrization:
    if format is not None:
        straight_through.require_learnable(format, "lsq")

    def make(layer: Any, key: Key[Array, ""]) -> AwareLinear:
        start = aware.start(layer, format)
        straight_through.require_learnable(start.format, "lsq")
        inputs: Any = aware.inputs_of(start, None)
        if input_bits is not None:
            inputs = LearnedInputs(input_bits, start.w.shape[1], offset=offset)
        return AwareLinear(start, LearnedStep(start, offset=offset), inputs)

    return Parametrization(make=make, match=match)


class LearnedStep(LearnedGrid):
    """A step for each group; where `low` is learned too, the grid begins there."""

    def __init__(self, start: Start, *, offset: bool):
        self.format = start.format
        step, zero, divisor = _kept(start.grid) if start.grid else _beginning(start, offset)
        self.step, self.divisor = exact(nnx.Param(step)), aware.kept(divisor)
        moves = offset and zero is not None
        self.low = exact(nnx.Param(-zero * step)) if moves else None
        self.zero = None if moves else aware.kept(zero)

    def quantized(self, w: Float[Array, "o i"]) -> Quantized:
        g = factor(w.size // self.step[...].size, self.format.element, self.low is not None)
        step = scaled_gradient(self.step[...], g)
        low = None if self.low is None else scaled_gradient(self.low[...], g)
        zero, divisor = (None if p is None else p[...] for p in (self.zero, self.divisor))
        return straight_through.on_steps(
            w, step, self.format, zero=zero, low=low, divisor=divisor, clip_first=True
        )


def _kept(grid: Grid) -> tuple[Any, Any, Any]:
    step = load_scale(grid.scale, grid.divisor)
    return step, None if grid.zero is None else grid.zero.astype(step.dtype), grid.divisor


def _beginning(start: Start, offset: bool) -> tuple[Any, Any, Any]:
    """Step, zero point and divisor of a weight that has none."""
    w, format = start.w, start.format
    element, groups = format.element, w.reshape(len(w), -1, format.block(w.shape)[1])
    if not isinstance(element, Integer):
        return _kept(format.fit(w))
    if offset:
        mean, spread = groups.mean(-1), 3 * groups.std(-1)
        size = jnp.maximum(jnp.abs(mean - spread), jnp.abs(mean + spread))
        step = size / 2 ** (element.bits - 1)
    else:
        step = 2 * jnp.abs(groups).mean(-1) / math.sqrt(most(element))
    step = jnp.where(step == 0, 1, step)  # a group of zeros stays one on any grid
    zero = None if element.centred else jnp.full_like(step, 2 ** (element.bits - 1))
    return step, zero, None


class LearnedInputs(nnx.Module):
    """One step for all of an input, and with an offset where its grid begins."""

    def __init__(self, bits: int, channels: int, *, offset: bool):
        element = Integer(bits=bits, symmetric=not offset)
        self.format = Format(element=element, columns=None, rows=None, scale_dtype="float32")
        self.channels = channels
        self.start = exact(Buffer(jnp.zeros(2)))  # step and `low` by the first batch; 0: not yet
        self.step = exact(nnx.Param(jnp.zeros(())))  # how far each has moved from there
        self.low = exact(nnx.Param(jnp.zeros(()))) if offset else None

    def rounded(self, x: Float[Array, "*m i"]) -> Float[Array, "*m i"]:
        row = x.reshape(1, -1).astype(jnp.float32)
        start = jax.lax.stop_gradient(self._first(row))
        self.start.set_value(jnp.where(self.start[...][0] > 0, self.start[...], start))
        return self._quantized(row).dense.reshape(x.shape).astype(x.dtype)

    def around(self, tensor: CompressedTensor) -> QuantizedInput:
        """Raises ValueError before there was any input."""
        if not self.start[...][0] > 0:
            raise ValueError("The step of an input follows from the first one: train a step first.")
        return QuantizedInput(tensor, *self._quantized(jnp.zeros((1, 1))).grid, self.format)

    def _first(self, x: Float[Array, "1 n"]) -> Float[Array, "2"]:
        element = self.format.element
        if self.low is None:
            return jnp.stack([2 * jnp.abs(x).mean() / math.sqrt(most(element)), jnp.zeros(())])
        low, high = jnp.minimum(x.min(), 0), jnp.maximum(x.max(), 0)
        return jnp.stack([(high - low) / (2**element.bits - 1), low])

    def _quantized(self, x: Float[Array, "1 n"]) -> Quantized:
        g = factor(self.channels, self.format.element, self.low is not None)
        step, low = self.start[...]
        step = (step + scaled_gradient(self.step[...], g)).reshape(1, 1)
        if self.low is not None:
            low = (low + scaled_gradient(self.low[...], g)).reshape(1, 1)
        one_row = dataclasses.replace(self.format, rows=1)
        given = None if self.low is None else low
        return straight_through.on_steps(x, step, one_row, low=given, clip_first=True)


def most(element: Element, offset: bool = False) -> float:
    """Q_p: the largest of a grid, in steps, from zero or from where it begins."""
    if isinstance(element, Integer) and offset:
        return float(2**element.bits - 1)
    if isinstance(element, Integer):
        return float(2 ** (element.bits - 1) - 1)
    return element.format.peak if isinstance(element, SmallFloat) else 1.0


def factor(count: int, element: Element, offset: bool) -> float:
    """1 / √(N Q_p)."""
    return 1 / math.sqrt(count * most(element, offset))


def scaled_gradient(x: Array, factor: float) -> Array:
    return through(x * factor, x)
