"""Which task each benchmark is announced as: the prompts that Gecko used on MTEB.

An encoder trained with ``task: ... | query: ...`` scores differently under another task, so
published numbers can be compared only when the prompts are the same.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompt:
    """How the texts of one benchmark are presented to the encoder.

    Attributes:
        task: Fills ``{task}`` of the query template.
        symmetric: Both sides are encoded as queries; otherwise documents are encoded as passages.
    """

    task: str
    symmetric: bool


# Gecko (arXiv 2403.20327), evaluation prompts by task type.
_BY_TYPE = {
    "Classification": EvaluationPrompt(task="classification", symmetric=True),
    "Clustering": EvaluationPrompt(task="search result", symmetric=True),
    "PairClassification": EvaluationPrompt(task="semantic similarity", symmetric=True),
    "Reranking": EvaluationPrompt(task="question answering", symmetric=False),
    "Retrieval": EvaluationPrompt(task="question answering", symmetric=False),
    "STS": EvaluationPrompt(task="semantic similarity", symmetric=True),
    "Summarization": EvaluationPrompt(task="search result", symmetric=True),
    # Not in the paper; each takes the prompt of its nearest type there.
    "BitextMining": EvaluationPrompt(task="semantic similarity", symmetric=True),
    "InstructionReranking": EvaluationPrompt(task="question answering", symmetric=False),
    "InstructionRetrieval": EvaluationPrompt(task="question answering", symmetric=False),
    "MultilabelClassification": EvaluationPrompt(task="classification", symmetric=True),
    "Regression": EvaluationPrompt(task="classification", symmetric=True),
}

# Gecko's exceptions, for retrieval and reranking: how a benchmark's name begins -> prompt.
_BY_NAME = {
    "climatefever": EvaluationPrompt(task="search result", symmetric=False),
    "fever": EvaluationPrompt(task="search result", symmetric=False),
    "hotpotqa": EvaluationPrompt(task="search result", symmetric=False),
    "treccovid": EvaluationPrompt(task="search result", symmetric=False),
    "quora": EvaluationPrompt(task="search result", symmetric=True),
    "stackoverflowdup": EvaluationPrompt(task="search result", symmetric=False),
    "nfcorpus": EvaluationPrompt(task="fact checking", symmetric=False),
    "scifact": EvaluationPrompt(task="fact checking", symmetric=False),
    "arguana": EvaluationPrompt(task="semantic similarity", symmetric=False),
    "mindsmall": EvaluationPrompt(task="semantic similarity", symmetric=False),
}


def evaluation_prompt(mteb_task_type: str, name: str) -> EvaluationPrompt:
    """Returns Gecko's prompt for a benchmark.

    Args:
        mteb_task_type: mteb's task type, such as ``Retrieval``.
        name: mteb's task name, or a BEIR folder's name; variants of a benchmark (``SciFact-PL``,
            ``NanoQuoraRetrieval``, ``FEVERHardNegatives``) take the prompt of the original.
    """
    if mteb_task_type in ("Retrieval", "Reranking"):
        plain = re.sub("[^a-z0-9]", "", name.lower())
        plain = plain.removeprefix("multilingual").removeprefix("nano")
        for beginning, prompt in _BY_NAME.items():
            if plain.startswith(beginning):
                return prompt
    return _BY_TYPE.get(mteb_task_type, EvaluationPrompt(task="search result", symmetric=True))
