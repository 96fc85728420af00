"""`python -m fedxmr.reproduce experiments/X.yaml`: run an experiment over seeds and print its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedxmr import commands
from fedxmr.commands import option, say

if TYPE_CHECKING:
    from fedxmr.experiment import Plan, Results, Run


def reproduce(
    file: Annotated[Path, typer.Argument(help="an experiment, such as experiments/wikipedia.yaml")],
    seeds: Annotated[int | None, option("how many seeds; default: the experiment's")] = None,
    workers: Annotated[int | None, option("runs side by side, one thread each; default: the number of cores")] = None,
    out: Annotated[Path | None, option("where the runs go and are found again; default: runs/<experiment>")] = None,
    figures: Annotated[Path | None, option("also draw mAP against rounds and against bytes into this folder")] = None,
) -> None:
    """Tune every method on validation with equal effort, run all seeds, and compare on test.

    Runs that have ended are not run again, so an interrupted experiment goes on where it was.
    """
    from fedxmr.errors import InputError
    from fedxmr.experiment import conduct, read_experiment
    from fedxmr.machine import cores
    from fedxmr.recording import write_json

    if workers is not None and workers < 1:
        raise InputError(f"--workers: expected 1 or more, got {workers}")
    plan, base = read_experiment(file)
    if seeds is not None:
        if seeds < 1 or set(plan.tuning_seeds) & set(range(seeds)):
            raise InputError(f"--seeds: expected 1 to {min(plan.tuning_seeds)}, got {seeds}")
        plan = plan.model_copy(update={"seeds": seeds})
    out = out or Path("runs") / file.stem
    try:
        results = conduct(plan, base, out, workers or cores())
    except BaseException as error:
        error.add_note(f"the runs that have ended are kept in {out}; the same command goes on with the others")
        raise
    text = render(file, plan, results)
    (out / "results.md").write_text(text, encoding="utf-8")
    write_json(out / "results.json", as_json(plan, results))
    if figures is not None:
        from fedxmr.figures import draw

        figures.mkdir(parents=True, exist_ok=True)
        for path in draw(results.runs, figures):
            say(f"drawn: {path}")
    say(text)


def render(file: Path, plan: Plan, results: Results) -> str:
    """The experiment's table in Markdown: mean ± standard deviation over seeds, and paired differences."""
    from fedxmr.comparison import paired_difference, spread

    reference = plan.reference or next(iter(plan.methods))
    directions = list(results.runs[reference][0].summary["test"]["selected"]["mean"])
    head = ["", *directions, "last round", "cross-client", "MB moved", f"average - {reference}", "95 % interval", ""]
    rows = []
    for name, runs in results.runs.items():
        scores = [score(run) for run in runs]
        row = [name, *(spread([s[d] for s in scores]) for d in directions)]
        row += [
            spread([s["last"] for s in scores]),
            spread([s["cross-client"] for s in scores]) if "cross-client" in scores[0] else "-",
        ]
        row += [f"{sum(s['megabytes'] for s in scores) / len(scores):.1f}"]
        if name == reference or plan.seeds < 2:
            row += ["", "", ""]
        else:
            apart = paired_difference(
                [s["average"] for s in scores], [score(r)["average"] for r in results.runs[reference]]
            )
            row += [f"{apart.mean:+.3f}", f"{apart.low:+.3f} to {apart.high:+.3f}", apart.verdict]
        rows.append(row)
    lines = [f"`python -m fedxmr.reproduce {file} --seeds {plan.seeds}`", ""]
    lines += [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows), ""]
    lines += [
        f"Test mAP at the round chosen on validation, mean over clients; mean ± standard deviation over {plan.seeds} "
        "seeds. Differences are paired by seed.",
    ]
    lines += _zero_shot(results)
    commits = sorted({str(run.environment["commit"])[:12] for runs in results.runs.values() for run in runs})
    lines += [f"Commit {', '.join(commits)}."]
    trials = len(next(iter(plan.methods.values())).trials())
    if results.tried:
        lines += [f"Every method was tuned with {trials} trials on validation, seeds {plan.tuning_seeds}:"]
        for name, method in plan.methods.items():
            grid = ", ".join(f"{key} in {values}" for key, values in method.grid.items())
            picked = ", ".join(f"{key}={value}" for key, value in results.chosen[name].items())
            lines += [f"- {name}: {grid}; chosen {picked}"]
    lines += [f"- departs from the published: {text}" for text in plan.departures]
    return "\n".join(lines) + "\n"


def _zero_shot(results: Results) -> list[str]:
    """Where every method ran a zero-shot task: its table, and what to know of it."""
    from fedxmr.zero_shot_report import experiment_table, splits_note

    found = {name: [run.retrieval.get("zero_shot") for run in runs] for name, runs in results.runs.items()}
    measured = {name: [f for f in of_method if f is not None] for name, of_method in found.items()}
    if not all(measured.values()):
        return []
    head, *rows = experiment_table(measured)
    return [
        "",
        "These are of seen classes' test items among themselves. The protocols of zero-shot retrieval, over "
        f"{splits_note(measured)} Below the methods what needs no training, under the same splits:",
        "",
        *(_row(cells) for cells in (head, ["---"] * len(head), *rows)),
        "",
    ]


def score(run: Run) -> dict[str, float]:
    """What the table shows of a run."""
    summary = run.summary
    found: dict[str, float] = {
        **summary["test"]["selected"]["mean"],
        "last": summary["test"]["last"]["mean"]["average"],
    }
    found["megabytes"] = sum(summary["bytes"].values()) / 1e6
    if across := run.retrieval["cross_client"]:
        found["cross-client"] = across["average"]
    if of_unseen := run.retrieval.get("zero_shot"):
        from fedxmr.zero_shot_report import scores

        found |= scores(of_unseen)
    return found


def as_json(plan: Plan, results: Results) -> dict[str, Any]:
    """The same for machines."""
    return {
        "seeds": plan.seeds,
        "chosen": {name: dict(trial) for name, trial in results.chosen.items()},
        "tried": {n: [{"trial": dict(t), "validation": v} for t, v in trials] for n, trials in results.tried.items()},
        "runs": {name: [score(run) for run in runs] for name, runs in results.runs.items()},
        "published": plan.published,
    }


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    commands.main(reproduce)
