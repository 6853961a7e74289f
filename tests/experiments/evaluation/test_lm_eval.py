"""Tasks: lm-eval's numbers are those of its own Hugging Face backend, and land in records."""

import dataclasses
import importlib.util
import json

import hydra
import pytest

from experiments import collect, compress, evaluate, task_scores
from experiments.checkpoints.sources import open_source
from experiments.comparison import compare, experiments
from experiments.configuration import CONF
from experiments.errors import UserError
from experiments.evaluation import tasks
from experiments.evaluation.lm_eval_model import PlanishLM, sampling_of
from experiments.evaluation.tasks import Tasks
from experiments.generate import continue_text
from experiments.generation import Sampling
from experiments.runs.identity import identity
from tests.experiments import tiny
from tests.experiments.evaluation import lm_eval_goldens as goldens
from tests.peers.goldens import COMMITTED


@pytest.fixture(scope="module")
def source():
    return open_source(goldens.FOLDER)


def config(folder, *more, name="evaluate"):
    """A command's configuration for the tiny model and its tasks, runs below `folder`."""
    own = [f"model.path={goldens.FOLDER}", f"evaluation.include_path={goldens.FOLDER / 'tasks'}"]
    base = ["model=local", *own, "evaluation=lm_eval", f"runs={folder}", "logger.tensorboard=false"]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(name, [*base, *more])


@pytest.mark.parametrize("case", goldens.CASES)
@pytest.mark.some(2)
def test_answers_are_those_of_the_hugging_face_backend(source, case):
    """Log-likelihoods with their greediness, with examples in front, of contexts that are cut, in
    windows; and generated texts."""
    goldens.compare(goldens.asked(source, case, batch=128), goldens.expected()[case])


def test_a_run_is_recorded_with_every_question_and_found_again(tmp_path):
    asked = config(tmp_path, "tasks=[choices,rolling]", "evaluation.limit=6")
    done = evaluate.run(asked)
    task = done.record["metrics"]["tasks"]["choices"]
    assert list(task) == ["version", "fewshot", "limit", "n", "digest", "acc", "acc_norm"]
    assert (task["version"], task["fewshot"], task["limit"], task["n"]) == (1.0, 0, 6, 6)
    scores = task["acc"]["sample_scores"]
    assert task["acc"]["value"] == pytest.approx(sum(scores) / 6) and len(scores) == 6
    assert task["acc"]["higher_is_better"] and task["acc"]["standard_error"] > 0
    rolling = done.record["metrics"]["tasks"]["rolling"]["word_perplexity"]
    assert len(rolling["sample_scores"]) == 4 and rolling["standard_error"] is None
    assert done.record["data"]["tasks"]["choices"] == task["digest"]
    assert done.record["metrics"]["lm_eval"].startswith("0.4")
    json.dumps(done.record, allow_nan=False)
    assert evaluate.run(asked).folder == done.folder
    other = config(tmp_path, "tasks=[choices,rolling]", "evaluation.limit=6", "data=enwiki")
    assert evaluate.run(other).folder == done.folder  # no data of ours is read
    assert (
        evaluate.run(config(tmp_path, "tasks=choices", "evaluation.limit=6")).folder != done.folder
    )


def test_a_compression_is_evaluated_on_tasks(tmp_path):
    text = [f"data.path={tiny.write_text(tmp_path)}", "data=text", "data.context=16"]
    sizes = ["data.calibration=2", "data.heldout=2", "algorithm=rtn", "bits=8"]
    grid = ["algorithm.format.group_size=16", "tasks=choices", "evaluation.limit=4"]
    done = compress.run(config(tmp_path, *text, *sizes, *grid, name="compress"))
    task = done.record["metrics"]["tasks"]["choices"]
    again = goldens.tasks("choices", limit=4)(open_source(done.checkpoint))["tasks"]["choices"]
    assert task == again and task["n"] == 4
    assert done.record["estimate"]["seconds"]["evaluate"] > 0
    assert done.record["data"]["calibration"] == [2, 16]


