"""Tokenizers out of folders and GGUF metadata, against slow readings of their definitions."""

import json
import re
from pathlib import Path

import hydra.utils
import numpy as np
import omegaconf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from experiments.checkpoints.gguf_tokenizer import read_tokenizer
from experiments.checkpoints.huggingface import read_tokenizer as read_folder
from experiments.data.tokenizer import Tokenizer, read_core, told
from experiments.errors import UserError

ROOT = Path(__file__).parents[3]
HARD = [
    "Hello world",
    "In 1234567 years, 3.14159 and 2nd ½ ² Ⅷ, year 1999's",
    "a  b   c\n\n\n d\t\te \r\n f",
    "  leading and trailing   ",
    "emoji 😀👩‍👩‍👧 🇩🇪",
    "漢字かな交じり文。中文，标点",
    "don't I'LL we've 'S can'T",
    "if x:\n    return x_1\n\t\tpass",
    "Ünïcödé e\u0301 \u00a0nbsp\u3000wide",
    "العربية ١٢٣ हिन्दी १२",
    "$100+<>^~|=`",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{{ m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def metadata(**changes):
    """A byte-level tokenizer of all bytes, a few merges and three special tokens."""
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *BYTES,
        "ab",
        "Ġab",
        "12",
        "abc",
        "<tag>",
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 4) + [4],
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    } | {f"tokenizer.{k}": v for k, v in changes.items()}


def byte_level(pre="smollm", **changes):
    content = metadata(**{"ggml.pre": pre, **changes})
    return read_tokenizer(lambda key, default=None: content.get(key, default), "model.gguf")


def spelled(tokenizer, text, **options):
    return [tokenizer.core.id_to_token(i) for i in tokenizer.encode(text, **options)]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"])
@pytest.mark.parametrize("text", HARD)
def test_text_survives(pre, text):
    tokenizer = byte_level(pre)
    ids = tokenizer.encode(text)
    expected = text.replace("e\u0301", "é") if pre == "qwen2" else text  # NFC, as Qwen does
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "Ġab Ġ1234 's Ġ Ġab"),
        ("smollm", "Ġab Ġ 1 2 3 4 's Ġ Ġab"),
        ("llama-bpe", "Ġab Ġ 123 4 's Ġ Ġab"),
        ("qwen2", "Ġab Ġ 1 2 3 4 's Ġ Ġab"),
        ("default", "Ġab Ġ 123 4 ' s Ġ Ġab"),
    ],
)
def test_each_pre_tokenizer_splits_its_way(pre, pieces):
    split = byte_level(pre).core.pre_tokenizer.pre_tokenize_str(" ab 1234's  ab")
    assert [piece for piece, _ in split] == pieces.split(" ")


