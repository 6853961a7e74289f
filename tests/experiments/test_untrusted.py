"""What is opened of a folder that somebody else made, and the JSON in it."""

import json
import os

import pytest

from experiments.errors import LONGEST, UserError
from experiments.untrusted import parse_json, read_json, refusing, require_file


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "not finite"),
        ('{"a": [-Infinity]}', "not finite"),
        ("[1e400]", "not finite"),
        (f"[{'9' * 5000}]", "integer string conversion"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        (b'"\xed\xa0\x80"', "invalid continuation byte"),
        ("\ufeff{}", "BOM"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_is_none(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_json(text)


def test_json_that_is_some():
    content = {"a": [1, -2.5, None, True, "ü \U0001f600"], "b": {"c": {}}}
    assert parse_json(json.dumps(content)) == parse_json(json.dumps(content).encode()) == content


def test_a_file_that_is_no_object_or_no_file(tmp_path):
    path = tmp_path / "config.json"
    assert read_json(path, default={"a": 1}) == {"a": 1}
    path.write_text("[]")
    with pytest.raises(UserError, match="config.json is not a JSON object .it holds a list"):
        read_json(path)
    path.unlink()
    os.mkfifo(path)  # which would wait for ever
    for default in (None, {}):
        with pytest.raises(UserError, match="config.json is missing or no ordinary file"):
            read_json(path, default=default)


def test_links_stay_within_the_folder(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("{}")
    (folder / "real").write_text("{}")
    for name, leads_to in (
        ("own", "real"),
        ("out", outside),
        ("loop", "loop"),
        ("zero", "/dev/zero"),
    ):
        (folder / name).symlink_to(leads_to)
    require_file(folder / "own", folder)
    with pytest.raises(UserError, match="out leads outside its folder"):
        require_file(folder / "out", folder)
    for name in ("loop", "zero"):
        with pytest.raises(UserError, match=f"{name} is missing or no ordinary file"):
            require_file(folder / name, folder)
    (tmp_path / "link").symlink_to(folder)  # the folder's own place is the user's choice
    require_file(tmp_path / "link" / "real", tmp_path / "link")


def test_the_hubs_cache_is_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "123").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert read_json(snapshot / "config.json", snapshot) == {"a": 1}


def test_refusals_are_one_bounded_line():
    with pytest.raises(UserError) as caught, refusing("This is damaged"):
        raise KeyError("a\nb\x1b[31m\ud800" + "x" * 10 * LONGEST)
    message = str(caught.value)
    assert message.startswith("This is damaged (KeyError: ") and message.endswith("fetch it again.")
    assert message.isprintable() and len(message) <= LONGEST + 3
    assert str(UserError("two\nlines \x1b[0m")) == "two lines \\x1b[0m"
