"""EfficientQAT. Chen, Shao, Xu, Wang, Gao, Zhang, Luo, ACL 2025, arXiv:2407.11062.

First, block by block (Block-AP), weights and the steps and zero points of their groups are all
learned, on the block's output:
    ŵ = s (clip(round(w / s) + round(z), 0, 2^b - 1) - round(z))
Then, through the whole model (E2E-QP), the steps alone: the codes of the packed weights are fixed.

This differs from the official code in:
1. Steps begin where the format begins, and are rounded to what it stores; there float32, kept at
   least 1e-4, and float16 once learned. Their rounding counts as the identity, as their floor does.
2. Rates are constant; there they fall by a cosine to a twentieth. The batches are drawn anew.
3. The loss is relative, so AdamW has a smaller ε: its steps do not depend on the loss's size.
4. E2E-QP learns in float32 and rounds to what is stored at each step; there in float16.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms import formats, straight_through
from algorithms.blockwise import BlockwiseMethod
from algorithms.formats import Format, integer
from algorithms.parametrization import Parametrization, parts_of
from algorithms.straight_through import Quantized
from algorithms.tensors import CompressedTensor, QuantizedInput, QuantizedTensor
from algorithms.tensors.quantized import load_scale
from algorithms.training import exact

EPSILON = 1e-16  # of AdamW: gradients of a relative error in one of many groups are small


class Parameters(NamedTuple):
    """Of one weight."""

    weight: Float[Array, "o i"]
    step: Float[Array, "o g"]  # s
    zero: Float[Array, "o g"]  # z, in steps; of centred elements unused


def efficient_qat(
    *,
    format: Format | None = None,
    steps: int = 100,
    batch: int = 2,
    learning_rate: float = 1e-4,
    weight_learning_rate: float = 2e-5,
    keep_best: bool = False,
) -> BlockwiseMethod:
    """Block-AP onto a format, by default 4-bit integers.

    learning_rate: of steps and zero points.
    """
    format = integer() if format is None else format
    straight_through.require_learnable(format, "efficient_qat")
    if learning_rate < 0 or weight_learning_rate < 0:
        raise ValueError(f"{learning_rate=} and {weight_learning_rate=} must not be negative.")

    def init(w: Float[Array, "o i"]) -> Parameters:
        grid = format.fit(w)
        step = load_scale(grid.scale, grid.divisor).astype(w.dtype)
        zero = jnp.zeros_like(step) if grid.zero is None else grid.zero.astype(w.dtype)
        return Parameters(w, step, zero)

    rates = {"weight": weight_learning_rate, "grid": learning_rate}
    optimizer = optax.partition(
        {name: optax.adamw(rate, eps=EPSILON, weight_decay=0.0) for name, rate in rates.items()},
        Parameters("weight", "grid", "grid"),  # type: ignore[arg-type]
    )
    return straight_through.learned(
        init, quantize_weight, format, optimizer, steps=steps, batch=batch, keep_best=keep_best
    )


def quantize_weight(w: Float[Array, "o i"], parameters: Parameters, format: Format) -> Quantized:
    """The learned weight on its learned grid; w is where it began."""
    weight, step, zero = parameters
    return straight_through.on_steps(weight, step, format, zero=zero)


def e2e_qp(*, match: str = r"blocks\..*") -> Parametrization:
    """The steps of packed weights, all else being fixed."""

    def make(layer: Any, key: Key[Array, ""]) -> PackedLinear:
        return PackedLinear(*parts_of(layer))

    return Parametrization(make=make, match=match, learned=r".*\.step")


class PackedLinear(nnx.Module):
    """A packed weight whose codes stay, with its steps learned."""

    def __init__(self, tensor: CompressedTensor, bias: Any):
        inner = tensor.weight if isinstance(tensor, QuantizedInput) else tensor
        if not isinstance(inner, QuantizedTensor):
            raise ValueError(
                f"e2e_qp learns the steps of a packed weight, and this is a "
                f"{type(inner).__name__}: "
                "begin with a checkpoint quantized to a format (algorithm=efficient_qat, or gptq)."
            )
        self.weight, self.bias = nnx.Variable(tensor), bias
        self.step = exact(nnx.Param(load_scale(inner.scale, inner.divisor)))

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        y = self._tensor(stored=False).matmul(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def finished(self) -> CompressedTensor:
        return self._tensor(stored=True)

    def _tensor(self, *, stored: bool) -> CompressedTensor:
        """stored: with scales as they are kept; else with what they are worth, differentiable."""
        whole: Any = self.weight.get_value()
        inner: Any = whole.weight if isinstance(whole, QuantizedInput) else whole
        kept = straight_through.stored_step(self.step[...], formats.format_of(inner), inner.divisor)
        scale = (kept.scale, kept.divisor) if stored else (kept.step, None)
        made = dataclasses.replace(inner, scale=scale[0], divisor=scale[1])
        return made if inner is whole else dataclasses.replace(whole, weight=made)
