"""Scores of vLLM's engine on a GPU, over its cache, beside plain logits of the same weights.

The model is a small Llama with random weights and a vocabulary of numbers, so nothing is needed
but vLLM's build for CUDA.
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import EngineConfig, LlmConfig
from actors.language_model import LanguageModel
from actors.pair_scores import PairScore, ScoringPrompt
from actors.score_check import check_scores

VOCABULARY, BLOCK, YES, NO = 2000, 16, 5, 6
CONTEXTS = (200, 4 * BLOCK, 3 * BLOCK, 3 * BLOCK - 1, BLOCK + 1, BLOCK, 10)
# How far from the same model in float32 on the CPU: an attention kernel in Triton multiplies
# float32 in TF32; in bfloat16 a logit between 8 and 16 is rounded to a sixteenth.
FROM_EXACT = {"float32": 0.02, "bfloat16": 0.15}
FROM_SEPARATE = {"float32": 2e-3, "bfloat16": 0.15}

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
    pytest.mark.skipif(
        not _vllm_for_gpus(), reason="needs vLLM's build for CUDA: pip install -r requirements.txt"
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose logits differ widely, and a tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    llama = LlamaForCausalLM(config)
    for name, weight in llama.named_parameters():
        if "norm" not in name:
            weight.data.mul_(4)
    llama.save_pretrained(folder)
    ids = {"<none>": 0, "<end>": 1} | {str(number): number for number in range(2, VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<none>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("v2", "float32"), ("v2", "bfloat16"), ("v1", "bfloat16")])
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[Any, Score, str]]:
    """An engine in a loop of its own, since it belongs to that it began in; and its precision."""
    runner, dtype = request.param
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if runner == "v2" else "0")
    loop = asyncio.new_event_loop()
    llm = LanguageModel.load(
        LlmConfig(model=str(model), dtype=dtype, max_model_tokens=512),
        EngineConfig(
            enforce_eager=True, gpu_memory_utilization=0.3, kv_cache_gib=0.5, block_size=BLOCK
        ),
    )

    def run(work: Any) -> Any:
        return loop.run_until_complete(work)

    yield llm, run, dtype
    run(llm.close())
    loop.close()
    patch.undo()


def pairs() -> list[ScoringPrompt]:
    """Three queries a context, of which the third begins as the second does."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(map(str, rng.integers(10, VOCABULARY, count)))

    found = []
    for length in CONTEXTS:
        context, question, begin = words(length), words(12), words(3)
        for query in (words(8), f"{begin} {words(5)}", f"{begin} {words(6)}"):
            found.append(
                ScoringPrompt(
                    context=context,
                    query=query,
                    question=question,
                    labels=((str(YES), 1.0), (str(NO), 0.0)),
                )
            )
    return found


@pytest.fixture(scope="module")
def exact(model: Path) -> list[tuple[float, float]]:
    """QL and RC of each pair in float32 on the CPU: the whole prompt in one pass."""
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def scores(pair: ScoringPrompt) -> tuple[float, float]:
        parts = (pair.context, pair.query, pair.question)
        context, query, question = ([int(word) for word in part.split()] for part in parts)
        with torch.inference_mode():
            log_p = llama(torch.tensor([context + query + question])).logits[0].log_softmax(-1)
        ql = sum(float(log_p[len(context) + i - 1, token]) for i, token in enumerate(query))
        yes, no = (float(log_p[-1, label]) for label in (YES, NO))
        return ql / len(query), yes - math.log(math.exp(yes) + math.exp(no))

    return [scores(pair) for pair in pairs()]


def test_scores_over_the_cache_equal_a_plain_forward_pass(
    exact: list[tuple[float, float]], engine: tuple[Any, Score, str]
):
    llm, run, dtype = engine
    for _ in range(2):  # the second time the queries are in the cache, too
        scores = run(llm.score(pairs()))
        for found, plain in zip(scores, exact, strict=True):
            assert found.error is None
            assert found.ql == pytest.approx(plain[0], abs=FROM_EXACT[dtype])
            relevance = math.exp(found.rc or 0)
            assert relevance == pytest.approx(math.exp(plain[1]), abs=FROM_EXACT[dtype])
    assert max(ql for ql, _ in exact) - min(ql for ql, _ in exact) > 1  # else any would do


def test_scores_over_the_cache_equal_separate_ones(engine: tuple[Any, Score, str]):
    llm, run, dtype = engine
    assert llm.score_tolerance == FROM_SEPARATE[dtype]
    fast, slow = run(llm.score(pairs())), run(llm.score(pairs(), separate=True))
    for one, other in zip(fast, slow, strict=True):
        assert one.ql == pytest.approx(other.ql, abs=FROM_SEPARATE[dtype])
    shown = run(check_scores(llm, pairs()))
    assert shown is None or shown < FROM_SEPARATE[dtype]  # None: all of it was cached


def test_an_engine_without_memory_says_which_key_to_lower(model: Path):
    from cluster.errors import TokayError

    held = torch.empty(torch.cuda.mem_get_info()[0] * 9 // 10, dtype=torch.uint8, device="cuda")
    with pytest.raises(TokayError, match=r"gpu_memory_utilization") as error:
        LanguageModel.load(
            LlmConfig(model=str(model), max_model_tokens=512),
            EngineConfig(enforce_eager=True, gpu_memory_utilization=0.5),
        )
    assert "\n" not in str(error.value)
    del held
    torch.cuda.empty_cache()
