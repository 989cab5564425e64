"""workflows.ray_cluster: leases of budgets, runs over stand-ins for actors in virtual time, real clusters of Ray."""

from __future__ import annotations

import asyncio
import copy
import heapq
import importlib.util
import itertools
import logging
import math
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_request_parallel_processor import (
    LOGGER,
    Cost,
    Outcome,
    ServerLimits,
    Settings,
    Tally,
    UsageError,
    process_api_requests_from_file,
)
from tests.jobs import CHAT, KEY, chats, clean_environment, one_line_each, read_lines, virtually, write_lines
from tests.local_provider import LocalProvider, Options, Stats
from workflows import ray_cluster
from workflows._ray_leases import (
    AWAY_SECONDS,
    LANES,
    LEASE_SECONDS,
    ClusterPacer,
    Finished,
    Grant,
    LeasedPacer,
    Leases,
    News,
    Purse,
    Want,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.jobs import ProviderProcess

ROOT = Path(__file__).resolve().parent.parent
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")

# ---- leases ----------------------------------------------------------------------------------------------------------


class Line:
    """Leases, and a clock that is turned by hand."""

    def __init__(self, requests: float = 0, tokens: float = 0, purse: Purse | None = None, **more: Any) -> None:
        self.leases, self.now = Leases(ClusterPacer(requests, tokens, **more), purse), 0.0
        self.answers: dict[str, list[Grant]] = {}

    def ask(self, worker: str, *costs: int, price: float = 0.0) -> None:
        self.answers.pop(worker, None)
        wants = [Want(cost, cost, price) for cost in costs]
        self.leases.ask(worker, 0, wants, self.now, lambda grants: self.answers.update({worker: grants}))

    def until(self, worker: str, seconds: float = 1000.0) -> list[Grant]:
        """Let time pass until this worker is answered."""
        end = self.now + seconds
        while (again := self.leases.turn(self.now)) and worker not in self.answers and self.now < end:
            self.now = min(end, max(self.now + 0.001, again))
        return self.answers.pop(worker, [])

    def take(self, worker: str, number: int, seconds: float = 100.0, **more: Any) -> list[Grant]:
        """Ask as a worker does until so many starts are granted, or so long."""
        grants, end = list[Grant](), self.now + seconds
        while len(grants) < number and self.now < end:
            self.ask(worker, *[1] * (number - len(grants)), **more)
            grants += self.until(worker, end - self.now)
        return grants

    def end(self, worker: str, grants: Iterable[Grant], outcome: Outcome = Outcome.ACCEPTED, **more: Any) -> None:
        news = News([Finished(g.number, outcome, more.get("used"), more.get("told")) for g in grants], [])
        self.leases.hear(worker, news, self.now)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_budget_is_a_ceiling_for_any_minute_whenever_leases_are_used(data: st.DataObject) -> None:
    """Each start is used as late as it may be, or not at all; still no minute has more than the budget."""
    line, used = Line(requests=30, tokens=300, per_second=True), list[tuple[float, int]]()
    for _ in range(data.draw(st.integers(5, 60))):
        worker = data.draw(st.sampled_from("abc"))
        asked = line.now
        line.ask(worker, *data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=9)))
        grants = line.until(worker, 20.0)
        late = data.draw(st.floats(0, LEASE_SECONDS))
        kept = [grant for grant in grants if data.draw(st.booleans())]
        used += [(max(line.now, asked + late), grant.expected) for grant in kept]
        line.leases.hear(worker, News([], [grant.number for grant in grants if grant not in kept]), line.now)
        line.end(worker, kept, data.draw(st.sampled_from(Outcome)))
        line.now += data.draw(st.floats(0, 3))
    for start, _ in used:
        assert sum(start <= at < start + 60 for at, _ in used) <= 30
    assert line.leases.pacer.in_flight == len(line.leases.open) == 0


def test_what_is_not_used_can_be_used_by_others() -> None:
    line = Line(requests=10)
    grants = line.take("a", 10)
    line.leases.hear("a", News([], [grant.number for grant in grants]), line.now)
    began = line.now
    assert len(line.take("b", 10)) == 10
    assert line.now - began < 50, "the budget of the minute was not lost"
    assert line.leases.pacer.last_minute() == (10, 10)