@pytest.mark.parametrize("text", HARD)
def test_smollm_splits_as_its_own_tokenizer_file_does(text):
    """SmolLM2's tokenizer.json: each digit apart, then GPT-2's own splitter."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    reference = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ours = byte_level("smollm").core.pre_tokenizer
    assert ours.pre_tokenize_str(text) == reference.pre_tokenize_str(text)


@pytest.mark.parametrize("text", HARD)
def test_gpt2_splits_as_the_library_does(text):
    reference = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = byte_level("gpt-2").core.pre_tokenizer
    assert ours.pre_tokenize_str(text) == reference.pre_tokenize_str(text)


def test_llama3_takes_whole_tokens_before_merging():
    assert spelled(byte_level("llama-bpe"), "abc") == ["abc"]
    assert spelled(byte_level("gpt-2"), "abc") == ["ab", "c"]


def test_aliases_of_pre_tokenizers():
    assert spelled(byte_level("llama-v3"), "abc") == ["abc"]


def test_special_tokens_are_text_unless_asked_for():
    tokenizer = byte_level()
    text = "<|im_start|>ab<tag>"
    assert tokenizer.encode(text, special=True)[0] == 1
    assert spelled(tokenizer, text, special=True) == ["<|im_start|>", "ab", "<tag>"]
    assert spelled(tokenizer, text)[:3] == ["<", "|", "i"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(text, special=True)
    assert tokenizer.decode(ids) == "ab<tag>"
    assert tokenizer.decode(np.array(ids), special=True) == text


def test_ids_from_the_metadata():
    tokenizer = byte_level(**{"ggml.eot_token_id": 0})
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (1, 2, (2, 0))
    assert not tokenizer.add_bos
    assert byte_level(**{"ggml.add_bos_token": True}).add_bos
    assert byte_level("llama-bpe").add_bos  # Llama 3's default


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ggml.model": "bert"}, r"does not read .model bert, pre-tokenizer smollm"),
        ({"ggml.model": None}, "does not read .model None"),
        ({"ggml.pre": "tekken"}, "pre-tokenizer tekken.*it reads llama, and gpt2 with gpt-2, smol"),
        ({"ggml.tokens": None}, "does not read"),
        ({"ggml.model": "llama"}, "does not read"),  # without scores
        ({"ggml.merges": ["a nonexistent"]}, "has a damaged tokenizer"),
    ],
)
def test_a_tokenizer_that_planish_does_not_read(changes, sentence):
    with pytest.raises(UserError, match=f"model.gguf .*{sentence}|model.gguf {sentence}"):
        byte_level(**changes) if "ggml.pre" not in changes else byte_level(changes["ggml.pre"])


PIECES = {  # SentencePiece: scores are negative ranks
    "▁t": 0, "he": -1, "▁the": -2, "in": -3, "▁a": -4, "th": -5, "the": -6, "▁": -7, "t": -8,
    "h": -9, "e": -10, "i": -11, "n": -12, "a": -13,
}  # fmt: skip


def sentence_piece(**changes):
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *raw, *PIECES]
    content = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(score) for score in PIECES.values()],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.{k}": v for k, v in changes.items()}
    return read_tokenizer(lambda key, default=None: content.get(key, default), "model.gguf")


def merged_slowly(text):
    """SentencePiece's BPE: merge the neighbours with the best-scored result, the leftmost first."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [PIECES.get(a + b, -np.inf) for a, b in zip(parts, parts[1:], strict=False)]
        if not joined or max(joined) == -np.inf:
            break
        at = joined.index(max(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in PIECES else [f"<0x{b:02X}>" for b in part.encode()])
    ]


