"""The page of examples: its lists against a ranking in NumPy, its marks, and that nobody's text can do anything."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import Tensor

from fedxmr.data.looks import Look, Looks
from fedxmr.evaluation import evaluate_in_full, ties
from fedxmr.examples import MAX_PER_CLASS, MAX_QUERIES, Example, examples, page, queries
from fedxmr.types import Items

CLASSES = ("art", "<b>bio</b>", "sport")
ABOUT = {"run": "r", "method": "m", "dataset": "d", "client": 0, "round": 1, "part": "test", "seed": 0, "items": 40}


class Own:
    """An encoder whose similarity is its own, knows the direction, and gives many ties: small integers, exactly."""

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return x

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:
        return -(query[:, None] - gallery).abs().sum(2) if direction[0] < direction[1] else query @ gallery.T


def some(n: int = 40, classes: int = 3) -> Items:
    """Items with one or two labels; audio, image and text, of which every item lacks one, or none."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.eye(classes).bool()[torch.randint(classes, (n,), generator=rng)]
    labels[::4, 0] = True
    held = {
        m: torch.tensor([i for i in range(n) if i % 5 != lacks]) for lacks, m in enumerate(("audio", "image", "text"))
    }
    return Items({m: torch.randint(-1, 2, (len(r), 3), generator=rng).float() for m, r in held.items()}, held, labels)


def shown(items: Items, looks: Looks | None = None, seed: int = 0, top: int = 7) -> dict[str, list[Example]]:
    return examples(Own(), items, CLASSES, looks or Looks(), "test", seed, top)


def test_the_lists_are_those_of_a_ranking_in_numpy():
    items = some()
    found = shown(items)
    assert len(found) == 6
    measured = evaluate_in_full(Own(), items, 0, ())
    for direction, of_direction in found.items():
        query, gallery = direction.split("->")
        rows, there = items.rows[query].tolist(), items.rows[gallery].numpy()
        x, y = items.features[query].numpy(), items.features[gallery].numpy()
        scores = -np.abs(x[:, None] - y).sum(2) if query < gallery else x @ y.T
        place = np.argsort(ties(items, gallery, 0).numpy())  # of each gallery item in the tie order
        for one in of_direction:
            row = rows.index(one.query.number)
            order = np.lexsort((place, -scores[row]))
            right = (items.labels[one.query.number] & items.labels[there]).any(1).numpy()[order]
            assert [hit.item.number for hit in one.hits] == there[order][:7].tolist()
            assert [hit.score for hit in one.hits] == scores[row][order][:7].tolist()
            assert [hit.right for hit in one.hits] == right[:7].tolist()
            assert [hit.own for hit in one.hits] == (there[order] == one.query.number)[:7].tolist()
            ranks = np.flatnonzero(right) + 1
            assert one.average_precision == pytest.approx(np.mean(np.arange(1, len(ranks) + 1) / ranks))
            assert one.average_precision == pytest.approx(float(measured[direction].average_precision[row]), rel=1e-12)
            own = np.flatnonzero(there[order] == one.query.number)
            assert one.own_rank == (own[0] + 1 if len(own) else None)
    assert any(hit.own for one in found["audio->text"] for hit in one.hits)
    assert any(one.own_rank is None for one in found["audio->text"])


