"""The driver of a cluster: it hands out shards of the request file, joins their results, shows the whole as one run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
from collections import deque
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from api_request_parallel_processor import (
    BLANKS,
    LOGGER,
    LearnedTokens,
    Pacer,
    Reader,
    Request,
    ResultsFile,
    Run,
    Tally,
    UsageError,
    loads,
    read_result,
)
from workflows._ray_actors import FEW_BYTES, FEW_REQUESTS, HEARTBEAT_SECONDS, BudgetState, Report

if TYPE_CHECKING:
    from collections.abc import Callable

LINES_PER_SHARD = (20, 1000)  # at least, so that handing over is worth it; at most, so that little is read ahead
SHARES = 4  # shards for each worker that what is left to read is cut into: the later, the smaller
STAMP = "%Y%m%dT%H%M%S"
KEPT_IN_MIND = 100  # messages of workers: another worker's is told only if it says something else
LOST_AT_MOST = 5  # workers in a row, without any success in between: then it is not the machines
DRIVERS_OWN = {"read", "finished_before", "seconds", "exit_code", "stop_reason"}  # of a tally


# ---- results: a file for each shard, joined into one -----------------------------------------------------------------


class JoinedResults(ResultsFile):
    """The results file, with the shards that a driver has left behind when it was killed.

    Their successful lines count as those of the file itself, and move into it when their requests are read. So it does
    not matter which lines are in both: they stay as they are until a run finishes.
    """

    def __init__(self, path: str, requests_path: str, *, restart: bool) -> None:
        super().__init__(path, requests_path, restart=restart)
        self.folder = Path(f"{self.path}.shards")
        self.left_behind: dict[bytes, list[tuple[Path, int]]] = {}  # by identity: the places of successful lines
        self.asked_for: set[bytes] = set()  # of these identities
        if restart and self.folder.exists():
            former = self.folder.rename(f"{self.folder}.{datetime.now(UTC):{STAMP}}")
            self.notices.append(f"The shards of the former results are kept as {former}.")
        for shard in sorted(self.folder.glob("*.jsonl")):
            with shard.open("rb") as file:
                place = 0
                for line in file:
                    result = read_result(line) if line.endswith(b"\n") else None
                    if result and result[1]:
                        self.left_behind.setdefault(result[0], []).append((shard, place))
                    place += len(line)
        self.resumed = self.resumed or bool(self.left_behind)

    def take(self, identity: bytes) -> bool:
        """Whether this request is finished already, here or in a shard that was left behind."""
        if super().take(identity):
            self.asked_for.update({identity} & self.left_behind.keys())
            return True
        if identity in self.left_behind:
            self.asked_for.add(identity)
            if places := self.left_behind[identity]:
                self._adopt(*places.pop())
                return True
        return False

    def _adopt(self, shard: Path, place: int) -> None:
        with shard.open("rb") as file:
            file.seek(place)
            self.write(*loads(file.readline()))

    def join(self, lines: bytes) -> None:
        """Queue whole lines of a shard."""
        self.queue += lines

    def finish(self, *, whole: bool, limited: bool = False) -> None:
        """End the run; shards that were left behind are not needed any more if it was a whole one."""
        kept = {identity: places for identity, places in self.left_behind.items() if identity not in self.asked_for}
        for place in (place for places in kept.values() for place in places if whole):
            self._adopt(*place)
        super().finish(whole=whole, limited=limited)
        self.foreign += sum(map(len, kept.values())) if whole and not limited else 0
        if whole:
            for shard in self.folder.glob("*.jsonl"):
                shard.unlink()
        with contextlib.suppress(OSError):  # there is still something in it
            self.folder.rmdir()


@dataclass
class Shard:
    """Some lines of the request file, on their way."""

    number: int
    path: Path  # of its results
    lines: dict[int, bytes]  # those without a result yet, by their number
    file: IO[bytes] | None = None

    def keep(self, results: dict[int, bytes]) -> None:
        """Write results, by line number. Raises OSError."""
        if self.file is None:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            self.file = open(self.path, "ab", opener=partial(os.open, mode=0o600))  # noqa: SIM115 - an opener
        self.file.writelines(results.values())
        self.file.flush()
        for number in results:
            del self.lines[number]

    def close(self) -> bytes:
        """Give all of its results."""
        if self.file is None:
            return b""
        self.file.close()
        return self.path.read_bytes()


# ---- the request file ------------------------------------------------------------------------------------------------


class ShardReader(Reader):
    """Reads the request file for the driver; the workers parse the lines and count their tokens."""

    line: bytes | None = b""  # the latest one, as it stands
    read_bytes = 0

    def next_line(self, now: float) -> bool:
        """Read up to the next line that is not blank; False if there is none (`ended`) or not yet."""
        self.due, self.line = math.inf, b"\n"
        while self.line and not self.line.strip(BLANKS):
            self.line = b"" if self.ended or self.given >= self.limit else self._next_line(now)
            self.number += bool(self.line)
        self.ended = self.line == b""
        self.given += bool(self.line)
        return bool(self.line)

    def estimate(self, _request: Request) -> Any:
        """Leave that to the workers."""

    def _next_line(self, now: float) -> bytes | None:
        self.line = super()._next_line(now)
        self.read_bytes += len(self.line or b"")
        return self.line


# ---- the driver ------------------------------------------------------------------------------------------------------


class ShownPacer(Pacer):
    """What the driver sees of the budgets of an endpoint, which are elsewhere."""

    state = BudgetState()
    change: Callable[[float, float], object] | None = None

    def set_budgets(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        """Change the ceilings during a run."""
        if self.change:
            self.change(requests_per_minute, tokens_per_minute)

    def last_minute(self) -> tuple[int, int]:
        """Requests and tokens started in the last minute."""
        return self.state.requests, self.state.tokens

    def describe(self) -> str:
        """What limit was found, in words."""
        return self.state.found


class Machines(Protocol):
    """What the driver needs of a cluster."""

    workers: int
    budgets: Any  # the actor that holds them
    errors: type[Exception]  # of an actor that is lost

    def hire(self) -> Any:
        """Start the actor of a worker."""

    async def begin(self, actor: Any, name: str) -> None:
        """Wait until it runs, and tell it what the run is."""

    def fire(self, actor: Any, name: str) -> None:
        """End it, and free what it has leased."""


@dataclass
class Slot:
    """The place of one worker, and whoever works there now."""

    number: int
    hired: int = 0  # workers so far
    name: str = ""  # of the present one
    actor: Any = None  # once it runs
    shards: dict[int, Shard] = field(default_factory=dict)
    report: Report = field(default_factory=Report)


class Driver:
    """Hands out shards, takes in results, and shows the whole as one run.

    `hire` starts an actor of a worker and lets it begin, `fire` ends it; `errors` are those of a lost one. `run` is
    never set going: it reads the request file, hears signals, and holds what is to be shown.
    """

    def __init__(self, run: Run, results: JoinedResults) -> None:
        assert isinstance(run.reader, ShardReader)
        self.run, self.reader, self.results = run, run.reader, results
        self.stamp, self.cut, self.size = f"{datetime.now(UTC):{STAMP}}", 0, LINES_PER_SHARD[0]
        self.waiting: deque[Shard] = deque()  # to be handed out
        self.shard_of: dict[int, Shard] = {}  # by line number, of what is handed out
        self.joined: list[Path] = []  # files whose lines are about to be written into the results file
        self.slots: list[Slot] = []
        self.told = deque[str](maxlen=KEPT_IN_MIND)  # warnings of workers
        self.lost_in_a_row, self.last_success = 0, -1

    async def find_work(self) -> bool:
        """Read until there is something to do; false if there is nothing."""
        while not (self.ended or self.waiting):
            found = self.cut_shard(self.run.clock())
            await asyncio.sleep(0 if found else 0.01)
        return bool(self.waiting)

    async def drive(self, machines: Machines) -> None:
        """Keep all workers busy until everything has its result, or nothing is in flight any more after a stop."""
        self.machines, self.slots = machines, [Slot(number) for number in range(1, machines.workers + 1)]
        jobs = [self.read(), self.watch_budgets(), *map(self.serve, self.slots)]
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            while not self.ended:
                for task in tasks:
                    if task.done():
                        task.result()
                await self.run.wait(self.look(self.run.clock()))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for shard in [shard for slot in self.slots for shard in slot.shards.values()] + list(self.waiting):
                self.join(shard)
            self.look(self.run.clock())

    # what goes out

    async def read(self) -> None:
        """Cut shards ahead of the workers, but few."""
        while not (self.run.reader.ended or self.run.stopped_by):
            found = len(self.waiting) < len(self.slots) and self.cut_shard(self.run.clock())
            await asyncio.sleep(0 if found else 0.01)  # a stream may be slow

    def cut_shard(self, now: float) -> bool:
        """Read the next shard; false if there is nothing to read yet."""
        reader, lines = self.reader, dict[int, bytes]()
        least, most = LINES_PER_SHARD
        left, start = reader.expected_total() - reader.given, reader.read_bytes
        if left < math.inf and self.slots:
            self.size = int(min(most, max(least, left / SHARES / len(self.slots))))
        while len(lines) < self.size and reader.read_bytes - start < FEW_BYTES:
            if not (number := self.read_line(now)):
                break
            lines[number] = reader.line or b""
        if lines:
            self.cut += 1
            self.waiting.append(Shard(self.cut, self.results.folder / f"{self.stamp}-{self.cut:06}.jsonl", lines))
        return bool(lines) or reader.due <= now

    def read_line(self, now: float) -> int:
        """Read up to the next line that is not finished yet; gives its number, or 0. Only old results need parsing."""
        if self.results.resumed:
            request = self.run.read_line(now)
            return request.line if request else 0
        found = self.reader.next_line(now)
        self.run.tally.read += found
        return found and self.reader.number

    async def serve(self, slot: Slot) -> None:
        """Exchange requests for results with one worker, and with its successors if it is lost."""
        while not self.run.stopped_by:
            slot.hired += 1
            slot.name = f"{slot.number}.{slot.hired}"
            actor = self.machines.hire()
            try:
                await self.machines.begin(actor, slot.name)
                slot.actor = actor
                while True:
                    lines, stop = self.shard_for(slot), self.run.stopped_by
                    report = await actor.exchange.remote(lines, more=not self.exhausted, stop=stop)
                    self.take_in(slot, report)
            except self.machines.errors as error:
                self.lose(slot, error)
                self.machines.fire(actor, slot.name)
            await asyncio.sleep(1.0)

    def shard_for(self, slot: Slot) -> list[tuple[int, bytes]]:
        """The lines of the next shard, if this worker has few left."""
        enough = slot.report.left > min(FEW_REQUESTS, self.size // 2) or slot.report.left_bytes > FEW_BYTES
        if not self.waiting or enough or self.run.stopped_by:
            return []
        shard = self.waiting.popleft()
        slot.shards[shard.number] = shard
        self.shard_of.update(dict.fromkeys(shard.lines, shard))
        return list(shard.lines.items())

    # what comes in

    def take_in(self, slot: Slot, report: Report) -> None:
        """Take in what a worker reports."""
        for level, text in report.logs:
            if level < logging.INFO or text not in self.told:  # all say the same about what is wrong
                self.told.extend([text] if level >= logging.INFO else [])
                LOGGER.log(level, "%s", text)
        found: dict[int, dict[int, bytes]] = {}
        for line, result in report.results:
            found.setdefault(self.shard_of.pop(line).number, {})[line] = result
        try:
            for number, results in found.items():
                slot.shards[number].keep(results)
                if not slot.shards[number].lines:
                    self.join(slot.shards.pop(number))
        except OSError as error:
            self.run.stop("results", f"{self.results.folder}: {error.strerror}. Make room, then go on.")
        before, slot.report = slot.report.tally, report
        add(self.run.tally, report.tally, before)
        self.lost_in_a_row *= report.tally.succeeded == before.succeeded
        if report.stopped_by and not self.run.stopped_by:
            self.run.stop(report.stopped_by, report.tally.stop_reason)
        if self.ended:
            self.run.wake.set()

    def join(self, shard: Shard) -> None:
        """Put the results of a shard into the results file; `flush` writes them."""
        if shard.file:
            self.results.join(shard.close())
            self.joined.append(shard.path)

    def flush(self, now: float) -> None:
        """Write what was joined; only then its own file is not needed any more."""
        self.run.flush(now)
        while self.joined and not self.results.queue:
            self.joined.pop().unlink(missing_ok=True)

    def lose(self, slot: Slot, error: BaseException) -> None:
        """Hand out again what a lost worker has not finished."""
        if (missing := re.search(r"No module named '([\w.]+)'", str(error))) and not self.run.tally.calls:
            packages = f"`pip install '{missing[1]}'` on every node, or a runtime environment"
            raise UsageError(f"a node of the cluster lacks the package {missing[1]}: {packages}")
        left = [shard for shard in slot.shards.values() if shard.lines]
        lost = sum(len(shard.lines) for shard in left)
        LOGGER.warning("Worker %s was lost (%s); its %d requests go to others.", slot.name, brief(error), lost)
        self.waiting.extendleft(reversed(left))
        for line in [line for shard in left for line in shard.lines]:
            del self.shard_of[line]
        slot.shards, slot.report, slot.actor = {}, Report(), None
        self.lost_in_a_row += 1
        if self.lost_in_a_row >= LOST_AT_MOST:
            self.run.stop("hopeless", f"{self.lost_in_a_row} workers were lost in a row: {brief(error)}")

    async def watch_budgets(self) -> None:
        """Show how the budgets are used; without the actor that holds them nothing can start."""
        budgets = self.machines.budgets
        pacers = [one.pacer for one in self.run.endpoints if isinstance(one.pacer, ShownPacer)]
        for index, pacer in enumerate(pacers):
            pacer.change = partial(budgets.set_budgets.remote, index)
        while True:
            try:
                states = await budgets.state.remote()
            except self.machines.errors as error:
                self.run.stop("hopeless", f"The actor that holds the budgets was lost ({brief(error)})")
                return
            for pacer, state in zip(pacers, states, strict=True):
                pacer.state = state
            if any(state.spent_up for state in states):
                spent = f"Spent {self.run.tally.spent:,.4f}"
                self.run.stop("max_cost", f"{spent}, one more may exceed --max_cost. Raise it to go on.")
            await asyncio.sleep(2 * HEARTBEAT_SECONDS)

    # the whole

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing to hand out any more, unless a worker is lost."""
        return self.run.reader.ended and not self.waiting

    @property
    def ended(self) -> bool:
        """Whether every request has its result, or nothing is in flight any more after a stop."""
        if self.run.stopped_by:
            drained = (slot.report.stopped_by and slot.report.idle for slot in self.slots if slot.actor)
            return self.run.force or all(drained)
        return self.exhausted and not self.shard_of

    def look(self, now: float) -> float:
        """Show the run, look after its end, write; gives when to look again."""
        run, reports = self.run, [slot.report for slot in self.slots]
        since = math.inf if run.tally.succeeded > self.last_success else run.trouble_since
        run.trouble_since = min(since, now) if any(report.troubled for report in reports) else math.inf
        self.last_success = run.tally.succeeded
        oldest = Request(0, None, None, "", "", started=now - max([report.oldest for report in reports], default=0.0))
        in_flight = range(sum(report.in_flight for report in reports))
        run.in_flight = dict.fromkeys(in_flight, (oldest, None))  # type: ignore[arg-type]
        run.retries = [(now, 0, oldest)] * sum(report.waiting for report in reports)
        for endpoint in run.endpoints:
            endpoint.outage.down = any(report.down for report in reports)
        run.learned = LearnedTokens()
        for model, sums in (item for report in reports for item in report.learned.items()):
            run.learned[model] = [a + b for a, b in zip(run.learned.get(model, [0.0] * len(sums)), sums, strict=True)]
        run.look_after(now)
        again = run.reporter.update(run, now)
        self.flush(now)
        return min(again, run.next_check, now + HEARTBEAT_SECONDS)


def add(total: Tally, now: Tally, before: Tally) -> None:
    """Add to a tally what a worker has done since its last report."""
    for name in (one.name for one in fields(Tally) if one.name not in DRIVERS_OWN):
        new = getattr(now, name)
        if isinstance(new, str):
            setattr(total, name, new or getattr(total, name))
        else:
            setattr(total, name, getattr(total, name) + (new - getattr(before, name)))


def brief(error: BaseException) -> str:
    """The line of an error of Ray that tells most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = (line for line in lines if re.search(r"because|Error: ", line))
    return next(telling, lines[0])[:200]
