"""An experiment's tables, from run folders written by hand, so that every number in them is known."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
import torch

from fedxmr import state
from fedxmr.conduct import Results, Run
from fedxmr.config import resolve
from fedxmr.errors import InputError
from fedxmr.experiment import Plan
from fedxmr.experiment_report import as_csv, as_json, compare, notes, tables
from fedxmr.figures import _retrieval, _scope_curve, _sweep, draw
from fedxmr.reproduce import with_section
from fedxmr.tables import Table
from fedxmr.zero_shot_report import experiment_table, splits_note

CLIENTS = 2


def run_folder(folder, average, apart, queries=60):
    """A run whose clients are `apart` above and below its average, in both directions alike, and so is every query."""
    folder.mkdir(parents=True)
    levels = [average + apart, average - apart]
    own = [
        {"client": k, "image->text": level, "text->image": level, "average": level} for k, level in enumerate(levels)
    ]
    mean = {"image->text": average, "text->image": average, "average": average}
    summary = {
        "test": {
            "selected": {"round": 1, "mean": mean, "clients": own},
            "last": {"round": 2, "mean": mean, "clients": own},
        },
        "bytes": {"up": 10**6, "down": 2 * 10**6},
        "seconds": {"fit": 2.5, "evaluate": 0.5},
    }
    curves = {"precision_at": {"1": average, "5": average}, "precision_recall": [average] * 11, "gallery": 60}
    retrieval = {"cross_client": None, "clients": [{"client": 0, "image->text": curves}]}
    environment = {"commit": "0123456789abcdef", "data_sha256": "same"}
    for name, content in (("summary", summary), ("retrieval", retrieval), ("environment", environment)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    lines = [
        {"round": r, "client": k, "loss": 1.0 / r, "bytes_up": 100, "bytes_down": 100, "validation": {"average": level}}
        for r in (1, 2)
        for k, level in enumerate(levels)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    precisions = {
        f"{k}/{d}": torch.full((queries,), level)
        for k, level in enumerate(levels)
        for d in ("image->text", "text->image")
    }
    state.save(folder / "precisions.safetensors", precisions, {})
    return Run(resolve({"federation": {"clients": CLIENTS}}), folder)


PUBLISHED = {
    "source": "a paper, Table 1",
    "columns": ["image->text", "average"],
    "rows": {"fedcmr": [[0.7, 0.71], [0.72, 0.73]], "ACMR": [0.5, None]},
}
METHODS = {"local": {"set": {"strategy": "local"}}, "fedcmr": {"set": {"strategy": "fedcmr"}}}
LEVELS = {"local": [0.40, 0.41, 0.42], "fedcmr": [0.50, 0.52, 0.51]}


@pytest.fixture
def found(tmp_path):
    plan = Plan(methods=METHODS, title="A title", seeds=3, published=PUBLISHED, departures=["other features"])
    runs = {
        row: [run_folder(tmp_path / row.label / str(i), level, 0.01) for i, level in enumerate(LEVELS[row.method])]
        for row in plan.rows()
    }
    return plan, Results({}, {}, runs)


def as_rows(table):
    return {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}


def test_ours_stands_beside_the_published(found):
    plan, results = found
    scores, differences, published = tables(plan, results, compare(plan, results))
    assert scores.caption == "A title"
    row = as_rows(scores)["fedcmr"]
    assert (row["average"], row["MB moved"], row["published average"]) == ("0.510 ± 0.010", "3.0", "0.720")
    assert as_rows(scores)["local"]["published average"] == "-"
    row = as_rows(differences)["fedcmr"]
    assert (row["difference"], row["95 % over queries"]) == ("+0.100", "+0.100 to +0.100")
    assert row[""] == "better"
    rows = as_rows(published)
    assert list(rows) == ["fedcmr, client 0", "fedcmr, client 1", "ACMR"]
    assert (rows["fedcmr, client 0"]["average"], rows["fedcmr, client 0"]["ours: average"]) == (
        "0.710",
        "0.520 ± 0.010",
    )
    assert rows["fedcmr, client 1"]["ours: average"] == "0.500 ± 0.010"
    assert (rows["ACMR"]["average"], rows["ACMR"]["ours: average"]) == ("-", "-")
    said = "\n".join(notes(plan, results))
    assert "Commit 0123456789ab" in said
    assert "Published: a paper, Table 1." in said
    assert "- other features" in said


def test_holms_correction_counts_every_row_that_is_compared(found):
    plan, results = found
    (alone,) = compare(plan, results)
    assert alone.adjusted == alone.p
    three = plan.model_copy(update={"methods": {**plan.methods, "twin": plan.methods["fedcmr"]}})
    runs = {row: results.runs[plan.rows()[row.method != "local"]] for row in three.rows()}
    assert [c.adjusted for c in compare(three, Results({}, {}, runs))] == pytest.approx([2 * alone.p] * 2)


def test_holms_correction_counts_every_score_that_is_compared(found, monkeypatch):
    plan, results = found
    (alone,) = compare(plan, results)
    monkeypatch.setattr("fedxmr.experiment_report.compared_scores", lambda _: ["average", "last round"])
    assert [c.adjusted for c in compare(plan, results)] == pytest.approx([2 * alone.p] * 2)


@pytest.mark.parametrize(
    "other", [{"dataset": "synthetic"}, {"evaluation": {"on": "all-test"}}, {"dataset": {"task": "zero-shot"}}]
)
def test_rows_that_were_asked_something_else_are_not_compared(found, other):
    plan, results = found
    local, fedcmr = results.runs.items()
    runs = dict([local, (fedcmr[0], [replace(run, config=resolve(other)) for run in fedcmr[1]])])
    assert compare(plan, Results({}, {}, runs)) == []


def changed(run, name, change):
    """A run after a change of one of its JSON files."""
    path = run.folder / f"{name}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return replace(run)


def test_a_client_that_was_not_evaluated_has_no_scores_beside_the_published(found):
    plan, results = found

    def panel(summary):  # clients 1 and 7
        for own, client in zip(summary["test"]["selected"]["clients"], (1, 7), strict=True):
            own["client"] = client

    runs = {row: [changed(run, "summary", panel) for run in own] for row, own in results.runs.items()}
    rows = as_rows(tables(plan, Results({}, {}, runs), [])[-1])
    assert rows["fedcmr, client 0"]["ours: average"] == "-"
    assert rows["fedcmr, client 1"]["ours: average"] == "0.520 ± 0.010"


def test_notes_say_what_was_measured_where_it_is_not_the_rule(found):
    plan, results = found
    own = {row.method: runs for row, runs in results.runs.items()}
    usual = "\n".join(notes(plan, results))
    assert "all test items" not in usual
    assert "panel" not in usual
    on_all = resolve({"evaluation": {"on": "all-test"}, "federation": {"clients": 100}})
    runs = {row: [replace(run, config=on_all) for run in own[row.method]] for row in plan.rows()}
    said = "\n".join(notes(plan, Results({}, {}, runs)))
    assert "Measured on all test items, also those that chose the round, where they are: local, fedcmr." in said
    assert "The mean over a seeded panel of the clients: local, fedcmr." in said


def test_a_floor_that_is_not_the_same_for_all_methods_says_whose_it_is():
    def run(ridge):
        unseen = {"unseen": {"average": 0.3}}
        floors = {"chance": {"unseen": {"average": 0.1}}, "ridge": {"unseen": {"average": ridge}}}
        return {"unseen_classes": ["a"], "floors": floors, "selected": {"mean": unseen}, "last": {"mean": unseen}}

    _, *rows = experiment_table({"jfse, width=10": [run(0.2)], "jfse, width=79": [run(0.25)], "dscmr": [run(0.25)]})
    assert [row[:2] for row in rows[3:]] == [
        ["*chance*", "0.100"],
        ["*ridge* (jfse, width=10)", "0.200"],
        ["*ridge* (jfse, width=79)", "0.250"],
    ]


def test_splits_are_counted_row_by_row():
    # a sweep over the share of seen classes has other splits in every row, and no row more for it
    def row(*splits):
        return [{"unseen_classes": list(split)} for split in splits]

    assert splits_note({"share=0.2": row("abc", "abd", "bcd"), "share=0.5": row("ab", "bc", "cd")}).startswith("3 diff")
    assert splits_note({"one": row(*"abcde"), "other": row(*"aaaaa")}) == (
        "1 to 5 different splits of the classes; 5 or more would make it a result."
    )
    assert splits_note({"one": row(*"abcde")}) == "5 different splits of the classes."


def test_one_seed_is_compared_with_nothing(found):
    plan, results = found
    plan = plan.model_copy(update={"seeds": 1})
    assert compare(plan, Results({}, {}, {row: runs[:1] for row, runs in results.runs.items()})) == []


def test_the_csv_has_plain_numbers(found):
    rows = list(csv.DictReader(io.StringIO(as_csv(*found))))
    (row,) = (r for r in rows if (r["row"], r["score"]) == ("fedcmr", "average"))
    assert [float(row[name]) for name in ("mean", "standard deviation", "published")] == pytest.approx(
        [0.51, 0.01, 0.72]
    )
    assert {r["published"] for r in rows if r["row"] == "local"} == {""}


def test_the_json_has_every_number(found):
    plan, results = found
    content = json.loads(json.dumps(as_json(plan, results, compare(plan, results))))
    assert [s["average"] for s in content["runs"]["local"]["seeds"]] == LEVELS["local"]
    assert content["runs"]["local"]["seeds"][0]["clients"][1]["average"] == pytest.approx(0.39)
    assert content["differences"][0]["seeds"]["mean"] == pytest.approx(0.1)
    assert content["published"]["rows"]["ACMR"] == [0.5, None]


def test_a_sweep_is_drawn(found, tmp_path):
    _, results = found
    methods = {"local": {"sweep": False}, "fedcmr": {}}
    sweep = Plan(methods=methods, title="A sweep", seeds=1, sweep={"strategy.alpha": [1, 100], "strategy.gamma": [1]})
    assert [row.label for row in sweep.rows()] == ["local", "fedcmr, alpha=1, gamma=1", "fedcmr, alpha=100, gamma=1"]
    local, fedcmr = results.runs.values()
    runs = {row: own[:1] for row, own in zip(sweep.rows(), (local, fedcmr, local), strict=True)}
    (path,) = draw(sweep, Results({}, {}, runs), tmp_path / "swept")
    assert (path.name, path.read_bytes()[:4]) == ("sensitivity.png", b"\x89PNG")


def test_a_sweep_over_the_number_of_clients_is_drawn_in_the_order_of_its_values(found):
    _, results = found
    sweep = Plan(methods={"fedcmr": {}}, seeds=3, sweep={"federation.clients": [2, 1]})
    two, one = results.runs.values()
    one = [changed(run, "summary", lambda s: s["test"]["selected"]["clients"].pop()) for run in one]
    ((_, figure),) = _sweep(sweep, Results({}, {}, dict(zip(sweep.rows(), (two, one), strict=True))))
    (line,) = figure.axes[0].lines  # none of single clients
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == pytest.approx([0.51, 0.41])


def test_precision_is_drawn_as_far_as_the_galleries_of_all_runs_reach(found):
    _, results = found
    (wide, *others), _ = results.runs.values()
    more = {"5": 0.4, "50": 0.4, "100": 0.4}
    wide = changed(wide, "retrieval", lambda r: r["clients"][0]["image->text"]["precision_at"].update(more))
    figure = _retrieval({"local": [wide, *others]}, "scope", _scope_curve)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 5]
    figure = _retrieval({"local": [wide]}, "scope", _scope_curve)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 5, 50]  # not 100: there are 60 to find


def test_latex_and_markdown_hold_what_is_special_to_them():
    table = Table("50 % of a_b & c", ["", "a|b"], [["x_1", "50 %, more"]])
    assert "\\caption{50 \\% of a\\_b \\& c}" in table.latex()
    assert "x\\_1 & 50 \\%, more" in table.latex()
    assert "a\\|b" in table.markdown()


def test_a_page_keeps_what_is_around_a_section():
    page = with_section("# Results\n", "one", "first\n")
    page = with_section(page, "two", "second\n")
    written = with_section(page, "one", "anew\n")
    assert written == page.replace("first\n", "anew\n")
    with pytest.raises(InputError, match="expected '<!-- end: one -->'"):
        with_section(page.replace("end: one", "fin: one"), "one", "anew\n")