def test_scores_are_those_that_the_metrics_see_in_whatever_chunks(monkeypatch):
    items = some()
    whole = shown(items)
    asked: list[int] = []

    class Counting(Own):
        def similarity(self, query, gallery, direction):
            asked.append(len(query))
            return super().similarity(query, gallery, direction)

    monkeypatch.setattr("fedxmr.metrics.CHUNK_SCORES", 100)
    assert examples(Counting(), items, CLASSES, Looks(), "test", 0, 7) == whole
    assert set(asked) == {100 // 32, 32 % 3}  # of 32 queries and a gallery of 32; the last chunk is what is left


def test_queries_are_drawn_by_the_seed_and_spread_over_the_classes():
    labels = torch.eye(8).bool()[torch.arange(400) % 8]
    everything = torch.arange(400)
    drawn = queries(labels, everything, 0)
    assert labels[drawn].sum(0).tolist().count(MAX_PER_CLASS) == MAX_QUERIES - 2 * 8
    assert labels[drawn].sum(0).min() == 2
    assert drawn.equal(queries(labels, everything, 0))
    assert not drawn.equal(queries(labels, everything, 1))
    assert labels[drawn].int().argmax(1).diff().min() == 0  # by class
    many = torch.eye(50).bool()[torch.arange(400) % 50]
    assert int(many[queries(many, everything, 0)].any(0).sum()) == len(queries(many, everything, 0)) == MAX_QUERIES
    few = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()
    assert sorted(queries(few, torch.arange(3), 0).tolist()) == [0, 1]  # no item twice, none of no class


def test_two_modalities_of_the_same_items_are_asked_about_the_same_ones():
    items = some(30)
    whole = Items.paired({"image": torch.zeros(30, 3), "text": torch.zeros(30, 3)}, items.labels)
    found = shown(whole)
    image, text = ([one.query.number for one in found[d]] for d in ("image->text", "text->image"))
    assert image == text


class Read(HTMLParser):
    """What a browser makes of a page: tags with their attributes, and the text of every list entry."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.entries: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "li":
            self.entries.append([])
        if self.entries and tag == "article":
            self.entries[-1].append(str(dict(attrs).get("class")))

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.entries:
            self.entries[-1] += data.split()


def test_right_wrong_and_the_own_pair_are_marked_by_a_sign_and_a_word():
    found = shown(some())
    read = Read(page(found, maps=dict.fromkeys(found, 0.25), **ABOUT))
    hits = [hit for of_direction in found.values() for one in of_direction for hit in one.hits]
    assert len(read.entries) == len(hits)
    for entry, hit in zip(read.entries, hits, strict=True):
        kind, rank, *words = entry
        assert (kind, rank) == ("right" if hit.right else "wrong", f"{hit.rank}.")
        assert words[:2] == (["✓", "right"] if hit.right else ["✗", "wrong"])
        assert (words[2] == "★") == hit.own


def test_a_strangers_text_is_shown_as_it_is_and_does_nothing():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)> & \"quoted\" 'too' </article>"
    looks = Looks({"text": lambda item: Look(evil), "image": lambda item: Look("x" * 1000, 'data:x" onload="alert(1)')})
    found = shown(some(), looks)
    text = page(found, maps=dict.fromkeys(found, 0.25), **(ABOUT | {"run": evil, "method": evil, "dataset": evil}))
    read = Read(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "section", "article", "ol",
               "li", "img"}  # fmt: skip
    assert {tag for tag, _ in read.tags} == allowed
    assert {name for _, attributes in read.tags for name in attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "src", "alt",
    }  # fmt: skip
    assert all(attributes["src"].startswith("data:") for tag, attributes in read.tags if tag == "img")
    assert evil in "".join(read.words)
    assert "<b>bio</b>" in "".join(read.words)
    assert "x" * 301 not in text
    assert "http://" not in text
    assert "https://" not in text


def test_the_same_model_and_seed_give_the_same_page():
    pages = {page(shown(some()), maps=dict.fromkeys(shown(some()), 0.25), **ABOUT) for _ in range(2)}
    assert len(pages) == 1
    other = shown(some(), seed=1)
    assert page(other, maps=dict.fromkeys(other, 0.25), **ABOUT) not in pages


def test_a_query_that_nothing_answers_says_so():
    labels = torch.eye(3).bool()
    items = Items(
        {"a": torch.zeros(2, 1), "b": torch.zeros(1, 1)}, {"a": torch.tensor([0, 1]), "b": torch.tensor([1])}, labels
    )
    found = shown(items)
    assert [one.average_precision for one in found["a->b"]] == [None, 1.0]
    assert "nothing in the gallery is relevant" in page(found, maps=dict.fromkeys(found, 0.25), **ABOUT)
