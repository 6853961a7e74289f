"""What a model is exported as: conf/export names these.

    compressed_tensors   a Hugging Face folder, quantized layers as compressed-tensors has them
    gptq                 the same, as GPTQModel and AutoGPTQ have them
    awq                  the same, as AutoAWQ has them
    safetensors          a Hugging Face folder, every weight dense
    gguf                 one file, for llama.cpp

A format of your own is an `Export`: what it refuses, and a writer that is given the parts of a
checkpoint as they are finished.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from algorithms.tensors import CompressedTensor, ExpertsTensor, filled
from experiments.checkpoints import gguf_metadata
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.folder import FolderWriter, layers, require_dense
from experiments.checkpoints.gguf_writer import GGUFWriter
from experiments.checkpoints.layouts import gguf_blocks
from experiments.checkpoints.layouts.awq import AWQ
from experiments.checkpoints.layouts.base import Layout, Scheme, no_cache
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from experiments.checkpoints.layouts.gptq import GPTQ
from experiments.checkpoints.planish import Tensor
from experiments.checkpoints.sources import shapes
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from models.config import DecoderConfig

type Forms = Mapping[str, CompressedTensor | None]  # of layers, by path such as "blocks.0.mlp.up"
DTYPES = ("float16", "bfloat16", "float32")


@runtime_checkable
class Writer(Protocol):
    """Writes an export part by part, as `planish.CheckpointWriter` does a checkpoint."""

    parts: Any  # a collection of the parts that are whole
    damaged: list[str]

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None: ...

    def finish(
        self, config: DecoderConfig, tokenizer: Tokenizer, notes: Mapping[str, Any]
    ) -> None: ...


class Export(abc.ABC):
    """One format."""

    name: str  # what a run's export of it is called, a file's suffix included

    @abc.abstractmethod
    def require(self, config: DecoderConfig, forms: Forms) -> None:
        """Raise UserError for what the format cannot hold. Forms may be of shapes alone."""

    @abc.abstractmethod
    def writer(
        self, place: Path, config: DecoderConfig, *, origin: str, check: Callable[[], None]
    ) -> Writer:
        """What writes to `place`, and goes on where an earlier writer of the same `origin` was."""

    def disk(self, config: DecoderConfig, forms: Forms, checkpoint: int) -> int:
        """Bytes that it takes, about; checkpoint: that our own takes."""
        return checkpoint


@dataclasses.dataclass(frozen=True)
class Folder(Export):
    """A Hugging Face folder."""

    name: str
    layout: Layout | None
    dtype: str | None = None

    def require(self, config: DecoderConfig, forms: Forms) -> None:
        schemes: dict[str, Scheme | None] = {}
        try:
            FAMILIES[config.family].write(config)
        except ValueError as error:
            raise UserError(str(error)) from error
        for path, form in forms.items():
            try:
                schemes[path] = None if form is None else self._scheme(path, form)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from error
        if self.layout is not None and not config.predicts:
            raise UserError(
                f"{self.layout.method} is written for models that predict tokens, and this is an "
                "encoder: export dense weights (safetensors)."
            )
        if config.cache is not None:
            self._require_cache(config.cache)
        if self.layout is not None:
            _require_places(config, forms)
        if self.layout is not None and any(schemes.values()):
            try:
                self.layout.describe(schemes)
            except ValueError as error:
                raise UserError(str(error)) from error

    def _require_cache(self, element: str) -> None:
        try:
            if self.layout is None:
                raise ValueError(no_cache("A folder of dense weights"))
            self.layout.cache(element)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _scheme(self, path: str, form: CompressedTensor) -> Scheme | None:
        if self.layout is None:
            require_dense(form)
            return None
        if path == "embed":
            raise ValueError(
                f"a compressed embedding is nothing that loaders of {self.layout.method} read: "
                "take the rule for it out."
            )
        return self.layout.scheme(_single(form))

    def writer(
        self, place: Path, config: DecoderConfig, *, origin: str, check: Callable[[], None]
    ) -> FolderWriter:
        return FolderWriter(
            place, config, self.layout, dtype=self.dtype, origin=origin, check=check
        )

    def disk(self, config: DecoderConfig, forms: Forms, checkpoint: int) -> int:
        if self.layout is None:
            return jnp.dtype(self.dtype or "float32").itemsize * _parameters(config)
        known = [form for form in forms.values() if form is not None]
        wide = [
            f.shape
            for f in known
            if self.layout.scheme(_single(f)).get("format") == "int-quantized"
        ]
        return checkpoint + sum(map(math.prod, wide))  # there, a code of any width takes a byte


def _single(form: CompressedTensor) -> CompressedTensor:
    """As a layer is stored: experts one by one, codes with those of zeros."""
    if isinstance(form, ExpertsTensor):
        form = jax.eval_shape(lambda tensor: tensor.one(0), form)
    return jax.eval_shape(filled, form)


def _require_places(config: DecoderConfig, forms: Forms) -> None:
    """Refuse layers that the family keeps in a way that no compressed one has."""
    family = FAMILIES[config.family]
    if family.fused or family.transposed:
        packed = {f"{path}.weight": form for path, form in forms.items() if form is not None}
        jax.eval_shape(lambda tensors: layers(family, config, tensors), packed)


def _parameters(config: DecoderConfig) -> int:
    return sum(map(math.prod, shapes(config).values()))


@dataclasses.dataclass(frozen=True)
class GGUF(Export):
    """One file, as llama.cpp has it."""

    fallback: str | None = None
    name: str = "model.gguf"

    def require(self, config: DecoderConfig, forms: Forms) -> None:
        if config.cache is not None:
            raise UserError(no_cache("GGUF"))
        gguf_metadata.architecture(config)
        for path, form in forms.items():
            try:
                _ = form and gguf_blocks.kind_of(_single(form), self.fallback)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from error

    def writer(
        self, place: Path, config: DecoderConfig, *, origin: str, check: Callable[[], None]
    ) -> GGUFWriter:
        return GGUFWriter(place, config, fallback=self.fallback, origin=origin, check=check)

    def disk(self, config: DecoderConfig, forms: Forms, checkpoint: int) -> int:
        """Parts, then the file of them, before the parts go."""
        dense = sum(math.prod(form.shape) for form in forms.values() if form is not None)
        wide = {None: 0, "f16": 2, "f32": 4}[self.fallback]
        return 2 * (checkpoint + wide * dense)


def gguf(*, fallback: str | None = None) -> Export:
    """A file that llama.cpp loads. fallback: f16 or f32, how to store, dequantized, what none of
    its blocks holds exactly; null refuses it.
    """
    if fallback not in (None, *gguf_blocks.FALLBACKS):
        raise ValueError(f"fallback={fallback!r} must be f16, f32 or null for none.")
    return GGUF(fallback)


def compressed_tensors(*, sparse: str | None = None) -> Export:
    """A folder that transformers, vLLM and SGLang load, quantized layers as they are.

    sparse: bitmask keeps pruned weights that have no codes as compressed-tensors did until 0.14,
    whose compressors decompress them, and later ones do not; null refuses them.
    """
    return Folder("compressed_tensors", CompressedTensors(sparse))


def gptq(*, checkpoint_format: str | None = None) -> Export:
    """A folder in GPTQModel's layout. checkpoint_format: gptq or gptq_v2, by default as the grid
    allows.
    """
    return Folder("gptq", GPTQ(checkpoint_format))


def awq() -> Export:
    """A folder in AutoAWQ's layout."""
    return Folder("awq", AWQ())


def safetensors(*, dtype: str = "float16") -> Export:
    """A folder of dense weights, which everything loads. dtype: float16, bfloat16 or float32."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    return Folder(f"safetensors_{dtype}", None, dtype)
