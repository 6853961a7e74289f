"""A tokenizer as a GGUF file's metadata: the inverse of `gguf_tokenizer.read_tokenizer`.

A file holds tokens, merges or scores, and the name of a pre-tokenizer whose pattern every reader
brings along. A tokenizer is written only where some name stands for exactly what it does.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.checkpoints.gguf_tokenizer import (
    BYTE,
    CONTROL,
    GPT2,
    PATTERNS,
    UNKNOWN,
    USER_DEFINED,
    merges_from_scores,
)
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError

NORMAL, UNUSED = 1, 5
Json = Mapping[str, Any]


def describe(tokenizer: Tokenizer, vocabulary: int) -> dict[str, Any]:
    """The tokenizer's keys and values; `vocabulary`: rows of the embedding, for the last tokens.

    Raises UserError, one sentence, for a tokenizer that no name stands for.
    """
    core = json.loads(tokenizer.core.to_str())
    model = core["model"]
    if model.get("type") != "BPE":
        _refuse(f"model {model.get('type')}, which is not BPE")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            _refuse(f"{option}={model[option]!r}")
    for token in core["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            _refuse(f"the token {token['content']}, which takes the spaces around it with it")
    tokens, kinds = _tokens(core, vocabulary)
    own = _sentence_piece if model.get("byte_fallback") else _byte_level
    return {**own(core, tokens, kinds), **_special(tokenizer)}


def _refuse(what: str) -> None:
    raise UserError(
        f"A GGUF file cannot hold the model's tokenizer with {what}: export another format, or "
        "convert the tokenizer with llama.cpp's own script."
    )


def _tokens(core: Json, vocabulary: int) -> tuple[list[str], list[int]]:
    """Every row's token and kind; rows without one are unused, as llama.cpp's converter has it."""
    by_id = {
        i: (token, UNUSED if token == f"[PAD{i}]" else NORMAL)
        for token, i in core["model"]["vocab"].items()
    }
    for token in core["added_tokens"]:
        kind = CONTROL if token["special"] else USER_DEFINED
        by_id[token["id"]] = (token["content"], kind)
    if max(by_id, default=-1) >= vocabulary:
        _refuse(f"{max(by_id) + 1} tokens for an embedding of {vocabulary} rows")
    rows = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocabulary)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    stops = [i for i in tokenizer.stops if i != tokenizer.eos]
    if len(stops) > 2:
        _refuse(f"{len(stops)} tokens beside eos that end a text, where it has two places")
    named = {"bos": tokenizer.bos, "eos": tokenizer.eos} | dict(
        zip(("eot", "eom"), stops, strict=False)
    )
    found: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i is not None
    }
    found["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _byte_level(core: Json, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    steps = _patterns(core["pre_tokenizer"])
    pre = next((name for name, patterns in PATTERNS.items() if patterns == steps), None)
    if pre is None:
        _refuse("a way of cutting text into words that llama.cpp has no name for")
    normalizer = (core["normalizer"] or {}).get("type")
    if normalizer != ("NFC" if pre == "qwen2" else None):
        _refuse(f"the normalizer {normalizer} beside the words of {pre}")
    if bool(core["model"].get("ignore_merges")) != (pre == "llama-bpe"):
        _refuse(f"ignore_merges={core['model'].get('ignore_merges')} beside the words of {pre}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(core)],
    }


def _merges(core: Json) -> list[tuple[str, str]]:
    pairs = (m.split(" ") if isinstance(m, str) else m for m in core["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _patterns(step: Json | None) -> tuple[str, ...] | None:
    """The patterns that cut text one after the other; None for anything else than such a chain."""
    if step is None:
        return None
    *cuts, last = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    found = [_pattern(cut) for cut in cuts]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or None in found:
        return None
    return (*filter(None, found), *([GPT2] if last["use_regex"] else []))


def _pattern(step: Json) -> str | None:
    if step["type"] == "Digits" and step["individual_digits"]:
        return r"\p{N}"
    split = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return step["pattern"].get("Regex") if split else None


def _sentence_piece(core: Json, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """Scores that put the merges in their order."""
    model = core["model"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    kinds = [_piece_kind(t, k, model.get("unk_token")) for t, k in zip(tokens, kinds, strict=True)]
    ranks: dict[str, int] = {}
    for left, right in _merges(core):
        ranks.setdefault(left + right, len(ranks) + 1)
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    if merges_from_scores(vocabulary, scores, kinds) != _merges(core):
        _refuse("merges that no scores of its pieces put into this order")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": _spaced(core),
    }


def _piece_kind(token: str, kind: int, unknown: str | None) -> int:
    if token == unknown:
        return UNKNOWN
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if kind == NORMAL and is_byte else kind


def _spaced(core: Json) -> bool:
    """Whether a space goes in front of a text."""
    normalizer = core["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepends = {"type": "Prepend", "prepend": "▁"}
    if core["pre_tokenizer"] is not None or steps not in ([replaces], [prepends, replaces]):
        _refuse("another treatment of spaces than SentencePiece's")
    return len(steps) == 2
