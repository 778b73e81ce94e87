"""Which documents are held out, and what queries they bring with them."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, unfinished_artifact, write_shards
from cluster.file_list import FileList
from cluster.shard_groups import shard_groups
from cluster.steps import Run, Step, StepContext
from cluster.storage import open_storage, read_table
from pipelines.corpus import seeds as seeds_step
from pipelines.corpus.cutting import Passage
from pipelines.corpus.held_out import (
    TrainingPassages,
    draw,
    held_out_documents,
    hold_out,
    own_queries,
    read_passages,
    repeated_titles,
    sentence_spans,
)
from pipelines.corpus.seeds import HoldOut, SeedsConfig, choose_seeds
from pipelines.ids import document_name
from pipelines.records import PASSAGE, SEED
from pipelines.run.console import JsonLines

BEES = "A bee that has found flowers tells the others by dancing on the comb of the hive."


def passage(document: str, title: str, text: str, part: int = 1) -> Passage:
    return Passage(id=f"{document}{part}", title=title, text=text, source=f"{document}#{part}")


def test_title_and_first_sentence_are_taken_out_of_the_passage_that_they_are_of() -> None:
    title, sentence = "The Dance of Bees", "How do bees talk?"
    text = f"the dance of bees. {sentence} {BEES}"
    by_title, by_sentence = own_queries([passage("d", title, text)], frozenset())
    assert (by_title.kind, by_title.query) == ("title", title)
    assert (by_title.passage.title, by_title.passage.text) == ("", f"{sentence} {BEES}")
    assert (by_sentence.kind, by_sentence.query) == ("first sentence", sentence)
    assert (by_sentence.passage.title, by_sentence.passage.text) == (title, BEES)
    assert by_title.passage.id == by_sentence.passage.id == "d1"


def test_first_line_ends_a_sentence_that_no_full_stop_ends() -> None:
    (own,) = own_queries([passage("d", "", f"What bees do\n{BEES}")], frozenset())
    assert (own.query, own.passage.text) == ("What bees do", BEES)


def test_sentences_end_with_their_lines_and_lose_nothing() -> None:
    text = "What bees do\nThey dance. So it is. \n\nアリは歩く。ハチは飛ぶ。"
    spans = list(sentence_spans(text))
    found = [text[start:end].strip() for start, end in spans]
    assert [each for each in found if each] == [
        *("What bees do", "They dance.", "So it is."),
        *("アリは歩く。", "ハチは飛ぶ。"),
    ]
    assert sum(end - start for start, end in spans) == len(text) - text.count("\n")
    assert list(sentence_spans("")) == [(0, 0)]


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("Two words", BEES),  # a title too short, and one sentence alone
        ("dancing on the comb", BEES),  # it stands in the text too
        ("123 456 789 - 0", BEES),  # no letters
        ("", "How do bees talk? By a dance."),  # too little is left
        ("", f"{'very ' * 41}long. {BEES}"),
        ("", f"{BEES} {BEES} And so on."),  # said twice
    ],
)
def test_what_is_no_query_or_would_find_itself_is_left_out(title: str, text: str) -> None:
    assert own_queries([passage("d", title, text)], frozenset()) == []


def test_title_of_several_documents_names_none_of_them() -> None:
    parts = [passage("a", "About these pages", BEES), passage("a", "About these pages", BEES, 2)]
    assert [own.query for own in own_queries(parts, repeated_titles(parts))] == [parts[0].title]
    repeated = repeated_titles([*parts, passage("b", "ABOUT these pages", BEES)])
    assert own_queries(parts, repeated) == []


def corpus(num_documents: int) -> list[Passage]:
    """Documents of two passages: a title and two first sentences each."""
    return [
        passage(
            f"d{n}", f"the title of number {n}", f"Sentence {part} of document {n}. {BEES}", part
        )
        for n in range(num_documents)
        for part in (1, 2)
    ]


class NoProgress:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def stored(folder: Path, passages: list[Passage], rows_per_shard: int) -> Artifact:
    table = pa.Table.from_pylist([vars(each) for each in passages], schema=PASSAGE)
    storage = open_storage(folder)
    return unfinished_artifact(storage, FileList.of(write_shards(storage, table, rows_per_shard)))


def test_documents_are_held_out_until_their_queries_and_passages_are_enough(
    tmp_path: Path,
) -> None:
    passages = stored(tmp_path / "a", corpus(40), 16)
    few = hold_out(passages, num_queries=5, num_passages=0, seed=0)
    assert len(few) == 2  # of three queries each
    more = hold_out(passages, num_queries=5, num_passages=9, seed=0)
    assert len(more) == 5  # of two passages each
    assert more[:2] == few
    backwards = stored(tmp_path / "b", corpus(40)[::-1], 16)
    assert hold_out(backwards, num_queries=5, num_passages=9, seed=0) == more
    assert hold_out(passages, num_queries=5, num_passages=9, seed=1) != more
    # A quarter at most.
    assert len(hold_out(passages, num_queries=500, num_passages=0, seed=0)) == 10
    assert (
        hold_out(stored(tmp_path / "c", corpus(3), 2), num_queries=5, num_passages=0, seed=0) == []
    )


def in_memory(
    passages: list[Passage], *, num_queries: int, num_passages: int, seed: int
) -> list[str]:
    """What is to be held out, by the whole corpus in memory."""
    by_document: dict[str, list[Passage]] = {}
    for each in passages:
        by_document.setdefault(document_name(each.source), []).append(each)
    repeated = repeated_titles(passages)
    order = sorted(by_document, key=lambda name: draw(f"{seed} held out {name}"))
    chosen: list[str] = []
    queries, size = 0, 0
    for name in order[: len(order) // 4]:
        if queries >= num_queries and size >= num_passages:
            break
        chosen.append(name)
        queries += len(own_queries(by_document[name], repeated))
        size += len(by_document[name])
    return chosen


@pytest.mark.parametrize(("rows_per_shard", "task_bytes"), [(7, 1), (7, 1 << 20), (1000, 1)])
def test_held_out_documents_do_not_depend_on_shards_and_tasks(
    rows_per_shard: int, task_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Titles that documents share, documents that a shard's end cuts, and some with no query."""
    passages = []
    for n in range(32):
        title = f"the title of number {n // 2 if n % 3 else n}"
        for part in range(1, 2 + n % 4):
            body = BEES if n % 5 else "Short."
            text = f"Sentence {part} of document {n}. {body}"
            passages.append(passage(f"d{n}", title, text, part))
    monkeypatch.setattr(shard_groups, "__defaults__", (task_bytes,))
    artifact = stored(tmp_path, passages, rows_per_shard)
    for num_queries, num_passages, seed in [(0, 0, 0), (3, 0, 1), (1, 9, 2), (500, 1, 3)]:
        asked = {"num_queries": num_queries, "num_passages": num_passages, "seed": seed}
        assert hold_out(artifact, **asked) == in_memory(passages, **asked)