@pytest.mark.parametrize(
    "text", ["the thin ant", "in a  tee", " then", "hé 漢 the", "nthethe\nin", "tteathheein", "a"]
)
def test_sentence_piece_merges_by_score(text):
    tokenizer = sentence_piece()
    assert spelled(tokenizer, text) == merged_slowly(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentence_piece_without_a_space_in_front():
    tokenizer = sentence_piece(**{"ggml.add_space_prefix": False})
    assert spelled(tokenizer, "the") == ["the"]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_sentence_piece_models_expect_bos():
    assert sentence_piece().add_bos
    assert not sentence_piece(**{"ggml.add_bos_token": False}).add_bos


def test_a_chat_opens_the_assistants_turn():
    tokenizer = byte_level()
    messages = [{"role": "system", "content": "ab"}, {"role": "user", "content": "<tag> 1"}]
    text = "<|im_start|>system\nab<|im_end|>\n<|im_start|>user\n<tag> 1<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    ids = tokenizer.chat(messages)
    assert tokenizer.decode(ids, special=True) == text
    assert ids == tokenizer.encode(text, special=True) and ids.count(1) == 3


def chat(template, content="ab"):
    tokenizer = byte_level(chat_template=template)
    ids = tokenizer.chat([{"role": "user", "content": content}])
    return tokenizer.decode(ids, special=True)


def test_what_templates_may_use():
    assert (
        chat("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
        == "<|im_start|>ab<|im_end|>"
    )
    assert chat("{% if true %}\n  x\n{% endif %}\n") == "  x\n"  # blocks take their line with them
    assert chat("{{ strftime_now('%Y') }}").isdigit()
    assert chat("{{ messages[0] | tojson }}", "<é>") == '{"role": "user", "content": "<é>"}'
    assert (
        chat("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    )
    assert chat("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "ab"
    assert chat("{{ 'none' if tools is none else 'some' }}") == "none"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # the way out of an open Jinja
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails(template):
    with pytest.raises(UserError, match="chat template fails .*: check the roles"):
        chat(template)


def test_no_template():
    with pytest.raises(UserError, match="has no chat template: give it plain text"):
        byte_level(chat_template=None).chat([{"role": "user", "content": "hi"}])


def test_save_and_load(tmp_path):
    tokenizer = byte_level(**{"ggml.eot_token_id": 0})
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for field in ("chat_template", "bos", "eos", "add_bos", "stops"):
        assert getattr(loaded, field) == getattr(tokenizer, field)
    for text in HARD:
        assert loaded.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", None, "There is no tokenizer.json in"),
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer that the tokenizers library"),
        ("planish_tokenizer.json", None, "planish_tokenizer.json is missing or no ordinary"),
        ("planish_tokenizer.json", '{"stops": [], "odd": 1}', "not what planish writes"),
        ("planish_tokenizer.json", "{}", "not what planish writes"),
    ],
)
def test_a_damaged_saved_tokenizer(tmp_path, file, content, sentence):
    byte_level().save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=sentence):
        Tokenizer.load(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face tokenizer with two special tokens."""
    vocabulary = {"<s>": 0, "</s>": 1, "<|eot|>": 2} | {c: i + 3 for i, c in enumerate(BYTES)}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<|eot|>"])
    core.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def said(folder, **content):
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def test_a_folders_special_tokens(folder):
    said(folder, bos_token={"content": "<s>"}, eos_token="</s>", chat_template="one")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    tokenizer = read_folder(folder, {"eos_token_id": 1})
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (0, 1, (1, 2))
    assert not tokenizer.add_bos and tokenizer.chat_template == "one"


def test_a_folder_that_names_ids_only_in_its_config(folder):
    tokenizer = read_folder(folder, {"bos_token_id": 0, "eos_token_id": [2, 1]})
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (0, 2, (2, 1))
    assert tokenizer.chat_template is None


def test_bos_is_expected_where_the_post_processor_adds_it(folder):
    path = str(folder / "tokenizer.json")
    core = tokenizers.Tokenizer.from_file(path)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    core.save(path)
    said(folder, bos_token="<s>")
    assert read_folder(folder, {}).add_bos
    assert read_folder(folder, {}).encode("a") == [3 + BYTES.index("a")]  # never by encode itself
    said(folder, bos_token="<s>", add_bos_token=False)
    assert not read_folder(folder, {}).add_bos


def test_templates_of_a_folder(folder):
    said(
        folder,
        chat_template=[{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}],
    )
    assert read_folder(folder, {}).chat_template == "b"
    (folder / "chat_template.jinja").write_text("c")
    assert read_folder(folder, {}).chat_template == "c"


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"There is no tokenizer.json in {tmp_path}")):
        read_folder(tmp_path, {})


@pytest.fixture(scope="module")
def smollm2():
    source = hydra.utils.instantiate(
        omegaconf.OmegaConf.load(ROOT / "conf/model/smollm2_135m.yaml")
    )
    return source.tokenizer()


@pytest.mark.real
def test_the_embedded_tokenizer_agrees_with_the_official_one(smollm2):
    """The peers' windows were cut from text that the official tokenizer encoded.

    Three of 168 differ: two end between two newlines that belong together, one holds a place where
    the text was cut before it was encoded.
    """
    with np.load(ROOT / "experiments/data/enwiki_windows.npz") as peers:
        windows = [*peers["calibration"], *peers["heldout"]]
    same = [smollm2.encode(smollm2.decode(w, special=True)) == w.tolist() for w in windows]
    assert (len(same), same.count(False)) == (168, 3)


@pytest.mark.real
@pytest.mark.parametrize("text", HARD)
def test_the_embedded_tokenizer_keeps_text(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


@pytest.mark.real
def test_the_embedded_chat(smollm2):
    assert (smollm2.bos, smollm2.eos, smollm2.stops, smollm2.add_bos) == (1, 2, (2,), False)
    ids = smollm2.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    )
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert smollm2.decode(ids, special=True) == text + "<|im_start|>assistant\n"


def test_a_text_longer_than_the_files_own_limit_is_not_cut_off(tmp_path):
    core = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.enable_truncation(3)
    core.enable_padding(length=8)
    core.save(str(tmp_path / "tokenizer.json"))
    assert read_core(tmp_path / "tokenizer.json").encode("a a a a a").ids == [0] * 5


class PanicException(BaseException):
    """As the library's Rust code raises it."""


def test_a_panic_of_the_library_is_a_sentence():
    with pytest.raises(UserError, match="The tokenizer fails .index out of range.: fetch it again"):
        with told("The tokenizer fails", "fetch it again"):
            raise PanicException("index out of range")
    with pytest.raises(KeyboardInterrupt), told("The tokenizer fails", "fetch it again"):
        raise KeyboardInterrupt
