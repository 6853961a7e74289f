"""The main job in one command: a real model made smaller four ways, and what each way cost."""

from pathlib import Path

import hydra

from experiments import compress, evaluate, records
from experiments.checkpoints.sources import open_source
from experiments.entry import CONF, guarded, prepare, resolved
from experiments.files import write_whole
from experiments.generate import continue_text
from experiments.plots import perplexity_against_size
from experiments.progress import console
from experiments.report import Record, label, markdown, table

RUNS = [("rtn", 4), ("rtn", 3), ("gptq", 4), ("gptq", 3)]
DATA = ["data.heldout=20"]  # half of protocol E's windows: enough to tell these runs apart
PROMPT = "Explain in one sentence why the sky is blue."


def run(folder: Path) -> list[Record]:
    """The float model, then each run; the table and the picture lie in `folder`."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        console.rule("the float model")
        done = [evaluate.run(hydra.compose("evaluate", DATA))]
        for method, bits in RUNS:
            console.rule(f"{method}, {bits} bits")
            overrides = [*DATA, f"algorithm={method}", f"algorithm.format.bits={bits}"]
            done.append(compress.run(hydra.compose("compress", overrides)))
        generation = resolved(
            hydra.compose("generate", ["prompt=''", "chat=true", "max_tokens=40"])
        )
    found = [finished.record for finished in done]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "table.md", markdown(found))
    picture = perplexity_against_size(found, folder / "perplexity_against_size.png")
    checkpoint = done[3].checkpoint
    answer = "".join(continue_text(open_source(checkpoint), PROMPT, generation))

    console.rule("what it cost")
    console.print(table(found))
    console.print(f"[bold]{PROMPT}[/]\n{answer.strip()}  [dim]({label(found[3])})[/]\n")
    console.print(f"picture      {picture}", soft_wrap=True)
    console.print(f"checkpoints  {checkpoint.parents[2]}/*/*/checkpoint", soft_wrap=True)
    console.print(f"records      beside them, {records.FILE}", soft_wrap=True)
    console.print(
        f"\nTry: python -m experiments.generate checkpoint={checkpoint} prompt='Hello' chat=true",
        soft_wrap=True,
    )
    return found


@guarded
def main() -> None:
    prepare()
    run(Path("runs/quickstart"))


if __name__ == "__main__":
    main()
