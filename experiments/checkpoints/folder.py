"""A Hugging Face folder written part by part: what servers and transformers load.

    config.json, model.safetensors.index.json     the model, and where its tensors are
    model-00001-of-000NN.safetensors              one file for each part, embed first
    tokenizer.json, tokenizer_config.json         with the chat template
    generation_config.json, README.md             where a text ends; a model card

It is written into `<folder>.partial` and renamed when it is whole, as our own checkpoints are: a
part appears whole or not at all and carries its own digest, and the bytes follow from what is
stored alone, so that an interrupted writer goes on to the same ones.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from algorithms.kv_cache import SCALES
from algorithms.tensors import CompressedTensor, DenseTensor, filled
from experiments import memory
from experiments.checkpoints import shards
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.families.base import Family, Place
from experiments.checkpoints.layouts.base import Layout, Scheme
from experiments.checkpoints.layouts.joining import join
from experiments.checkpoints.model_card import card
from experiments.checkpoints.planish import Tensor, part_of
from experiments.checkpoints.sources import count_not_finite, shapes
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from experiments.files import ORIGIN, begin_partial, kept_so_far, sync, write_whole
from models.config import DecoderConfig

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of dtypes in a config.json


class ShardNote(NamedTuple):
    """What is known of a part that is whole: its digest, its linear layers' schemes, its sizes."""

    digest: str
    schemes: Mapping[str, Scheme | None]


