"""Tiny models of every scheme that compressed-tensors is written in, in planish's environment."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from algorithms import formats
from algorithms.activations import quantized_inputs
from algorithms.elements import Integer
from algorithms.formats import Format
from algorithms.kv_cache import SCALES
from experiments.checkpoints.folder import FolderWriter
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from experiments.checkpoints.planish import part_of
from experiments.checkpoints.sources import shapes
from experiments.data.tokenizer import Tokenizer
from models.decoder import DecoderConfig
from models.rope import RopeScaling
from tests.algorithms.integers import rtn

CONFIG = DecoderConfig(
    vocabulary=61, hidden=96, layers=2, heads=3, kv_heads=1, head_size=32, feed_forward=160,
    context=64, norm_epsilon=1e-5,
)  # fmt: skip
WIDE = dataclasses.replace(CONFIG, hidden=160, heads=5, feed_forward=288)
QWEN2 = dataclasses.replace(CONFIG, family="qwen2", tied_embeddings=True, qkv_bias=True)
MISTRAL = dataclasses.replace(CONFIG, family="mistral", windows=(5, 5))
QWEN3 = dataclasses.replace(
    CONFIG, family="qwen3", qk_norm=True, windows=(None, 6), tied_embeddings=True
)
LLAMA3 = dataclasses.replace(
    CONFIG, qkv_bias=True, output_bias=True, mlp_bias=True,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=32),
)  # fmt: skip
TOKEN = formats.integer(bits=8, group_size=None, symmetric=True, scale_dtype="float32")
TENSOR = Format(
    element=Integer(bits=8, symmetric=True), rows=None, columns=None, scale_dtype="float32"
)
UNEVEN = Format(element=Integer(bits=8), rows=None, columns=None, scale_dtype="float32")
integer = formats.integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What linear layers are rounded to, and their inputs.

    tolerance: on a layer's outputs for the inputs that transformers gave it, root mean square over
    theirs. It is small but where an input falls between two codes, to either side by the last bit
    (the largest of a token at 8 bits, if it is negative), and in MX, whose power of two is chosen
    by another rule there. logits: the same on logits, as far as that can be asked: what falls to
    another side in one layer moves all that follow.
    """

    weights: Format | Callable[[str], Format | None]
    inputs: Format | None = None
    dynamic: bool | str = True
    config: DecoderConfig = CONFIG
    tolerance: float = 1e-5
    logits: float = 1e-4

    def format(self, path: str) -> Format | None:
        if callable(self.weights):
            return self.weights(path)
        return None if path in ("embed", "head") else self.weights


def mixed(path: str) -> Format | None:
    """A dense layer, FP8, a head of 8 bits, and 3 and 4 bits for the rest."""
    if path in ("embed", "blocks.1.mlp.down"):
        return None
    if path == "head":
        return integer(bits=8, group_size=None)
    if path.endswith("attention.o"):
        return formats.fp8()
    return integer(bits=3 if "mlp" in path else 4, group_size=32)


