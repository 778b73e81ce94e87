"""Web pages: how good their main text is beside trafilatura's own, and how fast they are passages.

Pages are read as a run reads them, in processes that can be killed; the rival is
`trafilatura.extract` on the same bytes, in this process. `f1` is the mean over the pages of
article-extraction of the F1 of their tokens against those of the article; `f` the F1 of
trafilatura's own evaluation: of trafilatura-eval's strings, those that a text must have and those
that it must not.

Then WARC files are made of the same pages in turn, with one member of gzip a response as crawlers
write them. All responses differ: each text of 40 characters or more between two tags is exchanged,
with a fixed seed, for as many characters from somewhere in the texts of all pages. What is shorter
stays, and so do tags and scripts: duplicates are passages of such texts alone, as menus are. The
product's step `passages` reads them, in a process of its own for each number of workers, which has
as many cores.

    python benchmarks/ingest.py DATA [--pages 296] [--responses 10000] [--workers 1 2]
        [--main-text trafilatura]

DATA is the folder that holds web/article-extraction and web/trafilatura-eval. Prints JSON lines: of
the main text, of the responses, and of each number of workers, with the memory that
benchmarks/scale.py explains; a worker's is that of a Ray task and of the processes that read its
pages.
"""

import argparse
import gzip
import hashlib
import importlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project is not installed

from benchmarks.scale import Measured, Meter, pss
from cluster.artifacts import Artifact
from cluster.plain_json import dump_json
from cluster.session import connect, disconnect
from cluster.steps import Run, Step
from pipelines.datasets.documents import Document, Page
from pipelines.datasets.pages.html_text import html_text
from pipelines.datasets.pages.workers import PageWorkers
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe

SETS = ("article-extraction", "trafilatura-eval")
SEED = 1
RESPONSES_PER_FILE = 500  # about 10 MB, which is a Ray task's
IMPORTS = ("ray.data", "icu4py")  # of the driver, so that they are no growth of the step

# What is between two tags, if it is long enough to be no part of a menu.
_MARKUP_OR_TEXT = re.compile(
    r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>|(?P<text>[^<]{40,})|[^<]+|<", re.S | re.I
)


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
    """Prints both sides' scores."""
    from trafilatura import extract

    every = [page for name in SETS for page in pages[name]]
    with PageWorkers(main_text) as workers:
        items = (Page(name=p["name"], content=p["content"], url=p["url"]) for p in every)
        found = list(workers.documents(items))
    texts = {d.name: d.text if isinstance(d, Document) else "" for d in found}
    own = {
        p["name"]: extract(p["content"], url=p["url"], include_comments=False) or "" for p in every
    }
    scores = {"ours": quality(texts, pages), "trafilatura": quality(own, pages)}
    line = {
        "benchmark": "main text",
        "main_text": main_text,
        "pages": {name: len(pages[name]) for name in SETS},
        **scores,
        "difference": {
            key: scores["ours"][key] - scores["trafilatura"][key] for key in ("f1", "f")
        },
    }
    print(dump_json(line), flush=True)


def write_warcs(folder: Path, pages: Sequence[Mapping], num_responses: int) -> int:
    """Writes responses, the pages in turn with other texts; returns how many differ."""
    parts = [
        [(found["text"] is not None, found[0]) for found in _MARKUP_OR_TEXT.finditer(html)]
        for html in (html_text(page["content"], None) for page in pages)
    ]
    pool = " ".join(dict.fromkeys(text for page in parts for is_text, text in page if is_text))
    digests = set()
    for start in range(0, num_responses, RESPONSES_PER_FILE):
        name = f"{start // RESPONSES_PER_FILE:05}.warc.gz"
        draw = random.Random(f"{SEED} {name}")
        with (folder / name).open("wb") as file:
            for number in range(start, min(num_responses, start + RESPONSES_PER_FILE)):
                html = "".join(
                    other_text(part, pool, draw) if is_text else part
                    for is_text, part in parts[number % len(pages)]
                )
                digests.add(hashlib.sha256(html.encode()).digest())
                file.write(response(html, f"{pages[number % len(pages)]['url']}#{number}", number))
    return len(digests)


def other_text(text: str, pool: str, draw: random.Random) -> str:
    """Returns as many characters from somewhere in the pool."""
    start = draw.randrange(len(pool) - len(text) + 1)
    return pool[start : start + len(text)]


def response(html: str, url: str, number: int) -> bytes:
    """Returns a record of WARC, packed by itself."""
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html.encode()
    head = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Date: 2025-01-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:{number:032x}>\r\nWARC-Target-URI: {url}\r\n"
        "Content-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + block + b"\r\n\r\n", 6, mtime=0)


class MeasuredPages(Measured):
    """Prints what it took to make a page's passages."""

    rows = "pages"

    def step_done(self, step: Step, artifact: Artifact) -> None:
        metrics = artifact.manifest.metrics
        self.end(
            metrics["num_documents"],
            num_passages=artifact.num_rows,
            num_duplicates=artifact.num_duplicates,
            rejects=dict(Counter(artifact.rejects()["reason"].to_pylist()).most_common()),
        )


def ingest(folder: Path, main_text: str, num_workers: int) -> None:
    """Prints what it took to make passages of WARC files; meant for a process of its own."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_workers])
    for module in IMPORTS:
        importlib.import_module(module)
    settings = [f"corpus.path={folder / 'warc'}", f"corpus.main_text={main_text}"]
    uri = str(folder / f"run-{num_workers}")
    product = build_run(load_recipe("laptop", settings), uri)
    with mock.patch("os.cpu_count", return_value=num_workers):  # that Ray is given
        connect(folder / "logs")
    meter = Meter()
    given = {"benchmark": "pages to passages", "main_text": main_text, "workers": num_workers}
    measured = MeasuredPages(meter, pss(os.getpid()), None, **given)
    meter.start()
    Run(uri, [measured.noting_files(product.steps[0])]).execute(measured)
    meter.end()
    disconnect()


def main() -> None:
    """Prints the lines of both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--pages", type=int, default=296)
    parser.add_argument("--responses", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--main-text", default="trafilatura")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        ingest(arguments.folder, arguments.main_text, *arguments.workers)
        return
    pages = read_pages(arguments.data, arguments.pages)
    compare(pages, arguments.main_text)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "warc").mkdir()
        every = [page for name in SETS for page in pages[name]]
        num_distinct = write_warcs(folder / "warc", every, arguments.responses)
        num_bytes = sum(file.stat().st_size for file in (folder / "warc").iterdir())
        line = {"responses": arguments.responses, "distinct": num_distinct, "bytes": num_bytes}
        print(dump_json({"benchmark": "pages to passages", **line}), flush=True)
        for number in arguments.workers:
            own = [sys.executable, *sys.argv, "--folder", str(folder), "--workers", str(number)]
            subprocess.run(own, check=True)


if __name__ == "__main__":
    main()
