"""planish's own checkpoints: a safetensors file for each block, and one JSON file on them all.

    planish.json                 format, architecture, recipe, digests, how each tensor is stored
    tokenizer/                   the tokenizer and chat template of the source
    parts/blocks.0.safetensors   one file per block, and one each for embed, norm and head

The bytes follow from what is stored alone: no times, no names of machines. A checkpoint is written
part by part into `<folder>.partial` and renamed when it is whole. A part appears whole under its
name or not at all and carries its own digest, so that an interrupted writer knows where to go on.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from algorithms.tensors import CompressedTensor
from experiments import memory
from experiments.checkpoints import forms, shards
from experiments.checkpoints.sources import (
    Source,
    require_finite,
    require_room,
    require_shape,
    shapes,
)
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from experiments.files import kept_so_far, sync, write_whole
from experiments.untrusted import DAMAGE, explained, parse_json, read_json, refusing, require_file
from models.config import BlockSizes, DecoderConfig, Mixing
from models.rope import RopeScaling

FORMAT = 3
DESCRIPTION = "planish.json"
SUFFIX = ".safetensors"
Tensor = np.ndarray | jax.Array | CompressedTensor
Trees = Mapping[str, Mapping[str, np.ndarray]]  # the fields of each tensor


def part_of(name: str) -> str:
    """The part that holds a tensor: "blocks.3" for all of block 3, else the module's name."""
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "blocks" else pieces[0]


class PartNote(NamedTuple):
    """What is known of a part that is whole: its digest and how its tensors are stored."""

    digest: str
    described: Mapping[str, Mapping[str, Any]]


class Part:
    """What one part of a checkpoint holds, read back and compared with its digest."""

    def __init__(self, path: Path):
        """Raises UserError or one of DAMAGE if the file is not whole."""
        description = parse_json(shards.read_metadata(path)["planish"])
        self.digest: str = description["digest"]
        self.described: dict[str, dict[str, Any]] = description["tensors"]
        self.trees: dict[str, dict[str, np.ndarray]] = {}
        for full, entry in shards.read_header(path).items():
            name, _, field = full.rpartition(":")
            self.trees.setdefault(name, {})[field] = entry.open()
        if digest(self.trees, self.described) != self.digest:
            raise ValueError("its content does not match its digest")

    def tensor(self, name: str) -> Tensor:
        """A dense array, a view of the file, or a compressed tensor as it is stored."""
        fields, stored = self.trees[name], self.described[name]
        if stored["kind"] == "dense":
            return fields["dense"]
        return forms.tensor(stored["form"], fields)


