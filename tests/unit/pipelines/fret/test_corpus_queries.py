"""Titles and sentences of the corpus: which are drawn, from where, and that a draw is repeated."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, write_shards
from cluster.file_list import shard_path
from cluster.plain_json import dump_json
from cluster.steps import Run, Step, StepContext
from cluster.storage import open_storage
from pipelines.corpus.cutting import Passage
from pipelines.corpus.held_out import FILE
from pipelines.fret import corpus_queries
from pipelines.fret.corpus_queries import CorpusQueriesConfig, draw_queries, take_queries
from pipelines.ids import document_name, passage_id, query_id
from pipelines.records import PASSAGE, QUERY
from pipelines.run.console import JsonLines


def passage(document: str, title: str, text: str, part: int = 1) -> Passage:
    return Passage(id=passage_id(title, text), title=title, text=text, source=f"{document}#{part}")


def corpus(num_documents: int = 30) -> list[Passage]:
    """Documents of two passages: one of a single fit sentence, one of three."""
    passages = []
    for n in range(num_documents):
        sentences = [f"This is sentence {name} of document {n}." for name in "abcd"]
        passages.append(passage(f"d{n}", f"the title of {n}", sentences[0]))
        passages.append(passage(f"d{n}", f"the title of {n}", " ".join(sentences[1:]), 2))
    return passages


def asked(passages: list[Passage], **config: int) -> list[str]:
    return [row["query"] for row in draw_queries(passages, CorpusQueriesConfig(**config))]


def test_titles_and_sentences_are_rows_of_queries_that_name_their_passage() -> None:
    text = "the dance of bees. They dance. A bee dances for the others.\nHow they find it again"
    one = passage("d", "The Dance of Bees", text)
    rows = draw_queries([one], CorpusQueriesConfig())
    assert pa.Table.from_pylist(rows, schema=QUERY).to_pylist() == rows
    found = {(row["id"], row["task"], row["query"]) for row in rows}
    # The title with which the text begins is asked once, and two words are no sentence.
    assert found == {
        (query_id(one.id, 0, "title"), "title", "The Dance of Bees"),
        (query_id(one.id, 1, "sentence"), "sentence", "A bee dances for the others."),
        (query_id(one.id, 2, "sentence"), "sentence", "How they find it again"),
    }
    assert {row["seed_id"] for row in rows} == {one.id}
    assert {row["dropped_by"] for row in rows} == {None}
    # No two are of one name, and none is of that of a query by the LLM.
    assert len({query_id(one.id, 0), *(row["id"] for row in rows)}) == 4


@pytest.mark.parametrize(
    ("text", "is_asked"),
    [
        ("Three words here", False),
        ("Four words are here", True),
        (" ".join(["word"] * 30), True),
        (" ".join(["word"] * 31), False),
        ("1 2 3 4 = 10", False),
    ],
)
def test_sentence_has_4_to_30_words_of_letters(text: str, is_asked: bool) -> None:
    assert asked([passage("d", "", text)]) == [text] * is_asked


def test_title_is_asked_once_whatever_its_case_and_for_the_first_that_has_it() -> None:
    texts = ("Bees Dance", "x."), ("BEES dance", "y."), ("Bees Dance", "z."), ("Bees", "w.")
    passages = [passage(f"d{n}", *each) for n, each in enumerate(texts)]
    (row,) = draw_queries(passages, CorpusQueriesConfig())
    assert (row["query"], row["seed_id"]) == ("Bees Dance", passages[0].id)


def test_more_contain_the_fewer_and_no_more_than_asked_for_are_drawn() -> None:
    passages = corpus()
    for key, num_all in (("max_titles", 30), ("max_sentences", 120)):
        other = {"max_titles": 0, "max_sentences": 0}
        drawn = [asked(passages, **(other | {key: num})) for num in (0, 1, 9, 29, 1000)]
        assert [len(each) for each in drawn] == [0, 1, 9, 29, num_all]
        assert drawn[1] == drawn[2][:1] and drawn[2] == drawn[3][:9] and drawn[3] == drawn[4][:29]
        assert len(set(drawn[4])) == num_all
        again = asked(passages, **(other | {key: 9}), seed=1)
        assert set(again) != set(drawn[2])
    # They are not those at the corpus' beginning.
    beginning = asked(passages[:10], max_titles=0, max_sentences=9)
    assert set(beginning) != set(asked(passages, max_titles=0, max_sentences=9))


def test_no_passage_gives_a_second_sentence_before_each_has_given_one() -> None:
    passages = corpus()

    def passages_asked(num: int) -> list[int]:
        rows = draw_queries(passages, CorpusQueriesConfig(max_titles=0, max_sentences=num))
        return sorted(Counter(row["seed_id"] for row in rows).values())

    assert passages_asked(60) == [1] * 60
    assert passages_asked(75) == [1] * 45 + [2] * 15
    assert passages_asked(100) == [1] * 30 + [2] * 20 + [3] * 10
    # Which sentence comes first is drawn too.
    firsts = Counter(query.split()[3] for query in asked(passages, max_titles=0, max_sentences=60))
    assert firsts["a"] == 30 and len(firsts) == 4


Taken = Any


@pytest.mark.parametrize("backwards", [False, True])
def test_parts_give_what_the_whole_corpus_gives_in_whatever_order_they_come(
    backwards: bool,
) -> None:
    passages = corpus(12)
    passages += [passage(f"e{n}", f"THE TITLE OF {n}", "Another of these texts.") for n in range(6)]
    config = CorpusQueriesConfig(max_titles=9, max_sentences=20)
    parts = []
    for start in range(0, len(passages), 5):
        parts.append(corpus_queries._Drawn(config))
        for number, each in enumerate(passages[start : start + 5], start):
            parts[-1].add(number, each)
    whole = corpus_queries._Drawn(config)
    for part in parts[::-1] if backwards else parts:
        whole.add_all(part)
    assert whole.rows() == draw_queries(passages, config)


@pytest.fixture
def take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Runs the step over the corpus, cut into shards of some size."""
    monkeypatch.setattr(corpus_queries, "QUERIES_PER_SHARD", 8)

    def run(
        config: CorpusQueriesConfig, rows_per_shard: int = 7, held_out: list[str] | None = None
    ) -> Artifact:
        def write(context: StepContext) -> dict[str, int]:
            table = pa.Table.from_pylist([vars(each) for each in corpus()], schema=PASSAGE)
            write_shards(context.storage, table, rows_per_shard)
            return {}

        def seeds(context: StepContext) -> dict[str, int]:
            if held_out is not None:
                context.storage.write_bytes(FILE, dump_json(held_out).encode())
            return {}

        steps = [
            Step(name="passages", config={"rows": rows_per_shard}, inputs=(), work=write),
            Step(name="seeds", config={"held_out": held_out}, inputs=("passages",), work=seeds),
            Step(
                name="corpus_queries",
                config=config.model_dump(),
                inputs=("passages", *(["seeds"] if held_out is not None else [])),
                work=lambda context: take_queries(config, context),
            ),
        ]
        run = Run(str(tmp_path / "run"), steps)
        return run.execute(JsonLines(), rebuild=True)["corpus_queries"]

    return run