@pytest.mark.parametrize(("rows_per_shard", "num_seeds"), [(9, 1), (9, 20), (9, 99), (99, 20)])
def test_seeds_are_those_of_the_smallest_draws_in_the_order_of_the_corpus(
    rows_per_shard: int, num_seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_groups, "__defaults__", (1,))
    passages = corpus(40)
    inputs = {"passages": stored(tmp_path / "p", passages, rows_per_shard)}
    config = SeedsConfig(num_seeds=num_seeds, rows_per_shard=2, seed=3)
    held_out = HoldOut(num_queries=9, num_seeds=5)

    def made() -> StepContext:
        storage = open_storage(tmp_path / "s")
        context = StepContext(storage=storage, inputs=inputs, progress=NoProgress())
        choose_seeds(config, held_out, context)
        context.log.flush()
        return context

    context = made()
    names = in_memory(passages, num_queries=9, num_passages=5, seed=3)
    order = sorted(passages, key=lambda each: draw(f"3 {each.id}"))
    theirs = [each for each in order if document_name(each.source) in names][:5]
    others = [each for each in order if document_name(each.source) not in names][:num_seeds]
    chosen = {each.id for each in theirs + others}
    files = context.log.files()
    tables = [read_table(context.storage, file.path) for file in files]
    assert [t.num_rows for t in tables[:-1]] == [2] * (len(tables) - 1)
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["id"] for row in rows] == [each.id for each in passages if each.id in chosen]
    assert {row["id"] for row in rows if row["held_out"]} == {each.id for each in theirs}
    # After a loss what is missing is written again, and the rest stays as it is.
    context.storage.delete(files[0].path)
    assert made().log.files() == files
    assert read_table(context.storage, files[0].path).equals(tables[0])


