"""Web pages: how good their main text is beside trafilatura's own, and how fast they are passages.

Pages are read as a run reads them, in processes that can be killed; the rival is
`trafilatura.extract` on the same bytes, in this process. `f1` is the mean over the pages of
article-extraction of the F1 of their tokens against those of the article; `f` the F1 of
trafilatura's own evaluation: of trafilatura-eval's strings, those that a text must have and those
that it must not.

Then WARC files are made of the same pages, with one member of gzip a response as crawlers write
them, and in each page some paragraphs are exchanged for those of others, so that all differ. From
them come deduplicated passages (`cut_corpus`), in a process of its own for each number of cores.

    python benchmarks/ingest.py DATA [--pages 296] [--responses 10000] [--cores 1 2]
        [--main-text trafilatura]

DATA is the folder that holds web/article-extraction and web/trafilatura-eval. Prints JSON lines.
"""

import argparse
import gzip
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.plain_json import dump_json

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project is not installed

from pipelines.corpus.passages import cut_corpus
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document, Page
from pipelines.datasets.pages.workers import PageWorkers

SETS = ("article-extraction", "trafilatura-eval")
RESPONSES_PER_FILE = 1000
EXCHANGED = 0.5  # of a page's paragraphs

_PARAGRAPH = re.compile(rb"<p\b[^>]*>.{40,3000}?</p>", re.S | re.I)


def read_pages(data: Path, num_pages: int) -> dict[str, list[dict]]:
    """Returns each set's pages, a part of them with a fixed seed, with `content` as it was sent."""
    pages = {}
    for name in SETS:
        folder = data / "web" / name
        lines = (folder / "gold.jsonl").read_text(encoding="utf-8").splitlines()
        pages[name] = [json.loads(line) for line in lines]
        for page in pages[name]:
            page["content"] = gzip.decompress((folder / page["file"]).read_bytes())
            page["name"] = f"{name}/{page['id']}"
    chosen = random.Random(0).sample(
        [page["name"] for name in SETS for page in pages[name]], num_pages
    )
    return {name: [page for page in pages[name] if page["name"] in chosen] for name in SETS}


def token_f1(text: str, gold: str) -> float:
    """Returns the F1 of the tokens of a text, with their numbers, against those of another."""
    found, wanted = (Counter(re.findall(r"\w+", each.lower())) for each in (text, gold))
    both = (found & wanted).total()
    return 2 * both / max(1, found.total() + wanted.total())


def quality(texts: Mapping[str, str], pages: Mapping[str, Sequence[dict]]) -> dict[str, float]:
    """Returns both scores of the texts that were found."""
    articles, mixed = (pages[name] for name in SETS)
    has = [s in texts[page["name"]] for page in mixed for s in page["with"]]
    lacks = [s not in texts[page["name"]] for page in mixed for s in page["without"]]
    precision, recall = sum(has) / max(1, sum(has) + lacks.count(False)), sum(has) / len(has)
    return {
        "f1": statistics.mean(token_f1(texts[page["name"]], page["text"]) for page in articles),
        "f": 2 * precision * recall / (precision + recall),
        "precision": precision,
        "recall": recall,
        "accuracy": (sum(has) + sum(lacks)) / (len(has) + len(lacks)),
        "empty": sum(not text for text in texts.values()),
    }


def compare(pages: Mapping[str, Sequence[dict]], main_text: str) -> None:
    """Prints both sides' scores, and the seconds that a page took each."""
    from trafilatura import extract

    every = [page for name in SETS for page in pages[name]]
    begin = time.perf_counter()
    with PageWorkers(main_text) as workers:
        items = (Page(name=p["name"], content=p["content"], url=p["url"]) for p in every)
        found = list(workers.documents(items))
    ours = {d.name if isinstance(d, Document) else d[0]: d for d in found}
    ours_s = time.perf_counter() - begin
    texts = {name: d.text if isinstance(d, Document) else "" for name, d in ours.items()}
    begin = time.perf_counter()
    own = {
        p["name"]: extract(p["content"], url=p["url"], include_comments=False) or "" for p in every
    }
    own_s = time.perf_counter() - begin
    scores = {"ours": quality(texts, pages), "trafilatura": quality(own, pages)}
    print(
        dump_json(
            {
                "benchmark": "main text",
                "main_text": main_text,
                "pages": {name: len(pages[name]) for name in SETS},
                **scores,
                "difference": {
                    key: scores["ours"][key] - scores["trafilatura"][key] for key in ("f1", "f")
                },
                "seconds": {"ours": ours_s, "trafilatura": own_s},
            }
        ),
        flush=True,
    )


def write_warcs(folder: Path, pages: Mapping[str, Sequence[dict]], num_responses: int) -> None:
    """Writes distinct responses, each a page with some paragraphs of others."""
    every = [page for name in SETS for page in pages[name]]
    pool = sorted({p for page in every for p in _PARAGRAPH.findall(page["content"])})
    draw = random.Random(1)
    for start in range(0, num_responses, RESPONSES_PER_FILE):
        with (folder / f"{start // RESPONSES_PER_FILE:05}.warc.gz").open("wb") as file:
            for number in range(start, min(num_responses, start + RESPONSES_PER_FILE)):
                page = every[number % len(every)]
                content = _PARAGRAPH.sub(
                    lambda found: draw.choice(pool) if draw.random() < EXCHANGED else found[0],
                    page["content"],
                )
                block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + content
                head = (
                    "WARC/1.0\r\nWARC-Type: response\r\nWARC-Date: 2025-01-01T00:00:00Z\r\n"
                    f"WARC-Record-ID: <urn:uuid:{number:032x}>\r\n"
                    f"WARC-Target-URI: {page['url']}#{number}\r\n"
                    "Content-Type: application/http; msgtype=response\r\n"
                    f"Content-Length: {len(block)}\r\n\r\n"
                )
                file.write(gzip.compress(head.encode() + block + b"\r\n\r\n", 6))


def ingest(folder: Path, main_text: str, cores: Sequence[int]) -> None:
    """Prints what it took to make passages of WARC files on some cores; meant for a process."""
    os.sched_setaffinity(0, cores)
    config = CorpusConfig.model_validate({"path": str(folder), "main_text": main_text})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    passages, rejects, num_pages = cut_corpus(Corpus(config))
    seconds = time.perf_counter() - begin
    own, workers = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    reasons = Counter(reason for _, reason, _ in rejects)
    print(
        dump_json(
            {
                "benchmark": "pages to passages",
                "main_text": main_text,
                "cores": len(cores),
                "pages": num_pages,
                "passages": len(passages),
                "rejects": dict(reasons.most_common(6)),
                "seconds": seconds,
                "pages_per_s": num_pages / seconds,
                "driver_mib": own / 1024,
                "driver_mib_before": before / 1024,
                "largest_worker_mib": workers / 1024,
            }
        ),
        flush=True,
    )


def main() -> None:
    """Prints the lines of both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--pages", type=int, default=296)
    parser.add_argument("--responses", type=int, default=10_000)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--main-text", default="trafilatura")
    parser.add_argument("--ingest", type=int, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ingest:
        ingest(arguments.data, arguments.main_text, arguments.ingest)
        return
    pages = read_pages(arguments.data, arguments.pages)
    compare(pages, arguments.main_text)
    available = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        write_warcs(Path(folder), pages, arguments.responses)
        for num_cores in arguments.cores:
            cores = map(str, available[:num_cores])
            own = [sys.executable, __file__, folder, "--main-text", arguments.main_text]
            subprocess.run([*own, "--ingest", *cores], check=True)


if __name__ == "__main__":
    main()
