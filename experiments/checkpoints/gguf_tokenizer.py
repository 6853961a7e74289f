"""The tokenizer inside a GGUF file's metadata: byte-level BPE ("gpt2") or SentencePiece ("llama").

Files name their pre-tokenizer and leave the pattern to the reader; the patterns are those of the
models' own tokenizer.json (OpenAI's GPT-2, Llama 3, Qwen2), and llama.cpp's for "default".
"""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE

from experiments.data.tokenizer import Tokenizer, told
from experiments.errors import UserError

LONGEST_PIECE = 1000  # characters; SentencePiece trains with 16 by default
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # llama.cpp's kinds of tokens
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {  # applied one after the other, each to the pieces of the one before
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (WORDS + r"\p{N}{1,3}" + REST,),
    "qwen2": (WORDS + r"\p{N}" + REST,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def read_tokenizer(get: Callable[..., Any], where: str) -> Tokenizer:
    """The tokenizer that the metadata describes; `get(key, default)` reads one entry.

    Raises UserError if there is none, or one of a kind that planish does not know.
    """
    kind = get("tokenizer.ggml.model")
    pre = get("tokenizer.ggml.pre", "default")
    tokens = get("tokenizer.ggml.tokens")
    with told(f"{where} has a damaged tokenizer", "fetch the file again"):
        pre = ALIASES.get(pre, pre)
        if kind == "gpt2" and pre in PATTERNS and tokens:
            core = byte_level(tokens, get("tokenizer.ggml.merges", []), pre)
        elif kind == "llama" and tokens and (scores := get("tokenizer.ggml.scores")):
            kinds = get("tokenizer.ggml.token_type") or [1] * len(tokens)
            spaced = get("tokenizer.ggml.add_space_prefix", True)
            core = sentence_piece(tokens, scores, kinds, spaced)
        else:
            raise UserError(
                f"{where} has a tokenizer that planish does not read (model {kind}, pre-tokenizer "
                f"{pre}): it reads llama, and gpt2 with {', '.join(PATTERNS)}."
            )
        _add_special(core, tokens, get("tokenizer.ggml.token_type") or [])
        made = _with_ids(core, get, llama_like=kind == "llama" or pre == "llama-bpe")
        made.validate()
        return made


def _with_ids(core: Core, get: Callable[..., Any], *, llama_like: bool) -> Tokenizer:
    bos, eos, eot, eom = (get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "eot", "eom"))
    return Tokenizer(
        core=core,
        chat_template=get("tokenizer.chat_template"),
        bos=bos,
        eos=eos,
        add_bos=bool(get("tokenizer.ggml.add_bos_token", llama_like)) and bos is not None,
        stops=tuple(dict.fromkeys(i for i in (eos, eot, eom) if i is not None)),
    )


def byte_level(tokens: Sequence[str], merges: Sequence[str], pre: str) -> Core:
    """BPE over the 256 byte characters of GPT-2, split by one of PATTERNS."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3's tokenizer takes a word that is itself a token whole, whatever its merges.
    core = Core(BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in PATTERNS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    core.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    return core


def sentence_piece(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], prefix: bool
) -> Core:
    """SentencePiece BPE: "▁" for spaces, the best-scored merge first, bytes for what is unknown."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    merges = merges_from_scores(vocabulary, scores, kinds)
    core = Core(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces, back = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
    )
    stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([back, decoders.ByteFallback(), decoders.Fuse(), *stripped])
    return core


def merges_from_scores(
    vocabulary: dict[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored result first.

    SentencePiece merges whichever neighbours give the best-scored piece; BPE wants that order
    spelled out.
    """
    special = (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    pieces = {t: i for t, i in vocabulary.items() if kinds[i] not in special}
    if max(map(len, pieces), default=0) > LONGEST_PIECE:
        raise ValueError(f"a piece is longer than {LONGEST_PIECE} characters")
    found = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[i], pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(core: Core, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Tokens that are matched before anything else; control tokens only where asked for."""
    for kinds_wanted, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        chosen = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in kinds_wanted
        ]
        core.add_special_tokens(chosen) if special else core.add_tokens(chosen)