def test_a_refusal_of_one_slows_all() -> None:
    line = Line(requests=600)
    line.ask("a", 1)
    line.end("a", line.until("a"), Outcome.REFUSED, told=ServerLimits(retry_after=7.0))
    refused = line.now
    for again in itertools.count():
        line.ask("b", 1)
        if line.until("b"):
            break
        assert again < 100
    assert line.now - refused >= 7.0


def test_small_requests_do_not_starve_a_large_one() -> None:
    """A request above the whole budget starts when the minute before is empty, though others would always fit."""
    line, small = Line(requests=0, tokens=100, per_second=True), 0
    line.ask("big", 250)
    while "big" not in line.answers or not line.answers["big"]:
        if line.answers.get("big") == []:
            line.ask("big", 250)
        if "small" in line.answers or not line.now:
            line.end("small", line.answers.get("small", []), used=1)
            small += len(line.answers.get("small", []))
            line.ask("small", 1, 1)
        line.now = max(line.now + 0.01, min(line.now + 0.1, line.leases.turn(line.now)))
        assert line.now < 150


def test_a_worker_that_does_not_come_back_loses_its_place() -> None:
    line = Line(requests=60, per_second=True)
    line.ask("a", 1)
    assert line.until("a")
    line.leases.pacer.paused_until = line.now + 1.0
    line.ask("gone", 1)
    assert line.until("gone", 0.5) == []
    line.now += 1.0
    line.ask("b", 1)
    began = line.now
    assert line.until("b")
    assert line.now - began <= AWAY_SECONDS + 0.1


def test_the_places_of_a_lost_worker_are_free_again() -> None:
    line = Line(max_concurrent=3)
    assert len(line.take("a", 5, 10.0)) == 3
    assert line.take("b", 1, 10.0) == []
    line.leases.forget("a", line.now)
    assert len(line.take("b", 1)) == 1


def test_all_workers_together_spend_no_more_than_is_allowed() -> None:
    line = Line(purse=Purse(most=1.0))
    grants = line.take("a", 3, 10.0, price=0.4)
    assert len(grants) == 2
    assert line.take("b", 1, 10.0, price=0.4) == []
    assert not line.leases.purse.empty, "what is in flight may turn out cheaper"
    line.leases.hear("a", News([Finished(g.number, Outcome.ACCEPTED, 1, None) for g in grants], [], 0.9), line.now)
    assert line.take("b", 1, 10.0, price=0.4) == []
    assert line.leases.purse.empty


class Simulation:
    """Workers that always have something to send until they stop, and messages that take a while: no actor, no loop."""

    cost = Cost(20, 30)

    def __init__(self, budget: float, stops: list[float], delay: float, latency: float = 0.5) -> None:
        self.leases, self.now = Leases(ClusterPacer(budget, per_second=True)), 0.0
        self.delay, self.latency, self.events, self.order = delay, latency, list[Any](), itertools.count()
        self.starts: list[tuple[float, int]] = []
        self.asked, self.due = list[float](), math.inf
        self.senders = [Sender(self, index, stop) for index, stop in enumerate(stops)]

    def at(self, when: float, job: Callable[[], object]) -> None:
        heapq.heappush(self.events, (when, next(self.order), job))

    def turn(self) -> None:
        again = max(self.now + 0.001, self.leases.turn(self.now))
        if again < self.due or self.due <= self.now:
            self.due = again
            if again < math.inf:
                self.at(again, self.turn)

    def run(self, seconds: float) -> list[tuple[float, int]]:
        for sender in self.senders:
            self.at(0.0, sender.look)
        while self.events and self.events[0][0] < seconds:
            self.now, _, job = heapq.heappop(self.events)
            job()
        return self.starts


