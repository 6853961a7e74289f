"""A linear layer that keeps its weight as it is and computes its products by other means."""

import abc

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt32

from algorithms.training import Buffer


class LowPrecisionLinear(nnx.Module, abc.ABC):
    """y = product(x) + b; the master weight is what the optimizer moves and what is saved."""

    def __init__(self, linear: nnx.Linear):
        self.kernel, self.bias = linear.kernel, linear.bias

    @abc.abstractmethod
    def product(self, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
        """x Wᵀ, and by a `custom_vjp` the products of its gradient."""

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        y = self.product(x.reshape(-1, x.shape[-1])).astype(x.dtype)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def finished(self) -> Float[Array, "o i"]:
        return self.kernel[...].T


class RandomLinear(LowPrecisionLinear):
    """One that rounds at random, differently in each pass, the same when a run is resumed."""

    def __init__(self, linear: nnx.Linear, key: Key[Array, ""]):
        super().__init__(linear)
        self.key = nnx.Variable(jax.random.key_data(key))
        self.passes = Buffer(jnp.zeros((), jnp.uint32))

    def draw(self) -> UInt32[Array, "k"]:
        """The data of this pass's own key."""
        own = jax.random.fold_in(jax.random.wrap_key_data(self.key[...]), self.passes[...])
        self.passes[...] = self.passes[...] + 1
        return jax.random.key_data(own)
