"""What the LLM is shown, and what is read from its answers."""

from pathlib import Path

import pytest
import yaml

from cluster.errors import UserError
from pipelines.fret.languages import is_other_language, language_code
from pipelines.fret.prompts import (
    WRITTEN,
    PairPrompts,
    QueryPrompts,
    load_prompts,
    passage_line,
    unfit,
)
from pipelines.recipe import load_recipe

TOKAYS = Path(__file__).parents[3] / "pipelines" / "fret" / "prompts.yaml"
ALL = QueryPrompts(prompts=load_prompts(), tasks=tuple(load_prompts().tasks))
QA = "question answering"


@pytest.mark.parametrize(
    ("completion", "query"),
    [
        (" how do  bees dance\nPassage: more", "how do bees dance"),
        (' "how do bees dance"', "how do bees dance"),
        (" 蜜蜂如何跳舞", "蜜蜂如何跳舞"),
    ],
)
def test_parse_takes_the_first_line(completion: str, query: str) -> None:
    assert ALL.parse(QA, completion, cut=False) == (QA, query, None)


@pytest.mark.parametrize(
    ("completion", "cut", "reason"),
    [
        ("\nhow do bees dance", False, "the LLM wrote nothing"),
        (" bees dance", False, "query too short"),
        (" word" * 41, False, "query too long"),
        (" how do bees", True, "query too long"),
    ],
)
def test_parse_says_why_it_is_no_query(completion: str, cut: bool, reason: str) -> None:
    assert ALL.parse(QA, completion, cut=cut)[2] == reason


def test_written_task_and_query_are_parted_at_the_bar() -> None:
    read = ALL.parse(WRITTEN, " Fact  Checking | bees are deaf to it\n", cut=False)
    assert read == ("fact checking", "bees are deaf to it", None)


@pytest.mark.parametrize("completion", [" how do bees dance", " | how do bees dance"])
def test_written_query_wants_a_task(completion: str) -> None:
    assert ALL.parse(WRITTEN, completion, cut=False)[2] == "the LLM wrote no task"


def test_eight_tasks_are_drawn_uniformly() -> None:
    drawn = [ALL.task(f"query {number}") for number in range(8000)]
    assert len(ALL.tasks) >= 8
    assert {"question answering", "search result", "fact checking", "sentence similarity"} <= set(
        ALL.tasks
    )
    for task in ALL.tasks:
        assert drawn.count(task) == pytest.approx(8000 / len(ALL.tasks), rel=0.15)
    assert drawn[:9] == [ALL.task(f"query {number}") for number in range(9)]


def test_prompts_end_right_before_the_answer() -> None:
    for task in (*ALL.tasks, WRITTEN):
        text = ALL.render(task, "Bees", "They\ndance.")
        cue = text.rpartition("\n")[2]
        assert text.endswith(f"\n\nPassage: Bees. They dance.\n{cue}") and cue.endswith(":")


def test_every_example_is_what_its_parser_accepts() -> None:
    prompts = load_prompts()
    for task, prompt in prompts.tasks.items():
        for passage, query in prompt.examples.items():
            assert ALL.parse(task, f" {query}\n", cut=False) == (task, query, None)
            assert unfit(query, prompts.passages[passage]) is None
    for example in prompts.written.examples:
        read = ALL.parse(WRITTEN, f" {example.task} | {example.query}", cut=False)
        assert read == (example.task, example.query, None)


def test_prompts_of_one_task_share_their_beginning() -> None:
    one, other = ALL.render(QA, "", "Bees dance."), ALL.render(QA, "", "Moss has no roots.")
    shared = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert one[:shared].endswith("Passage: ")


def test_language_and_instruction_come_first_where_they_are_wanted() -> None:
    german = QueryPrompts(prompts=load_prompts(), tasks=(QA,), language="German")
    chat = QueryPrompts(prompts=load_prompts(), tasks=(QA,), instruct=True)
    instruction = load_prompts().tasks[QA].instruction
    assert german.render(QA, "", "x").startswith(f"{instruction} Write in German.\n\nPassage: ")
    assert chat.render(QA, "", "x").startswith(f"{instruction}\n\nPassage: ")
    assert ALL.render(QA, "", "x").startswith("Passage: ")


@pytest.mark.parametrize("relevance", ["yes-no", "graded"])
def test_scoring_prompt_is_laid_out_in_parts_whose_blanks_lead(relevance: str) -> None:
    prompts = load_prompts()
    pair = PairPrompts(prompts=prompts, relevance=relevance).render("how", "Bees", "They dance.")
    assert pair.context.endswith("\n\nPassage: Bees. They dance.\nQuestion:")
    assert pair.query == " how"
    assert pair.question == f"\n{prompts.scores[relevance].question}"
    assert all(label.startswith(" ") for label, _ in pair.labels)
    assert {weight for _, weight in pair.labels} >= {0, 1}
    for label, _ in pair.labels:
        assert f"{prompts.scores[relevance].question}{label}\n\n" in pair.context


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("what does the passage say of bees", "names the passage"),
        ("bees dance on the comb to show the way to flowers", "copies its passage"),
        ("how do bees show the way to flowers", None),
        ("a text about bees", None),
    ],
)
def test_query_that_does_not_suit_its_passage_is_unfit(query: str, reason: str | None) -> None:
    passage = "Bees dance on the comb, to show the way to flowers."
    assert unfit(query, passage) == reason


def test_query_may_name_a_document_where_the_passage_is_of_documents() -> None:
    assert unfit("how long may the document be", "The document has at most nine pages.") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {QA: {"cue": "Q:"}}}, "tasks.question answering.instruction: Field required"),
        ({"passages": {}}, "which are not in `passages`"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_mistake_in_a_file_of_prompts_is_named(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    tree = yaml.safe_load(TOKAYS.read_text()) | change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"mine\.yaml") as error:
        load_prompts(str(tmp_path / "mine.yaml"))
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        load_prompts(str(tmp_path / "absent.yaml"))


def test_passage_line_names_the_title_once() -> None:
    assert passage_line("Bees", "They dance.") == "Bees. They dance."
    assert passage_line("Bees", "Bees dance.") == "Bees dance."
    assert passage_line("", "They\n\ndance.") == "They dance."


@pytest.mark.parametrize(
    ("query", "other"),
    [
        ("wie backe ich Brot ohne Hefe", False),
        ("why do corals turn white when the sea gets warmer", True),
        ("为什么珊瑚变白", True),
        ("numpy argsort", False),  # of no language that one could tell
    ],
)
def test_only_what_is_clearly_another_language_is_called_so(query: str, other: bool) -> None:
    assert is_other_language(query, language_code("German")) == other


@pytest.mark.parametrize("name", ["Germanish", "Klingon"])
def test_language_that_cannot_be_recognised_is_the_users_mistake(name: str) -> None:
    with pytest.raises(UserError, match=f"queries.language '{name}'"):
        load_recipe("laptop", [f"queries.language={name}"])
