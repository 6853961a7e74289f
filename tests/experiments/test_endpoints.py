"""A model behind a real server gets the scores that it gets here."""

import json
import socket

import hydra
import pytest

from experiments import collect, compress, evaluate, task_scores
from experiments.checkpoints.sources import open_source
from experiments.configuration import CONF
from experiments.endpoints import Endpoint
from experiments.errors import UserError
from experiments.evaluation.lm_eval_endpoint import connect, parted, score_of
from experiments.evaluation.scoring import Request, score
from tests.experiments.completions_server import KEY, Model, serving
from tests.experiments.evaluation import lm_eval_goldens as goldens
from tests.golden.lm_eval.tasks.texts import rolling


@pytest.fixture(scope="module")
def source():
    return open_source(goldens.FOLDER)


@pytest.fixture(scope="module")
def model(source):
    return Model(source)


@pytest.fixture(scope="module")
def url(model):
    with serving(model) as url:
        yield url


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def config(folder, url, *more, name="evaluate"):
    own = ["model=endpoint", f"model.url={url}", "model.name=tiny", "evaluation=lm_eval"]
    place = f"evaluation.include_path={goldens.FOLDER / 'tasks'}"
    if "evaluation=perplexity" in more:
        own, place = own[:-1], "evaluation.chunk=2"
    base = [*own, place, f"runs={folder}", "logger.tensorboard=false"]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(name, [*base, *more])


def endpoint(url, **more):
    return Endpoint(url=url, name="tiny", **more)


@pytest.mark.parametrize("bos", ["shown", "hidden"])
@pytest.mark.some(1)
def test_completions_get_the_scores_that_the_model_gets_here(source, bos):
    with serving(Model(source, bos=bos)) as url:
        found = goldens.asked(endpoint(url, concurrent=2), "choices")
    goldens.compare(found, goldens.expected()["choices"])


def test_a_prefix_stands_where_nothing_else_does(source, url):
    found = goldens.asked(endpoint(url, prefix="<s>"), "rolling", limit=2)
    text = source.tokenizer()
    asked = [Request([text.bos], text.encode(doc["text"])) for doc in rolling()["test"]]
    scores = score(source, asked[:2], batch=64)
    for (response,), here in zip(found["responses"], scores, strict=True):
        assert response == pytest.approx(here.loglikelihood, abs=goldens.TOLERANCE)
    with pytest.raises(UserError, match="nothing is in front of: give model.prefix="):
        goldens.asked(endpoint(url), "rolling")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.some(1)
def test_answers_are_those_of_the_model(url, model, chat):
    del model.asked[:]
    found = goldens.asked(endpoint(url, chat=chat), "answers")
    goldens.compare(found, goldens.expected()["answers"])
    assert model.asked[0]["model"] == "tiny" and model.asked[0]["temperature"] == 0


def test_the_same_command_lands_in_the_same_tables(tmp_path, url):
    here = ["model=local", f"model.path={goldens.FOLDER}"]
    place = f"evaluation.include_path={goldens.FOLDER / 'tasks'}"
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        own = hydra.compose(
            "evaluate",
            [*here, "evaluation=lm_eval", "tasks=choices", place, f"runs={tmp_path}"],
        )
    evaluate.run(own)
    done = evaluate.run(config(tmp_path, url, "tasks=choices"))
    facts = done.record["model"]
    assert facts["url"] == url and facts["location"] == "tiny"
    assert facts["server"] == {"owned_by": "nobody", "context": 64}
    assert "bytes_on_disk" not in done.record and done.folder.parent.name.startswith("tiny-")
    head, *rows = task_scores.rows(collect.gather([tmp_path]))
    assert {row[0] for row in rows} == {"float", "tiny"}
    assert rows[0][1:] == rows[1][1:] == ["–", "0.312 ± 0.120"]


def test_the_key_comes_from_the_environment_and_stays_there(tmp_path, model, monkeypatch, capfd):
    with serving(model, wants_key=True) as url:
        with pytest.raises(UserError, match=r"refuses the key \(HTTP 401\): .* OPENAI_API_KEY"):
            evaluate.run(config(tmp_path, url, "tasks=answers"))
        monkeypatch.setenv("OTHER_KEY", KEY)
        done = evaluate.run(config(tmp_path, url, "tasks=answers", "model.key_variable=OTHER_KEY"))
    assert KEY not in json.dumps(done.record) and KEY not in capfd.readouterr().err
    assert all(KEY not in path.read_text() for path in tmp_path.rglob("*.json*"))


def test_what_an_endpoint_cannot_do_is_said_before_it_is_asked(tmp_path, model, url):
    del model.asked[:]
    with pytest.raises(UserError, match="choices asks how likely .* chat endpoint does not say"):
        evaluate.run(config(tmp_path, url, "tasks=choices", "model.chat=true"))
    with pytest.raises(UserError, match="An endpoint gives no weights .* evaluation=lm_eval"):
        evaluate.run(config(tmp_path, url, "evaluation=perplexity"))
    with pytest.raises(UserError, match="is an endpoint, which gives no weights to work on"):
        compress.run(config(tmp_path, url, "tasks=answers", name="compress"))
    with pytest.raises(UserError, match="apply_chat_template=true needs .* give model.chat=true"):
        goldens.asked(endpoint(url), "answers", apply_chat_template=True)
    for wrong in ("localhost:8000/v1", "ftp://host/v1"):
        with pytest.raises(UserError, match="is no address: give one such as http://localhost"):
            endpoint(wrong)
    for secret in ("https://me:secret@host/v1", "https://host/v1?key=secret"):
        with pytest.raises(UserError, match="holds more than an address") as refused:
            endpoint(secret)
        assert "secret" not in str(refused.value)
    assert model.asked == []


def test_a_server_that_is_not_there_or_something_else_is_said(url, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = endpoint(f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    with pytest.raises(UserError, match="does not answer .*Connection refused.*: check that the"):
        nobody.facts()
    with pytest.raises(UserError, match="answers HTTP 404: null; check model.url"):
        goldens.asked(endpoint(url + "/more"), "choices")
    client = connect(endpoint(url), seed=0)
    monkeypatch.setattr(client, "model_call", lambda *_, **__: {"choices": [{"logprobs": None}]})
    with pytest.raises(UserError, match="gives no log-probabilities of a prompt's tokens"):
        client._score("a", " b")
    monkeypatch.setattr(client, "model_call", lambda *_, **__: {"error": "none"})
    with pytest.raises(UserError, match="answers otherwise than OpenAI's API does .*choices"):
        client._score("a", " b")


def test_the_continuation_begins_where_the_context_ends():
    assert parted("a b  ", "c") == ("a b", "  c")
    said = {
        "tokens": ["a", " b", "c d", "é", "!"],
        "token_logprobs": [None, -1.0, -2.0, -4.0, -8.0],
        "top_logprobs": [None, {" b": -1.0}, {"c d": -2.0}, {"x": -3.0}, {"!": -8.0}],
        "text_offset": [0, 1, 3, 6, 7],
    }
    assert score_of(said, "a b", "c dé") == (-6.0, False)  # without the "!" behind it
    assert score_of(said, "a b", "c d") == (-2.0, True)
    assert score_of(said, "a bc", " d") == (-2.0, True)  # a token across the border counts
    said["text_offset"][-1] += 1
    with pytest.raises(UserError, match="counts the characters of a text otherwise"):
        score_of(said, "a b", "c dé")
    del said["text_offset"]
    assert score_of(said, "a b", "c d") == (-2.0, True)
    with pytest.raises(UserError, match="no log-probability of the first token .*model.prefix"):
        score_of(said, "", "a b")
