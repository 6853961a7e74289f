"""A Hugging Face folder written part by part: what servers and transformers load.

    config.json, model.safetensors.index.json     the model, and where its tensors are
    model-00001-of-000NN.safetensors              one file for each part, embed first
    tokenizer.json, tokenizer_config.json         with the chat template
    generation_config.json, README.md             where a text ends; a model card

It is written into `<folder>.partial` and renamed when it is whole, as our own checkpoints are: a
part appears whole or not at all and carries its own digest, and the bytes follow from what is
stored alone, so that an interrupted writer goes on to the same ones.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from algorithms.tensors import CompressedTensor, DenseTensor
from experiments.checkpoints import shards
from experiments.checkpoints.hf_config import to_raw
from experiments.checkpoints.huggingface import stored_name
from experiments.checkpoints.layouts.base import Layout, Scheme
from experiments.checkpoints.model_card import card
from experiments.checkpoints.planish import Tensor, free_space
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from experiments.files import sync, write_whole
from models.decoder import DecoderConfig

ORIGIN = ".origin.json"  # in a partial folder: what it is of
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
        blocks = [f"blocks.{layer}" for layer in range(config.layers)]
        self._order = ["embed", *blocks, "norm", *([] if config.tied_embeddings else ["head"])]
        self.parts: dict[str, ShardNote] = {}
        self.damaged: list[str] = []
        said = {"origin": origin, "layout": layout and layout.method, "dtype": dtype}
        with _writing(folder):
            self._begin(json.dumps(said))
            for part in self._order:
                self._take_stock(part)

    def _begin(self, said: str) -> None:
        mark, last = self.partial / ORIGIN, self.partial / "README.md"
        ours = mark.read_text() == said if mark.is_file() else last.is_file()  # but not renamed
        if self.partial.is_dir() and not ours:
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        write_whole(mark, said)
        for left in self.partial.glob(".*.tmp"):
            left.unlink()

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
        arrays: dict[str, np.ndarray] = {}
        schemes: dict[str, Scheme | None] = {}
        for name, tensor in sorted(tensors.items()):
            module, _, field = stored_name(name).rpartition(".")
            found, scheme = self._encode(name, tensor)
            arrays |= {f"{module}.{key or field}": x for key, x in found.items()}
            if scheme is not None or part != "embed" and len(tensor.shape) == 2:
                schemes[module] = scheme
        note = ShardNote(_digest(arrays, schemes), schemes)
        metadata = {"format": "pt", "planish": json.dumps(note._asdict(), sort_keys=True)}
        self._check()
        with _writing(self.folder):
            shards.save(self._path(part), arrays, metadata)
        self.parts[part] = note

    def _encode(self, name: str, tensor: Tensor) -> tuple[dict[str, np.ndarray], Scheme | None]:
        """Arrays by name within the module, "" for the tensor's own; how it is compressed."""
        if isinstance(tensor, DenseTensor):
            tensor = tensor.weight
        if not isinstance(tensor, CompressedTensor):
            return {"": cast(name, np.asarray(tensor), self._dtype)}, None
        try:
            if self._layout is None:
                require_dense(tensor)
                return {"": cast(name, np.asarray(tensor.dequantize()), self._dtype)}, None
            return dict(self._layout.encode(tensor)), self._layout.scheme(tensor)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    def _path(self, part: str) -> Path:
        number, of = self._order.index(part) + 1, len(self._order)
        return self.partial / f"model-{number:05}-of-{of:05}.safetensors"

    def finish(self, config: DecoderConfig, tokenizer: Tokenizer, notes: Mapping[str, Any]) -> None:
        """Describe what was written and give the folder its name.

        notes: recipe, source, … as of a checkpoint, and `measured`, for the model card.
        """
        assert config == self._config and set(self.parts) == set(self._order), self.parts.keys()
        schemes = {n: s for part in self._order for n, s in self.parts[part].schemes.items()}
        if config.tied_embeddings:
            schemes[stored_name("head.weight").removesuffix(".weight")] = None
        entries = {p: shards.read_header(self._path(p)) for p in self._order}
        compressed = [scheme for scheme in schemes.values() if scheme is not None]
        layout = self._layout if compressed else None
        dtype = layout and layout.dtype(compressed) or self._dense_dtype(entries)
        raw = to_raw(config) | {"torch_dtype": dtype} | _special_ids(tokenizer)
        if layout is not None:
            raw["quantization_config"] = layout.describe(schemes)
        method = None if layout is None else layout.method
        with _writing(self.folder):
            self._json("config.json", raw)
            self._json(shards.INDEX, _index(entries))
            save_tokenizer(tokenizer, self.partial, longest=config.context)
            write_whole(self.partial / "README.md", card(notes, method=method, dtype=dtype))
            self._check()
            (self.partial / ORIGIN).unlink()
            os.replace(self.partial, self.folder)
            sync(self.folder.parent)

    def _dense_dtype(self, entries: Mapping[str, Mapping[str, shards.Entry]]) -> str:
        """Of the embedding, or the last norm where that is compressed: as the model should run."""
        embed = entries["embed"].get(stored_name("embed.weight"))
        found = embed or entries["norm"][stored_name("norm.weight")]
        return NAMES[found.storage]

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        _write_json(self.partial / name, content)


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
    if not np.isfinite(stored).all():
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
        total.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Writing {folder} failed ({free_space(folder)}): {error}. What was written before is "
            "kept: make room and run the same command again."
        ) from error
