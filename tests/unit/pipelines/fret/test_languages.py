import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from cluster.errors import UserError
from pipelines.fret import languages
from pipelines.fret.languages import is_other_language, language_code, language_name, language_of
from pipelines.recipe.read import load_recipe

WU = "谁是多瑙河伯爵？"  # Chinese, and to py3langid Wu Chinese


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


def test_parts_of_a_language_count_as_the_whole() -> None:
    assert LanguageIdentifier.from_model_file(MODEL_FILE).classify(WU)[0] == "wuu"
    assert language_of(WU) == "zh"
    assert not is_other_language(WU, language_code("Chinese"))
    assert language_code("Wu Chinese") == "zh"


@pytest.mark.parametrize(
    ("text", "code", "name"),
    [
        ("wie backe ich Brot ohne Hefe", "de", "German"),
        ("how do bees tell each other where the flowers are", "en", "English"),
        ("πώς χορεύουν οι μέλισσες", "el", "Greek"),
        ("蜜蜂如何跳舞", "zh", "Chinese"),
        ("nyuki hucheza vipi wanapopata maua", "sw", "Swahili"),
    ],
)
def test_language_of_a_text_has_a_name(text: str, code: str, name: str) -> None:
    assert language_of(text) == code
    assert language_name(code) == name
    assert language_code(name) == code


def test_every_language_that_is_recognised_has_a_name() -> None:
    codes = {*languages._identifier().labels}
    assert len({language_name(code) for code in codes}) == len(codes)
    assert language_of("") != languages.NONE
