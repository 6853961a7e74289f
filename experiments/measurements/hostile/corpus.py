"""The files that are damaged: a small valid model in every layout that planish reads.

Random weights at a trained model's scale, written by planish's own writers, all with one tokenizer
of a few dozen tokens, but for a GGUF file with SentencePiece's.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from algorithms import formats
from algorithms.formats import Format
from algorithms.tensors import ExpertsTensor, LowRankTensor, SumTensor
from experiments.checkpoints import exports, shards
from experiments.checkpoints.exports import Export, Writer
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.families.raw import Raw
from experiments.checkpoints.folder import save_tokenizer
from experiments.checkpoints.gguf_tokenizer import BYTE, CONTROL, read_tokenizer
from experiments.checkpoints.planish import CheckpointWriter, Tensor, part_of
from experiments.checkpoints.sources import shapes
from experiments.data.tokenizer import Tokenizer
from models.config import CacheElement, DecoderConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64,
    "max_position_embeddings": 128, "ffn_dim": 64, "n_embd": 64, "n_layer": 2, "n_head": 2,
    "n_positions": 128, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789.,!?':")
WIDE = 256  # columns that the largest blocks of GGUF fill


class Model(NamedTuple):
    """One model of the corpus. form: of its linear layers; export: None is planish's own."""

    family: str
    export: Export | None
    form: Format | None = None
    settings: Mapping[str, Any] = {}
    whole: bool = False  # one file of tensors without an index
    pieces: bool = False  # SentencePiece's tokenizer
    cache: CacheElement | None = None


def _integers(bits: int, group: int = 32, **more: Any) -> Format:
    return formats.integer(bits=bits, group_size=group, **more)


DENSE, PACKED = exports.safetensors(dtype="float16"), exports.compressed_tensors()
WIDER = {"hidden_size": WIDE, "intermediate_size": WIDE, "head_dim": WIDE, "num_attention_heads": 1}
WINDOWS = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
MODELS: dict[str, Model] = {
    "llama-whole": Model("llama", DENSE, settings={"rope_scaling": LLAMA3}, whole=True),
    "llama-shards": Model("llama", exports.safetensors(dtype="bfloat16")),
    "gemma3": Model("gemma3_text", DENSE, settings={"sliding_window": 8}),
    "qwen3": Model("qwen3", exports.safetensors(dtype="float32"), settings=WINDOWS),
    "phi3": Model("phi3", DENSE),
    "qwen2-moe": Model("qwen2_moe", DENSE),
    "gpt2": Model("gpt2", DENSE, whole=True),
    "opt": Model("opt", DENSE),
    "bert": Model("bert", DENSE),
    "ct-int4": Model("llama", PACKED, _integers(4), cache="fp8"),
    "ct-int8-moe": Model("qwen2_moe", PACKED, _integers(8, symmetric=True)),
    "ct-fp8-phi3": Model("phi3", PACKED, formats.fp8()),
    "ct-nvfp4": Model("llama", PACKED, formats.nvfp4()),
    "ct-mxfp4": Model("llama", PACKED, formats.microscaling()),
    "gptq-v2": Model("llama", exports.gptq(), _integers(4)),
    "gptq-symmetric": Model("qwen3", exports.gptq(), _integers(3, symmetric=True)),
    "awq": Model("llama", exports.awq(), _integers(4)),
    "gguf-f16": Model("llama", exports.gguf(), settings={"rope_scaling": LLAMA3}),
    "gguf-pieces": Model("qwen2", exports.gguf(), pieces=True),
    "gguf-q4": Model("llama", exports.gguf(), _integers(4, symmetric=True)),
    "gguf-q8": Model("llama", exports.gguf(), _integers(7)),
    "gguf-mxfp4": Model("qwen3", exports.gguf(), formats.microscaling()),
    "gguf-k": Model("llama", exports.gguf(), _integers(2, WIDE), settings=WIDER),
    "planish-int3": Model("llama", None, _integers(3)),
    "planish-nvfp4": Model("qwen2_moe", None, formats.nvfp4()),
    "planish-sum": Model("llama", None, _integers(2)),
}


def make(folder: Path) -> dict[str, Path]:
    """Write the corpus into a new folder; where each model lies: a folder, or a file."""
    for name, model in MODELS.items():
        _write(name, model, folder / name)
    return found(folder)


def found(folder: Path) -> dict[str, Path]:
    """Where each model lies in a folder that `make` wrote."""
    return {name: _place(name, folder / name) for name in MODELS}


def _place(name: str, folder: Path) -> Path:
    return folder / ("model.gguf" if name.startswith("gguf") else "model")


