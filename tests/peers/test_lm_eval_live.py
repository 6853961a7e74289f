"""Live checks of tasks and endpoints: lm-eval's own Hugging Face backend, llama.cpp's own server.

PLANISH_PEERS_PYTHON names a Python with requirements.txt, PLANISH_LLAMACPP_PYTHON one with
requirements-llamacpp.txt.
"""

import contextlib
import json
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
import requests
from omegaconf import OmegaConf

from experiments import evaluate, task_scores
from experiments.checkpoints.exports import safetensors
from experiments.checkpoints.planish import part_of
from experiments.checkpoints.sources import Source, open_source, shapes
from experiments.configuration import CONF
from experiments.endpoints import Endpoint
from experiments.evaluation import packaged_tasks
from experiments.evaluation.tasks import Tasks
from tests.experiments.evaluation import lm_eval_goldens
from tests.peers.goldens import EMBEDDED
from tests.peers.test_live import run

pytestmark = pytest.mark.peers
FEW = 40  # questions
BOS = "<|im_start|>"  # of SmolLM2, which its tokenizer does not add
FEWER = 4  # for a server that sorts the whole vocabulary for each token, in Python
# Nats that a continuation's log-likelihood of about -35 moves, on average, where llama.cpp rounds
# activations to 8 bits: 0.24 measured. Tokens that were one off would move it by tens.
ROUNDED = 0.5


@pytest.fixture(scope="module")
def embedded() -> Source:
    return hydra.utils.instantiate(OmegaConf.load(EMBEDDED))


def test_a_fresh_model_gets_what_the_hugging_face_backend_gives(python, tmp_path):
    seed = secrets.randbelow(2**31)
    run(python, "make_lm_eval.py", str(tmp_path), "--seed", str(seed))
    expected = lm_eval_goldens.expected(tmp_path)
    for case in lm_eval_goldens.CASES:
        found = lm_eval_goldens.asked(open_source(tmp_path), case)
        lm_eval_goldens.compare(found, expected[case])


@pytest.mark.real
def test_the_embedded_model_gets_what_the_hugging_face_backend_gives(python, embedded, tmp_path):
    """The same weights, as a folder of float32 safetensors, on wikiHow's questions."""
    folder, task = tmp_path / "folder", packaged_tasks.prepare("wikihow_steps")
    write_folder(embedded, folder)
    run(
        python, "run_lm_eval.py", str(folder), "--tasks", "wikihow_steps", "--include", str(task),
        "--out", str(tmp_path / "theirs.json"), "--limit", str(FEW),
    )  # fmt: skip
    theirs = json.loads((tmp_path / "theirs.json").read_text())["wikihow_steps"]
    found = Tasks(tasks="wikihow_steps", limit=FEW).answers(embedded)
    ours = [sample["filtered_resps"] for sample in found["samples"]["wikihow_steps"]]
    metrics = found["results"]["wikihow_steps"]
    lm_eval_goldens.compare({"responses": ours, "metrics": metrics}, theirs)


def write_folder(source: Source, folder: Path) -> None:
    """A model as it is, in float32, as a Hugging Face folder."""
    export = safetensors(dtype="float32")
    writer = export.writer(folder, source.config, origin=source.digest(), check=lambda: None)
    parts: dict[str, list[str]] = {}
    for name in shapes(source.config):
        parts.setdefault(part_of(name), []).append(name)
    for part, names in parts.items():
        writer.write(part, {name: source.read(name) for name in names})
    notes = {"recipe": [], "source": source.facts(), "measured": {}}
    writer.finish(source.config, source.tokenizer(), notes)


@contextlib.contextmanager
def llamacpp_server(python: str, model: Path, log: Path) -> Iterator[str]:
    """llama.cpp's server of a file on loopback, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "-m", "llama_cpp.server", "--model", str(model), "--model_alias", "smollm2",
        "--logits_all", "true", "--n_ctx", "512", "--n_threads", "2", "--host", "127.0.0.1",
        "--port", str(port), "--verbose", "false", "--type_k", "0", "--type_v", "0",
    ]  # fmt: skip
    with log.open("wb") as said:
        server = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}/v1"
        try:
            wait_for(url, server, log)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"{url}/models", timeout=5).ok:
                return
        time.sleep(0.5)
    raise AssertionError(f"no answer in {seconds} s: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def server(llama, embedded, tmp_path_factory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with llamacpp_server(llama, Path(embedded.location), log) as url:
        yield url


@pytest.mark.real
def test_a_local_server_of_the_embedded_model_gets_its_scores(server, embedded, tmp_path):
    """By the command, with bos in front of every question: this server's log-probabilities are one
    token late without. llama.cpp rounds activations to 8 bits, so numbers are near, not equal."""
    task = with_bos(packaged_tasks.prepare("wikihow_steps"), tmp_path / "tasks")
    asked = [f"evaluation.include_path={task}", "evaluation=lm_eval", "tasks=wikihow_bos"]
    asked += [f"evaluation.limit={FEWER}", f"runs={tmp_path / 'runs'}", "logger.tensorboard=false"]
    there = ["model=endpoint", f"model.url={server}", "model.name=smollm2"]
    there += [f"model.prefix='{BOS}'"]  # sent already: the server leaves it out of what it shows
    records = []
    for model in ([], there):
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            config = hydra.compose("evaluate", [*asked, *model])
        records.append(evaluate.run(config).record)
    here, there = (record["metrics"]["tasks"]["wikihow_bos"] for record in records)
    assert here["digest"] == there["digest"]
    for metric in ("acc", "acc_norm"):  # one may be as good as tied
        pairs = zip(here[metric]["sample_scores"], there[metric]["sample_scores"], strict=True)
        assert sum(a == b for a, b in pairs) >= FEWER - 1
    assert task_scores.rows(records)[0] == ["method", "bits", "wikihow_bos acc"]


@pytest.mark.real
def test_its_log_likelihoods_are_near_and_its_chats_are_answers(server, embedded, tmp_path):
    task = with_bos(packaged_tasks.prepare("wikihow_steps"), tmp_path / "tasks")
    asked = Tasks(tasks="wikihow_bos", include_path=str(task), limit=FEWER)
    ours, theirs = (
        [r[0] for s in asked.answers(model)["samples"]["wikihow_bos"] for r in s["filtered_resps"]]
        for model in (embedded, Endpoint(url=server, name="smollm2", prefix=BOS))
    )
    assert theirs == pytest.approx(ours, abs=3.0)
    assert sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours) < ROUNDED
    said = Tasks(tasks="answers", include_path=str(lm_eval_goldens.FOLDER / "tasks"), limit=2)
    found = said.answers(Endpoint(url=server, name="smollm2", chat=True))
    assert all(isinstance(s["filtered_resps"][0], str) for s in found["samples"]["answers"])


def with_bos(prepared: Path, folder: Path) -> Path:
    """The same task with the model's bos in front of each question."""
    folder.mkdir()
    text = (prepared / "wikihow_steps.yaml").read_text()
    text = text.replace("task: wikihow_steps", "task: wikihow_bos")
    text = text.replace("doc_to_text: question", f"doc_to_text: '{BOS}{{{{question}}}}'")
    (folder / "wikihow_bos.yaml").write_text(text)
    return folder
