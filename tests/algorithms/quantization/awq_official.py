"""A slow NumPy float64 port of the official AWQ code, the oracle of test_awq.py.

Source: github.com/mit-han-lab/llm-awq at commit d6e797a (MIT): `_search_module_scale` in
awq/quantize/auto_scale.py for a module that is linear layers side by side, `auto_clip_layer` in
awq/quantize/auto_clip.py, `pseudo_quantize_tensor` in awq/quantize/quantizer.py with zero points,
the only kind that it uses. Left out are batches of rows and the sample of at most 512 tokens.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

Range = tuple[np.ndarray, np.ndarray]  # [o, g]: the ends that a group is clipped to


class Search(NamedTuple):
    """What the search for scales finds."""

    scale: np.ndarray  # [i]
    ratio: float
    losses: list[float]  # of every ratio tried


def pseudo_quantize(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """W [o, i] rounded in groups; their range need not hold zero."""
    x, top = w.reshape(-1, group), 2**bits - 1
    high, low = x.max(1, keepdims=True), x.min(1, keepdims=True)
    scale = np.maximum(high - low, 1e-5) / top
    zero = np.clip(-np.round(low / scale), 0, top)
    codes = np.clip(np.round(x / scale) + zero, 0, top)
    return ((codes - zero) * scale).reshape(w.shape)


def search_scale(w: np.ndarray, x: np.ndarray, bits: int, group: int, grid: int = 20) -> Search:
    """Scales for W [o, i] and activations X [n, i]."""
    magnitude = np.abs(x).mean(0)
    best, losses = None, []
    for step in range(grid):
        ratio = step / grid
        scale = np.maximum(magnitude**ratio, 1e-4)
        scale = scale / np.sqrt(scale.max() * scale.min())
        rounded = pseudo_quantize(w * scale, bits, group) / scale
        losses.append(float(((x @ w.T - x @ rounded.T) ** 2).mean()))
        if best is None or losses[-1] < best[0]:
            best = losses[-1], ratio, scale
    assert best is not None
    return Search(best[2], best[1], losses)


def shrunken(grid: int = 20, most: float = 0.5) -> Callable[[np.ndarray], Iterable[Range]]:
    """The official candidates for groups [o, g, c]: ± the largest magnitude, shrunk by steps."""

    def ranges(groups: np.ndarray) -> Iterable[Range]:
        largest = np.abs(groups).max(-1)
        for step in range(int(most * grid)):
            yield -largest * (1 - step / grid), largest * (1 - step / grid)

    return ranges


def auto_clip(
    w: np.ndarray,
    x: np.ndarray,
    bits: int,
    group: int,
    candidates: Callable[[np.ndarray], Iterable[Range]] | None = None,
) -> np.ndarray:
    """W [o, i] clipped and rounded, each group to the range that costs its own output least."""
    groups = w.reshape(len(w), -1, group)
    inputs = x.reshape(len(x), -1, group)
    least, best = np.full(groups.shape[:2], 1e9), groups
    for low, high in (candidates or shrunken())(groups):
        clipped = np.clip(groups, low[..., None], high[..., None])
        rounded = pseudo_quantize(clipped.reshape(w.shape), bits, group).reshape(groups.shape)
        output = np.einsum("ngc,ogc->ngo", inputs, rounded - groups)
        error = (output**2).mean(0).T
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better[..., None], rounded, best)
    return best.reshape(w.shape)