def describe(name: str, path: Path) -> dict[str, Any]:
    """What a record says of a model of the corpus; its digest is of all names and bytes."""
    own = files(path)
    total = hashlib.sha256()
    for file in own:
        total.update(f"{file.relative_to(path.parent)} {file.stat().st_size}\n".encode())
        total.update(file.read_bytes())
    return {
        "name": name,
        "family": MODELS[name].family,
        "format": "planish" if (made := MODELS[name].export) is None else made.name,
        "files": len(own),
        "bytes": sum(file.stat().st_size for file in own),
        "digest": total.hexdigest(),
    }


def files(path: Path) -> list[Path]:
    """The files of a model, which may be one."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _write(name: str, model: Model, folder: Path) -> None:
    folder.mkdir(parents=True)
    family = FAMILIES[model.family]
    raw = {"architectures": [family.architecture], **SIZES, **model.settings}
    if model.form is not None:
        raw["num_hidden_layers"] = 1  # unpacking takes its time
    config = dataclasses.replace(family.read(Raw(raw, Path(name))), cache=model.cache)
    tokenizer = (_pieces if model.pieces else _bytes)(config.vocabulary)
    tensors = {n: _form(n, x, model, name) for n, x in _weights(config).items()}
    if model.whole:
        _write_whole(_place(name, folder), config, tensors, tokenizer)
        return
    place = _place(name, folder)
    writer: Writer = (
        CheckpointWriter(place)
        if model.export is None
        else model.export.writer(place, config, origin=name, check=lambda: None)
    )
    for part in dict.fromkeys(map(part_of, tensors)):
        writer.write(part, {n: x for n, x in tensors.items() if part_of(n) == part})
    notes = {"identity": name, "source": {"location": name, "digest": ""}}
    writer.finish(config, tokenizer, notes)


def _weights(config: DecoderConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in shapes(config).items():
        x = rng.standard_normal(shape, np.float32)
        found[name] = 1 + x / 10 if "norm" in name else x / np.sqrt(shape[-1], dtype=np.float32)
    return found


def _form(name: str, x: np.ndarray, model: Model, stem: str) -> Tensor:
    """Matrices of blocks in the model's format, experts' one by one; the rest in float16."""
    inside = name.startswith("blocks.") and name.endswith("weight") and x.ndim > 1
    if model.form is None or not inside or "router" in name or "shared_gate" in name:
        return x.astype(np.float16) if model.export is None or model.form is not None else x
    if x.ndim == 3:
        each = [model.form.quantize(jnp.asarray(one)) for one in x]
        return ExpertsTensor(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    base = model.form.quantize(jnp.asarray(x))
    if stem != "planish-sum":
        return base
    a, b = np.ones((x.shape[0], 2), np.float16), np.ones((2, x.shape[1]), np.float16)
    return SumTensor(base, LowRankTensor(a, b))


def _write_whole(
    folder: Path, config: DecoderConfig, tensors: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    folder.mkdir()
    family = FAMILIES[config.family]
    half = {name: x.astype(np.float16) for name, x in tensors.items()}
    shards.save(folder / shards.SINGLE, family.stored(config, half), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.write(config), indent=2))
    save_tokenizer(tokenizer, folder, longest=config.context)


def _bytes(vocabulary: int) -> Tokenizer:
    """Byte-level BPE; a few letters of it."""
    tokens = ["<pad>", "<s>", "</s>", *LETTERS, "Ġ", "ab", "Ġab"]
    tokens += [f"<unused{n}>" for n in range(vocabulary - len(tokens))]
    return _tokenizer(
        {
            "model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": ["a b", "Ġ ab"],
            "token_type": [CONTROL] * 3 + [1] * (vocabulary - 3),
        }
    )  # fmt: skip


def _pieces(vocabulary: int) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", *LETTERS, "ab", "▁ab"]
    tokens += [f"<unused{n}>" for n in range(vocabulary - len(tokens))]
    return _tokenizer(
        {
            "model": "llama", "tokens": tokens, "scores": [-float(n) for n in range(vocabulary)],
            "token_type": [2, CONTROL, CONTROL, BYTE] + [1] * (vocabulary - 4),
        }
    )  # fmt: skip


def _tokenizer(said: Mapping[str, Any]) -> Tokenizer:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    metadata |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    metadata |= {"tokenizer.chat_template": TEMPLATE}
    get: Callable[..., Any] = lambda key, default=None: metadata.get(key, default)  # noqa: E731
    return read_tokenizer(get, "the corpus")
