"""What the peers' runners share: the model from its GGUF, windows, protocol E, one line of JSON.

Protocol E: each window on its own, no bos, loss over positions 1..T-1, perplexity = exp(mean loss),
standard error over the windows' mean losses.
"""

import copy
import json
import os
import resource
import sys
from pathlib import Path

# Before torch loads OpenMP: spinning threads on busy cores cost a factor of ten.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def prepare(threads: int) -> None:
    """A stated number of threads, products in full float32, no progress bars."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    transformers.utils.logging.disable_progress_bar()


def load_gguf(path: Path, layers: int | None = None) -> transformers.PreTrainedModel:
    """The dequantized float32 model; with `layers`, only its first blocks.

    transformers marks a model read from GGUF as quantized and then refuses to save or compress it,
    so that its state moves into a fresh model whose config lacks the mark.
    """
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = loaded.state_dict()
    if layers is not None:
        config.num_hidden_layers = layers
        state = {name: t for name, t in state.items() if depth(name) < layers}
    model = type(loaded)(config).float()
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval()


def depth(name: str) -> int:
    """The block that a tensor belongs to, -1 outside the blocks."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def windows(path: Path, part: str, count: int | None) -> torch.Tensor:
    """`count` evenly spread windows [N, T] of "calibration" or "heldout", all when None."""
    with np.load(path) as archive:
        tokens = archive[part].astype(np.int64)
    if count is not None:
        tokens = tokens[np.linspace(0, len(tokens) - 1, count).astype(int)]
    return torch.from_numpy(tokens)


@torch.inference_mode()
def window_loss(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> float:
    """The mean loss of one window [T] over positions 1..T-1, in nats."""
    logits = model(tokens[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), tokens[1:]).item()


def perplexity(losses: list[float]) -> dict:
    """Perplexity, the mean loss's standard error over windows, and the losses themselves."""
    loss = np.asarray(losses)
    error = loss.std(ddof=1) / len(loss) ** 0.5 if len(loss) > 1 else None
    return {
        "perplexity": float(np.exp(loss.mean())),
        "standard_error": None if error is None else float(error),
        "losses": losses,
    }


def report(result: dict) -> None:
    """The result with versions, threads and peak memory in bytes, as the last line of stdout."""
    common = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(common | result))
    sys.stdout.flush()
