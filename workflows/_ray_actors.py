"""What runs on the nodes of a cluster: one actor with the budgets, and workers that run the single file's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import math
import os
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import (
    LOGGER,
    MOST_CONCURRENT,
    Cost,
    LearnedTokens,
    Reader,
    Reporter,
    Request,
    ResultsFile,
    Run,
    Secrets,
    Settings,
    Tally,
    Tokenizer,
    dumps,
    make_endpoint,
    open_files_for,
)
from workflows._ray_leases import LANES, ClusterPacer, Grant, LeasedPacer, Leases, News, Purse, Want

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

HEARTBEAT_SECONDS = 0.25  # between two reports of a worker that has nothing to report
FEW_REQUESTS, FEW_BYTES = 500, 4 << 20  # left to a worker: it should be handed more
TURN_SECONDS = 0.004  # between two looks at what may start: the pacing catches up twice as much
LOOK_AHEAD_SECONDS = 0.05  # at a time, for counting the tokens of what is to be asked for
MOST_UNREPORTED_BYTES = 64 << 20  # of results that the driver has not fetched: nothing is started then


@dataclass
class Report:
    """What a worker tells the driver."""

    results: list[tuple[int, bytes]] = field(default_factory=list)  # result lines by the line numbers of their requests
    tally: Tally = field(default_factory=Tally)  # of all that is in `results`, now or before
    learned: LearnedTokens = field(default_factory=LearnedTokens)
    in_flight: int = 0
    waiting: int = 0  # to be tried again
    oldest: float = 0.0  # seconds since the start of what is longest in flight
    left: int = 0  # lines that the loop has not come to
    left_bytes: int = 0  # of those that are not parsed
    idle: bool = True  # nothing is going on
    down: bool = False  # the provider seems to be
    troubled: bool = False  # failures or refusals after the last success
    stopped_by: str = ""
    logs: list[tuple[int, str]] = field(default_factory=list)  # level and text


@dataclass
class BudgetState:
    """What is to be seen of the budgets."""

    requests: int = 0  # started in the last minute
    tokens: int = 0
    found: str = ""  # the limit that was found, in words
    spent_up: bool = False  # one more request might cost more than is allowed


def clock() -> float:
    """The time of the running loop; that of uvloop moves by milliseconds."""
    loop = asyncio.get_running_loop()
    return time.monotonic() if "uvloop" in type(loop).__module__ else loop.time()


class Budgets:
    """The actor that holds the budgets of all workers, for each endpoint its own."""

    def __init__(self, pacing: list[dict[str, Any]], max_cost: float, message_seconds: float) -> None:
        self.purse = Purse(max_cost)
        self.leases = [Leases(ClusterPacer(**values), self.purse, message_seconds) for values in pacing]
        self.kicked = asyncio.Event()
        self.dispatcher: asyncio.Task[None] | None = None

    async def watch_driver(self, port: int) -> None:
        """Grant nothing any more once the driver is gone: Ray ends its actors only after a while."""
        with contextlib.suppress(OSError):  # it is on another machine: then after a while
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                await reader.read()
            self.dispatcher = self.dispatcher or asyncio.create_task(self._dispatch())
            self.dispatcher.cancel()

    async def lease(self, endpoint: int, worker: str, lane: int, wants: list[Want], news: News) -> list[Grant]:
        """Grant starts as soon as there are some, at the latest after HOLD_SECONDS none."""
        self.dispatcher = self.dispatcher or asyncio.create_task(self._dispatch())
        answer: asyncio.Future[list[Grant]] = asyncio.get_running_loop().create_future()

        def tell(grants: list[Grant]) -> None:
            if not answer.done():  # its worker may be gone
                answer.set_result(grants)

        self.leases[endpoint].hear(worker, news, clock())
        self.leases[endpoint].ask(worker, lane, wants, clock(), tell)
        self.kicked.set()
        return await answer

    async def tell(self, endpoint: int, worker: str, news: News) -> None:
        """Hear how leases ended."""
        self.leases[endpoint].hear(worker, news, clock())
        self.kicked.set()

    async def forget(self, worker: str) -> None:
        """Hear that a worker is gone."""
        for leases in self.leases:
            leases.forget(worker, clock())
        self.kicked.set()

    async def set_budgets(self, endpoint: int, requests_per_minute: float, tokens_per_minute: float) -> None:
        """Change the ceilings during a run."""
        self.leases[endpoint].pacer.set_budgets(requests_per_minute, tokens_per_minute)
        self.kicked.set()

    async def state(self) -> list[BudgetState]:
        """Tell what is to be seen of each endpoint."""
        pacers = [leases.pacer for leases in self.leases]
        return [BudgetState(*pacer.last_minute(), pacer.describe(), self.purse.empty) for pacer in pacers]

    async def _dispatch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            seconds = min([leases.turn(clock()) for leases in self.leases]) - clock()
            timer = loop.call_later(max(seconds, TURN_SECONDS), self.kicked.set) if seconds < math.inf else None
            await self.kicked.wait()
            self.kicked.clear()
            if timer:
                timer.cancel()


class HandedReader(Reader):
    """Reads the lines that the driver hands over; `hungry` is called when few are left, `wake` as in a Reader."""

    def __init__(
        self, endpoint: Any, tokens: Tokenizer, hungry: Callable[[], object], wake: Callable[[], object]
    ) -> None:
        self.endpoint, self.tokens, self.hungry, self.wake = endpoint, tokens, hungry, wake
        self.lines, self.ahead = deque[tuple[int, bytes]](), deque[Request]()  # the latter: read before their turn
        self.number, self.given, self.limit, self.preparing, self.bytes = 0, 0, math.inf, None, 0
        self.due, self.more, self.ended = math.inf, True, False

    @property
    def left(self) -> int:
        """How many lines the loop has not come to."""
        return len(self.lines) + len(self.ahead) + (self.preparing is not None)

    def hand(self, lines: list[tuple[int, bytes]], *, more: bool) -> None:
        """Take over lines with their numbers; `more`: others may follow."""
        self.lines += lines
        self.bytes += sum(len(line) for _, line in lines)
        self.more, self.ended = more, not (more or self.left)

    def next(self, now: float) -> Request | None:
        """Give the next request; None if there is none (`ended`) or not yet."""
        request = self.ahead.popleft() if self.ahead else super().next(now)
        if self.left in (FEW_REQUESTS, 0):
            self.hungry()
        self.ended = not (self.more or self.left)
        return request

    def look_ahead(self, number: int) -> list[Request]:
        """So many of the next requests, or as many as can be read in a moment."""
        late = clock() + LOOK_AHEAD_SECONDS
        while len(self.ahead) < number and clock() < late and (request := super().next(clock())):
            self.estimate(request)
            self.ahead.append(request)
        self.ended = not (self.more or self.left)
        return list(islice(self.ahead, number))

    def _next_line(self, _now: float) -> bytes | None:
        if not self.lines:
            return None if self.more else b""
        number, line = self.lines.popleft()
        self.number, self.bytes = number - 1, self.bytes - len(line)
        return line

    def expected_total(self) -> float:
        """The driver knows."""
        return math.inf

    def close(self) -> None:
        """Nothing is open."""


class Outbox(ResultsFile):
    """Takes result lines as a results file does, and keeps them for the driver, which has skipped what is finished."""

    def __init__(self, filled: Callable[[], object]) -> None:
        self.filled, self.line, self.bytes = filled, 0, 0  # line: of the request that is recorded
        self.resumed = False  # nothing is finished that was handed over
        self.results: list[tuple[int, bytes]] = []

    def write(self, body: Any, outcome: Any, metadata: Any = None, details: Any = None) -> None:
        """Queue one result line."""
        width = 4 if details is not None else 3 if metadata is not None else 2
        self.results.append((self.line, dumps([body, outcome, metadata, details][:width]) + b"\n"))
        self.bytes += len(self.results[-1][1])

    def flush(self) -> None:
        """Tell that there is something to fetch."""
        if self.results:
            self.filled()

    def check(self) -> None:
        """The driver looks after the file."""

    def fetch(self) -> list[tuple[int, bytes]]:
        """Give what was queued since the last time."""
        results, self.results, self.bytes = self.results, [], 0
        return results


class WorkerRun(Run):
    """The loop, which notes the line number of what it records."""

    def record(self, request: Request, reply: Any = None, usage: Any = None) -> None:
        """Queue the one result line of a request."""
        assert isinstance(self.results, Outbox)
        self.results.line = request.line
        super().record(request, reply, usage)


class LogLines(logging.Handler):
    """Keeps log lines for the driver, which shows them."""

    def __init__(self, filled: Callable[[], object]) -> None:
        super().__init__()
        self.filled, self.lines = filled, list[tuple[int, str]]()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append((record.levelno, record.getMessage()))
        self.filled()


class Worker:
    """The actor that runs the loop over what the driver hands to it."""

    async def begin(self, name: str, rows: list[Settings], budgets: Any, message_seconds: float) -> str:
        """Prepare the run with the settings of each endpoint; gives the name of the machine.

        Messages on the same matter are so many seconds apart: the first goes at once, then many things are in one.

        The settings hold the key: as an argument of a method it is kept in memory only, whereas Ray writes arguments
        of constructors to its store and environments of actors to its logs.
        """
        sys.set_int_max_str_digits(0)
        gc.set_threshold(100_000, 20, 100)
        self.name, settings, self.budgets, self.message_seconds = name, rows[0], budgets, message_seconds
        loop, self.stack = asyncio.get_running_loop(), contextlib.AsyncExitStack()
        self.wake, self.news, self.work = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.logs, secrets = LogLines(lambda: loop.call_soon_threadsafe(self.news.set)), Secrets()
        LOGGER.addFilter(secrets)
        level = str(settings.logging_level).upper()
        endpoints = [make_endpoint(row, secrets) for row in rows]
        LOGGER.addHandler(self.logs)
        LOGGER.setLevel(max(1, int(level)) if level.isdecimal() else level)
        tokens, wake = Tokenizer(settings.token_encoding_name), lambda: loop.call_soon_threadsafe(self.wake.set)
        self.reader = HandedReader(endpoints[0], tokens, self.news.set, wake)
        self.outbox, self.pacers, jobs = Outbox(self.news.set), list[LeasedPacer](), [self._work()]
        most = open_files_for(settings.max_concurrent_requests or MOST_CONCURRENT)
        for index, endpoint in enumerate(endpoints):
            asks, tells = asyncio.Event(), asyncio.Event()
            endpoint.pacer = pacer = LeasedPacer(most, self.upcoming, self.price, asks.set, tells.set, self.wake.set)
            self.pacers.append(pacer)
            jobs += [self._drain_at_end_of(self._ask(index, pacer, asks, lane)) for lane in range(LANES)]
            jobs += [self._drain_at_end_of(self._tell(index, pacer, tells))]
            await endpoint.open(self.stack)
        self.run = WorkerRun(settings, self.reader, endpoints, self.outbox, Reporter("none"), self.wake, clock)
        self.idle = True
        self.tasks = [asyncio.create_task(job) for job in jobs]
        return f"{socket.gethostname()} (pid {os.getpid()})"

    def upcoming(self, number: int) -> list[Cost]:
        """The costs of so many of the next requests."""
        requests = [request for request in self.reader.look_ahead(number) if not request.problem]
        return [self.run.learned.cost(request.model, self.reader.estimate(request)) for request in requests]

    def price(self, cost: Cost) -> float:
        """The price of a request; as long as nothing is known about answers, at worst."""
        output = (cost.expected if self.run.learned else cost.worst) - cost.prompt
        return self.run.settings.price(cost.prompt, output)

    async def exchange(self, lines: list[tuple[int, bytes]], *, more: bool, stop: str) -> Report:
        """Take over lines of the request file and give what there is to report: soon if there is something."""
        for task in self.tasks:
            if task.done():
                task.result()
        if stop:
            self.run.stop(stop)
            for pacer in self.pacers:
                pacer.close()
        self.reader.hand(lines, more=more)
        if lines:
            self.idle = False
            self.work.set()
        self.wake.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.news.wait(), HEARTBEAT_SECONDS)
            await asyncio.sleep(self.message_seconds)
        self.news.clear()
        return self._report()

    def _report(self) -> Report:
        run, logs = self.run, self.logs.lines
        self.logs.lines = []
        for pacer in self.pacers:
            pacer.drop_late(clock())
        oldest = next((request.started for request, _ in run.in_flight.values()), math.inf)
        return Report(
            results=self.outbox.fetch(),
            tally=dataclasses.replace(run.tally, kinds=run.tally.kinds.copy()),
            learned=run.learned,
            in_flight=len(run.in_flight),
            waiting=len(run.retries) + len(run.limbo),
            oldest=max(0.0, clock() - oldest),
            left=self.reader.left,
            left_bytes=self.reader.bytes,
            idle=self.idle,
            down=all(endpoint.outage.down for endpoint in run.endpoints),
            troubled=run.trouble_since < math.inf,
            stopped_by=run.stopped_by,
            logs=logs,
        )

    async def _work(self) -> None:
        """Run the loop whenever there is something to do: what another worker has lost may come after the end."""
        while True:
            await self.work.wait()
            self.work.clear()
            await self.run.process_requests()
            for pacer in self.pacers:
                pacer.blocked = None
            self.idle = not self.reader.left or self.run.stopped_by != ""
            self.news.set()

    async def _drain_at_end_of(self, job: Coroutine[Any, Any, None]) -> None:
        """Without the actor that holds the budgets nothing can start, but what is in flight is waited for."""
        try:
            await job
        except Exception as error:  # noqa: BLE001 - as values, errors of the network do not end a run
            self.run.stop("hopeless", f"The actor that holds the budgets was lost ({str(error)[:200]})")
            self.wake.set()

    async def _ask(self, endpoint: int, pacer: LeasedPacer, asks: asyncio.Event, lane: int) -> None:
        """Ask for starts, as long as some are wanted."""
        in_line = False
        while True:
            if not in_line:
                await asks.wait()
            asks.clear()
            wants = pacer.wanted(clock()) if self.outbox.bytes < MOST_UNREPORTED_BYTES else []
            asked_at = clock()  # counting tokens took a while
            if wants or in_line:
                news = pacer.news(self.run.tally.spent)
                grants = await self.budgets.lease.remote(endpoint, self.name, lane, wants, news)
                pacer.take_in(grants, len(wants), asked_at, clock())
                in_line = bool(wants) and not grants

    async def _tell(self, endpoint: int, pacer: LeasedPacer, tells: asyncio.Event) -> None:
        """Report what ended: little at once, much together."""
        while True:
            await tells.wait()
            tells.clear()
            if pacer.finished or pacer.unused:
                told_at = clock()
                await self.budgets.tell.remote(endpoint, self.name, pacer.news(self.run.tally.spent))
                await asyncio.sleep(max(0.0, told_at + self.message_seconds - clock()))
