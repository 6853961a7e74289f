"""What quantization-aware layers share: a weight learned through the rounding that stores it.

A layer is y = Q_x(x) Q(W)ᵀ + b. W [i, o] is its `kernel`, so that an optimizer takes it for the
matrix that it is; `rounding` says what Q is, `inputs` what Q_x is. A layer that is quantized
already keeps its grid: W begins at what its codes stand for, so that the first step's outputs are
those of the quantized model.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from algorithms import formats
from algorithms.formats import Format, Grid
from algorithms.numerics import through
from algorithms.parametrization import parts_of
from algorithms.straight_through import Quantized
from algorithms.tensors import CompressedTensor, DenseTensor, QuantizedInput, QuantizedTensor
from algorithms.training import exact


class Start(NamedTuple):
    """What a layer is made of."""

    w: Float[Array, "o i"]
    bias: Any  # nnx.Param | None
    format: Format
    grid: Grid | None  # that w is on already
    inputs: QuantizedInput | None  # what rounds its input already


@runtime_checkable
class Rounding(Protocol):
    """A weight's grid, learned or not."""

    def dense(self, w: Float[Array, "o i"]) -> Float[Array, "o i"]:
        """What w is rounded to, differentiable."""
        ...

    def tensor(self, w: Float[Array, "o i"]) -> CompressedTensor:
        """The same as it is stored."""
        ...


class LearnedGrid(nnx.Module):
    """A `Rounding` whose grid is learned."""

    format: Format

    def quantized(self, w: Float[Array, "o i"]) -> Quantized:
        raise NotImplementedError

    def dense(self, w: Float[Array, "o i"]) -> Float[Array, "o i"]:
        return self.quantized(w).dense

    def tensor(self, w: Float[Array, "o i"]) -> QuantizedTensor:
        return self.quantized(w).tensor(self.format)


@runtime_checkable
class Inputs(Protocol):
    """An input's grid, learned or not."""

    def rounded(self, x: Float[Array, "*m i"]) -> Float[Array, "*m i"]: ...

    def around(self, tensor: CompressedTensor) -> QuantizedInput:
        """A weight whose layer rounds its input so."""
        ...


class AwareLinear(nnx.Module):
    """A linear layer that computes with its weight, and its input, as they are stored."""

    def __init__(self, start: Start, rounding: Rounding, inputs: Inputs | None = None):
        self.kernel, self.bias = exact(nnx.Param(start.w.T)), start.bias
        self.rounding, self.inputs = rounding, inputs

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        x = x if self.inputs is None else self.inputs.rounded(x)
        y = DenseTensor(self.rounding.dense(self.kernel[...].T)).matmul(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def finished(self) -> CompressedTensor:
        tensor = self.rounding.tensor(self.kernel[...].T)
        return tensor if self.inputs is None else self.inputs.around(tensor)


class Nearest(nnx.Module):
    """Each number at its nearest point of a grid: one that is kept, or fitted to w each time."""

    def __init__(self, format: Format, grid: Grid | None = None):
        if format.needs_data:
            raise ValueError(f"search={format.search} needs activations, which training keeps not.")
        self.format = format
        parts = (None, None, None) if grid is None else grid
        self.scale, self.zero, self.divisor = map(kept, parts)

    @property
    def grid(self) -> Grid | None:
        parts = [None if v is None else v[...] for v in (self.scale, self.zero, self.divisor)]
        return None if self.scale is None else Grid(*parts)

    def dense(self, w: Float[Array, "o i"]) -> Float[Array, "o i"]:
        return through(w, self.format.nearest(w, self.grid))

    def tensor(self, w: Float[Array, "o i"]) -> QuantizedTensor:
        return self.format.quantize(w) if self.grid is None else self.format.round(w, self.grid)


class RoundedInputs(nnx.Module):
    """An input rounded onto a format, with a scale fitted to it, or as a layer does already."""

    def __init__(self, way: QuantizedInput):
        nothing = DenseTensor(jnp.zeros((0, way.shape[1])))
        self.way = nnx.Variable(dataclasses.replace(way, weight=nothing))

    def rounded(self, x: Float[Array, "*m i"]) -> Float[Array, "*m i"]:
        return self.way.get_value().rounded(x)

    def around(self, tensor: CompressedTensor) -> QuantizedInput:
        return dataclasses.replace(self.way.get_value(), weight=tensor)


def start(layer: Any, format: Format | None) -> Start:
    """A layer's weight and what it is to be rounded to.

    format: of a dense layer; None, or the same, of one that is quantized. Raises ValueError for a
    layer that is quantized otherwise.
    """
    tensor, bias = parts_of(layer)
    inputs = tensor if isinstance(tensor, QuantizedInput) else None
    inner = tensor.weight if isinstance(tensor, QuantizedInput) else tensor
    if isinstance(inner, QuantizedTensor):
        own = formats.format_of(inner)
        if not _alike(format, own, inner.shape):
            raise ValueError(
                f"format={format} is not the one that a layer is quantized to, {own}: choose "
                "format=null to keep that, or begin with the model before it was quantized."
            )
        grid = Grid(inner.scale, inner.zero, inner.divisor)
        return Start(inner.dequantize(), bias, own, grid, inputs)
    if not isinstance(inner, DenseTensor):
        raise ValueError(
            f"A {type(inner).__name__} has no grid to go on with: begin with a dense model, or one "
            "quantized to integers or small floats by rtn, gptq or another method of a format."
        )
    if format is None:
        raise ValueError(
            "format=null keeps the one that a layer is quantized to, and this one is dense: choose "
            "a format, such as int or nvfp4."
        )
    format.block(inner.shape)  # or ValueError
    return Start(inner.dequantize(), bias, format, None, inputs)


def _alike(format: Format | None, own: Format, shape: tuple[int, int]) -> bool:
    if format is None:
        return True
    same = dataclasses.replace(format, rows=own.rows, columns=own.columns, search=None)
    return same == own and format.block(shape) == own.block(shape)


def inputs_of(start: Start, activations: Format | None) -> RoundedInputs | None:
    """What rounds a layer's input: `activations`, fitted to each input, or what did before."""
    if activations is None:
        return None if start.inputs is None else RoundedInputs(start.inputs)
    if activations.needs_data:
        raise ValueError(f"search={activations.search} is for weights: activations have null.")
    nothing = DenseTensor(jnp.zeros((0, start.w.shape[1])))
    return RoundedInputs(QuantizedInput(nothing, None, None, None, activations))


def kept(x: Any) -> nnx.Variable | None:
    """A part of a grid that is not learned."""
    return None if x is None else exact(nnx.Variable(x))
