"""Processes that find the main text of pages, and that a page can kill without harm to another.

The libraries have no limit of time or memory of their own, and some pages make them run for ever or
overflow the stack. So the system limits the process, ends it where it must, and another takes its
place: the page is a reject. Time is that of the processor, so a busy machine refuses no more.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from cluster.errors import Reject
from pipelines.datasets.documents import Document, Page
from pipelines.datasets.pages.main_text import MainText, document_of

MAX_PAGE_S = 10
MAX_WORKER_BYTES = 2 << 30
_AHEAD = 64  # items that are read while a page before them is being worked on


@dataclass(kw_only=True)
class _Slot:
    """A place in the order of what comes out, and the page that it waits for."""

    page: Page | None = None
    result: Document | Reject | None = None
    num_ended: int = 0  # processes that ended over it


class PageWorkers:
    """As many processes as there are cores, or `max_workers`, started with the first page.

    Leave it as a context, or its processes outlive it.
    """

    def __init__(
        self,
        main_text: MainText,
        *,
        max_page_s: int = MAX_PAGE_S,
        max_workers: int | None = None,
    ) -> None:
        self._settings = (main_text, max_page_s)
        self._workers: list[_Worker] = []
        self._max_workers = max_workers or len(os.sched_getaffinity(0))

    def __enter__(self) -> PageWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def documents(self, items: Iterable[Page | Document | Reject]) -> Iterator[Document | Reject]:
        """Yields each page's document, or why it has none, and what is no page, in their order."""
        slots: deque[_Slot] = deque()
        for item in items:
            if isinstance(item, Page):
                slots.append(_Slot(page=item))
                self._free_worker().start(slots[-1])
            else:
                slots.append(_Slot(result=item))
            while slots and (slots[0].result or len(slots) > _AHEAD):
                yield self._result(slots.popleft())
        while slots:
            yield self._result(slots.popleft())

    def _result(self, slot: _Slot) -> Document | Reject:
        while slot.result is None:
            self._receive()
        return slot.result

    def _free_worker(self) -> _Worker:
        while True:
            for worker in self._workers:
                if worker.slot is None:
                    return worker
            if len(self._workers) < self._max_workers:
                self._workers.append(_Worker(*self._settings))
            else:
                self._receive()

    def _receive(self) -> None:
        """Waits for a page to be done; replaces the processes that ended over theirs."""
        busy = {worker.pipe: worker for worker in self._workers if worker.slot}
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # type: ignore[index]
            slot = worker.slot
            assert slot is not None
            if worker.receive():
                continue
            self._workers.remove(worker)
            if slot.result is None:
                self._workers.append(_Worker(*self._settings))
                self._workers[-1].start(slot)


class _Worker:
    """A process that reads one page at a time."""

    def __init__(self, main_text: MainText, max_page_s: int) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.slot: _Slot | None = None
        self._max_page_s = max_page_s
        settings = (theirs, main_text, max_page_s)
        self._process = context.Process(target=_work, args=settings, daemon=True)
        self._process.start()
        theirs.close()

    def start(self, slot: _Slot) -> None:
        self.slot = slot
        with suppress(OSError):  # it ended, which `receive` finds
            self.pipe.send(slot.page)

    def receive(self) -> bool:
        """Takes the result of its page; returns whether it lives on.

        What ended a process once may have been the system, short of memory: the page may have a
        second one, unless it took too long.
        """
        slot, self.slot = self.slot, None
        assert slot is not None and slot.page is not None
        name = slot.page.name
        try:
            slot.result, slot.page = self.pipe.recv(), None
        except (EOFError, OSError):
            self._process.join()
            slot.num_ended += 1
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit {code}"
            if how == "SIGXCPU":
                slot.result = name, f"took longer than {self._max_page_s} s", ""
            elif slot.num_ended > 1:
                slot.result = name, f"ended the process that read it ({how})", ""
            self.end()
            return False
        return True

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(pipe: Connection, main_text: MainText, max_page_s: int) -> None:
    """Answers pages until the other side is gone."""
    logging.disable(logging.CRITICAL)  # what a library thinks of a page is no news
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))
    _, longest = resource.getrlimit(resource.RLIMIT_CPU)
    while True:
        try:
            page = pipe.recv()
        except EOFError:
            return
        seconds = int(time.process_time()) + 1 + max_page_s
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, longest))
        result: Document | Reject
        try:
            result = document_of(page, main_text)
        except MemoryError:
            result = page.name, f"took more memory than {MAX_WORKER_BYTES >> 30} GiB", ""
        except Exception as error:  # whatever a library makes of a page
            result = page.name, f"no main text ({type(error).__name__})", str(error)[:200]
        pipe.send(result)