class Sender:
    """A worker of the simulation."""

    def __init__(self, simulation: Simulation, index: int, stop: float) -> None:
        self.all, self.index, self.stop, self.busy = simulation, index, stop, set[int]()
        nothing = [self.all.cost]
        self.pacer = LeasedPacer(10**6, lambda n: nothing * n, lambda _: 0.0, self.asks, self.tells, self.look)

    def look(self) -> None:
        while self.all.now < self.stop and self.pacer.delay(self.all.cost, self.all.now) == 0:
            ticket = self.pacer.start(self.all.cost, self.all.now)
            self.all.starts.append((self.all.now, self.index))
            self.all.at(self.all.now + self.all.latency, partial(self.finish, ticket))
        if self.all.now >= self.stop and not self.pacer.closed:
            self.pacer.close()

    def finish(self, ticket: Any) -> None:
        self.pacer.finish(ticket, Outcome.ACCEPTED, self.all.now, 20)
        self.look()

    def asks(self) -> None:
        for lane in set(range(LANES)) - self.busy:
            self.all.at(self.all.now, partial(self.ask, lane))

    def ask(self, lane: int, *, again: bool = False) -> None:
        wants = self.pacer.wanted(self.all.now) if lane not in self.busy else []
        if lane not in self.busy and (wants or again):
            self.busy.add(lane)
            asked_at, news = self.all.now, self.pacer.news(0.0)

            def answer(grants: list[Grant]) -> None:
                self.all.at(self.all.now + self.all.delay, lambda: self.take(lane, grants, wants, asked_at))

            def arrive() -> None:
                self.all.leases.hear(str(self.index), news, self.all.now)
                self.all.asked.append(self.all.now)
                self.all.leases.ask(str(self.index), lane, wants, self.all.now, answer)
                self.all.turn()

            self.all.at(self.all.now + self.all.delay, arrive)

    def take(self, lane: int, grants: list[Grant], wants: list[Want], asked_at: float) -> None:
        self.busy.discard(lane)
        self.pacer.take_in(grants, len(wants), asked_at, self.all.now)
        if wants and not grants:
            self.ask(lane, again=True)

    def tells(self) -> None:
        news = self.pacer.news(0.0)
        self.all.at(self.all.now + self.all.delay, lambda: self.hear(news))

    def hear(self, news: News) -> None:
        self.all.leases.hear(str(self.index), news, self.all.now)
        self.all.turn()


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("delay", [0.001, 0.02])
def test_the_budget_is_used_up_and_never_exceeded(workers: int, delay: float) -> None:
    """At least 95 % of it is, whether messages take a millisecond or twenty, by one worker as by four."""
    starts = [at for at, _ in Simulation(3000, [math.inf] * workers, delay).run(70.0)]
    assert len([at for at in starts if 8 <= at < 68]) >= 0.95 * 3000
    assert all(later - earlier > 60 for earlier, later in zip(starts, starts[3000:], strict=False))


@pytest.mark.parametrize("workers", [1, 3])
def test_messages_are_few_though_starts_are_many(workers: int) -> None:
    """A worker asks some twenty times a second and lane, however many starts are granted."""
    simulation = Simulation(60_000, [math.inf] * workers, 0.002)
    starts = [at for at, _ in simulation.run(6.0)]
    assert len([at for at in starts if at >= 4]) >= 0.9 * 2000
    assert len([at for at in simulation.asked if at >= 4]) <= 2 * 60 * workers


def test_the_shares_of_idle_workers_go_to_busy_ones() -> None:
    starts = Simulation(3000, [math.inf, 20.0, 20.0, 20.0], 0.005).run(60.0)
    alone = [at for at, worker in starts if worker == 0 and 30 <= at < 60]
    assert len(alone) >= 0.95 * 1500
    shares = [sum(worker == index and at < 20 for at, worker in starts) for index in range(4)]
    assert min(shares) >= 0.8 * max(shares), "as long as all are busy they share alike"


def test_a_start_that_fits_nothing_hardly_makes_a_worker_ask_for_less() -> None:
    """Costs vary, so some of what was granted is always too small; what is not used at all is asked for no more."""
    pacer = LeasedPacer(1000, lambda n: [Cost(10, 10)] * n, lambda _: 0.0, *[lambda: None] * 3)
    pacer.portion = 100
    pacer.take_in([Grant(1, 1, 1)], 1, 0.0, 0.2)
    pacer.take_in([Grant(number, 10, 10) for number in range(2, 52)], 50, 0.3, 0.4)
    pacer.drop_late(LEASE_SECONDS)
    assert (pacer.portion, len(pacer.pool), pacer.unused) == (99, 50, [1])
    pacer.drop_late(0.3 + LEASE_SECONDS)
    assert (pacer.portion, len(pacer.pool)) == (49, 0)


# ---- runs over stand-ins for actors, in virtual time -----------------------------------------------------------------


class LostError(Exception):
    """As Ray's errors: the actor is lost."""


