"""Small models on disk: a Hugging Face folder, a GGUF file, a wheel."""

import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import safetensors.numpy

from experiments.checkpoints import gguf as gguf_source
from experiments.checkpoints import huggingface
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.sources import shapes
from models.config import DecoderConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 53,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


def random_tensors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Float32 tensors for every name of a config."""
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes(config).items()}


def write_folder(
    folder: Path, raw: dict[str, Any], *, dtype: Any = np.float32, make: Any = random_tensors
) -> dict:
    """A Hugging Face folder with one safetensors file; what it holds, by our names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config = huggingface.read_config(raw, folder / "config.json")
    tensors = {name: x.astype(dtype) for name, x in make(config).items()}
    stored = FAMILIES[config.family].stored(config, tensors)
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    return tensors


def shard(folder: Path) -> None:
    """Split a folder's one file in two, with an index."""
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(stored), ("model-00001-of-00002", "model-00002-of-00002")
    halves = dict(zip(files, (names[::2], names[1::2]), strict=True))
    for file, half in halves.items():
        path = folder / f"{file}.safetensors"
        safetensors.numpy.save_file({name: stored[name] for name in half}, path)
    index = {name: f"{file}.safetensors" for file, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


CONFIG = DecoderConfig(
    vocabulary=53, hidden=96, layers=2, heads=3, kv_heads=1, head_size=32, feed_forward=64,
    context=128,
)  # fmt: skip
TOKENS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", *"0123456789.,!?'-:;()", "ab", "Ġab"]  # fmt: skip  # noqa: E501


def gguf_metadata(architecture: str = "llama", config: DecoderConfig = CONFIG) -> dict[str, Any]:
    """The metadata of a synthetic file, for tests to change."""
    c, a = config, architecture
    return {
        f"{a}.block_count": c.layers,
        f"{a}.context_length": c.context,
        f"{a}.embedding_length": c.hidden,
        f"{a}.feed_forward_length": c.feed_forward,
        f"{a}.attention.head_count": c.heads,
        f"{a}.attention.head_count_kv": c.kv_heads,
        f"{a}.attention.key_length": c.head_size,
        f"{a}.attention.layer_norm_rms_epsilon": c.norm_epsilon,
        f"{a}.rope.freq_base": c.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS[: c.vocabulary],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (c.vocabulary - 3),
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """Two halves per head to interleaved pairs, as the converter to GGUF does."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any],
    *,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray] | None = None,
    extra_kind: gguf.GGMLQuantizationType | None = None,
) -> None:
    """A GGUF file of the given tensors (by our names), its matrices stored as `kind`.

    `extra` are tensors by the file's own names, already stored as `extra_kind`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, x in tensors.items():
        if x.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            packed = gguf.quants.quantize(x, kind)
            writer.add_tensor(gguf_source.stored_name(name), packed, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_source.stored_name(name), x)
    for name, x in (extra or {}).items():
        writer.add_tensor(name, x, raw_dtype=extra_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }[type(value)]
    add(key, value)


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path
