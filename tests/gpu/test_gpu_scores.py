"""vLLM's scores on a GPU beside plain logits of transformers on the CPU, without Ray."""

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from actors.embedded import embedded_model
from actors.engine import EngineOptions
from actors.language_model import LanguageModel
from actors.pair_scores import PairScore, ScoringPrompt

MODEL = "embedded:SmolLM2-135M-Instruct"
# Of a log-probability: a logit between 8 and 16 is rounded to a sixteenth in bfloat16.
TOLERANCES = {"float32": 2e-3, "bfloat16": 0.15}
SHOTS = "Passage: Bread is baked from dough.\nQuestion: what is bread made of\nAnswered: yes\n\n"
PASSAGES = (
    "The tide follows the moon: where the moon stands highest the sea rises, and half a day later"
    " it rises again on the other side of the earth.",
    "A violin's bow is strung with horsehair, which is rubbed with rosin so that it grips the"
    " strings.",
    "Yeast turns sugar into alcohol and carbon dioxide; in dough the gas makes bubbles and the"
    " alcohol leaves in the oven.",
)
QUERIES = ("why does the sea rise twice a day", "what is a bow made of", "how does bread get holes")


Score = Callable[..., list[PairScore]]


def _vllm_for_gpus() -> bool:
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    return bool(current_platform.is_cuda())


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]


@pytest.fixture(scope="module", params=TOLERANCES)
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[Score, float]]:
    """An engine and its tolerance; in a loop of its own, since it belongs to that it began in."""
    if not _vllm_for_gpus():
        pytest.skip("needs vLLM's build for CUDA: pip install -r requirements.txt")
    loop = asyncio.new_event_loop()
    llm = LanguageModel.load(
        EngineOptions(
            model=MODEL,
            dtype=request.param,
            max_model_tokens=256,
            enforce_eager=True,
            gpu_memory_utilization=0.3,
            kv_cache_gib=0.5,
        )
    )

    def score(pairs: list[ScoringPrompt], **options: Any) -> list[PairScore]:
        return loop.run_until_complete(llm.score(pairs, **options))

    yield score, TOLERANCES[request.param]
    llm.close()
    loop.close()


PAIRS = [
    ScoringPrompt(
        context=f"{SHOTS}Passage: {passage}\nQuestion:",
        query=f" {query}",
        question="\nAnswered:",
        labels=((" yes", 1.0), (" no", 0.0)),
    )
    for passage in PASSAGES
    for query in QUERIES
]


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, float]]:
    """QL and RC of each pair in float32: the whole prompt in one pass."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def scores(pair: ScoringPrompt) -> tuple[float, float]:
        context, query, question = map(ids, (pair.context, pair.query, pair.question))
        with torch.inference_mode():
            logits = model(torch.tensor([context + query + question])).logits[0]
        log_p = logits.log_softmax(-1)
        ql = sum(float(log_p[len(context) + i - 1, token]) for i, token in enumerate(query))
        yes, no = (float(log_p[-1, ids(label)[0]]) for label, _ in pair.labels)
        return ql / len(query), yes - math.log(math.exp(yes) + math.exp(no))

    return [scores(pair) for pair in PAIRS]


def test_scores_equal_a_plain_forward_pass(
    expected: list[tuple[float, float]], engine: tuple[Score, float]
):
    score, tolerance = engine
    scores = score(PAIRS)
    assert sum(each.num_cached_tokens for each in scores) > 0  # the prefix was shared
    for found, plain in zip(scores, expected, strict=True):
        assert (found.ql, found.rc) == pytest.approx(plain, abs=tolerance)
    own = [max(range(3), key=lambda at: scores[3 * at + query].ql) for query in range(3)]
    assert own == [0, 1, 2]  # each question is likeliest behind the passage that answers it


def test_fused_prompts_over_the_cache_score_as_separate_ones(engine: tuple[Score, float]):
    score, tolerance = engine
    for fused, alone in zip(score(PAIRS), score(PAIRS, separate=True), strict=True):
        assert (fused.ql, fused.rc) == pytest.approx((alone.ql, alone.rc), abs=tolerance)
