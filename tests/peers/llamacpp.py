"""llama.cpp beside planish: run on a file, and what its arithmetic does to our model.

llama.cpp multiplies quantized blocks with activations that it rounds first: to blocks of 32 with a
float16 scale (Q8_0) for MXFP4 and the types of 32, to blocks of 256 with a float32 scale (Q8_K) for
the K types. `as_llamacpp` does the same to our model, so that what is left is its sums' order.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.decoder import Decoder

SCRIPT = Path(__file__).parent / "run_llamacpp.py"
LINEARS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


def run(python: str, model: Path, tokens: np.ndarray, folder: Path, *more: str) -> dict[str, Any]:
    """What the script reports, with `logits` [N, T, V]."""
    np.save(folder / "tokens.npy", np.asarray(tokens, np.int32))
    finished = subprocess.run(
        [
            python, str(SCRIPT), "--gguf", str(model), "--tokens", str(folder / "tokens.npy"),
            "--logits", str(folder / "logits.npy"), *more,
        ],
        capture_output=True,
        text=True,
        timeout=1200,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1]) | {"logits": np.load(folder / "logits.npy")}


def round_q8_0(x: jax.Array) -> jax.Array:
    """Blocks of 32: d = max|x| / 127 divides in float32, and multiplies as a float16."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    d = jnp.abs(blocks).max(-1, keepdims=True) / 127
    q = jnp.round(jnp.where(d == 0, 0, blocks / jnp.where(d == 0, 1, d)))
    return (q * d.astype(jnp.float16).astype(x.dtype)).reshape(x.shape)


def round_q8_k(x: jax.Array) -> jax.Array:
    """Blocks of 256: the largest magnitude becomes -127 with its sign turned."""
    blocks = x.reshape(*x.shape[:-1], -1, 256)
    at = jnp.abs(blocks).argmax(-1, keepdims=True)
    peak = jnp.take_along_axis(blocks, at, -1)
    turned = -127 / jnp.where(peak == 0, 1, peak)
    q = jnp.minimum(jnp.round(turned * blocks), 127)
    return jnp.where(peak == 0, 0, q / turned).reshape(x.shape)


def as_llamacpp(model: Decoder, round_input: Callable[[jax.Array], jax.Array]) -> Decoder:
    """The model with its blocks' linear layers multiplying rounded inputs, in place."""
    for block in model.blocks:
        for part, names in LINEARS.items():
            module = getattr(block, part)
            for name in names:
                setattr(module, name, _Rounded(getattr(module, name), round_input))
    return model


class _Rounded:
    def __init__(self, linear: Any, round_input: Callable[[jax.Array], jax.Array]):
        self.linear, self.round_input = linear, round_input

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.round_input(x))
