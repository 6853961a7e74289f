"""Layers of Llama-3 8B and 70B and of Qwen2.5-7B, decoding: few rows of x."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.packing import pack
from kernels.wna16_matmul.api import bucket, wna16_matmul
from kernels.workload import Cost, Workload

LAYERS = {  # K, N
    "8B qkv": (4096, 6144),
    "8B o": (4096, 4096),
    "8B gate_up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B o": (8192, 8192),
    "70B gate_up": (8192, 57344),
    "Qwen qkv": (3584, 4608),
    "Qwen gate_up": (3584, 37888),
    "Qwen down": (18944, 3584),
}


class Form(NamedTuple):
    kind: str
    bits: int
    group: int
    scale: str = "float16"
    zero: str | None = None
    divisor: bool = False


FORMS = {
    "W4": Form("int", 4, 128),
    "W4 zero": Form("int", 4, 128, zero="uint8"),
    "W4 g32": Form("int", 4, 32),
    "W8": Form("int", 8, 128),
    "W3": Form("int", 3, 128, zero="uint8"),
    "W2": Form("int", 2, 64, zero="float16"),
    "NVFP4": Form("fp4", 4, 16, scale="float8_e4m3fn", divisor=True),
    "MXFP4": Form("fp4", 4, 32, scale="float8_e8m0fnu"),
    "NF4": Form("nf4", 4, 64),
}


def arguments(key, form: Form, m, i, o, dtype="bfloat16"):
    """x like a normalized activation's, weights that spread over all codes, scales within 2."""
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (m, i), jnp.dtype(dtype))
    packed = pack(jax.random.randint(keys[1], (o, i), 0, 2**form.bits, jnp.uint8), form.bits)
    table = (o, i // form.group)
    if form.scale == "float8_e8m0fnu":
        powers = jax.random.randint(keys[2], table, 117, 121, jnp.uint8)
        scale = jax.lax.bitcast_convert_type(powers, jnp.float8_e8m0fnu)
    else:
        scale = jax.random.uniform(keys[2], table, minval=0.01, maxval=0.02)
        scale = (scale * 2e4 if form.divisor else scale).astype(form.scale)
    zero = None
    if form.zero == "uint8":
        zero = jax.random.randint(keys[3], table, 0, 2**form.bits, jnp.uint8)
    elif form.zero is not None:
        zero = jax.random.uniform(keys[3], table, form.zero, 0, 2**form.bits - 1)
    return x, packed, scale, zero, jnp.float32(2e4) if form.divisor else None


def workload(form: Form, m: int, i: int, o: int) -> Workload:
    run = functools.partial(wna16_matmul, bits=form.bits, kind=form.kind)
    make = functools.partial(arguments, form=form, m=m, i=i, o=o)
    x, packed, scale, zero, _ = jax.eval_shape(lambda: make(jax.random.key(0)))
    read = sum(a.size * a.dtype.itemsize for a in (x, packed, scale, zero) if a is not None)

    def dense(key):
        keys = jax.random.split(key)
        return [jax.random.normal(k, shape, jnp.bfloat16)
                for k, shape in zip(keys, ((m, i), (i, o)), strict=True)]  # fmt: skip

    rows = m + -m % 8
    return Workload(
        make, run, Cost(read + 2 * m * o, 2 * m * i * o),
        bucket=bucket(m, i, o, form.group, form.bits, form.kind),
        plain=jnp.matmul, plain_arguments=lambda key: tuple(dense(key)),
        temporary=8 * rows * o * 4 + 2 * rows * i,  # parts of sums in float32, and x in its order
    )  # fmt: skip


def _name(layer: str, form: str, m: int) -> str:
    return f"{layer}, {form}, M={m}"


WORKLOADS = {
    _name(layer, form, m): workload(FORMS[form], m, *LAYERS[layer])
    for layer, form, m in [
        *((layer, "W4", 1) for layer in LAYERS),
        *((layer, "W4", 16) for layer in LAYERS),
        *((layer, "W4", 128) for layer in ("8B qkv", "8B gate_up", "70B o", "Qwen down")),
        *((layer, form, 16) for form in ("W4 zero", "W8", "W3", "W2", "NVFP4", "MXFP4", "NF4")
          for layer in ("8B gate_up", "70B o")),
        ("8B qkv", "W4 g32", 16),
        ("8B qkv", "W8", 128),
        ("8B qkv", "NVFP4", 1),
        ("8B qkv", "NVFP4", 128),
    ]
}  # fmt: skip
