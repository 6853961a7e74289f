"""Linear layers over compressed tensors."""

from flax import nnx
from jaxtyping import Array, Float

from algorithms.tensors import QuantizedTensor
from kernels.wna16_matmul import wna16_matmul


class QuantizedLinear(nnx.Module):
    """y = x Wᵀ + b on the packed codes of W; the dense weight is never kept."""

    def __init__(self, tensor: QuantizedTensor, bias: Float[Array, " o"] | None = None):
        tensor.validate()
        self.bits, self.columns = tensor.bits, tensor.columns
        self.packed = nnx.Variable(tensor.packed)
        self.scale = nnx.Variable(tensor.scale)
        self.zero = None if tensor.zero is None else nnx.Variable(tensor.zero)
        self.bias = None if bias is None else nnx.Param(bias)

    @property
    def tensor(self) -> QuantizedTensor:
        zero = None if self.zero is None else self.zero[...]
        return QuantizedTensor(self.packed[...], self.scale[...], zero, self.bits, self.columns)

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        zero = None if self.zero is None else self.zero[...]
        y = wna16_matmul(x, self.packed[...], self.scale[...], zero, bits=self.bits)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
