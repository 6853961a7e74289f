"""The main job in one command: a real model made smaller four ways, and what each way cost."""

import datetime
from pathlib import Path

import hydra

from experiments import compress, evaluate, records
from experiments.checkpoints.sources import open_source
from experiments.entry import CONF, guarded, prepare, resolved
from experiments.generate import continue_text
from experiments.plots import perplexity_against_size
from experiments.progress import console
from experiments.report import Record, label, markdown, table

RUNS = [("rtn", 4), ("rtn", 3), ("gptq", 4), ("gptq", 3)]
DATA = ["data.heldout=20"]  # half of protocol E's windows: enough to tell these runs apart
PROMPT = "Explain in one sentence why the sky is blue."


def run(folder: Path) -> list[Record]:
    """The float model, then each run; one record per line of the table, each in its own folder."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        console.rule("the float model")
        found = [evaluate.run(hydra.compose("evaluate", DATA), folder / "float")]
        for method, bits in RUNS:
            console.rule(f"{method}, {bits} bits")
            overrides = [*DATA, f"algorithm={method}", f"algorithm.bits={bits}"]
            config = hydra.compose("compress", overrides)
            found.append(compress.run(config, folder / f"{method}-{bits}"))
        generation = resolved(
            hydra.compose("generate", ["prompt=''", "chat=true", "max_tokens=40"])
        )
    (folder / "table.md").write_text(markdown(found))
    picture = perplexity_against_size(found, folder / "perplexity_against_size.png")
    checkpoint = folder / "gptq-4" / "checkpoint"
    answer = "".join(continue_text(open_source(checkpoint), PROMPT, generation))

    console.rule("what it cost")
    console.print(table(found))
    console.print(f"[bold]{PROMPT}[/]\n{answer.strip()}  [dim]({label(found[3])})[/]\n")
    console.print(f"picture      {picture}", soft_wrap=True)
    console.print(f"checkpoints  {folder}/*/checkpoint", soft_wrap=True)
    console.print(f"records      {folder}/*/{records.FILE}", soft_wrap=True)
    console.print(
        f"\nTry: python -m experiments.generate checkpoint={checkpoint} prompt='Hello' chat=true",
        soft_wrap=True,
    )
    return found


@guarded
def main() -> None:
    prepare()
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    run(Path("runs/quickstart") / stamp)


if __name__ == "__main__":
    main()