def test_no_seed_leaves_the_columns(tmp_path: Path) -> None:
    """No document is fit for training where all are held out: there is one empty shard."""
    inputs = {"passages": stored(tmp_path / "p", corpus(4), 3)}
    storage = open_storage(tmp_path / "s")
    context = StepContext(storage=storage, inputs=inputs, progress=NoProgress())
    config = SeedsConfig(num_seeds=1, rows_per_shard=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds_step, "hold_out", lambda *_, **__: [f"d{n}" for n in range(4)])
        choose_seeds(config, HoldOut(num_queries=0, num_seeds=0), context)
    (file,) = context.log.files()
    table = read_table(storage, file.path)
    assert table.num_rows == 0 and table.schema.equals(SEED)


Seeds = Callable[[HoldOut | None, int], dict[str, Artifact]]


@pytest.fixture
def seeds(tmp_path: Path) -> Seeds:
    """Runs the steps `passages` and `seeds`."""

    def run(held_out: HoldOut | None, num_seeds: int) -> dict[str, Artifact]:
        def write(context: StepContext) -> dict[str, int]:
            table = pa.Table.from_pylist([vars(each) for each in corpus(40)], schema=PASSAGE)
            write_shards(context.storage, table, 16)
            return {}

        config = SeedsConfig(num_seeds=num_seeds, rows_per_shard=8)
        steps = [
            Step(name="passages", config={}, inputs=(), work=write),
            Step(
                name="seeds",
                config={},
                inputs=("passages",),
                work=lambda context: choose_seeds(config, held_out, context),
            ),
        ]
        folder = tmp_path / f"{held_out} {num_seeds}"
        return Run(str(folder), steps).execute(JsonLines())

    return run


def test_no_training_seed_comes_from_a_held_out_document(seeds: Seeds) -> None:
    made = seeds(HoldOut(num_queries=20, num_seeds=6), 1000)
    names = held_out_documents(made["seeds"])
    assert len(names) == 7
    table = made["seeds"].read()
    assert table.schema.equals(SEED)
    theirs = [row for row in table.to_pylist() if row["held_out"]]
    others = [row for row in table.to_pylist() if not row["held_out"]]
    assert len(theirs) == 6 and {document_name(row["source"]) for row in theirs} <= names
    assert len(others) == 80 - 14
    assert not names & {document_name(row["source"]) for row in others}
    assert made["seeds"].manifest.metrics == {
        "num_seeds": 66,
        "num_held_out_seeds": 6,
        "num_held_out_documents": 7,
    }
    sources = table["source"].to_pylist()  # neighbours stay neighbours
    assert sources == sorted(sources, key=[row.source for row in corpus(40)].index)


def test_without_a_gate_nothing_is_held_out_and_the_same_seeds_are_drawn(seeds: Seeds) -> None:
    plain, gated = seeds(None, 10)["seeds"], seeds(HoldOut(num_queries=20, num_seeds=6), 66)
    assert plain.manifest.metrics == {"num_seeds": 10}
    assert held_out_documents(plain) == frozenset()
    rows = plain.read().to_pylist()
    assert not any(row["held_out"] for row in rows)
    names = held_out_documents(gated["seeds"])
    kept = {row["id"] for row in rows if document_name(row["source"]) not in names}
    assert kept <= set(gated["seeds"].read()["id"].to_pylist())


def test_passages_for_training_are_those_of_other_documents(seeds: Seeds) -> None:
    made = seeds(HoldOut(num_queries=20, num_seeds=6), 10)
    names, passages = held_out_documents(made["seeds"]), made["passages"]
    left = TrainingPassages(passages.storage, passages.manifest, names)
    left = pickle.loads(pickle.dumps(left))  # it may travel to another process
    tables = list(left.tables(["id", "title"]))
    assert {tuple(table.column_names) for table in tables} == {("id", "title")}
    ids = [id_ for table in tables for id_ in table["id"].to_pylist()]
    assert ids == [row.id for row in corpus(40) if document_name(row.source) not in names]


def test_passages_are_read_as_they_were_cut(tmp_path: Path) -> None:
    plain = passage("d", "Bees", BEES)
    of_page = replace(plain, url="http://x.org", language="en", headings=("Bees", "Dances"))

    def write(context: StepContext) -> dict[str, int]:
        table = pa.Table.from_pylist([vars(plain), vars(of_page)], schema=PASSAGE)
        context.log.append(write_shards(context.storage, table, 1))
        return {}

    steps = [Step(name="passages", config={}, inputs=(), work=write)]
    made = Run(str(tmp_path), steps).execute(JsonLines())["passages"]
    assert list(read_passages(made)) == [plain, of_page]
