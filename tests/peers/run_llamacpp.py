"""What llama.cpp computes on a GGUF file: `python run_llamacpp.py --gguf FILE --tokens NPY`.

In the environment of requirements-llamacpp.txt. TOKENS: windows [N, T]; each is run on its own,
nothing in front of it. Writes logits [N, T, V] with --logits, and prints one line of JSON: the mean
loss of each window over positions 1..T-1, perplexity and its standard error (protocol E).

Keys and values are kept in float32 and attention is computed without its fused form, so that what
differs from exact arithmetic is llama.cpp's products alone: it rounds the activations to 8 bits
(Q8_0 or Q8_K, by blocks) before it multiplies them with quantized blocks, to float16 for F16.
"""

import argparse
import json
import time
from pathlib import Path

import llama_cpp
import numpy as np

F32 = 0  # GGML_TYPE_F32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--text", help="a text to cut into tokens, printed as ids")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    windows = np.load(arguments.tokens)
    model = load(arguments.gguf, windows.shape[1], arguments.threads)
    start = time.perf_counter()
    logits = np.stack([run(model, window) for window in windows])
    seconds = time.perf_counter() - start
    if arguments.logits:
        np.save(arguments.logits, logits)
    losses = [window_loss(x, window) for x, window in zip(logits, windows, strict=True)]
    report = {"tool": "llama.cpp", "llama_cpp_python": llama_cpp.__version__, "seconds": seconds}
    if arguments.text is not None:
        report["ids"] = model.tokenize(arguments.text.encode(), add_bos=False, special=True)
    print(json.dumps(report | perplexity(losses)))


def load(path: Path, context: int, threads: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=context, n_ubatch=context, n_threads=threads,
        n_threads_batch=threads, logits_all=True, type_k=F32, type_v=F32, flash_attn=False,
        verbose=False,
    )  # fmt: skip


def run(model: llama_cpp.Llama, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one window."""
    model.reset()
    model.eval(tokens.tolist())
    return model.scores[: len(tokens)].copy()


def window_loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """The mean loss over positions 1..T-1, in nats."""
    x = logits[:-1].astype(np.float64)
    x -= x.max(-1, keepdims=True)
    chosen = np.take_along_axis(x, tokens[1:, None].astype(np.int64), -1)[:, 0]
    return float((np.log(np.exp(x).sum(-1)) - chosen).mean())


def perplexity(losses: list[float]) -> dict:
    loss = np.asarray(losses)
    error = loss.std(ddof=1) / len(loss) ** 0.5 if len(loss) > 1 else None
    return {
        "perplexity": float(np.exp(loss.mean())),
        "standard_error": None if error is None else float(error),
        "losses": losses,
    }


if __name__ == "__main__":
    main()
