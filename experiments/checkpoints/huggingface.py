"""A local Hugging Face folder: config.json, safetensors, tokenizer.json.

The configuration is read as transformers 5 reads it, older spellings included: `rope_parameters`
or the older `rope_theta` and `rope_scaling`, `layer_types` or `max_window_layers`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.checkpoints import packages, shards
from experiments.checkpoints.layouts.reading import QuantizedLayers, readable
from experiments.checkpoints.sources import Source, require_finite, require_shape, shapes
from experiments.data.tokenizer import Tokenizer, read_core
from experiments.errors import UserError
from models.decoder import DecoderConfig
from models.rope import RopeScaling

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TOP_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


class HuggingFaceFolder(Source):
    """A model in a folder as `save_pretrained` of transformers writes it."""

    def __init__(self, folder: Path):
        self.folder, self.location = folder, str(folder)
        self._raw = read_json(folder / "config.json")
        self.config = read_config(self._raw, folder / "config.json")
        self._shapes = shapes(self.config)
        self._entries = shards.read_entries(folder)
        self._quantized = QuantizedLayers(
            self._raw, self._entries, self._shapes, stored_name, folder
        )
        for name, shape in self._shapes.items():
            if name in self._quantized:
                continue
            entry = self._entry(name)
            shards.require_readable(stored_name(name), entry)
            require_shape(entry.shape, shape, stored_name(name), str(entry.file))

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def read(self, name: str) -> np.ndarray:
        if name not in self._shapes:
            raise UserError(f"There is no tensor {name} in {self.location}: check the name.")
        if name in self._quantized:
            return np.asarray(self._quantized.tensor(name).dequantize())
        entry = self._entry(name)
        x = entry.open()
        require_finite(x, stored_name(name), str(entry.file))
        return x

    def tensor(self, name: str) -> Any:
        return self._quantized.tensor(name) if name in self._quantized else self.read(name)

    def _entry(self, name: str) -> shards.Entry:
        try:
            return self._entries[stored_name(name)]
        except KeyError:
            raise UserError(
                f"{self.location} lacks the tensor {stored_name(name)}, which its config.json "
                "calls for: fetch the model again."
            ) from None

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.folder, self._raw)

    def digest(self) -> str:
        """SHA-256 of the lines "<name> <SHA-256 of the file>\\n" of config.json and the weights."""
        files = [self.folder / "config.json", *shards.weight_files(self.folder)]
        lines = [f"{file.name} {packages.file_digest(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def stored_name(name: str) -> str:
    """What transformers calls one of our tensors."""
    path, _, kind = name.rpartition(".")
    if path in TOP_NAMES:
        return f"{TOP_NAMES[path]}.{kind}"
    _, layer, module = path.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[module]}.{kind}"


def read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object, or `default` where there is no such file."""
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        error: object = f"it holds a {type(content).__name__}"
    except (OSError, ValueError) as caught:
        error = caught
    raise UserError(f"{path} is not a JSON object ({error!s}): fetch the file again.")


