"""Prune, then quantize: what one method leaves is what another rounds."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod, Statistics, beside
from algorithms.tensors import BlockSparseTensor, QuantizedTensor, SparseTensor


def pruned(pruner: LayerwiseMethod, method: LayerwiseMethod) -> LayerwiseMethod:
    """`method` on the weights that `pruner` leaves, and on those alone.

    A method with `compress_sparse` is told which weights are gone; what others put in their place
    is cut off. Statistics that both want are kept once. Raises ValueError, when it compresses, if
    the first removes nothing or the second has no codes.
    """
    around, inner, own = method, _itself, _itself
    if pruner.observe is None:
        own = _nothing
    elif pruner.observe is not method.observe:
        assert pruner.init is not None
        around = beside(method, pruner.init, pruner.observe)
        inner, own = (lambda stats: stats.inner), (lambda stats: stats.own)

    def compress(w: Float[Array, "o i"], stats: Statistics, *key: Any) -> Any:
        left = pruner.compress(w, own(stats))
        if not isinstance(left, SparseTensor | BlockSparseTensor):
            raise ValueError(
                f"pruning gave a {type(left).__name__}, of which nothing is gone: choose magnitude,"
                " wanda, sparsegpt or admm before the algorithm."
            )
        w = left.dequantize(w.dtype)
        if method.compress_sparse is not None:
            found = method.compress_sparse(w, left.alive(), inner(stats))
        else:
            found = method.compress(w, inner(stats), *key)
        if not isinstance(found, QuantizedTensor):
            raise ValueError(
                f"After pruning, an algorithm has to round to a format, and a "
                f"{type(found).__name__} is no such thing: choose rtn, gptq or hqq."
            )
        return left.holding(found)

    def notes(stats: Statistics) -> dict[str, Array]:
        both = (pruner.notes, own), (method.notes, inner)
        return {key: x for n, of in both if n is not None for key, x in n(of(stats)).items()}

    around = around._replace(
        compress=compress, compress_sparse=None, stacked=pruner.stacked and method.stacked,
        notes=notes if pruner.notes or method.notes else None,
    )  # fmt: skip
    if method.observe is not None or pruner.observe is None:
        return around
    return around._replace(error=_on(pruner.error, own))  # which has seen what weights multiply


def _itself(stats: Statistics) -> Statistics:
    return stats


def _nothing(stats: Statistics) -> None:
    return None


def _on(error: Callable[..., Any], own: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda w, approximation, stats: error(w, approximation, own(stats))
