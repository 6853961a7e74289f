"""GGUF files: llama.cpp's format, metadata and (mostly quantized) tensors in one file.

The `gguf` package maps the file and undoes the quantization, one tensor at a time. Files of the
architecture "llama" (Llama, SmolLM2, Mistral) keep the rows of q and k in the order of interleaved
rotary pairs; they are put back into the two-halves order that `models.rope` uses.
"""

import functools
from pathlib import Path

import gguf
import gguf.quants
import ml_dtypes
import numpy as np

from algorithms.tensors import QuantizedTensor
from experiments.checkpoints import packages
from experiments.checkpoints.gguf_reader import Metadata, open_reader
from experiments.checkpoints.gguf_tokenizer import read_tokenizer
from experiments.checkpoints.layouts import gguf_blocks
from experiments.checkpoints.sources import Rows, Source, require_finite, require_shape, shapes
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from experiments.untrusted import refusing
from models import rope
from models.config import DecoderConfig

Type = gguf.GGMLQuantizationType
HEADS = "{arch}.attention.head_count"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PLAIN = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
TOP_NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


class GGUFFile(Source):
    """A model in one GGUF file."""

    def __init__(self, path: Path):
        self.path, self.location = path, str(path)
        reader = open_reader(path)
        self._metadata = Metadata(reader, path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = read_config(self._metadata, self._tensors)
        self._permuted = self._metadata.architecture() == "llama"
        self._shapes = shapes(self.config)
        for name, expected in self._shapes.items():
            tensor = self._tensor(name)
            _require_readable(tensor, self.location)
            require_shape(_shape(tensor), expected, tensor.name, self.location)

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def read(self, name: str) -> np.ndarray:
        x = self.rows(name, slice(None))
        heads = permuted_heads(self.config, name) if self._permuted else None
        return x if heads is None else unpermute(x, heads)

    def rows(self, name: str, rows: Rows) -> np.ndarray:
        """Some rows, as the file orders them; no others are dequantized."""
        if name not in self._shapes:
            raise UserError(f"There is no tensor {name} in {self.location}: check the name.")
        tensor = self._tensor(name)
        x = dequantize(tensor, rows)
        require_finite(x, tensor.name, self.location)
        return x

    def stored(self, name: str) -> np.ndarray | QuantizedTensor:
        """One tensor as its blocks hold it, where they are a grid of planish's; else as `read`.

        What planish wrote comes back bit for bit; `tensor` gives floats, for most files' blocks
        are no such grid.
        """
        dense = self.read(name)  # which refuses what is damaged
        tensor = self._tensor(name)
        try:
            if tensor.tensor_type in PLAIN:
                return dense
            heads = permuted_heads(self.config, name) if self._permuted else None
            blocks = np.asarray(tensor.data)
            return gguf_blocks.decode(
                blocks if heads is None else unpermute(blocks, heads), tensor.tensor_type
            )
        except ValueError:
            return dense

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        try:
            return self._tensors[stored_name(name)]
        except KeyError:
            raise UserError(
                f"{self.location} lacks the tensor {stored_name(name)}, which its metadata calls "
                "for: fetch the file again."
            ) from None

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self._metadata.get, self.location)

    def digest(self) -> str:
        """SHA-256 of the file."""
        return packages.file_digest(self.path)


def read_config(metadata: Metadata, tensors: dict[str, gguf.ReaderTensor]) -> DecoderConfig:
    """Our configuration from the metadata. Raises UserError for what planish cannot run."""
    with refusing(f"{metadata.path} does not describe a model"):
        return _read_config(metadata, tensors)


def _read_config(metadata: Metadata, tensors: dict[str, gguf.ReaderTensor]) -> DecoderConfig:
    _refuse_unknown_arithmetic(metadata)
    hidden, heads = metadata.count("{arch}.embedding_length"), metadata.count(HEADS)
    head_size = metadata.count("{arch}.attention.key_length", hidden // heads)
    layers, context = metadata.count("{arch}.block_count"), metadata.count("{arch}.context_length")
    if layers > len(tensors):
        raise ValueError(f"it has {layers} layers and {len(tensors)} tensors")
    theta = float(metadata.get("{arch}.rope.freq_base", 10000.0))
    window = metadata.get("{arch}.attention.sliding_window") or None
    return DecoderConfig(
        family="mistral" if window is not None else metadata.architecture(),
        vocabulary=_vocabulary(tensors, metadata.path),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=metadata.count("{arch}.attention.head_count_kv", heads),
        head_size=head_size,
        feed_forward=metadata.count("{arch}.feed_forward_length"),
        context=context,
        norm_epsilon=_epsilon(metadata),
        rope_theta=theta,
        rope_scaling=_scaling(metadata, tensors, head_size, theta),
        windows=None if window is None else (window,) * layers,
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=metadata.architecture() == "qwen3",
    )


def _refuse_unknown_arithmetic(metadata: Metadata) -> None:
    where, architecture = metadata.path, metadata.architecture()
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{where} has the architecture {architecture}, which planish does not run: it runs "
            f"{', '.join(ARCHITECTURES)}."
        )
    if metadata.get("{arch}.expert_count"):
        raise UserError(f"{where} is a mixture of experts, which planish does not run.")
    head_size = metadata.count("{arch}.embedding_length") // metadata.count(HEADS)
    head_size = metadata.count("{arch}.attention.key_length", head_size)
    rotated = metadata.get("{arch}.rope.dimension_count", head_size)
    values = metadata.get("{arch}.attention.value_length", head_size)
    if rotated != head_size or values != head_size:
        raise UserError(
            f"{where} has heads of {head_size} channels with {rotated} of them rotated and values "
            f"of {values}: planish runs models where the three agree."
        )
    # Only Mistral's first release states a window here, and every layer of it has that window.
    if architecture != "llama" and metadata.get("{arch}.attention.sliding_window"):
        raise UserError(
            f"{where} has a sliding window but not which layers: planish cannot run it."
        )


