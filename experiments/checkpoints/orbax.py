"""planish's own checkpoints: packed tensors through Orbax, and one JSON file that describes them.

    planish.json      format, architecture, recipe, digests, how each tensor is stored
    tokenizer/        the tokenizer and chat template of the source
    parts/blocks.0/   one Orbax tree per block, and one each for embed, norm and head

A checkpoint is written part by part into `<folder>.partial` and renamed when it is whole.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from algorithms.tensors import QuantizedTensor
from experiments.checkpoints.sources import Source
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from models.decoder import DecoderConfig
from models.rope import RopeScaling

FORMAT = 1
DESCRIPTION = "planish.json"
Tensor = np.ndarray | jax.Array | QuantizedTensor


def part_of(name: str) -> str:
    """The part that holds a tensor: "blocks.3" for all of block 3, else the module's name."""
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "blocks" else pieces[0]


class CheckpointWriter:
    """Writes a checkpoint part by part; nothing appears under its final name until `finish`."""

    def __init__(self, folder: Path):
        if folder.exists():
            raise UserError(f"{folder} exists already: choose another output folder.")
        self.folder, self.partial = folder, folder.with_name(folder.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        (self.partial / "parts").mkdir(parents=True)
        self._tensors: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, str] = {}

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one part: tensors by full name, all of this part."""
        trees = {name: _fields(tensor) for name, tensor in sorted(tensors.items())}
        with _writing(self.folder):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                path = (self.partial / "parts" / part).absolute()
                checkpointer.save(path, args=ocp.args.PyTreeSave(trees))
        self._digests[part] = _digest(trees)
        self._tensors |= {name: _describe(tensor) for name, tensor in tensors.items()}

    def finish(self, config: DecoderConfig, tokenizer: Tokenizer, notes: Mapping[str, Any]) -> None:
        """Describe what was written and give the folder its name. notes: recipe, source, …"""
        description = {
            "format": FORMAT,
            "architecture": dataclasses.asdict(config),
            **notes,
            "tensors": self._tensors,
            "digests": self._digests,
        }
        with _writing(self.folder):
            (self.partial / "tokenizer").mkdir()
            tokenizer.save(self.partial / "tokenizer")
            (self.partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
            os.replace(self.partial, self.folder)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # Orbax reports a full disk as a ValueError
        free = shutil.disk_usage(folder.parent).free / 1e6
        raise UserError(
            f"Writing the checkpoint {folder} failed ({free:.0f} MB free on its disk): {error}. "
            "Make room or choose another output folder."
        ) from error


@contextlib.contextmanager
def checkpoint_writer(folder: Path) -> Iterator[CheckpointWriter]:
    """A writer that removes its partial output if the body does not reach `finish`."""
    writer = CheckpointWriter(folder)
    try:
        yield writer
    finally:
        writer.discard()


class Checkpoint(Source):
    """A checkpoint of our own, opened lazily; the last part read is kept."""

    def __init__(self, folder: Path):
        self.location, self._folder = str(folder), folder
        try:
            self.description = json.loads((folder / DESCRIPTION).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / DESCRIPTION} cannot be read as JSON: {error}.") from error
        if self.description.get("format") != FORMAT:
            raise UserError(
                f"{folder} has checkpoint format {self.description.get('format')!r}; this version "
                f"reads format {FORMAT}: compress the model again."
            )
        self.config = _config(self.description["architecture"])
        self._part = functools.lru_cache(maxsize=1)(self._read_part)

    def names(self) -> frozenset[str]:
        return frozenset(self.description["tensors"])

    def tensor(self, name: str) -> Tensor:
        """A dense array, or a QuantizedTensor as it is stored."""
        stored = self.description["tensors"].get(name)
        if stored is None:
            raise UserError(f"{self.location} has no tensor {name}.")
        fields = self._part(part_of(name))[name]
        if stored["kind"] == "dense":
            return fields["dense"]
        zero = jnp.asarray(fields["zero"]) if "zero" in fields else None
        tensor = QuantizedTensor(
            jnp.asarray(fields["packed"]),
            jnp.asarray(fields["scale"]),
            zero,
            stored["bits"],
            stored["columns"],
        )
        tensor.validate()
        return tensor

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensor(name)
        if isinstance(tensor, QuantizedTensor):
            return np.asarray(tensor.dequantize())
        return np.asarray(tensor)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self._folder / "tokenizer")

    def digest(self) -> str:
        """SHA-256 of the description, which holds the digest of every part."""
        return hashlib.sha256((self._folder / DESCRIPTION).read_bytes()).hexdigest()

    def _read_part(self, part: str) -> dict[str, dict[str, np.ndarray]]:
        path = (self._folder / "parts" / part).absolute()
        try:
            trees = _restore(path)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read, the checkpoint is damaged: {error}."
            ) from error
        if _digest(trees) != self.description["digests"].get(part):
            raise UserError(
                f"{path} does not match its SHA-256 in {DESCRIPTION}: the checkpoint is damaged, "
                "compress the model again."
            )
        return trees


def _restore(path: Path) -> dict[str, dict[str, np.ndarray]]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError("its Orbax metadata are missing or damaged")
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _fields(tensor: Tensor) -> dict[str, np.ndarray]:
    if not isinstance(tensor, QuantizedTensor):
        return {"dense": np.asarray(tensor)}
    fields = {"packed": tensor.packed, "scale": tensor.scale, "zero": tensor.zero}
    return {name: np.asarray(field) for name, field in fields.items() if field is not None}


def _describe(tensor: Tensor) -> dict[str, Any]:
    if isinstance(tensor, QuantizedTensor):
        kind = {"kind": "quantized", "bits": tensor.bits, "columns": tensor.columns}
        return {**kind, "shape": list(tensor.shape), "storage_bits": tensor.storage_bits()}
    return {
        "kind": "dense",
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "storage_bits": 8 * tensor.nbytes,
    }


def _digest(trees: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    total = hashlib.sha256()
    for name in sorted(trees):
        for field, array in sorted(trees[name].items()):
            total.update(f"{name} {field} {array.dtype} {array.shape}\n".encode())
            total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()


def _config(fields: dict[str, Any]) -> DecoderConfig:
    scaling, windows = fields["rope_scaling"], fields["windows"]
    return DecoderConfig(
        **fields
        | {
            "rope_scaling": None if scaling is None else RopeScaling(**scaling),
            "windows": None if windows is None else tuple(windows),
        }
    )
