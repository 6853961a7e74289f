"""Templates run in a process with limits; what they may use is tested with the tokenizer."""

import pytest

from experiments.data import chat


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "time"),
        ("{{ 'a' * 10**11 }}", "memory"),
        ("{{ 'a' * 20000000 }}", "it makes 20000000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "time or memory"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ],
)
@pytest.mark.some(4)
def test_a_hostile_template_is_stopped(template, sentence, monkeypatch):
    with pytest.raises(ValueError, match=sentence):
        chat.render(template, {})


def test_what_a_template_makes():
    assert chat.render("{{ a }}: {{ b | tojson }}\n", {"a": "ü", "b": ["é"]}) == 'ü: ["é"]'


def test_one_process_renders_many_and_another_what_follows_its_end():
    first = chat.render("{{ n }}", {"n": 1})
    (process,) = chat._RENDERING
    assert [first, *(chat.render("{{ n }}", {"n": n}) for n in (2, 3))] == ["1", "2", "3"]
    assert chat._RENDERING == [process]
    with pytest.raises(ValueError, match="time or memory"):
        chat.render("{{ 'a' * 10**11 }}", {})
    assert chat.render("{{ n }}", {"n": 4}) == "4"
    process.kill()
    process.wait()
    assert chat.render("{{ n }}", {"n": 5}) == "5"
    chat._RENDERING[0].kill()
    chat._RENDERING[0].wait()
    assert chat.render("{{ n }}", {"n": 6}) == "6"
