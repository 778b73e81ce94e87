"""Held-out queries, and the ranks of the passages that they have to find."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.encoder_templates import PromptTemplates
from cluster.artifacts import write_shards
from cluster.steps import Run, Step, StepContext
from pipelines.corpus.cutting import Passage
from pipelines.corpus.held_out import FILE, HELD_OUT, OwnQuery
from pipelines.records import PASSAGE, QUERY, SEED
from pipelines.run.console import JsonLines
from pipelines.training.gate_queries import (
    WRITTEN,
    HeldOutQuery,
    KnownItems,
    held_out_queries,
    known_item_ndcg,
    read_known_items,
)


def passage(document: str, part: int = 1, text: str = "") -> Passage:
    return Passage(id=f"{document}{part}", title="", text=text, source=f"{document}#{part}")


def query(text: str, of: Passage, kind: str = WRITTEN) -> HeldOutQuery:
    return HeldOutQuery(kind=kind, query=text, task="search result", passage=of)


def own(text: str, document: str, part: int = 1) -> OwnQuery:
    return OwnQuery(kind="first sentence", query=text, passage=passage(document, part))


def test_own_queries_follow_what_the_llm_wrote() -> None:
    written = [query("w1", passage("a")), query("w2", passage("b"))]
    brought = [[own("a1", "a"), own("a2", "a", 2), own("a3", "a", 3)], [own("b1", "b")], []]
    chosen = held_out_queries(written, brought, 2)
    assert [each.query for each in chosen[:2]] == ["w1", "w2"]
    # One of each document before a second of any.
    assert [each.document for each in chosen[2:]] == ["a", "b"]
    assert [each.kind for each in chosen[2:]] == ["first sentence"] * 2
    assert len(held_out_queries(written, brought, 100)) == 6


def test_query_that_is_there_twice_names_no_passage() -> None:
    written = [query("Same", passage("a")), query("one", passage("b"))]
    brought = [[own("same", "a")], [own("two", "b"), own("TWO", "b", 2)]]
    assert [each.query for each in held_out_queries(written, brought, 9)] == ["one"]


class Letters:
    """An encoder by hand: a text's vector counts its letters a to d."""

    dimensions = 4
    templates = PromptTemplates(query="{text}", passage="{text}")

    def encode(self, texts: list[str]) -> np.ndarray:
        counts = np.array([[text.count(letter) for letter in "abcd"] for text in texts], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)

    def format_passages(self, texts: list[str], titles: list[str]) -> list[str]:
        return texts


def ndcg(items: KnownItems) -> list[float]:
    encoder: Any = Letters()
    return [float(score) for score in known_item_ndcg(encoder, items)]


def test_ndcg_is_that_of_the_own_passages_rank() -> None:
    # Cosines with "a" fall from the first to the last.
    texts = ["a", "aaab", "aab", "ab", *["abb", "abbb"] * 4, "c"]
    pool = [passage(f"p{n}", text=text) for n, text in enumerate(texts)]
    asked = [query("a", pool[place]) for place in (0, 1, 3, 12)]
    expected = [1, 1 / np.log2(3), 1 / np.log2(5), 0]
    assert ndcg(KnownItems(num_deciding=0, queries=asked, pool=pool)) == pytest.approx(expected)


def test_passage_that_is_as_near_as_the_own_one_stands_above_it() -> None:
    pool = [passage("p", text="ab"), passage("q", text="abab"), passage("r", text="c")]
    found = ndcg(KnownItems(num_deciding=0, queries=[query("a", pool[0])], pool=pool))
    assert found == pytest.approx([1 / np.log2(3)])  # so vectors that are all alike find nothing


def test_passage_is_found_without_the_query_that_was_taken_from_it() -> None:
    pool = [passage("p", text="aaaa b"), passage("q", text="ab")]
    cut = passage("p", text="b")  # the pool's has the sentence still
    found = ndcg(
        KnownItems(num_deciding=0, queries=[query("aaaa", cut, "first sentence")], pool=pool)
    )
    assert found == pytest.approx([1 / np.log2(3)])


def test_title_is_not_searched_for_among_other_parts_of_its_document() -> None:
    pool = [passage("p", text="ab"), passage("p", 2, "a"), passage("q", text="c")]
    kinds = ("title", "first sentence")
    asked = [query("a", pool[0], kind) for kind in kinds]
    assert ndcg(KnownItems(num_deciding=0, queries=asked, pool=pool)) == pytest.approx(
        [1, 1 / np.log2(3)]
    )


def test_no_query_gives_no_score() -> None:
    assert ndcg(KnownItems(num_deciding=0, queries=[], pool=[passage("p", text="a")])) == []


def test_run_gives_the_usable_queries_of_held_out_documents(tmp_path: Path) -> None:
    text = "A bee that has found flowers tells the others by dancing on the comb of the hive."
    passages = [
        {
            "id": f"d{n}",
            "title": f"The title of {n}" if n % 2 else "The same title",
            "text": f"Sentence {n} of all. {text}",
            "source": f"d{n}#1",
        }
        for n in range(60)
    ]
    held_out = ["d0", "d1", "d2"]
    queries = [
        ("d0", "what do bees do", HELD_OUT),
        ("d1", "bees", "query too short"),
        ("d9", "who dances", None),
        ("d2", "who finds flowers", HELD_OUT),
    ]

    def write(table: pa.Table, file: bytes = b"") -> Any:
        def work(context: StepContext) -> dict[str, Any]:
            write_shards(context.storage, table, 7)
            if file:
                context.storage.write_bytes(FILE, file)
            return {}

        return work

    rows = [
        {"id": f"q{n}", "seed_id": seed, "task": "t", "query": text, "dropped_by": why}
        for n, (seed, text, why) in enumerate(queries)
    ]
    tables = {
        "passages": write(pa.Table.from_pylist(passages, schema=PASSAGE)),
        "seeds": write(SEED.empty_table(), b'["d0", "d1", "d2"]'),
        "queries": write(pa.Table.from_pylist(rows, schema=QUERY)),
    }
    steps = [Step(name=name, config={}, inputs=(), work=work) for name, work in tables.items()]
    made = Run(str(tmp_path), steps).execute(JsonLines())
    items = read_known_items(
        made["passages"], made["seeds"], made["queries"], num_queries=100, max_passages=20
    )
    found = [(each.kind, each.query, each.document) for each in items.queries]
    assert found[0] == (WRITTEN, "what do bees do", "d0")
    assert found[1] == (WRITTEN, "who finds flowers", "d2")
    assert items.queries[0].task == "t"
    assert sorted(found[2:]) == [
        *(("first sentence", f"Sentence {n} of all.", f"d{n}") for n in range(3)),
        ("title", "The title of 1", "d1"),  # the others share theirs
    ]
    assert items.num_deciding == 6  # all that there are
    assert len(items.pool) == 20
    assert {"d0", "d1", "d2"} <= {each.id for each in items.pool}
    assert next(each for each in items.pool if each.id == "d1").title == "The title of 1"
    again = read_known_items(
        made["passages"], made["seeds"], made["queries"], num_queries=1, max_passages=30
    )
    assert [each.kind == WRITTEN for each in again.queries] == [True, True, False]
    assert again.num_deciding == 2  # the LLM's are enough, and all of them decide
    assert {each.id for each in items.pool} - {*held_out} <= {each.id for each in again.pool}
