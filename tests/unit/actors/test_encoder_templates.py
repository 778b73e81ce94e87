import tracemalloc

import pytest

from actors.encoder_templates import MAX_TEMPLATE_CHARS, PromptTemplates

GECKO = PromptTemplates(
    query="task: {task} | query: {text}", passage="title: {title} | text: {text}"
)
BRACES = PromptTemplates(query="{{text}} {task}: {text}!", passage="{{title}} {text} {{}}")


def test_templates_are_filled_and_other_braces_kept():
    assert GECKO.format_query("wing", task="search") == "task: search | query: wing"
    assert GECKO.format_passage("lift", "Wings") == "title: Wings | text: lift"
    assert BRACES.format_query("a{b}", task="{text}") == "{text} {text}: a{b}!"
    assert BRACES.format_passage("{0}", "Title") == "{title} Title {0} {}"


def test_missing_title_reads_none_or_is_left_out():
    assert GECKO.format_passage("lift") == "title: none | text: lift"
    templates = PromptTemplates(passage="{title}\n{text}")
    assert templates.format_passage("lift") == "lift"
    assert templates.format_passage("lift", "Wings") == "Wings\nlift"
    assert templates.prefixes(None)["document"] == ""


def test_title_without_a_place_stands_in_front_of_the_text():
    assert PromptTemplates().format_passage("lift", "Wings") == "Wings lift"
    assert PromptTemplates().format_passage("lift", "") == "lift"
    assert PromptTemplates(passage="p: {text}.").format_passage("lift", "Wings") == "p: Wings lift."
    # Also where the text begins with it.
    assert PromptTemplates().format_passage("Wings lift", "Wings") == "Wings Wings lift"


def test_blanks_of_a_text_stay():
    assert PromptTemplates().format_passage("\n  lift ") == "\n  lift "
    assert PromptTemplates(passage="{title}\n{text}").format_passage("  lift") == "  lift"
    assert PromptTemplates(query=" q: {text}").format_query(" x", task="") == " q:  x"


@pytest.mark.parametrize(
    "template",
    [
        "no field",
        "{text} {text}",
        "{title} {text}",
        "{text} {x}",
        "{task} {task} {text}",
        "{text:>1000000}",
        "{text:{task}}",
        "{text!r}",
        "{text.__class__}",
        "{text[0]}",
        "{0}",
        "{}",
        "{text",
        "text}",
    ],
)
def test_template_with_other_fields_is_refused(template: str):
    with pytest.raises(ValueError, match=r"query template .* must hold \{text\} once") as caught:
        PromptTemplates(query=template)
    assert "\n" not in str(caught.value)


def test_template_beyond_all_bounds_is_refused():
    PromptTemplates(query="x" * (MAX_TEMPLATE_CHARS - 6) + "{text}")
    with pytest.raises(ValueError, match=f"accepted are {MAX_TEMPLATE_CHARS}"):
        PromptTemplates(query="x" * MAX_TEMPLATE_CHARS + "{text}")


@pytest.mark.parametrize("templates", [GECKO, BRACES, PromptTemplates(passage="{title}\n{text}")])
def test_length_is_known_before_the_text_is_made(templates: PromptTemplates):
    for text in ("", "  two blanks", "雪{task}"):
        assert templates.query_chars(text, task="a task") == len(
            templates.format_query(text, task="a task")
        )
        for title in (None, "", "A title"):
            assert templates.passage_chars(text, title) == len(
                templates.format_passage(text, title)
            )
    text = task = "x" * 10**6
    tracemalloc.start()
    assert templates.query_chars(text, task=task) >= 10**6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**5


def test_prompts_need_a_task_where_the_template_does():
    assert GECKO.prefixes(None) == {"document": "title: none | text: "}
    assert GECKO.prefixes("search")["query"] == "task: search | query: "
    assert PromptTemplates(query="{text} ({task})").prefixes("x") == {"document": ""}