def test_draw_is_the_same_wherever_the_shards_of_the_corpus_end(take: Taken) -> None:
    config = CorpusQueriesConfig(max_titles=11, max_sentences=20)
    made = [take(config, rows).read() for rows in (1, 7, 100)]
    assert made[0].equals(made[1]) and made[1].equals(made[2])
    assert made[0].schema.equals(QUERY)
    assert made[0]["query"].to_pylist() == asked(corpus(), max_titles=11, max_sentences=20)


def test_nothing_is_asked_of_documents_that_the_gate_holds_out(take: Taken) -> None:
    config, names = CorpusQueriesConfig(max_sentences=90), ["d3", "d4", "d17"]
    documents = {each.id: document_name(each.source) for each in corpus()}

    def documents_asked(made: Artifact) -> set[str]:
        return {documents[id_] for id_ in made.read()["seed_id"].to_pylist()}

    assert set(names) <= documents_asked(take(config))
    made = take(config, held_out=names)
    assert documents_asked(made) == set(documents.values()) - set(names)
    # Others come in their place.
    assert made.manifest.metrics == {"num_titles": 27, "num_sentences": 90}
    assert made.num_rows == 117


def test_killed_step_goes_on_over_what_it_had_written(take: Taken, tmp_path: Path) -> None:
    config = CorpusQueriesConfig(max_titles=11, max_sentences=20)
    whole = take(config)
    expected, storage = whole.read(), open_storage(tmp_path / "run/corpus_queries")
    assert [shard.num_rows for shard in whole.shards] == [8, 8, 8, 7]
    # As a kill leaves it: some shards, no manifest, and the note that the work has begun.
    note = {"format": whole.manifest.format, "fingerprint": whole.manifest.fingerprint}
    storage.write_bytes("work/begun.json", dump_json(note | {"config": {}}).encode())
    for path in ("manifest.json", shard_path(2), shard_path(3)):
        storage.delete(path)
    again = take(config)
    assert again.read().equals(expected)
    assert again.manifest.files == whole.manifest.files
