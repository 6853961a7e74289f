"""A local Hugging Face folder: config.json, safetensors, tokenizer.json.

What a model's settings mean and what its tensors are called is said by its family.
"""

import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from experiments.checkpoints import packages, shards
from experiments.checkpoints.families import FAMILIES, Family
from experiments.checkpoints.families.base import Place
from experiments.checkpoints.families.raw import Raw
from experiments.checkpoints.layouts.reading import QuantizedLayers, cached, readable
from experiments.checkpoints.sources import (
    Source,
    require_finite,
    require_room,
    require_shape,
    shapes,
)
from experiments.data.tokenizer import Tokenizer, read_core, told
from experiments.errors import UserError
from experiments.untrusted import DAMAGE, explained, read_json, read_text, refusing
from models.config import DecoderConfig


class HuggingFaceFolder(Source):
    """A model in a folder as `save_pretrained` of transformers writes it."""

    def __init__(self, folder: Path):
        self.folder, self.location = folder, str(folder)
        self._raw = read_json(folder / "config.json", folder)
        self.config = read_config(self._raw, folder / "config.json")
        self.family = FAMILIES[self.config.family]
        self._entries = shards.read_entries(folder)
        require_room(self.config, len(self._entries), self.location)
        self._finite: set[Place] = set()
        self._places = {n: self.family.places(self.config, n) for n in shapes(self.config)}
        self._quantized = QuantizedLayers(self._raw, self._entries, self._places, folder)
        self.stored_as = self._quantized.method
        self.views = self.stored_as is None
        dense = (places for n, places in self._places.items() if n not in self._quantized)
        for place in itertools.chain(*dense):
            entry = self._entry(place.name)
            shards.require_readable(place.name, entry)
            require_shape(entry.shape, place.shape, place.name, str(entry.file))

    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def read(self, name: str) -> np.ndarray:
        if name not in self._places:
            raise UserError(f"There is no tensor {name} in {self.location}: check the name.")
        if name in self._quantized:
            return np.asarray(self._quantized.tensor(name).dequantize())
        found = [self._take(place) for place in self._places[name]]
        return np.stack(found) if len(shapes(self.config)[name]) == 3 else found[0]

    def packed(self, name: str) -> bool:
        return name in self._quantized

    def tensor(self, name: str) -> Any:
        return self._quantized.tensor(name) if name in self._quantized else self.read(name)

    def _take(self, place: Place) -> np.ndarray:
        entry = self._entry(place.name)
        x = place.take(entry.open())
        if place not in self._finite:  # a head comes in parts, and is looked through once
            require_finite(x, place.name, str(entry.file))
            self._finite.add(place)
        return x

    def _entry(self, stored: str) -> shards.Entry:
        """By its name, or that of a model that was saved without its head, or with one: the first
        part of a name is missing, or is the family's.
        """
        for name in (stored, stored.partition(".")[2], f"{self.family.name}.{stored}"):
            if name in self._entries:
                return self._entries[name]
        raise UserError(
            f"{self.location} lacks the tensor {stored}, which its config.json calls for: fetch "
            "the model again."
        )

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.folder, self._raw)

    def digest(self) -> str:
        """SHA-256 of the lines "<name> <SHA-256 of the file>\\n" of config.json and the weights."""
        files = [self.folder / "config.json", *shards.weight_files(self.folder)]
        lines = [f"{file.name} {packages.file_digest(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_config(settings: dict[str, Any], path: Path) -> DecoderConfig:
    """Our configuration from a config.json. Raises UserError for what planish cannot run."""
    raw = Raw(settings, path)
    try:
        family = _family(raw)
        _refuse_quantized(raw)
        description = raw.get("quantization_config")
        cache = None if description is None else cached(description, path)
        return dataclasses.replace(family.read(raw), cache=cache)
    except DAMAGE as error:
        raise UserError(f"{path} does not describe a model: {explained(error)}.") from error


def _family(raw: Raw) -> Family:
    """By the architecture that the file names; else by its model_type."""
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    kind = FAMILIES.get(str(raw.get("model_type")))
    named = (raw.get("architectures") or ["unstated" if kind is None else kind.architecture])[0]
    if not isinstance(named, str) or named not in by_architecture:
        raise UserError(
            f"{raw.path} has the architecture {named}, which planish does not run: it runs "
            f"{', '.join(by_architecture)}."
        )
    return by_architecture[named]


def _refuse_quantized(raw: Raw) -> None:
    if (method := raw.get("quantization_config")) is not None and not readable(method):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(
            f"{raw.path} says that the weights are already quantized ({name}): start from the "
            "model's original weights."
        )


def read_tokenizer(folder: Path, model: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a folder; `model` is its config.json, asked for ids not named elsewhere."""
    core = read_core(folder / "tokenizer.json", folder)
    said = read_json(folder / "tokenizer_config.json", folder, default={})
    generation = read_json(folder / "generation_config.json", folder, default={})
    with refusing(f"{folder} says what its tokenizer's special tokens are in no way that is read"):
        return _with_special_tokens(core, said, generation, model, _template(folder, said))


def _with_special_tokens(
    core: Any,
    said: dict[str, Any],
    generation: dict[str, Any],
    model: dict[str, Any],
    template: str | None,
) -> Tokenizer:
    bos = _special(core, said, "bos_token", model)
    eos = _special(core, said, "eos_token", model)
    if bos is None and eos is None:  # of an encoder, whose texts stand between these
        bos = _special(core, said, "cls_token", model)
        eos = _special(core, said, "sep_token", model)
    add_bos = said.get("add_bos_token")
    if add_bos is None:  # then the tokenizer's own post-processor decides
        with told("The tokenizer's post-processor fails", "fetch the model again"):
            add_bos = bos is not None and core.encode("").ids[:1] == [bos]
    stops = [eos, *_ids(model.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
    made = Tokenizer(
        core=core,
        chat_template=template,
        bos=bos,
        eos=eos,
        add_bos=bool(add_bos),
        stops=tuple(dict.fromkeys(i for i in stops if i is not None)),
    )
    made.validate()
    return made


def _special(core: Any, said: dict[str, Any], key: str, model: dict[str, Any]) -> int | None:
    """The id of a special token: its text's, or the first one that config.json names."""
    token = said.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and (known := core.token_to_id(text)) is not None:
        return known
    return next(iter(_ids(model.get(f"{key}_id"))), None)


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [int(value)]


def _template(folder: Path, said: dict[str, Any]) -> str | None:
    """The chat template: a file of its own first, else the tokenizer's configuration."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja", folder)
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