def test_a_changed_task_is_another_run(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.yaml").write_text("task: a")
    asked = {"evaluation": {"tasks": ["a"], "include_path": str(folder)}, "seeds": {}}
    before = identity("evaluate", asked)
    assert identity("evaluate", asked) == before
    (folder / "a.yaml").write_text("task: a # changed")
    assert identity("evaluate", asked) != before


def test_the_estimate_counts_the_prompts(tmp_path, capfd):
    few, many = (
        evaluate.prepare(config(tmp_path, "tasks=choices", f"evaluation.limit={n}")).estimate
        for n in (2, 16)
    )
    assert many.operations["evaluate"] > 2 * few.operations["evaluate"]


def test_methods_are_compared_by_question(tmp_path):
    evaluate.run(config(tmp_path, "tasks=choices"))
    place = "metrics.tasks.choices.acc.value"
    record = collect.gather([tmp_path])[0]
    worse = json.loads(json.dumps(record)) | {"identity": "other", "stored_as": "worse"}
    task = worse["metrics"]["tasks"]["choices"]["acc"]
    task["sample_scores"] = [0.0, *task["sample_scores"][1:]]
    task["value"] = sum(task["sample_scores"]) / 16
    row = compare(experiments([record, worse]), place)[1]
    expected = task["value"] - record["metrics"]["tasks"]["choices"]["acc"]["value"]
    assert row.difference is not None and row.difference.mean == pytest.approx(expected)
    assert (row.over, row.difference_over, row.difference.n) == ("questions", "questions", 16)
    worse["metrics"]["tasks"]["choices"]["digest"] = "of other questions"
    assert compare(experiments([record, worse]), place, "float")[1].difference_over == (
        "other questions"
    )
    assert task_scores.rows([record])[0] == ["method", "bits", "choices acc"]
    assert task_scores.rows([record])[1][2] == "0.312 ± 0.120"


def test_what_cannot_be_asked_is_said(tmp_path, source, monkeypatch):
    index = tasks._index  # lm-eval's own thousands take seconds to list
    monkeypatch.setattr(tasks, "_index", lambda paths, everything: index(paths, everything=False))
    with pytest.raises(UserError, match="There is no task choises; did you mean choices?"):
        goldens.tasks("choises").opened  # noqa: B018
    with pytest.raises(UserError, match="needs to know which tasks: give tasks=NAME"):
        Tasks(tasks=[])
    with pytest.raises(UserError, match=r"evaluation.limit=0 must be more than 0"):
        goldens.tasks("choices", limit=0)
    with pytest.raises(UserError, match="There is no folder at evaluation.include_path=nowhere"):
        Tasks(tasks="choices", include_path="nowhere")
    (tmp_path / "lost.yaml").write_text(
        "task: lost\noutput_type: multiple_choice\ndataset_path: json\ntest_split: test\n"
        "dataset_kwargs: {data_files: {test: /no/such/file.jsonl}}\n"
    )
    with pytest.raises(UserError, match="Task lost cannot be opened .*: its data may need the net"):
        Tasks(tasks="lost", include_path=str(tmp_path)).opened  # noqa: B018
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    with pytest.raises(
        UserError, match=r"lm-eval, which is not installed: pip install -e '.\[eval"
    ):
        goldens.tasks("choices").opened  # noqa: B018


def test_an_encoder_is_asked_nothing():
    encoder = open_source(COMMITTED / "bert")
    with pytest.raises(UserError, match="family bert predicts no tokens, so that it has no tasks"):
        PlanishLM(encoder, batch=64, seed=0)
    settings = {"chat": False, "max_tokens": 1, "sampling": {}, "seed": 0}
    with pytest.raises(UserError, match="family bert predicts no tokens, .* no text to generate"):
        list(continue_text(encoder, "a", settings))


def test_sampling_is_what_a_task_says():
    assert sampling_of({"do_sample": False, "temperature": 0.0, "num_beams": 1}) == Sampling()
    hot = sampling_of({"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert hot == Sampling(temperature=0.7, top_p=0.9)
    assert sampling_of({"do_sample": True, "temperature": 1}) == Sampling(temperature=1.0)
    with pytest.raises(UserError, match="generate with num_beams=4, which planish does not do"):
        sampling_of({"do_sample": False, "num_beams": 4})


def test_a_conversation_is_a_text_of_its_template(tmp_path):
    model = PlanishLM(tiny.model(tmp_path), batch=64, seed=0)
    spelled = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    template = f"{spelled}{{% if add_generation_prompt %}}a:{{% endif %}}"
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi "}]
    model.text = dataclasses.replace(model.text, chat_template=template)
    assert model.apply_chat_template(turns) == "s:be;u:hi ;a:"
    assert model.apply_chat_template(turns, add_generation_prompt=False) == "s:be;u:hi"
    model.text = dataclasses.replace(model.text, chat_template=no_system + template)
    assert model.apply_chat_template(turns) == "u:hi ;a:"
    model.text = dataclasses.replace(model.text, chat_template=None)
    with pytest.raises(UserError, match="has no chat template"):
        model.apply_chat_template(turns)
