"""The texts: protocol E's stored windows, a Wikipedia dump, a local file."""

import bz2
import dataclasses
import hashlib
from pathlib import Path

import hydra
import numpy as np
import omegaconf
import pytest

from experiments.data import corpora, mediawiki
from experiments.data.corpora import PackagedEnwiki, StoredEnwiki, TextFile, TextPair
from experiments.errors import UserError
from tests.experiments.data.test_windows import words

CONF = Path(__file__).parents[3] / "conf"

ARTICLE = """{{Infobox|name={{lang|en|Ox}}|size={{convert|2|m}}}}
{| class="wikitable"
! head
|-
| cell {| nested |}
|}
[[File:Ox.jpg|thumb|An [[ox]] in a [[field (agriculture)|field]]]]
The '''ox''' ({{lang-la|bos}}) is a [[cattle|bovine]]<ref name="a">{{cite web|url=x}}</ref> and
pulls [[plough]]s.<ref name="a" /> It eats&nbsp;grass<!-- a <ref> here -->.

== Use ==
* Ploughing, see [http://example.org/x the manual] or [https://example.org/y]
* H<sub>2</sub>O: <math>a^2</math> is ''not'' drunk
Text with {{ an open template.

== See also ==
* [[Cow]]

== External links ==
* http://example.org

[[Category:Cattle]]
"""
CLEANED = """The ox is a bovine and
pulls ploughs. It eats grass.

Use

Ploughing, see the manual or
H2O: is not drunk
Text with {{ an open template."""


def page(title, text, ns=0, extra=""):
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    inner = f"<title>{title}</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision>"
    return f"<page>{inner}</page>"


def write_dump(folder, *pages):
    namespace = 'xmlns="http://www.mediawiki.org/xml/export-0.10/"'
    path = folder / "dump.xml.bz2"
    path.write_bytes(bz2.compress(f"<mediawiki {namespace}>{''.join(pages)}</mediawiki>".encode()))
    return path


def test_cleaning_keeps_what_a_reader_reads():
    assert mediawiki.clean(ARTICLE) == CLEANED


def test_only_articles_are_read(tmp_path):
    dump = write_dump(
        tmp_path,
        page("Ox", ARTICLE),
        page("Bull", "#REDIRECT [[Ox]]", extra='<redirect title="Ox" />'),
        page("Talk:Ox", "Is it?", ns=1),
        page("Cow", "The '''cow'''."),
    )
    assert [title for title, _ in mediawiki.pages(dump)] == ["Ox", "Cow"]
    assert mediawiki.read(dump) == f"Ox\n\n{CLEANED}\n\nCow\n\nThe cow."


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"no" + b, lambda b: b""])
def test_refuses_a_damaged_dump(tmp_path, damage):
    dump = write_dump(tmp_path, page("Ox", ARTICLE))
    dump.write_bytes(damage(dump.read_bytes()))
    with pytest.raises(UserError, match="dump.xml.bz2 is not a whole MediaWiki dump in bzip2"):
        mediawiki.read(dump)


def test_a_packaged_dump_is_cut_with_the_models_tokenizer(tmp_path, monkeypatch):
    dump = write_dump(tmp_path, page("a", "b c b c"), page("b", "c b c b c b c"))
    asked = []

    def fetch(*identity, size):
        asked.append((identity, size))
        return dump

    monkeypatch.setattr(corpora, "fetch_member", fetch)
    identity = dict(package="p", version="1", member="m", sha256="00")
    corpus = PackagedEnwiki(context=2, calibration=2, heldout=2, size=9, **identity)
    found = corpus.windows(words("a", "b", "c"), 4)
    assert asked == [(("p", "1", "m", "00"), 9)]
    assert found.calibration.shape == found.heldout.shape == (2, 2)
    assert found.name == "enwiki"


def test_a_text_file_gives_windows(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"a b a\r\n\r\nb a b")
    corpus = TextFile(path=str(path), context=3, calibration=1, heldout=1)
    found = corpus.windows(words("a", "b"), 3)
    np.testing.assert_array_equal(found.calibration, [[1, 2, 1]])
    np.testing.assert_array_equal(found.heldout, [[2, 1, 2]])
    assert found.name == "own.txt"


