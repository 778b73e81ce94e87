"""Gecko's prompts, as the paper lists them."""

import pytest

from pipelines.evaluation.prompts import EvaluationPrompt, evaluation_prompt


@pytest.mark.parametrize(
    ("mteb_task_type", "name", "task", "symmetric"),
    [
        ("Classification", "Banking77Classification", "classification", True),
        ("STS", "STS12", "semantic similarity", True),
        ("PairClassification", "TwitterURLCorpus", "semantic similarity", True),
        ("Clustering", "RedditClustering", "search result", True),
        ("Summarization", "SummEval", "search result", True),
        ("Reranking", "AskUbuntuDupQuestions", "question answering", False),
        ("Reranking", "StackOverflowDupQuestions", "search result", False),
        ("Reranking", "MindSmallReranking", "semantic similarity", False),
        ("Retrieval", "NQ", "question answering", False),
        ("Retrieval", "ClimateFEVER", "search result", False),
        ("Retrieval", "FEVERHardNegatives", "search result", False),
        ("Retrieval", "HotpotQA", "search result", False),
        ("Retrieval", "TRECCOVID", "search result", False),
        ("Retrieval", "QuoraRetrieval", "search result", True),
        ("Retrieval", "NFCorpus", "fact checking", False),
        ("Retrieval", "NanoSciFactRetrieval", "fact checking", False),
        ("Retrieval", "ArguAna", "semantic similarity", False),
        ("Retrieval", "trec-covid", "search result", False),
        ("Retrieval", "scifact", "fact checking", False),
        ("Retrieval", "cranfield", "question answering", False),
        ("STS", "FEVER", "semantic similarity", True),
    ],
)
def test_evaluation_prompt_is_geckos(
    mteb_task_type: str, name: str, task: str, symmetric: bool
) -> None:
    expected = EvaluationPrompt(task=task, symmetric=symmetric)
    assert evaluation_prompt(mteb_task_type, name) == expected
