"""The table that a run ends with, and the note of what its means count."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import permutations

import pytest
from rich.console import Console

from fedxmr.report import untrained
from fedxmr.sources import dataset
from fedxmr.summary import table
from tests.federations import configured


def drawn(modalities: Sequence[str], which: Sequence[str] = ("selected", "last")) -> list[str]:
    """The lines at 80 columns; direction i scores i / 100, and the average is .777."""
    scores = {f"{a}->{b}": i / 100 for i, (a, b) in enumerate(permutations(modalities, 2))} | {"average": 0.777}
    scored = {"mean": scores, "clients": [{"client": 19, **scores}]}
    summary = {"test": {name: {"round": 40, **scored} for name in which}}
    screen = Console(width=80, file=io.StringIO())
    screen.print(table(summary, {19: (12345.6, 12345.6)}))
    return screen.file.getvalue().splitlines()


@pytest.mark.parametrize("modalities", [["image", "text"], ["audio", "image", "text"], [*"abcdef"], ["x" * 30, "y"]])
def test_a_row_of_the_table_is_one_line_of_80_columns(modalities):
    lines = drawn(modalities, ("selected", "last", "best_on_test"))
    assert max(map(len, lines)) <= 80
    client = next(line for line in lines if "client 19" in line)
    assert "0.777" in client
    assert client.split()[-2:] == ["12345.6", "12345.6"]
    assert not any("…" in line for line in lines)


def test_two_modalities_are_shown_by_direction_and_three_by_the_mean_of_their_directions_as_a_query():
    assert "image->text  text->image  average" in "\n".join(drawn(["image", "text"]))
    lines = drawn(["audio", "image", "text"])
    assert "audio->*  image->*  text->*  average" in "\n".join(lines)
    mean = next(line.split() for line in lines if "  mean " in line)
    assert mean == ["mean", "0.005", "0.025", "0.045", "0.777"]
    assert "every direction is in summary.json" in lines[-1]


def test_many_modalities_are_shown_by_their_average_and_where_the_rest_is():
    lines = drawn([*"abcdef"])
    assert next(line.split() for line in lines if "  mean " in line) == ["mean", "0.777"]
    assert lines[-1].strip() == "every direction is in summary.json"


def test_who_lacks_a_modality_is_said_and_what_that_means_for_the_mean():
    some_lack = ("partition.scheme=missing-modality", "partition.missing=0.67", "strategy=local")
    config = configured(*some_lack)
    (line,) = untrained(config, dataset(config), [0, 1, 2])
    assert line.startswith("some clients lack a modality: ")
    assert line.count("client ") == 2  # .67 of three, in turns
    assert line.endswith("the means count their encoder of it, untrained")
    config = configured(*some_lack[:2], "strategy=fedavg")
    (line,) = untrained(config, dataset(config), [0, 1, 2])
    assert line.endswith("as far as others share it")


def test_where_nobody_lacks_a_modality_nothing_is_said():
    config = configured()
    assert list(untrained(config, dataset(config), [0, 1, 2])) == []