class CheckpointWriter:
    """Writes a checkpoint part by part; nothing appears under its final name until `finish`.

    `parts` are those that an earlier writer of the same folder left whole; `damaged` those that it
    left in another state, which were removed.
    """

    def __init__(self, folder: Path, *, check: Callable[[], None] = lambda: None):
        """check: called before anything is put in place; it raises if that must not happen."""
        if folder.exists():
            raise UserError(f"{folder} exists already: choose another output folder.")
        self._check = check
        self.folder, self.partial = folder, folder.with_name(folder.name + ".partial")
        self.parts: dict[str, PartNote] = {}
        self.damaged: list[str] = []
        with kept_so_far(folder, "the checkpoint "):
            (self.partial / "parts").mkdir(parents=True, exist_ok=True)
            for path in sorted((self.partial / "parts").iterdir()):
                self._take_stock(path)

    def _take_stock(self, path: Path) -> None:
        try:
            if path.suffix != SUFFIX:
                raise ValueError("it was being written")
            part = Part(path)
            self.parts[path.stem] = PartNote(part.digest, part.described)
        except (UserError, *DAMAGE):
            if path.suffix == SUFFIX:
                self.damaged.append(path.stem)
            path.unlink()

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one part: tensors by full name, all of this part."""
        with kept_so_far(self.folder, "the checkpoint "):
            self.parts[part] = write_part(self._path(part), tensors, self._check)

    def read(self, part: str) -> Part:
        """A part that was written before."""
        return Part(self._path(part))

    def _path(self, part: str) -> Path:
        return self.partial / "parts" / f"{part}{SUFFIX}"

    def finish(self, config: DecoderConfig, tokenizer: Tokenizer, notes: Mapping[str, Any]) -> None:
        """Describe what was written and give the folder its name. notes: recipe, source, …"""
        parts = {name: self.parts[name] for name in sorted(self.parts)}
        description = {
            "format": FORMAT,
            "architecture": dataclasses.asdict(config),
            **notes,
            "tensors": {n: t for part in parts.values() for n, t in part.described.items()},
            "digests": {name: part.digest for name, part in parts.items()},
        }
        with kept_so_far(self.folder, "the checkpoint "):
            shutil.rmtree(self.partial / "tokenizer", ignore_errors=True)
            (self.partial / "tokenizer").mkdir()
            tokenizer.save(self.partial / "tokenizer")
            write_whole(self.partial / DESCRIPTION, json.dumps(description, indent=1) + "\n")
            self._check()
            os.replace(self.partial, self.folder)
            sync(self.folder.parent)


def write_part(
    path: Path, tensors: Mapping[str, Tensor], check: Callable[[], None] = lambda: None
) -> PartNote:
    """One file of tensors with its digest, which `Part` reads: whole under its name, or not there.

    check: called before anything is put in place; it raises if that must not happen.
    """
    described = {name: _describe(tensor) for name, tensor in sorted(tensors.items())}
    trees = {name: _fields(tensor) for name, tensor in tensors.items()}
    note = PartNote(digest(trees, described), described)
    arrays = {f"{name}:{field}": x for name, t in trees.items() for field, x in t.items()}
    metadata = {"planish": json.dumps({"digest": note.digest, "tensors": note.described})}
    check()
    shards.save(path, arrays, metadata)
    return note


class Checkpoint(Source):
    """A checkpoint of our own, opened lazily; the last part read is kept."""

    def __init__(self, folder: Path):
        self.location, self._folder = str(folder), folder
        self.description = read_json(folder / DESCRIPTION, folder)
        if self.description.get("format") != FORMAT:
            raise UserError(
                f"{folder} has checkpoint format {self.description.get('format')!r}; this version "
                f"reads format {FORMAT}: compress the model again."
            )
        with refusing(f"{folder / DESCRIPTION} does not describe a model"):
            self.config = decoder_config(self.description["architecture"])
            self._require_tensors()
        self._part = functools.lru_cache(maxsize=1)(self._read_part)

    def _require_tensors(self) -> None:
        held = self.description["tensors"]
        require_room(self.config, len(held), self.location)
        lacking = sorted(shapes(self.config).keys() ^ held.keys())
        if lacking or not isinstance(self.description["digests"], dict):
            raise ValueError(f"its tensors are not those of its architecture, {lacking[:1]}")

    def names(self) -> frozenset[str]:
        return frozenset(self.description["tensors"])

    def packed(self, name: str) -> bool:
        return self.description["tensors"][name]["kind"] == "compressed"

    def tensor(self, name: str) -> Tensor:
        """A dense array, or a compressed tensor as it is stored."""
        if name not in self.description["tensors"]:
            raise UserError(f"{self.location} has no tensor {name}.")
        with refusing(f"{name} in {self.location} is damaged", "compress the model again"):
            tensor = self._part(part_of(name)).tensor(name)
            require_shape(tuple(tensor.shape), shapes(self.config)[name], name, self.location)
            return tensor

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensor(name)
        with refusing(f"{name} in {self.location} is damaged", "compress the model again"):
            dense = tensor.dequantize() if isinstance(tensor, CompressedTensor) else tensor
            require_finite(np.asarray(dense), name, self.location)
            return np.asarray(dense)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self._folder / "tokenizer")

    def digest(self) -> str:
        """SHA-256 of the description, which holds the digest of every part."""
        return hashlib.sha256((self._folder / DESCRIPTION).read_bytes()).hexdigest()

    def _read_part(self, name: str) -> Part:
        path = require_file(self._folder / "parts" / f"{name}{SUFFIX}", self._folder)
        try:
            part = Part(path)
        except (UserError, *DAMAGE) as error:
            raise UserError(
                f"{path} cannot be read, the checkpoint is damaged: {explained(error)}."
            ) from error
        if part.digest != self.description["digests"].get(name):
            raise UserError(
                f"{path} does not match its SHA-256 in {DESCRIPTION}: the checkpoint is damaged, "
                "compress the model again."
            )
        return part


def _fields(tensor: Tensor) -> dict[str, np.ndarray]:
    if isinstance(tensor, CompressedTensor):
        return forms.fields(tensor)
    return {"dense": np.asarray(tensor)}


def _describe(tensor: Tensor) -> dict[str, Any]:
    if isinstance(tensor, CompressedTensor):
        return {
            "kind": "compressed",
            "form": forms.describe(tensor),
            "shape": list(tensor.shape),
            "storage_bits": tensor.storage_bits(),
            "multiplications": tensor.multiplications(),
        }
    return {
        "kind": "dense",
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "storage_bits": 8 * tensor.nbytes,
    }


def digest(trees: Trees, described: Mapping[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(trees):
        for field, array in sorted(trees[name].items()):
            total.update(f"{name} {field} {array.dtype} {array.shape}\n".encode())
            for part in memory.in_parts(array):
                total.update(np.ascontiguousarray(part).view(np.uint8).data)
    return total.hexdigest()


def decoder_config(fields: dict[str, Any]) -> DecoderConfig:
    made = _tuples(fields)
    for key, kind in (("rope_scaling", RopeScaling), ("experts", Mixing)):
        if made.get(key) is not None:
            made[key] = kind(**_tuples(made[key]))
    if made.get("blocks") is not None:
        made["blocks"] = tuple(BlockSizes(**sizes) for sizes in made["blocks"])
    return DecoderConfig(**made)


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
