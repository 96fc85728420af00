"""`python -m fedxmr.reproduce experiments/X.yaml`: run an experiment over seeds, and print it beside the published."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedxmr import commands
from fedxmr.commands import option, say
from fedxmr.errors import InputError, one_line

if TYPE_CHECKING:
    from fedxmr.tables import Table


def reproduce(
    file: Annotated[Path, typer.Argument(help="an experiment, such as experiments/wikipedia.yaml")],
    assignments: commands.Assignments = None,
    seeds: Annotated[int | None, option("how many seeds; default: the experiment's")] = None,
    method: Annotated[list[str] | None, option("only this method; may be given several times")] = None,
    workers: Annotated[int | None, option("runs side by side, one thread each; default: the number of cores")] = None,
    out: Annotated[
        Path | None, option("where the runs go and are found again; default: runs/<experiment>, with any KEY=VALUE")
    ] = None,
    figures: Annotated[Path | None, option("where the figures go; default: the folder figures there")] = None,
    into: Annotated[Path | None, option("a Markdown page whose section of this experiment is written anew")] = None,
) -> None:
    """Tune every method on validation with equal effort, run all seeds, and compare on test.

    Prints the tables and writes them as results.md and .tex, the numbers as .csv and .json, and figures. Runs that have
    ended are not run again, so an interrupted experiment goes on where it was. KEY=VALUE holds for every method.
    """
    from fedxmr.conduct import conduct
    from fedxmr.experiment import MAX_SEEDS, folder_name, read_experiment
    from fedxmr.experiment_report import as_csv, as_json, compare, notes, tables
    from fedxmr.figures import draw
    from fedxmr.machine import cores
    from fedxmr.recording import write_json, write_text

    if workers is not None and workers < 1:
        raise InputError(f"--workers: expected 1 or more, got {workers}")
    plan, base = read_experiment(file, assignments or [])
    plan = plan.only(method) if method else plan
    if seeds is not None:
        if not 1 <= seeds <= (most := min(*plan.tuning_seeds, MAX_SEEDS)):
            raise InputError(f"--seeds: expected 1 to {most}, got {seeds}")
        plan = plan.model_copy(update={"seeds": seeds})
    out = out or Path("runs") / folder_name(",".join([file.stem, *(assignments or [])]))
    if into is not None:
        with_section(read_page(into), out.name, "")  # better refused now than after all runs
    try:
        results = conduct(plan, base, out, workers or cores())
    except BaseException as error:
        error.add_note(f"the runs that have ended are kept in {out}; the same command goes on with the others")
        raise
    compared = compare(plan, results)
    found = tables(plan, results, compared)
    command = ["python", "-m", "fedxmr.reproduce", str(file), "--seeds", str(plan.seeds), *(assignments or [])]
    command += [word for name in method or [] for word in ("--method", name)]
    said = notes(plan, results)
    if assignments:
        said.append(f"Title, what is published and what differs are of the file without {', '.join(assignments)}.")
    text = _markdown(shlex.join(command), found, said)
    (out / "results.md").write_text(text, encoding="utf-8")
    (out / "results.tex").write_text("\n".join(table.latex() for table in found), encoding="utf-8")
    (out / "results.csv").write_text(as_csv(plan, results), encoding="utf-8")
    write_json(out / "results.json", as_json(plan, results, compared))
    if into is not None:
        write_text(into, with_section(read_page(into), out.name, text))
    for path in draw(plan, results, figures or out / "figures"):
        say(f"drawn: {path}")
    say(text)


def read_page(path: Path) -> str:
    """A page's text; none where there is no such file yet. Raises InputError for what is no page."""
    if not path.parent.is_dir():
        raise InputError(f"--into {path}: expected a folder {path.parent}, got nothing there")
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--into {path}: expected a Markdown page, got {one_line(error)}") from error


def with_section(page: str, name: str, text: str) -> str:
    """A Markdown page with `text` between the marks of a section, which is added at its end where it is not there."""
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"
    before, found, rest = page.partition(begin)
    if not found:
        return f"{page}\n{begin}{text}{end}"
    _, found, after = rest.partition(end)
    if not found:
        raise InputError(f"the page: expected {end.strip()!r} after {begin.strip()!r}, got no such line")
    return f"{before}{begin}{text}{end}{after}"


def _markdown(command: str, tables: list[Table], notes: list[str]) -> str:
    apart = (note if note.startswith("- ") else f"\n{note}" for note in notes)  # else it would go on a list's last item
    return "\n".join([f"`{command}`\n", *(table.markdown() for table in tables), *apart]) + "\n"


if __name__ == "__main__":
    commands.main(reproduce)