def read_config(raw: dict[str, Any], path: Path) -> DecoderConfig:
    """Our configuration from a config.json. Raises UserError for what planish cannot run."""
    architecture = _architecture(raw, path)
    _refuse_unknown_arithmetic(raw, path)
    heads, hidden = _count(raw, "num_attention_heads", path), _count(raw, "hidden_size", path)
    head_size = raw.get("head_dim") or (128 if architecture == "Qwen3" else hidden // heads)
    bias = bool(raw.get("attention_bias")) and architecture in ("Llama", "Qwen3")
    theta, scaling = read_rope(raw, path)
    try:
        return DecoderConfig(
            vocabulary=_count(raw, "vocab_size", path),
            hidden=hidden,
            layers=_count(raw, "num_hidden_layers", path),
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_size=head_size,
            feed_forward=_count(raw, "intermediate_size", path),
            context=_count(raw, "max_position_embeddings", path),
            norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            windows=_windows(raw, architecture, path),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bias or architecture == "Qwen2",
            output_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias")) and architecture == "Llama",
            qk_norm=architecture == "Qwen3",
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not describe a model: {error}") from error


def _architecture(raw: dict[str, Any], path: Path) -> str:
    """The family's name: Llama, Mistral, Qwen2 or Qwen3."""
    named = raw.get("architectures") or [MODEL_TYPES.get(str(raw.get("model_type")), "unstated")]
    if named[0] not in MODEL_TYPES.values():
        raise UserError(
            f"{path} has the architecture {named[0]}, which planish does not run: it runs "
            f"{', '.join(MODEL_TYPES.values())}."
        )
    return named[0].removesuffix("ForCausalLM")


def _refuse_unknown_arithmetic(raw: dict[str, Any], path: Path) -> None:
    if (method := raw.get("quantization_config")) is not None and not readable(method):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(
            f"{path} says that the weights are already quantized ({name}): start from the "
            "model's original weights."
        )
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UserError(f"{path} has hidden_act={activation!r} where planish runs silu only.")


def _count(raw: dict[str, Any], key: str, path: Path) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise UserError(
            f"{path} has {key}={value!r} where a positive whole number is expected: fetch the "
            "file again."
        )
    return value


def read_rope(raw: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """The base of the rotation and its scaling, in the newer or the older spelling."""
    said = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    nested = any(isinstance(value, dict) for value in said.values())
    partial = said.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if nested or partial != 1.0 or kind not in ("default", "linear", "llama3"):
        what = "one per kind of layer" if nested else f"{kind} over {partial} of each head"
        raise UserError(
            f"{path} has rotary positions of a kind that planish does not run ({what}): it runs "
            "default, linear and llama3, over whole heads."
        )
    try:
        theta = float(said.get("rope_theta", raw.get("rope_theta", 10000.0)))
        return theta, _scaling(kind, said, raw)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has incomplete rotary parameters ({error!r}): fetch the file again."
        ) from error


def _scaling(kind: str, said: dict[str, Any], raw: dict[str, Any]) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(said["factor"]))
    key = "original_max_position_embeddings"
    return RopeScaling(
        kind="llama3",
        factor=float(said["factor"]),
        low_frequency_factor=float(said["low_freq_factor"]),
        high_frequency_factor=float(said["high_freq_factor"]),
        original_context=int(raw.get(key) or said.get(key) or raw["max_position_embeddings"]),
    )


def _windows(raw: dict[str, Any], architecture: str, path: Path) -> tuple[int | None, ...] | None:
    """The sliding window of each layer; None where every layer sees everything."""
    layers = _count(raw, "num_hidden_layers", path)
    if architecture == "Llama":
        return None
    if architecture == "Mistral":
        window = raw.get("sliding_window", 4096)
        return None if window is None else (window,) * layers
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "full_attention" if layer < first else "sliding_attention" for layer in range(layers)
    ]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{path} has layers of type {min(unknown)}, which planish does not run.")
    if window is None or "sliding_attention" not in kinds:
        return None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_tokenizer(folder: Path, model: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a folder; `model` is its config.json, asked for ids not named elsewhere."""
    core = read_core(folder / "tokenizer.json")
    said = read_json(folder / "tokenizer_config.json", default={})
    generation = read_json(folder / "generation_config.json", default={})
    bos = _special(core, said, "bos_token", model)
    eos = _special(core, said, "eos_token", model)
    add_bos = said.get("add_bos_token")
    if add_bos is None:  # then the tokenizer's own post-processor decides
        add_bos = bos is not None and core.encode("").ids[:1] == [bos]
    stops = [eos, *_ids(model.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
    return Tokenizer(
        core=core,
        chat_template=_template(folder, said),
        bos=bos,
        eos=eos,
        add_bos=bool(add_bos),
        stops=tuple(dict.fromkeys(i for i in stops if i is not None)),
    )


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
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