def test_refuses_text_that_cannot_be_read(tmp_path):
    def windows(path):
        return TextFile(path=str(path)).windows(words("a"), 2)

    with pytest.raises(UserError, match="none.txt cannot be read .No such file"):
        windows(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        windows(tmp_path)
    (tmp_path / "latin.txt").write_bytes("straße".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt is not UTF-8 text .byte 4 does not fit"):
        windows(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="empty.txt holds no text"):
        windows(tmp_path / "empty.txt")


def write_pair(folder, calibration="a b a b a", heldout="b b a a b a b"):
    """TextPair's two paths."""
    found = {}
    for name, text in (("calibration", calibration), ("heldout", heldout)):
        (folder / f"{name}.txt").write_text(text)
        found[f"{name}_path"] = str(folder / f"{name}.txt")
    return found


def test_a_pair_of_texts_is_cut_whole_with_one_bos_in_front(tmp_path):
    pair = dict(context=3, calibration=1, **write_pair(tmp_path))
    found = TextPair(**pair).windows(words("a", "b"), 3)
    np.testing.assert_array_equal(found.calibration, [[0, 1, 2]])
    np.testing.assert_array_equal(found.heldout, [[0, 2, 2], [1, 1, 2]])
    assert found.name == "heldout.txt"
    bare = TextPair(**pair, bos=False).windows(words("a", "b"), 3)
    np.testing.assert_array_equal(bare.heldout, [[2, 2, 1], [1, 2, 1]])
    never = dataclasses.replace(words("a", "b"), add_bos=False)
    assert TextPair(**pair).windows(never, 3).digest == bare.digest


def test_a_pair_can_be_drawn_and_cut_short(tmp_path):
    paths = write_pair(tmp_path, calibration="a b " * 40)
    pair = TextPair(context=3, calibration=5, heldout=1, draw="random", bos=False, **paths)
    digests = [pair.windows(words("a", "b"), 3, seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert pair.windows(words("a", "b"), 3).heldout.shape == (1, 3)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (dict(calibration=""), "data.calibration_path=.*calibration.txt holds no text: give"),
        (dict(heldout="\n \n"), "data.heldout_path=.*heldout.txt holds no text: give the path"),
        (dict(calibration="a b"), "calibration.txt holds 1 calibration windows .* data.calib"),
        (dict(heldout="a"), "heldout.txt holds 0 heldout windows of 3 tokens, fewer than one"),
        (dict(heldout="a c b"), "gives token 3 for heldout.txt, but .* vocabulary ends at 2"),
    ],
)
def test_refuses_a_pair_without_enough_text(tmp_path, texts, sentence):
    pair = TextPair(context=3, calibration=2, **write_pair(tmp_path, **texts))
    with pytest.raises(UserError, match=sentence):
        pair.windows(words("a", "b", "c"), 3)


def test_refuses_a_pair_that_cannot_be_read(tmp_path):
    paths = write_pair(tmp_path) | {"calibration_path": str(tmp_path / "none.txt")}
    with pytest.raises(UserError, match="data.calibration_path=.*none.txt cannot be read"):
        TextPair(**paths).windows(words("a"), 2)


def test_refuses_a_context_longer_than_the_model_allows():
    for corpus in (StoredEnwiki(), TextFile(path="none.txt")):
        with pytest.raises(UserError, match="data.context=512 is longer than the model allows"):
            corpus.windows(words("a"), 49152, longest=256)


def test_the_stored_windows_are_those_of_protocol_e():
    stated = (corpora.STORED.parent / "enwiki_windows.md").read_text()
    assert hashlib.sha256(corpora.STORED.read_bytes()).hexdigest() in stated
    with np.load(corpora.STORED, allow_pickle=False) as stored:
        assert stored["calibration"].shape == (128, 512)
        assert stored["heldout"].shape == (40, 512)
        assert {array.dtype for array in stored.values()} == {np.dtype(np.int32)}
        assert max(array.max() for array in stored.values()) < corpora.STORED_VOCABULARY


def test_the_stored_windows_refuse_other_models():
    with pytest.raises(UserError, match="vocabulary of 49152, but the model's has 32000"):
        StoredEnwiki().windows(words("a"), 32000)
    with pytest.raises(UserError, match="tokenizer encodes the text of data=enwiki512 differently"):
        StoredEnwiki().windows(words("a"), 49152)
    with pytest.raises(UserError, match="data.context=256, .* have exactly 512 tokens"):
        StoredEnwiki(context=256).windows(words("a"), 49152)


def test_the_stored_windows_are_spread(monkeypatch):
    monkeypatch.setattr(corpora, "_comes_back", lambda *_: True)
    with np.load(corpora.STORED, allow_pickle=False) as stored:
        calibration, heldout = stored["calibration"], stored["heldout"]
    found = StoredEnwiki(calibration=32, heldout=40).windows(words("a"), 49152)
    np.testing.assert_array_equal(found.calibration, calibration[np.arange(32) * 127 // 31])
    np.testing.assert_array_equal(found.heldout, heldout)
    with pytest.raises(UserError, match="holds 128 calibration windows .* data.calibration=129"):
        StoredEnwiki(calibration=129).windows(words("a"), 49152)


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("enwiki512", StoredEnwiki()),
        ("enwiki", StoredEnwiki()),
        ("text", TextFile(path="own.txt")),
        ("wikitext2", TextPair(calibration_path="own.txt", heldout_path="own.txt")),
    ],
)
def test_every_yaml_instantiates_with_the_defaults_of_its_class(name, defaults):
    config = omegaconf.OmegaConf.load(CONF / "data" / f"{name}.yaml")
    for option in config:
        if omegaconf.OmegaConf.is_missing(config, option):
            config[option] = "own.txt"
    corpus = hydra.utils.instantiate(config)
    for field in dataclasses.fields(defaults):
        assert field.name in config
        assert getattr(corpus, field.name) == getattr(defaults, field.name)


@pytest.fixture(scope="module")
def smollm2():
    source = hydra.utils.instantiate(omegaconf.OmegaConf.load(CONF / "model" / "smollm2_135m.yaml"))
    return source.tokenizer()


@pytest.mark.real
def test_smollm2s_tokenizer_made_the_stored_windows(smollm2):
    found = StoredEnwiki().windows(smollm2, 49152, longest=8192)
    assert found.calibration.shape == (32, 512) and found.heldout.shape == (40, 512)


@pytest.mark.real
def test_the_packaged_dump_is_cleaned_the_same_everywhere(smollm2):
    corpus = hydra.utils.instantiate(omegaconf.OmegaConf.load(CONF / "data" / "enwiki.yaml"))
    found = corpus.windows(smollm2, 49152, longest=8192)
    assert found.calibration.shape == (32, 512) and found.heldout.shape == (40, 512)
    text = smollm2.decode(found.calibration[0])
    assert text.startswith("Anarchism\n\nAnarchism is a political philosophy that advocates self-")
    for markup in ("{{", "[[", "''", "<ref", "&nbsp;"):
        assert not any(markup in smollm2.decode(window) for window in found.heldout)