class Actor:
    """Stands for an actor: its methods take a moment, and what they take and give is copied."""

    every: ClassVar[list[Actor]] = []

    def __init__(self, target: Any) -> None:
        self.target, self.lost, self.answers = target, False, set[asyncio.Future[Any]]()
        self.number = len(self.every)
        self.every.append(self)

    def __reduce__(self) -> Any:
        return actor_of, (self.number,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        async def call(args: bytes, answer: asyncio.Future[Any]) -> None:
            await asyncio.sleep(0.001)
            words, more = pickle.loads(args)
            try:
                result = pickle.dumps(await getattr(self.target, name)(*words, **more))
                await asyncio.sleep(0.001)
            finally:
                self.answers.discard(answer)
            if not answer.done():
                answer.set_result(pickle.loads(result))

        def remote(*args: Any, **more: Any) -> asyncio.Future[Any]:
            loop = asyncio.get_running_loop()
            answer = loop.create_future()
            if self.lost:
                answer.set_exception(LostError("it is dead"))
                answer.exception()
            else:
                self.answers.add(answer)
                task = loop.create_task(call(pickle.dumps((args, more)), answer))
                answer.add_done_callback(lambda _: task.cancel())
            return answer

        return type("Method", (), {"remote": staticmethod(remote)})

    def lose(self) -> None:
        """Die: what is sent is answered to nobody."""
        self.lost = True
        tasks = list(getattr(self.target, "tasks", []))
        if run := getattr(self.target, "run", None):
            tasks += [task for _, task in run.in_flight.values()]
        for task in tasks:
            task.cancel()
        for answer in [answer for answer in self.answers if not answer.done()]:
            answer.set_exception(LostError("The actor is dead because it was lost."))
            answer.exception()


def actor_of(number: int) -> Actor:
    return Actor.every[number]


async def cluster_run(settings: Settings, workers: int) -> Tally:
    """Run on stand-ins; what they have open is closed afterwards."""
    Actor.every.clear()
    handlers = list(LOGGER.handlers)
    try:
        return await ray_cluster.run_cluster(settings, workers, "")
    finally:
        for actor in Actor.every:
            actor.lose()
            if stack := getattr(actor.target, "stack", None):
                await stack.aclose()
        LOGGER.handlers[:] = handlers
        await asyncio.sleep(0.1)


class FakeRay:
    """Stands for the module."""

    def remote(self, **_: Any) -> Callable[[Any], Any]:
        return lambda kind: type("Kind", (), {"remote": staticmethod(lambda *args: Actor(kind(*args)))})

    def kill(self, actor: Actor) -> None:
        actor.lose()

    def shutdown(self) -> None:
        for actor in Actor.every:
            actor.lose()


class FakeCluster(ray_cluster.Cluster):
    """A cluster of stand-ins in this process; `lose` says after how many virtual seconds each worker dies."""

    lose: ClassVar[dict[str, float]] = {}

    def __init__(self, _address: str, workers: int) -> None:
        self.ray, self.errors, self.workers = FakeRay(), LostError, workers or 1

    def here(self) -> None:
        """Nowhere."""

    async def begin(self, actor: Any, name: str) -> None:
        await super().begin(actor, name)
        if name in self.lose:
            asyncio.get_running_loop().call_later(self.lose[name], actor.lose)


@pytest.fixture(autouse=True)
def _no_leftovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ray_cluster, "Cluster", FakeCluster)
    FakeCluster.lose = {}
    filters = list(LOGGER.filters)
    yield
    LOGGER.filters[:] = filters


class Played:
    """How a run over stand-ins went."""

    def __init__(self, tally: Tally, stats: Stats, seconds: float, results: Path) -> None:
        self.tally, self.stats, self.seconds, self.results = tally, stats, seconds, results
        self.lines = read_lines(results)


def play(
    folder: Path, requests: Iterable[Any], options: Options | None = None, workers: int = 3, **flags: Any
) -> Played:
    """Process requests on stand-ins for a cluster."""
    path = write_lines(folder / "job.jsonl", requests)
    options = options or Options()
    options.record_calls = options.record_bodies = True
    values: dict[str, Any] = {
        "max_requests_per_minute": 60000,
        "max_tokens_per_minute": 0,
        "api_key": KEY,
        "progress": "none",
    }

    async def run() -> Played:
        async with LocalProvider(options) as provider:
            loop = asyncio.get_running_loop()
            began = loop.time()
            more = values | {"request_url": provider.url + CHAT} | flags
            tally = await cluster_run(Settings(requests_filepath=str(path), **more), workers)
            return Played(tally, provider.stats, loop.time() - began, path.with_name("job_results.jsonl"))

    return virtually(run())


