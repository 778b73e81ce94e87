"""What the LLM is shown, and what is read from its answers."""

import pytest

from pipelines.fret.prompts import (
    FREE_TASK_PROMPT,
    PAIR_PROMPT,
    QUERY_PROMPTS,
    choose_prompt,
    parse_query,
    parse_task_and_query,
    passage_line,
    scoring_prompt,
)


@pytest.mark.parametrize(
    ("completion", "query"),
    [
        (" how do  bees dance\nPassage: more", "how do bees dance"),
        (' "how do bees dance"', "how do bees dance"),
    ],
)
def test_parse_query_takes_the_first_line(completion: str, query: str) -> None:
    assert parse_query(completion, cut=False) == (query, None)


@pytest.mark.parametrize(
    ("completion", "cut", "reason"),
    [
        ("\nhow do bees dance", False, "the LLM wrote nothing"),
        (" bees dance", False, "query too short"),
        (" word" * 41, False, "query too long"),
        (" how do bees", True, "query too long"),
    ],
)
def test_parse_query_says_why_it_is_no_query(completion: str, cut: bool, reason: str) -> None:
    assert parse_query(completion, cut=cut)[1] == reason


def test_parse_task_and_query_parts_them_at_the_bar() -> None:
    read = parse_task_and_query(" Fact  Checking | bees are deaf to it\n", cut=False)
    assert read == ("fact checking", "bees are deaf to it", None)


@pytest.mark.parametrize("completion", [" how do bees dance", " | how do bees dance"])
def test_parse_task_and_query_wants_a_task(completion: str) -> None:
    assert parse_task_and_query(completion, cut=False)[2] == "the LLM wrote no task"


def test_prompts_end_right_before_the_answer() -> None:
    for prompt in QUERY_PROMPTS.values():
        text = prompt.render("Bees", "They\ndance.")
        assert text.endswith(f"\n\nPassage: Bees. They dance.\n{prompt.cue}")
        assert not text[-1].isspace()  # the blank belongs to the answer's first token
    assert FREE_TASK_PROMPT.render("", "They dance.").endswith("They dance.\nTask | Query:")


def test_every_example_of_a_prompt_is_what_its_parser_accepts() -> None:
    for prompt in QUERY_PROMPTS.values():
        for _, query in prompt.examples:
            assert parse_query(f" {query}\n", cut=False) == (query, None)
    for _, task, query in FREE_TASK_PROMPT.examples:
        assert parse_task_and_query(f" {task} | {query}", cut=False) == (task, query, None)


def test_prompts_of_one_task_share_their_beginning() -> None:
    prompt = QUERY_PROMPTS["question answering"]
    one, other = prompt.render("", "Bees dance."), prompt.render("", "Moss has no roots.")
    shared = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert one[:shared].endswith("Passage: ")


def test_scoring_prompt_is_laid_out_in_parts_whose_blanks_lead() -> None:
    pair = scoring_prompt("how do bees dance", "Bees", "They dance.")
    assert pair.context.endswith("\n\nPassage: Bees. They dance.\nQuestion:")
    assert pair.query == " how do bees dance"
    assert pair.question == f"\n{PAIR_PROMPT.question}"
    assert all(label.startswith(" ") for label in pair.labels)


def test_scoring_prompts_of_one_passage_share_their_context() -> None:
    one, other = (scoring_prompt(q, "Bees", "They dance.") for q in ("do they", "how"))
    assert one.context == other.context


def test_scoring_examples_show_both_labels_equally_often() -> None:
    relevant = [is_relevant for _, _, is_relevant in PAIR_PROMPT.examples]
    assert sum(relevant) * 2 == len(relevant)


def test_choose_prompt_gives_a_query_the_same_task_every_time_and_uses_all_tasks() -> None:
    tasks = tuple(QUERY_PROMPTS)
    drawn = [choose_prompt(tasks, f"query {n}").task for n in range(60)]
    assert drawn == [choose_prompt(tasks, f"query {n}").task for n in range(60)]
    assert set(drawn) == set(tasks)


@pytest.mark.parametrize(
    ("title", "text", "line"),
    [
        ("Bees", "They\n\ndance.", "Bees. They dance."),
        ("Bees", "Bees dance.", "Bees dance."),
        ("", "They dance.", "They dance."),
    ],
)
def test_passage_line_is_one_line_with_the_title_once(title: str, text: str, line: str) -> None:
    assert passage_line(title, text) == line