class FolderWriter:
    """Writes a folder part by part; nothing appears under its final name until `finish`.

    `parts` are those that an earlier writer of the same folder left whole; `damaged` those that it
    left in another state, which were removed.
    """

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        layout: Layout | None,
        *,
        dtype: str | None = None,
        origin: str = "",
        check: Callable[[], None] = lambda: None,
    ):
        """layout: of compressed tensors; None makes them dense. dtype: of what is dense; None
        leaves it as it comes. origin: what identifies the tensors; a partial folder of others is
        begun anew. check: called before anything is put in place; it raises if that must not be.
        """
        if folder.exists():
            raise UserError(f"{folder} exists already: choose another output folder.")
        self.folder, self.partial = folder, folder.with_name(folder.name + ".partial")
        self._config, self._layout, self._dtype, self._check = config, layout, dtype, check
        self._family = FAMILIES[config.family]
        self._order = list(dict.fromkeys(map(part_of, shapes(config))))
        self.parts: dict[str, ShardNote] = {}
        self.damaged: list[str] = []
        said = {"origin": origin, "layout": layout and layout.method, "dtype": dtype}
        with kept_so_far(folder):
            finished = (self.partial / "README.md").is_file()
            begin_partial(self.partial, json.dumps(said), finished=finished)
            for left in self.partial.glob(".*.tmp"):
                left.unlink()
            for part in self._order:
                self._take_stock(part)

    def _take_stock(self, part: str) -> None:
        path = self._path(part)
        if not path.exists():
            return
        try:
            note = json.loads(shards.read_metadata(path)["planish"])
            arrays = {name: e.open() for name, e in shards.read_header(path).items()}
            if _digest(arrays, note["schemes"]) != note["digest"]:
                raise ValueError("its content does not match its digest")
            self.parts[part] = ShardNote(note["digest"], note["schemes"])
        except (UserError, ValueError, OSError, KeyError, TypeError):
            self.damaged.append(part)
            path.unlink()

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one part: tensors by our full names, all of this part."""
        dense = {name: self._dense(name, x) for name, x in sorted(tensors.items())
                 if not self._packs(x)}  # fmt: skip
        arrays = self._family.stored(self._config, dense)
        schemes: dict[str, Scheme | None] = {
            place.name.removesuffix(".weight"): None
            for name in dense for place in self._places(name)
            if name.startswith("blocks.") and len(place.shape) == 2 or name == "head.weight"
        }  # fmt: skip
        packed = {name: x for name, x in tensors.items()
                  if isinstance(x, CompressedTensor) and name not in dense}  # fmt: skip
        for module, tensor in layers(self._family, self._config, packed).items():
            found, schemes[module] = self._encode(module, tensor)
            arrays |= {f"{module}.{key}": x for key, x in found.items()}
        note = ShardNote(_digest(arrays, schemes), schemes)
        metadata = {"format": "pt", "planish": json.dumps(note._asdict(), sort_keys=True)}
        self._check()
        with kept_so_far(self.folder):
            shards.save(self._path(part), arrays, metadata)
        self.parts[part] = note

    def _places(self, name: str) -> list[Place]:
        return self._family.places(self._config, name)

    def _packs(self, tensor: Tensor) -> bool:
        compressed = isinstance(tensor, CompressedTensor) and not isinstance(tensor, DenseTensor)
        return self._layout is not None and compressed

    def _dense(self, name: str, tensor: Tensor) -> np.ndarray:
        if isinstance(tensor, CompressedTensor):
            try:
                require_dense(tensor)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
            tensor = tensor.dequantize()
        dtype = None if name.endswith(SCALES) else self._dtype
        return cast(name, np.asarray(tensor), dtype)

    def _encode(self, module: str, tensor: Any) -> tuple[Mapping[str, np.ndarray], Scheme]:
        assert self._layout is not None
        try:
            return self._layout.encode(tensor), self._layout.scheme(tensor)
        except ValueError as error:
            raise UserError(f"{module}: {error}") from error

    def _path(self, part: str) -> Path:
        number, of = self._order.index(part) + 1, len(self._order)
        return self.partial / f"model-{number:05}-of-{of:05}.safetensors"

    def finish(self, config: DecoderConfig, tokenizer: Tokenizer, notes: Mapping[str, Any]) -> None:
        """Describe what was written and give the folder its name.

        notes: recipe, source, … as of a checkpoint, and `measured`, for the model card.
        """
        assert config == self._config and set(self.parts) == set(self._order), self.parts.keys()
        schemes = {n: s for part in self._order for n, s in self.parts[part].schemes.items()}
        if config.tied_embeddings and config.predicts:
            schemes[self._family.top["head"]] = None
        entries = {p: shards.read_header(self._path(p)) for p in self._order}
        compressed = [scheme for scheme in schemes.values() if scheme is not None]
        layout = self._layout if compressed or config.cache else None
        dtype = layout and layout.dtype(compressed) or self._dense_dtype(entries)
        raw = self._family.write(config) | {"torch_dtype": dtype} | _special_ids(tokenizer)
        if layout is not None:
            raw["quantization_config"] = layout.describe(schemes)
            if config.cache is not None:
                raw["quantization_config"] |= layout.cache(config.cache)
        sparse = "sparsity_config" in raw.get("quantization_config", {})
        with kept_so_far(self.folder):
            self._json("config.json", raw)
            self._json(shards.INDEX, _index(entries))
            save_tokenizer(tokenizer, self.partial, longest=config.context)
            method = None if layout is None else layout.method
            text = card(notes, method=method, dtype=dtype, sparse=sparse)
            write_whole(self.partial / "README.md", text)
            self._check()
            (self.partial / ORIGIN).unlink()
            os.replace(self.partial, self.folder)
            sync(self.folder.parent)

    def _dense_dtype(self, entries: Mapping[str, Mapping[str, shards.Entry]]) -> str:
        """Of the embedding, or the last norm where that is compressed: as the model should run."""
        (embed,) = self._places("embed.weight")
        found = entries["embed"].get(embed.name)
        if found is None:
            (norm,) = self._places("norm.weight")
            found = entries["norm"][norm.name]
        return NAMES[found.storage]

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        _write_json(self.partial / name, content)


def layers(
    family: Family, config: DecoderConfig, tensors: Mapping[str, CompressedTensor]
) -> dict[str, Any]:
    """Compressed layers by the names that the family has for them, those that it keeps in one
    matrix joined, experts one by one, codes with those of zeros. Raises UserError for what it
    cannot keep so.
    """
    found: dict[str, list[tuple[tuple[int, int], Any]]] = {}
    whole: dict[str, int] = {}
    for name, tensor in tensors.items():
        places = family.places(config, name)
        pieces = [tensor] if len(places) == 1 else [tensor.one(n) for n in range(len(places))]  # type: ignore[attr-defined]
        for place, piece in zip(places, pieces, strict=True):
            module = place.name.removesuffix(".weight")
            if place.transposed:
                raise UserError(
                    f"{name}: {family.architecture} keeps its matrices as [in, out], which no "
                    "format of quantized layers has a place for: export dense weights "
                    "(safetensors)."
                )
            found.setdefault(module, []).append((place.rows, filled(piece)))
            whole[module] = place.shape[0]
    return {module: _joined(module, parts, whole[module]) for module, parts in found.items()}


def _joined(module: str, parts: list[tuple[tuple[int, int], Any]], rows: int) -> Any:
    parts.sort(key=lambda part: part[0])
    try:
        if sum(stop - start for (start, stop), _ in parts) != rows:
            raise ValueError(
                "these layers are one matrix in other software, and not all of them are "
                "compressed: give all of them one method."
            )
        return join([piece for _, piece in parts])
    except ValueError as error:
        raise UserError(f"{module}: {error}") from error


def require_dense(tensor: CompressedTensor) -> None:
    """Refuse a form that no dense weight computes."""
    if tensor.online:
        raise ValueError(
            "a dense weight does not round or turn its input, as this layer does: leave the step "
            "out that does (activations=none), or choose a format that keeps it."
        )


def cast(name: str, x: np.ndarray, dtype: str | None) -> np.ndarray:
    """A dense tensor in another type; raises UserError if it does not fit."""
    if dtype is None or str(x.dtype) == dtype:
        return x
    with np.errstate(over="ignore"):  # refused below
        stored = x.astype(jnp.dtype(dtype))
    if count_not_finite(stored):
        raise UserError(
            f"{name} does not fit {dtype}: its largest magnitude is "
            f"{np.abs(x.astype(np.float32)).max():.3g}. Choose bfloat16."
        )
    return stored


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, longest: int) -> None:
    """tokenizer.json, and what transformers' own files say beside it."""
    said: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    for key, number in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        if number is not None:
            said[key] = tokenizer.core.id_to_token(number)
    if tokenizer.chat_template is not None:
        said["chat_template"] = tokenizer.chat_template
    text = tokenizer.core.to_str(pretty=False)
    write_whole(folder / "tokenizer.json", text)
    _write_json(folder / "tokenizer_config.json", said)
    _write_json(folder / "generation_config.json", _special_ids(tokenizer))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """As config.json and generation_config.json have them."""
    first = () if tokenizer.eos is None else (tokenizer.eos,)
    stops = list(dict.fromkeys([*first, *tokenizer.stops]))
    eos = stops[0] if len(stops) == 1 else stops or None
    return {"bos_token_id": tokenizer.bos, "eos_token_id": eos}


def _index(entries: Mapping[str, Mapping[str, shards.Entry]]) -> dict[str, Any]:
    found = [(name, e) for part in entries.values() for name, e in part.items()]
    return {
        "metadata": {"total_size": sum(e.stop - e.start for _, e in found)},
        "weight_map": {name: e.file.name for name, e in sorted(found, key=lambda item: item[0])},
    }


def _digest(arrays: Mapping[str, np.ndarray], schemes: Mapping[str, Scheme | None]) -> str:
    total = hashlib.sha256(json.dumps(schemes, sort_keys=True).encode())
    for name, x in sorted(arrays.items()):
        total.update(f"{name} {x.dtype} {x.shape}\n".encode())
        for part in memory.in_parts(x):
            total.update(np.ascontiguousarray(part).view(np.uint8).data)
    return total.hexdigest()
