"""Generate text: python -m experiments.generate checkpoint=... prompt="..." """

import time
from collections.abc import Iterator

import jax
from omegaconf import DictConfig

from experiments.checkpoints.loading import load_model
from experiments.checkpoints.sources import Source, of_weights, require_predictions
from experiments.data.tokenizer import Tokenizer
from experiments.entry import entry_point, resolved
from experiments.errors import UserError
from experiments.evaluate import open_model
from experiments.generation import Sampling, generate
from experiments.progress import console


def continue_text(source: Source, prompt: str, config: dict) -> Iterator[str]:
    """Pieces of text as they are generated; what cannot be done is refused at once."""
    require_predictions(source.config, "text to generate")
    tokenizer = source.tokenizer()
    ids = encode_prompt(tokenizer, prompt, chat=config["chat"])
    tokens = generate(
        load_model(source),
        ids,
        max_tokens=config["max_tokens"],
        stops=tokenizer.stops,
        sampling=Sampling(**config["sampling"]),
        key=jax.random.key(config["seed"]),
    )
    return _pieces(tokenizer, tokens)


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    so_far: list[int] = []
    text = ""
    for token in tokens:
        so_far.append(token)
        longer = tokenizer.decode(so_far)
        if not longer.endswith("\N{REPLACEMENT CHARACTER}"):  # a character still incomplete
            yield longer[len(text) :]
            text = longer


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """The prompt as a user's turn of the chat template, or as plain text to be continued."""
    if chat:
        return tokenizer.chat([{"role": "user", "content": prompt}])
    bos = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    return bos + tokenizer.encode(prompt)


@entry_point("generate")
def main(config: DictConfig) -> None:
    plain = resolved(config)
    if plain["max_tokens"] < 1:
        raise UserError(f"max_tokens={plain['max_tokens']} must be at least 1.")
    start, count = time.perf_counter(), 0
    pieces = continue_text(of_weights(open_model(config)), plain["prompt"], plain)
    if not plain["chat"]:
        print(plain["prompt"], end="", flush=True)
    for piece in pieces:
        count += 1
        print(piece, end="", flush=True)
    print()
    console.print(
        f"[dim]{count} pieces in {time.perf_counter() - start:.1f} s, start-up included[/]"
    )


if __name__ == "__main__":
    main()