def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_every_request_has_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Duplicates each have their own, bad lines name where they stand, metadata comes back."""
    requests: list[Any] = chats(500)
    requests += requests[:20]
    lines: list[Any] = [*requests[:3], b"\n", b"{broken\n", *requests[3:]]
    caplog.set_level(logging.INFO, LOGGER.name)
    run = play(tmp_path, lines)
    failed = [line for line in run.lines if isinstance(line[1], list)]
    assert [line[0] for line in failed] == ["{broken"]
    assert failed[0][1][0]["message"].startswith("line 5: ")
    assert one_line_each(requests, [line for line in run.lines if line not in failed])
    assert (run.tally.succeeded, run.tally.failed, run.tally.read, run.tally.exit_code) == (520, 1, 521, 1)
    assert run.stats.calls == run.tally.calls == 520
    assert "520 succeeded, 1 failed" in told(caplog)
    assert not Path(f"{run.results}.shards").exists()
    assert run.results.stat().st_mode & 0o777 == 0o600


def test_workers_read_lines_of_any_length(tmp_path: Path) -> None:
    """Long lines, which are read in a thread, keep their place and number; a bad one does, too."""
    words = "so many words " * 20_000
    requests = [{**chat, "messages": [{"role": "user", "content": words}]} if i % 7 == 3 else chat
                for i, chat in enumerate(chats(40))]  # fmt: skip
    lines = [b"\xef\xbb\xbf \n", *requests[:20], b"\r\n", b'{"model": "' + b"x" * 300_000 + b"\n", *requests[20:]]
    run = play(tmp_path, lines, workers=2)
    failed = [line for line in run.lines if isinstance(line[1], list)]
    assert [line[1][0]["message"].partition(":")[0] for line in failed] == ["line 23"]
    assert one_line_each(requests, [line for line in run.lines if line not in failed])
    assert (run.stats.calls, run.tally.read) == (40, 41)


def test_a_lost_worker_repeats_only_what_it_had_in_flight(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FakeCluster.lose = {"1.1": 2.0, "3.1": 3.0, "3.2": 2.0}
    options = Options(latency=0.5)
    run = play(tmp_path, chats(900), options, max_concurrent_requests=60)
    assert one_line_each(chats(900), run.lines)
    assert run.tally.exit_code == 0
    assert run.tally.succeeded == 900
    assert run.stats.calls - 900 <= 3 * 60
    assert run.stats.max_in_flight <= 60
    assert set(re.findall(r"Worker (\S+) was lost", told(caplog))) == {"1.1", "3.1", "3.2"}


def test_refusals_seen_by_one_worker_slow_all(tmp_path: Path) -> None:
    """Half of the budget that the user believes in: found together, with few refusals."""
    options = Options(requests_per_minute=1200, limit_kind="second_slots", latency=0.3)
    run = play(tmp_path, chats(500), options, workers=4, max_requests_per_minute=2400)
    assert run.tally.succeeded == 500
    assert run.stats.refused <= 10


def test_without_budgets_the_pace_is_found(tmp_path: Path) -> None:
    run = play(tmp_path, chats(1500), Options(latency=0.2), max_requests_per_minute=0)
    assert run.tally.succeeded == 1500
    assert run.seconds < 20


def test_a_few_requests_are_shared_by_all(tmp_path: Path) -> None:
    run = play(tmp_path, chats(60), Options(latency=1.0), max_concurrent_requests=3)
    assert run.tally.succeeded == 60
    assert run.seconds < 25


def test_resuming_takes_any_mixture(tmp_path: Path) -> None:
    """Shards that a killed driver has left, and the results file, in whatever order: nothing is sent again."""
    requests = chats(100) + chats(10)
    first = play(tmp_path, requests)
    lines = first.results.read_bytes().splitlines(keepends=True)
    shards = Path(f"{first.results}.shards")
    shards.mkdir()
    first.results.write_bytes(b"".join(lines[:40]))
    (shards / "20260101T000000-000001.jsonl").write_bytes(b"".join(lines[30:70]))  # ten are in both
    (shards / "20260101T000000-000002.jsonl").write_bytes(b"".join(lines[70:100]) + lines[100][:50])  # torn
    foreign = b'[{"model": "m", "messages": []}, {"choices": []}]\n'
    (shards / "20260102T000000-000001.jsonl").write_bytes(foreign)
    second = play(tmp_path, requests)
    assert one_line_each(requests, [line for line in second.lines if line[0]["model"] != "m"])
    assert len(second.lines) == 111, "a result of another file is kept"
    assert second.tally.finished_before + second.stats.calls == 110
    assert second.stats.calls <= 10 + 10, "the rest, and duplicates among what was in both"
    assert not shards.exists()
    third = play(tmp_path, requests)
    assert (third.tally.finished_before, third.stats.calls) == (110, 0)


def test_a_shard_that_was_joined_already_adds_nothing(tmp_path: Path) -> None:
    """The driver was killed after the joining, before the file was removed."""
    first = play(tmp_path, chats(50))
    shards = Path(f"{first.results}.shards")
    shards.mkdir()
    (shards / "20260101T000000-000001.jsonl").write_bytes(first.results.read_bytes())
    before = sorted(first.results.read_bytes().splitlines())
    second = play(tmp_path, chats(50))
    assert second.stats.calls == 0
    assert sorted(second.results.read_bytes().splitlines()) == before
    assert not shards.exists()


def test_restart_keeps_the_old_shards_apart(tmp_path: Path) -> None:
    first = play(tmp_path, chats(20))
    shards = Path(f"{first.results}.shards")
    shards.mkdir()
    (shards / "20260101T000000-000001.jsonl").write_bytes(first.results.read_bytes())
    second = play(tmp_path, chats(20), restart=True)
    assert second.stats.calls == 20
    assert [path.name for path in tmp_path.glob("job_results.jsonl.shards.*/*")] == ["20260101T000000-000001.jsonl"]


def test_the_plain_program_leaves_shards_to_the_cluster(tmp_path: Path) -> None:
    """It does not know what is in them and would send it again; once they are joined it goes on."""
    first = play(tmp_path, chats(20))
    shards = Path(f"{first.results}.shards")
    shards.mkdir()
    first.results.rename(shards / "20260101T000000-000001.jsonl")
    plain = process_api_requests_from_file(tmp_path / "job.jsonl", api_key=KEY)
    with pytest.raises(UsageError, match=r"job_results.jsonl.shards holds .* workflows.ray_cluster` goes on with it"):
        asyncio.run(plain)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["job.jsonl", shards.name], "nothing was touched"
    assert play(tmp_path, chats(20)).stats.calls == 0
    assert asyncio.run(process_api_requests_from_file(tmp_path / "job.jsonl", api_key=KEY)).finished_before == 20


def test_limit_and_what_is_left(tmp_path: Path) -> None:
    first = play(tmp_path, chats(90), limit=30)
    assert (len(first.lines), first.tally.exit_code) == (30, 0)
    second = play(tmp_path, chats(90))
    assert (second.stats.calls, second.tally.finished_before) == (60, 30)
    assert one_line_each(chats(90), second.lines)


def test_a_refused_key_stops_all(tmp_path: Path) -> None:
    run = play(tmp_path, chats(200), Options(api_key="sk-another-key-0123456789"))
    assert run.tally.exit_code == 3
    assert "Check that the key" in run.tally.stop_reason
    assert run.stats.calls < 200
    assert run.lines == []


def test_costs_are_bounded_for_all_together(tmp_path: Path) -> None:
    prices: dict[str, Any] = {"input_price": 0.0, "output_price": 1e6 / 16, "max_cost": 50.0}  # an answer costs 1
    requests = [{**request, "max_tokens": 16} for request in chats(200)]
    run = play(tmp_path, requests, Options(completion_tokens=16, latency=0.2), **prices)
    assert run.tally.exit_code == 3
    assert "--max_cost" in run.tally.stop_reason
    assert 40 <= len(run.lines) <= 50


def test_an_outage_is_waited_out(tmp_path: Path) -> None:
    options = Options(latency=0.1, outage_schedule=[[2.0, 10.0, "503"]])
    run = play(tmp_path, chats(400), options, max_requests_per_minute=1200, workers=2)
    assert one_line_each(chats(400), run.lines)
    assert run.tally.succeeded == 400


def test_files_are_guarded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is the request file too"):
        play(tmp_path, chats(3), save_filepath=str(tmp_path / "job.jsonl"))
    (tmp_path / "job_results.jsonl").write_text("my diary\n")
    with pytest.raises(UsageError, match="its first line is no result line"):
        play(tmp_path, chats(3))


def test_shards_are_private_and_survive_a_stop(tmp_path: Path) -> None:
    """What is interrupted is joined; the same command continues."""
    path = write_lines(tmp_path / "job.jsonl", chats(300))

    async def run() -> tuple[Tally, Stats]:
        async with LocalProvider(Options(latency=0.5)) as provider:
            knobs = Settings(
                requests_filepath=str(path), request_url=provider.url + CHAT, api_key=KEY, progress="none",
                max_tokens_per_minute=0, max_concurrent_requests=10,
            )  # fmt: skip
            asyncio.get_running_loop().call_later(5.0, signal.raise_signal, signal.SIGINT)
            return await cluster_run(knobs, 2), provider.stats

    tally, stats = virtually(run())
    lines = read_lines(tmp_path / "job_results.jsonl")
    assert tally.exit_code == 130
    assert 0 < len(lines) == stats.calls == tally.succeeded < 300, "all that was sent has been waited for"
    assert not (tmp_path / "job_results.jsonl.shards").exists()
    assert play(tmp_path, chats(300)).stats.calls == 300 - len(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def words(path: Path, url: str, *flags: object) -> list[str]:
    return [
        *(sys.executable, "-m", "workflows.ray_cluster", "--requests_filepath", str(path)),
        *("--request_url", url + CHAT, "--progress", "none", "--max_tokens_per_minute", "0", *map(str, flags)),
    ]


def environment(**more: str) -> dict[str, str]:
    return clean_environment(RAY_USAGE_STATS_ENABLED="0", **more)


def command(path: Path, url: str, *flags: object) -> subprocess.CompletedProcess[str]:
    line = words(path, url, *flags)
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)


def test_a_dry_run_needs_no_cluster(tmp_path: Path, provider: ProviderProcess) -> None:
    path = write_lines(tmp_path / "job.jsonl", [*chats(10), b"{\n"])
    done = command(path, provider.url, "--dry_run", "--num-workers", 5)
    assert done.returncode == 1
    assert "10 requests can be sent, 1 lines cannot." in done.stdout
    assert not (tmp_path / "job_results.jsonl").exists()
    if importlib.util.find_spec("pyarrow"):
        line = words(path, provider.url, "--dry_run")
        line[line.index(str(path))] = path.as_uri()
        again = subprocess.run(
            line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert (again.returncode, again.stdout) == (1, done.stdout), again.stderr


def test_wrong_flags_are_told(tmp_path: Path, provider: ProviderProcess) -> None:
    done = command(tmp_path / "none.jsonl", provider.url)
    assert (done.returncode, "cannot be read" in done.stderr) == (2, True)
    assert command(tmp_path / "none.jsonl", provider.url, "--num_workers", -1).returncode == 2
    done = command(tmp_path / "none.jsonl", provider.url, "--save_filepath", "s3://bucket/results.jsonl")
    assert (done.returncode, "a file on this machine" in done.stderr) == (2, True)


def test_the_code_can_be_sent_with_a_submitted_job() -> None:
    """`ray job submit` joins the runtime environment with that of the job, and makes a copy for it."""
    asked: dict[str, Any] = {}
    cluster = FakeCluster("", 1)
    cluster.ray = SimpleNamespace(init=lambda **more: asked.update(more))
    cluster._connect("auto", 1)
    sent = copy.deepcopy(asked["runtime_env"])["py_modules"]
    assert [Path(path).name for path in sent] == ["api_request_parallel_processor.py", "workflows"]
    assert all(Path(path).exists() for path in sent)


def test_without_ray_it_says_what_to_install(tmp_path: Path, provider: ProviderProcess) -> None:
    path, line = write_lines(tmp_path / "job.jsonl", chats(3)), "import runpy, sys; sys.modules['ray'] = None; "
    line += "sys.argv[0] = 'ray_cluster'; runpy.run_module('workflows.ray_cluster', run_name='__main__')"
    call = [sys.executable, "-c", line, *words(path, provider.url)[3:]]
    done = subprocess.run(call, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pip install" in done.stderr
    assert "ray" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["job.jsonl"], "nothing was touched"


def test_requests_from_an_address_are_read_as_a_stream(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = write_lines(tmp_path / "job.jsonl", chats(50))
    with ray_cluster.open_requests(path.as_uri()) as file:
        assert file.read() == path.read_bytes()
    with pytest.raises(UsageError, match="cannot be read"):
        ray_cluster.open_requests((tmp_path / "none.jsonl").as_uri())


# ---- a real cluster --------------------------------------------------------------------------------------------------


@pytest.fixture
def real_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores and two nodes; gone afterwards, with all that it wrote."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("OPENAI_API_KEY")
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray.", dir="/tmp", ignore_cleanup_errors=True) as folder:  # a short name
        monkeypatch.setenv("RAY_TMPDIR", folder)  # subtle: the address of the cluster would be kept elsewhere otherwise
        Path(folder, "ray").mkdir()
        args: dict[str, Any] = {"num_cpus": 0, "object_store_memory": 80 << 20}
        cluster: Any = Cluster(initialize_head=True, head_node_args=args | {"include_dashboard": False})
        try:
            cluster.folder = Path(folder)
            cluster.workers = [cluster.add_node(**args | {"num_cpus": 2}) for _ in range(2)]
            yield cluster
        finally:
            cluster.shutdown()


class Driver:
    """The program, on a real cluster."""

    def __init__(self, cluster: Any, provider: ProviderProcess, path: Path, *flags: object) -> None:
        more = ("--ray_address", cluster.address, "--max_concurrent_requests", 30, "--max_requests_per_minute", 0)
        line = words(path, provider.url, "--num_workers", 3, *more, *flags)
        self.said = path.with_suffix(".log").open("a+b")
        self.process = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=self.said, stderr=self.said)

    def wait_for_calls(self, provider: ProviderProcess, number: int) -> None:
        give_up = time.monotonic() + 90
        while provider.ask("/_stats")["calls"] < number:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < give_up, self.text()
            time.sleep(0.05)

    def wait(self) -> int:
        return self.process.wait(120)

    def text(self) -> str:
        self.said.seek(0)
        return self.said.read().decode()


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_a_real_cluster(real_cluster: Any, provider: ProviderProcess, tmp_path: Path) -> None:
    """A node is killed, then the driver, then comes Ctrl-C: what is in flight is all that is asked twice."""
    provider.ask("/_control", {"latency": 0.5})
    path, results = write_lines(tmp_path / "job.jsonl", chats(900)), tmp_path / "job_results.jsonl"
    driver = Driver(real_cluster, provider, path)
    driver.wait_for_calls(provider, 150)
    real_cluster.remove_node(real_cluster.workers[0], allow_graceful=False)
    driver.wait_for_calls(provider, 350)
    driver.process.kill()
    driver.wait()
    assert re.search(r"Worker \S+ was lost", driver.text())
    calls = -1
    while calls < (calls := provider.ask("/_stats")["calls"]):  # until the workers that it has left behind are gone
        time.sleep(2)
    files = [results, *tmp_path.glob("job_results.jsonl.shards/*.jsonl")]
    kept = len({line for file in files for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")})
    assert 0 < calls - kept <= 2 * 30 + 60, "in flight at both kills, and answered a moment before but not yet told"

    driver = Driver(real_cluster, provider, path)
    driver.wait_for_calls(provider, provider.ask("/_stats")["calls"] + 100)
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait() == 130, driver.text()
    assert "SIGINT: nothing new is started" in driver.text()
    assert not list(tmp_path.glob("*.shards/*")) or len(read_lines(results)) < 900

    driver = Driver(real_cluster, provider, path)
    assert driver.wait() == 0, driver.text()
    assert one_line_each(chats(900), read_lines(results))
    assert not list(tmp_path.glob("*.shards"))
    stats = provider.ask("/_stats")
    assert stats["max_in_flight"] <= 60, "30, and 30 that the killed driver has left behind"
    assert stats["calls"] - calls == 900 - kept, "a kill costs what it caught, and Ctrl-C nothing"
    written = [file for file in real_cluster.folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert written
    assert not [file for file in [*written, *tmp_path.iterdir()] if KEY.encode() in file.read_bytes()]