def _vocabulary(tensors: dict[str, gguf.ReaderTensor], path: Path) -> int:
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} lacks the tensor token_embd.weight: fetch the file again.")
    return _shape(tensors["token_embd.weight"])[0]


def _epsilon(metadata: Metadata) -> float:
    value = metadata.get("{arch}.attention.layer_norm_rms_epsilon")
    if not isinstance(value, float):
        raise UserError(
            f"{metadata.path} lacks {metadata.architecture()}.attention.layer_norm_rms_epsilon: "
            "fetch the file again."
        )
    return float(f"{value:.7g}")  # stored as float32: 1e-5, not 9.999999747e-06


def _scaling(
    metadata: Metadata, tensors: dict[str, gguf.ReaderTensor], head_size: int, theta: float
) -> rope.RopeScaling | None:
    """Linear scaling stands in the metadata, Llama 3's in a tensor of divisors."""
    if "rope_freqs.weight" in tensors:
        return _llama3(tensors["rope_freqs.weight"], head_size, theta, metadata.path)
    kind = metadata.get("{arch}.rope.scaling.type", "none")
    factor = metadata.get("{arch}.rope.scaling.factor")
    if factor is None:  # the older spelling, which implied "linear"
        factor = metadata.get("{arch}.rope.scale_linear")
        kind = "linear" if factor not in (None, 1.0) and kind == "none" else kind
    if kind == "none":
        return None
    if kind != "linear" or not factor:
        raise UserError(
            f"{metadata.path} has rotary positions scaled by {kind} with factor {factor}, which "
            "planish does not run: it runs linear, and Llama 3's."
        )
    return rope.RopeScaling(kind="linear", factor=float(factor))


def _llama3(
    tensor: gguf.ReaderTensor, head_size: int, theta: float, path: Path
) -> rope.RopeScaling | None:
    """The scaling behind the divisors; every published Llama 3 differs in `factor` alone."""
    divisors = dequantize(tensor).astype(np.float64).ravel()
    if divisors.size != head_size // 2:
        raise ValueError(f"rope_freqs.weight has {divisors.size} divisors for {head_size} channels")
    scaling = rope.RopeScaling(kind="llama3", factor=float(divisors.max(initial=1.0)))
    plain = np.asarray(rope.frequencies(head_size, theta, None), np.float64)
    scaled = np.asarray(rope.frequencies(head_size, theta, scaling), np.float64)
    if divisors.shape != plain.shape or not np.allclose(plain / divisors, scaled, 1e-4, 0.0):
        raise UserError(
            f"{path} scales its rotary positions by divisors (rope_freqs.weight) that are not "
            "Llama 3's: planish does not run them."
        )
    return None if scaling.factor == 1.0 else scaling


def stored_name(name: str) -> str:
    """What llama.cpp calls one of our tensors."""
    path, _, kind = name.rpartition(".")
    if path in TOP_NAMES:
        return f"{TOP_NAMES[path]}.{kind}"
    _, layer, module = path.split(".", 2)
    return f"blk.{layer}.{BLOCK_NAMES[module]}.{kind}"


def permuted_heads(config: DecoderConfig, name: str) -> int | None:
    """The heads whose rows files of the architecture "llama" keep interleaved, for q and k."""
    heads = {"attention.q": config.heads, "attention.k": config.kv_heads}
    return next((n for role, n in heads.items() if name.rpartition(".")[0].endswith(role)), None)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _require_readable(tensor: gguf.ReaderTensor, where: str) -> None:
    kind = tensor.tensor_type
    if not _readable(kind):
        raise UserError(
            f"{tensor.name} in {where} is stored as {kind.name}, which planish does not read: "
            "quantize the model as one of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K."
        )


@functools.cache
def _readable(kind: Type) -> bool:
    """Whether the package knows the type, asked with one block of zeros."""
    if kind in PLAIN:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        return True
    except NotImplementedError:
        return False


def dequantize(tensor: gguf.ReaderTensor, rows: Rows = slice(None)) -> np.ndarray:
    """The tensor's values; a read-only view of the file where they are stored as such."""
    if tensor.tensor_type in PLAIN:
        return tensor.data.view(PLAIN[tensor.tensor_type])[rows]
    with np.errstate(all="ignore"):  # damaged scales show as NaN, which the caller refuses
        return gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from two halves per head to interleaved rotary pairs."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k (weight or bias) from interleaved rotary pairs to two halves per head."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
