"""GGUF files, written part by part: llama.cpp's format, from tensors as planish keeps them.

Grids that ggml's blocks hold exactly are stored as such (`layouts.gguf_blocks`), what is dense as
F32, F16 or BF16, vectors as F32, which llama.cpp wants. Files of the architecture "llama" keep the
rows of q and k in the order of interleaved rotary pairs; groups run along columns, so that rows
change places without any rounding.

Parts lie in `<file>.partial/parts`, each whole or absent, with its own digest; `finish` puts the
metadata in front of them and gives the file its name at once. The bytes follow from what is stored
alone.
"""

import collections
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from algorithms.tensors import CompressedTensor, QuantizedTensor, filled
from experiments.checkpoints import gguf_metadata, gguf_parts, gguf_vocabulary
from experiments.checkpoints.gguf import PLAIN, permute, permuted_heads, stored_name
from experiments.checkpoints.layouts import gguf_blocks
from experiments.checkpoints.planish import Tensor
from experiments.checkpoints.sources import count_not_finite
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from experiments.files import begin_partial, kept_so_far, sync
from models.config import DecoderConfig

Type = gguf.GGMLQuantizationType
Infos = list[tuple[str, tuple[int, ...], int, Type]]  # name, shape, bytes, type


class GGUFWriter:
    """The twin of `planish.CheckpointWriter`: the same calls, one file.

    `parts` are those that an earlier writer of the same file left whole; `damaged` those that it
    left in another state, which were removed.
    """

    def __init__(
        self,
        path: Path,
        config: DecoderConfig,
        *,
        fallback: str | None = None,
        origin: str = "",
        check: Callable[[], None] = lambda: None,
    ):
        """fallback: f16 or f32, how tensors are stored, dequantized, that no block holds exactly.

        origin: what identifies the tensors; a partial file of others is begun anew. check: called
        before anything is put in place; it raises if that must not happen. Raises UserError if the
        file exists, or cannot say what the model computes.
        """
        if path.exists():
            raise UserError(f"{path} exists already: choose another output file.")
        if fallback not in (None, *gguf_blocks.FALLBACKS):
            raise UserError(f"fallback={fallback!r} must be f16, f32 or null for none.")
        self._check, self._fallback = check, fallback
        self.config, self.architecture = config, gguf_metadata.architecture(config)
        self._extra = gguf_metadata.tensors(config)
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.parts: dict[str, gguf_parts.PartNote] = {}
        self.damaged: list[str] = []
        with kept_so_far(path):
            begin_partial(self.partial, json.dumps({"origin": origin, "fallback": fallback}))
            (self.partial / "parts").mkdir(exist_ok=True)
            for part in sorted((self.partial / "parts").iterdir()):
                self._take_stock(part)

    def _take_stock(self, path: Path) -> None:
        try:
            if path.suffix != gguf_parts.SUFFIX:
                raise ValueError("it was being written")
            self.parts[path.stem] = gguf_parts.Part(path).note
        except (ValueError, OSError, KeyError, TypeError):
            if path.suffix == gguf_parts.SUFFIX:
                self.damaged.append(path.stem)
            path.unlink()

    def kind(self, name: str, tensor: Tensor) -> Type:
        """How a tensor will be stored; its leaves may be shapes.

        Raises UserError for one that no block holds, where there is no fallback.
        """
        if isinstance(tensor, CompressedTensor):
            try:
                return gguf_blocks.kind_of(jax.eval_shape(filled, tensor), self._fallback)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
        if len(tensor.shape) < 2:
            return Type.F32
        return next(kind for kind, dtype in PLAIN.items() if tensor.dtype == dtype)

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one part: tensors by full name, all of this part."""
        stored = {name: self._store(name, tensor) for name, tensor in sorted(tensors.items())}
        self._check()
        with kept_so_far(self.path):
            self.parts[part] = gguf_parts.save(self._path(part), stored)

    def _store(self, name: str, tensor: Tensor) -> gguf_parts.Stored:
        kind, shape = self.kind(name, tensor), tuple(tensor.shape)
        compressed = isinstance(tensor, CompressedTensor)
        tensor = filled(tensor) if isinstance(tensor, CompressedTensor) else tensor
        if isinstance(tensor, QuantizedTensor) and kind not in PLAIN:
            try:
                data = gguf_blocks.encode(tensor, kind)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
        else:
            dense = tensor.dequantize() if isinstance(tensor, CompressedTensor) else tensor
            data = _dense(name, np.asarray(dense), kind)
        heads = permuted_heads(self.config, name) if self.architecture == "llama" else None
        data = data if heads is None else permute(data, heads)
        return gguf_parts.Stored(kind, shape, data, compressed and kind in PLAIN)

    def read(self, part: str) -> gguf_parts.Part:
        """A part that was written before."""
        return gguf_parts.Part(
            self._path(part), self.config if self.architecture == "llama" else None
        )

    def _path(self, part: str) -> Path:
        return self.partial / "parts" / f"{part}{gguf_parts.SUFFIX}"

    def finish(self, config: DecoderConfig, tokenizer: Tokenizer, notes: Mapping[str, Any]) -> None:
        """Put everything into one file and give it its name. notes: recipe, source, …"""
        assert config == self.config
        unfinished = self.partial / self.path.name
        values = {
            **gguf_metadata.describe(config),
            **gguf_vocabulary.describe(tokenizer, config.vocabulary),
            **self._notes(notes),
        }
        extra = [(name, x.shape, x.nbytes, Type.F32) for name, x in self._extra.items()]
        infos = [*self._infos(), *extra]
        with kept_so_far(self.path):
            _write_header(unfinished, self.architecture, values, infos)
            with unfinished.open("ab") as file:
                file.write(gguf_parts.padding(file.tell()))
                for part in self._ordered():
                    with self._path(part).open("rb") as source:
                        source.seek(gguf_parts.Part(self._path(part)).start)
                        shutil.copyfileobj(source, file, 1 << 20)
                for x in self._extra.values():
                    file.write(x.tobytes() + gguf_parts.padding(x.nbytes))
            sync(unfinished)
            self._check()
            os.replace(unfinished, self.path)
            sync(self.path.parent)
            shutil.rmtree(self.partial)

    def _ordered(self) -> list[str]:
        """The embedding, the blocks by number, then what comes after them."""
        place = {"embed": -1}
        return sorted(
            self.parts,
            key=lambda p: (place.get(p, int(p[7:]) if p.startswith("blocks.") else 10**9), p),
        )

    def _infos(self) -> Infos:
        """Of every tensor, in the order of the file."""
        return [
            (stored_name(name), tuple(t["shape"]), t["bytes"], getattr(Type, t["type"]))
            for part in self._ordered()
            for name, t in self.parts[part].described.items()
        ]

    def _notes(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        types = collections.Counter(kind for _, shape, _, kind in self._infos() if len(shape) > 1)
        found = {
            "general.type": "model",
            "general.quantization_version": 2,
            "general.file_type": _file_type(types.most_common(1)[0][0] if types else Type.F32),
            "planish.notes": json.dumps(notes, sort_keys=True),
        }
        dense = [
            name
            for part in self._ordered()
            for name, t in self.parts[part].described.items()
            if t["dequantized"]
        ]
        return found | ({"planish.dequantized": dense} if dense else {})


def _dense(name: str, x: np.ndarray, kind: Type) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = x.astype(PLAIN[kind])
    if count_not_finite(stored):
        raise UserError(f"{name} does not fit {kind.name}: choose fallback=f32, or a wider format.")
    return _bytes(stored)


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8)


def _write_header(path: Path, architecture: str, values: Mapping[str, Any], infos: Infos) -> None:
    """Everything in front of the tensors' bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in values.items():
        add[type(value)](key, value)
    for name, shape, size, kind in infos:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _file_type(kind: Type) -> int:
    """What llama.cpp calls a file most of whose matrices are of this type."""
    named = {Type.F32: "ALL_F32", Type.Q3_K: "MOSTLY_Q3_K_S", Type.MXFP4: "MOSTLY_MXFP4_MOE"}
    named |= {k: f"MOSTLY_{k.name}_S" for k in (Type.Q4_K, Type.Q5_K)}
    return int(gguf.LlamaFileType[named.get(kind, f"MOSTLY_{kind.name}")])