W8 = integer(bits=8, group_size=None, symmetric=True)
W4 = integer(group_size=32, symmetric=True)
FP8, FP8_TENSOR, FP8_BLOCK = (
    formats.fp8(),
    formats.fp8(rows=None),
    formats.fp8(rows=128, columns=128),
)
NVFP4, MXFP4, MXFP8 = formats.nvfp4(), formats.microscaling(), formats.microscaling(element="e4m3")
CASES: dict[str, Case] = {
    **{f"w{bits}": Case(weights=integer(bits=bits, group_size=32)) for bits in range(2, 9)},
    "w4_symmetric": Case(weights=integer(group_size=16, symmetric=True)),
    "w3_channel": Case(weights=integer(bits=3, group_size=None)),
    **{
        f"w4_{name}": Case(weights=integer(group_size=32), config=config)
        for name, config in (
            ("qwen2", QWEN2), ("mistral", MISTRAL), ("qwen3", QWEN3), ("llama3", LLAMA3)
        )
    },
    "w8_float32_scales": Case(weights=integer(bits=8, group_size=None, scale_dtype="float32")),
    "w8a8": Case(weights=W8, inputs=TOKEN, tolerance=1e-2, logits=0.1),
    "w8a8_static": Case(weights=W8, inputs=TENSOR, dynamic=False, tolerance=1e-2, logits=0.05),
    "w8a8_uneven": Case(
        weights=integer(bits=8, group_size=None), inputs=UNEVEN, dynamic=False,
        tolerance=1e-2, logits=0.05,
    ),
    "w4a8": Case(weights=W4, inputs=TOKEN, tolerance=1e-2, logits=0.1),
    "w4afp8": Case(weights=W4, inputs=FP8, logits=0.1),
    "fp8_tensor": Case(weights=FP8_TENSOR),
    "fp8_channel": Case(weights=FP8),
    "fp8_block": Case(weights=FP8_BLOCK, config=WIDE),
    "fp8_dynamic": Case(weights=FP8, inputs=FP8, logits=0.1),
    "fp8_static": Case(weights=FP8_TENSOR, inputs=FP8_TENSOR, dynamic=False, logits=0.1),
    "fp8_block_groups": Case(
        weights=FP8_BLOCK, inputs=formats.fp8(columns=32), config=WIDE, logits=0.1
    ),
    "nvfp4": Case(weights=NVFP4),
    "nvfp4a4": Case(weights=NVFP4, inputs=NVFP4, dynamic="local", logits=0.5),
    "mxfp4": Case(weights=MXFP4),
    "mxfp8": Case(weights=MXFP8),
    "mxfp4a4": Case(weights=MXFP4, inputs=MXFP4, tolerance=0.2, logits=1.0),
    "mxfp8a8": Case(weights=MXFP8, inputs=MXFP8, tolerance=0.05, logits=0.3),
    "mixed": Case(weights=mixed),
    **{
        f"w4_kv_{element}": Case(
            weights=integer(group_size=32), config=dataclasses.replace(config, cache=element),
        )
        for element, config in (("fp8", LLAMA3), ("int8", QWEN3))
    },
}  # fmt: skip


def tensors(case: Case, seed: int = 0) -> dict[str, Any]:
    """A random model of a case, by our names; float16 where it is dense."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for name, shape in shapes(case.config).items():
        path = name.removesuffix(".weight")
        x = _draw(rng, path, shape)
        format = case.format(path) if len(shape) == 2 and path != name else None
        if name.endswith(SCALES):
            found[name] = x.astype(np.float32)
            continue
        found[name] = x.astype(np.float16) if format is None else _compress(case, format, x, rng)
    return found


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    if "norm" in path:
        return rng.uniform(0.5, 1.5, shape)
    if path.endswith(SCALES):  # coarse, so that rounding shows
        return rng.uniform(0.05, 0.1, shape) * (1 if path.endswith("k_scale") else 0.5)
    if path.endswith("bias"):
        return 0.3 * rng.standard_normal(shape)
    if path == "embed":
        return 0.3 * rng.standard_normal(shape)
    return 1.2 * rng.standard_normal(shape) / shape[-1] ** 0.5


def _compress(case: Case, format: Format, x: np.ndarray, rng: np.random.Generator) -> Any:
    w = jnp.asarray(x, jnp.float32)
    if case.inputs is None:
        return format.quantize(w)
    method = rtn(bits=4)._replace(compress=lambda w, _: format.quantize(w))
    method = quantized_inputs(format=case.inputs, dynamic=case.dynamic)(method)
    if case.dynamic is True:
        return method.compress(w, None)
    seen = jnp.asarray(rng.standard_normal((40, w.shape[1])), jnp.float32)
    return method.compress(w, method.observe(method.init(w.shape[1]), seen))  # type: ignore


def write(case: Case, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Export a model of a case; what it holds, by our names."""
    made = tensors(case, seed)
    writer = FolderWriter(folder, case.config, CompressedTensors())
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in made.items():
        parts.setdefault(part_of(name), {})[name] = tensor
    for part, its in parts.items():
        writer.write(part, its)
    writer.finish(case.config, tokenizer(case.config.vocabulary), {})
    return made


def tokenizer(vocabulary: int) -> Tokenizer:
    words = {chr(33 + n): n for n in range(vocabulary)}
    return Tokenizer(core=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="!")))
