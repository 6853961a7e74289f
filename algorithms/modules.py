"""Linear layers over compressed tensors."""

from flax import nnx
from jaxtyping import Array, Float, Int

from algorithms.tensors import CompressedTensor, ExpertsTensor


class CompressedLinear(nnx.Module):
    """y = x Wᵀ + b on the compressed form of W; the dense weight is never kept."""

    def __init__(self, tensor: CompressedTensor, bias: Float[Array, " o"] | None = None):
        tensor.validate()
        self.weight = nnx.Variable(tensor)
        self.bias = None if bias is None else nnx.Param(bias)

    @property
    def tensor(self) -> CompressedTensor:
        return self.weight.get_value()

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        y = self.tensor.matmul(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class CompressedExperts(nnx.Module):
    """The same for each expert: rows are sorted by expert, `counts` of each."""

    def __init__(self, tensor: ExpertsTensor):
        tensor.validate()
        self.weight = nnx.Variable(tensor)

    @property
    def tensor(self) -> ExpertsTensor:
        return self.weight.get_value()

    def __call__(self, x: Float[Array, "n i"], counts: Int[Array, " e"]) -> Float[Array, "n o"]:
        return self.tensor.grouped_matmul(x, counts)
