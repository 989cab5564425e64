"""Station 3, pace: ceilings, order and pauses by hand and by hypothesis; the goals by simulation in virtual time."""

from __future__ import annotations

import collections
import itertools
import math
import random
import statistics
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_request_parallel_processor import Cost, Outcome, Pacer, ServerLimits, Ticket
from tests import simulation
from tests.simulation import HEADER_MODES, ROWS, Job, Queueing, Unlimited, measure, simulate

ONE = Cost(0, 0, 0)
ACCEPTED, REFUSED, FAILED = Outcome.ACCEPTED, Outcome.REFUSED, Outcome.FAILED


def run_until(pacer: Pacer, cost: Cost, now: float, most: float = 1e6) -> float:
    """The time at which `pacer` lets a request of `cost` start; asks again whenever it says so."""
    end = now + most
    while (wait := pacer.delay(cost, now)) > 0:
        assert now + wait < end, "waits for ever"
        now += wait
    return now


# --- the goals: every kind of server, with every kind of headers


@pytest.mark.parametrize("mode", HEADER_MODES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_uses_the_budget_and_is_almost_never_refused(row: simulation.Row, mode: str) -> None:
    """Each kind of server is used nearly fully, with hardly a refused call, whatever its headers tell."""
    index = ROWS.index(row) * 3 + HEADER_MODES.index(mode)
    jobs = [(1800, 1.0), (3000, 2.0), (6000, 1.0), (12000, 1.0)]
    for offset in range(2):
        limit, minutes = jobs[(index + offset) % len(jobs)]
        flavour = ("ceil", "float", "ms")[offset]
        elapsed, refused, run = measure(row, limit, minutes, mode, index + offset, flavour=flavour)
        where = f"{limit} a minute for {minutes} min, seed {index + offset}: {run.found}"
        assert math.isnan(elapsed) or elapsed <= row.time, where
        assert refused <= row.refused, where


@pytest.mark.parametrize("mode", HEADER_MODES)
@pytest.mark.parametrize(
    "row", [row for row in ROWS if "minute" not in row.name and "60 s" not in row.name], ids=lambda row: row.name
)
def test_a_short_job_pays_for_learning_once(row: simulation.Row, mode: str) -> None:
    """A job of 30 s keeps the same goals; a silent server may refuse twice the share."""
    elapsed, refused, run = measure(row, 6000, 0.5, mode, 11)
    assert elapsed <= row.time, run.found
    assert refused <= row.refused * (2 if mode == "none" else 1)


@pytest.mark.parametrize("limit", [1800, 12000])
def test_a_job_within_one_minute_s_budget_takes_seconds(limit: int) -> None:
    """Where a minute's budget may be burst, a job smaller than it is done after the latency and a short ramp."""
    server = simulation.Bucket(limit, 60, lambda job: 1.0)
    run = simulate(server, [Job()] * (limit - 100), Pacer(limit), seed=3)
    assert run.finished < 8
    assert run.refused == 0


# --- servers that are in no table


@pytest.mark.parametrize("flavour", ["ceil", "float"])
@pytest.mark.parametrize(
    ("server", "rate", "share"),
    [
        (lambda: simulation.Bucket(6000, 5, lambda job: 1.0), 100, 1.2),
        (lambda: simulation.Slots(1000, seconds=10.0, phase=3.3), 100, 1.2),
        (lambda: simulation.Sliding(50, window=1.0), 50, 1.6),
        (lambda: simulation.Bucket(3000, 60, lambda job: 1.0), 50, 1.2),
    ],
    ids=["five-second bucket", "ten-second slots", "half, sliding second", "half, minute bucket"],
)
def test_other_servers_are_learned_as_well(server: object, rate: float, share: float, flavour: str) -> None:
    """Limits of other lengths than a second or a minute are found, too."""
    run = simulate(
        server() if callable(server) else server, [Job()] * 9000, Pacer(6000), mode="retry-after", flavour=flavour
    )
    assert run.seconds <= share * 9000 / rate
    assert run.refused_share <= 0.04


def test_refusals_that_come_as_late_as_replies_are_survived() -> None:
    """A gateway that refuses only after half a second costs more refusals, but no collapse."""
    server = simulation.Bucket(6000, 1, lambda job: 1.0)
    run = simulate(server, [Job()] * 6000, Pacer(6000), refusal=(0.4, 0.6))
    assert run.seconds <= 1.2 * 59
    assert run.refused_share <= 0.06


# --- queues


@pytest.mark.parametrize("slots", [1, 8, 50, 200])
@pytest.mark.parametrize("spread", [0.0, 0.5], ids=["constant", "lognormal"])
def test_a_server_that_queues_is_kept_busy_but_not_flooded(slots: int, spread: float) -> None:
    """A server that never refuses works at 95 % of its rate or more, and its queue stays short."""
    server, jobs = Queueing(slots), max(400, slots * 240)
    run = simulate(server, [Job()] * jobs, Pacer(), latency=lambda chance: chance.lognormvariate(math.log(0.5), spread))
    assert server.least >= 0.95 * run.finished
    late = run.latencies[len(run.latencies) // 2 :]
    assert statistics.mean(late) <= 0.5 * (4 if slots > 1 else 8)
    assert max(run.latencies) < 40


def test_a_slow_server_behind_a_large_budget_is_not_flooded() -> None:
    """The window holds also where the user's budget allows twice what the server can do."""
    run = simulate(Queueing(25), [Job()] * 6000, Pacer(6000), latency=lambda chance: 0.5)
    assert 6000 / run.finished >= 0.95 * 50
    assert statistics.mean(run.latencies[3000:]) < 2


def test_ten_thousand_in_flight_within_ten_seconds() -> None:
    """Without limits and with replies after 10 s, 10,000 requests are under way after 10 s."""
    run = simulate(Unlimited(), [Job()] * 30000, Pacer(), latency=lambda chance: 10.0, until=10.0)
    assert run.peak_in_flight >= 10_000


def test_latency_that_changes_without_a_queue_costs_little() -> None:
    """Replies that become four times slower for reasons of their own do not starve the run."""
    served = itertools.count()
    run = simulate(
        Unlimited(),
        [Job()] * 12000,
        Pacer(6000),
        latency=lambda chance: chance.lognormvariate(math.log(0.5 if next(served) < 6000 else 2.0), 0.5),
    )
    assert run.seconds <= 1.15 * 60 + 5


# --- fast servers: replies are the clock


@pytest.mark.parametrize(("most", "delay"), [(64, 0.01), (0, 0.15)])
def test_a_fast_server_is_busy_from_the_first_moment(most: int, delay: float) -> None:
    """Without budgets, a server of 8,333 replies a second is used fully at once, and its queue stays short."""
    server = Queueing(1, latency=0.0005)
    run = simulate(server, [Job()] * 40000, Pacer(0, 0, most), latency=lambda chance: 0.00012, jitter=0.00001)
    assert server.least >= 0.97 * run.finished
    assert run.starts[199] < 0.05
    assert statistics.mean(run.latencies[20000:]) < delay
    assert max(run.latencies) < 1


def test_a_queue_within_the_users_own_concurrency_is_no_reason_to_shrink() -> None:
    """Where 64 in flight are slow only because the machine is busy, about 64 stay in flight to the end."""
    pacer = Pacer(0, 0, 64)
    run = simulate(Queueing(1, latency=0.0005), [Job()] * 20000, pacer, latency=lambda chance: 0.0005, jitter=0.00001)
    assert statistics.mean(run.latencies[10000:]) > 0.03
    assert run.peak_in_flight == 64


@pytest.mark.parametrize(("latency", "seconds"), [(0.005, 0.1), (0.05, 0.6)])
def test_thousands_are_in_flight_after_a_few_round_trips(latency: float, seconds: float) -> None:
    """Each round of replies about doubles what is in flight, where no queue shows."""
    run = simulate(Unlimited(), [Job()] * 60000, Pacer(), latency=lambda chance: latency, jitter=0.0001, until=seconds)
    assert run.peak_in_flight >= 4000


def test_a_known_budget_is_not_ramped_by_replies() -> None:
    """Fast replies change nothing where the user named a budget."""
    starts = [
        simulate(Unlimited(), [Job()] * 1400, Pacer(1500), latency=lambda _, seconds=seconds: seconds).starts[60]  # type: ignore[misc]
        for seconds in (0.002, 2.0)
    ]
    assert starts[0] == pytest.approx(starts[1], rel=0.05)


# --- limits that the server tells


def paced(pacer: Pacer, now: float, seconds: float, limits: ServerLimits | None) -> int:
    """How many requests start within `seconds`; each is answered at once and tells `limits`."""
    end, count = now + seconds, 0
    while (now := run_until(pacer, Cost(100, 200), now)) < end:
        pacer.finish(pacer.start(Cost(100, 200), now), ACCEPTED, now, 100, limits)
        count += 1
    return count


@pytest.mark.parametrize("limits", [ServerLimits(requests_per_minute=600), ServerLimits(tokens_per_minute=60000)])
def test_a_limit_that_the_server_tells_is_believed_at_once(limits: ServerLimits) -> None:
    """A lower one becomes the ceiling of the minute, or the even pace where seconds are counted."""
    pacer = Pacer(6000, 10**6)
    assert 590 <= paced(pacer, 0.0, 59, limits) <= 600
    even = Pacer(6000, 10**6, per_second=True)
    assert paced(even, 0.0, 30, limits) == pytest.approx(300, rel=0.03)
    assert Pacer(0).describe() == ""
    found = "this server takes about 9.85 requests a second; you allowed 100"
    assert pacer.describe() == (found if limits.requests_per_minute else "")


def test_a_told_limit_is_followed_when_it_rises_or_disappears() -> None:
    """The pace goes back to the user's budget."""
    for later in (None, ServerLimits(requests_per_minute=60000), ServerLimits(requests_per_minute=1200)):
        pacer = Pacer(3000, per_second=True)
        assert paced(pacer, 0.0, 20, ServerLimits(requests_per_minute=600)) == pytest.approx(200, rel=0.05)
        goal = 20 if later and later.requests_per_minute == 1200 else 50
        assert paced(pacer, 20.0, 20, later) == pytest.approx(20 * goal, rel=0.05)


@pytest.mark.parametrize("told", [None, 6000.0, 1e9, 0.0, -5.0, math.nan, math.inf])
def test_a_told_limit_that_is_higher_or_absurd_changes_nothing(told: float | None) -> None:
    """The user's budget stays."""
    pacer = Pacer(6000, per_second=True)
    assert paced(pacer, 0.0, 10, ServerLimits(requests_per_minute=told)) == pytest.approx(985, rel=0.02)


@pytest.mark.parametrize("flavour", ["ceil", "float", "ms"])
@pytest.mark.parametrize("seed", range(4))
def test_a_deep_fall_is_learned_however_short_the_pauses_that_the_server_asks_for(seed: int, flavour: str) -> None:
    """A server that names only the time to its next token is slowed down for, not asked again and again."""
    row = next(row for row in ROWS if row.name.startswith("falls"))
    elapsed, refused, run = measure(row, 1800, 1.0, "retry-after", seed, flavour=flavour)
    assert elapsed <= row.time, run.found
    assert refused <= 0.02


# --- ceilings


def worst_minute(starts: list[tuple[float, Ticket]], index: int) -> int:
    """The most of one currency within any 60 s, as it stands in the tickets now."""
    window: collections.deque[tuple[float, Ticket]] = collections.deque()
    most = total = 0
    for at, ticket in starts:
        while window and at - window[0][0] >= 60:
            total -= window.popleft()[1].held[index]
        window.append((at, ticket))
        total += ticket.held[index]
        most = max(most, total)
    return most


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 5000), st.booleans())
def test_no_minute_holds_more_than_the_budgets(seed: int, requests: int, tokens: int, per_second: bool) -> None:
    """Over random traffic, replies, refusals, settlements and clock steps, no start exceeds a ceiling."""
    chance, pacer = random.Random(seed), Pacer(requests, tokens, per_second=per_second)
    now, flying = chance.uniform(0, 1e6), list[Ticket]()
    starts: list[tuple[float, Ticket]] = []
    for _ in range(400):
        now += chance.choice(
            [0.0, 0.0, 0.001, chance.uniform(0, 2), chance.uniform(0, 90), chance.choice([0.0, 7200.0])]
        )
        cost = Cost(chance.randint(0, 400), chance.randint(0, 4000), 0)
        recent = [ticket for at, ticket in starts if now - at < 60]
        if pacer.delay(cost, now) == 0:
            assert len(recent) + 1 <= requests
            held = sum(ticket.held[1] for ticket in recent)
            assert not tokens or held + cost.expected <= tokens or held == 0
            ticket = pacer.start(cost, now)
            starts.append((now, ticket))
            flying.append(ticket)
        while flying and chance.random() < 0.5:
            ticket = flying.pop(chance.randrange(len(flying)))
            pacer.finish(ticket, chance.choice(list(Outcome)), now, chance.choice([None, 0, chance.randint(0, 900)]))
    assert worst_minute(starts, 0) <= requests


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_asking_again_when_told_always_leads_to_a_start(seed: int) -> None:
    """Whatever was refused or settled, the head of the line starts within bounded time once nothing is in flight."""
    chance = random.Random(seed)
    pacer = Pacer(chance.choice([0, 60, 6000]), chance.choice([0, 1000, 10**6]))
    now = 0.0
    for _ in range(60):
        now = run_until(pacer, Cost(chance.randint(0, 5000), 5000), now, most=4000)
        ticket = pacer.start(Cost(chance.randint(0, 5000), 5000), now)
        now += chance.uniform(0, 3)
        limits = ServerLimits(retry_after=chance.choice([None, 0.0, 1.0, 30.0, 1e9]))
        pacer.finish(ticket, chance.choice(list(Outcome)), now, chance.choice([None, 3000]), limits)


def test_settling_above_the_reservation_makes_later_starts_wait() -> None:
    """Usage that is higher than expected counts at once."""
    pacer = Pacer(0, 1000)
    ticket = pacer.start(Cost(100, 100), 0.0)
    pacer.finish(ticket, ACCEPTED, 0.5, 1000)
    assert 60 <= run_until(pacer, Cost(1, 1), 1.0) < 61


def test_a_request_above_the_whole_budget_starts_when_the_minute_is_empty() -> None:
    """It is the one exception, waits no longer than that, and the next one waits for it."""
    pacer = Pacer(0, 1000)
    pacer.finish(pacer.start(Cost(10, 10), 0.0), ACCEPTED, 0.1, 10)
    at = run_until(pacer, Cost(5000, 5000), 30.0)
    assert 60 <= at < 61
    pacer.finish(pacer.start(Cost(5000, 5000), at), ACCEPTED, at + 1, 5000)
    assert 120 <= run_until(pacer, Cost(1, 1), at + 1) < 122


def test_a_large_request_waits_no_longer_than_the_budget_forces() -> None:
    """Strictly first come first served: the large one starts as soon as enough has left the minute."""
    pacer = Pacer(0, 1000)
    now = 0.0
    for _ in range(10):
        now = run_until(pacer, Cost(100, 100), now)
        pacer.finish(pacer.start(Cost(100, 100), now), ACCEPTED, now, 100)
    assert 60 <= run_until(pacer, Cost(300, 300), now) <= 61 + now


def test_budgets_may_change_during_a_run() -> None:
    """A lower ceiling holds from the next start on, a higher one frees at once."""
    pacer = Pacer(10)
    now = 0.0
    for _ in range(10):
        now = run_until(pacer, ONE, now)
        pacer.start(ONE, now)
    assert pacer.delay(ONE, now + 10) > 0
    pacer.set_budgets(1000, 0)
    assert run_until(pacer, ONE, now + 10) < now + 11


# --- gaps, pauses and places


@pytest.mark.parametrize("gap", [0.01, 0.15])
def test_the_shortest_gap_is_never_undercut_and_kept_exactly(gap: float) -> None:
    """No two starts are closer than the gap, and the mean is the gap."""
    pacer, now, starts = Pacer(min_gap_seconds=gap, requests_per_minute=60000), 1e6, []
    for _ in range(300):
        now = run_until(pacer, ONE, now)
        pacer.finish(pacer.start(ONE, now), ACCEPTED, now)
        starts.append(now)
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert min(gaps) >= gap
    assert statistics.mean(gaps) <= gap * 1.01


def test_at_most_so_many_in_flight() -> None:
    """Only a reply frees a place when all that the user allows are taken."""
    pacer = Pacer(60000, max_concurrent=2)
    first = pacer.start(ONE, 0.0)
    pacer.start(ONE, 1.0)
    assert pacer.delay(ONE, 5.0) == math.inf
    pacer.finish(first, FAILED, 6.0)
    assert pacer.delay(ONE, 6.0) == 0
    assert pacer.in_flight == 1


@pytest.mark.parametrize(("asked", "least", "most"), [(2.0, 2, 3), (60.0, 60, 61), (300.0, 300, 301), (1e9, 60, 3600)])
def test_the_pause_that_a_server_asks_for_is_obeyed(asked: float, least: float, most: float) -> None:
    """Seconds and minutes are obeyed, absurd ones are bounded."""
    pacer = Pacer(6000)
    ticket = pacer.start(ONE, 0.0)
    pacer.finish(ticket, REFUSED, 0.1, None, ServerLimits(retry_after=asked))
    assert least <= run_until(pacer, ONE, 0.1) <= most + 0.1


def test_asking_for_no_pause_is_no_word_about_the_pace() -> None:
    """Random refusals with `retry-after: 0` cost as little as those that say nothing."""

    def seconds_of_a_job(told: ServerLimits | None) -> float:
        pacer, now, chance = Pacer(6000), 0.0, random.Random(1)
        for _ in range(1000):
            now = run_until(pacer, ONE, now)
            refused = chance.random() < 0.1
            pacer.finish(pacer.start(ONE, now), REFUSED if refused else ACCEPTED, now, None, told if refused else None)
        return now

    assert seconds_of_a_job(ServerLimits(retry_after=0)) == seconds_of_a_job(None)


ABSURD = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e300)


@pytest.mark.parametrize("value", ABSURD)
def test_absurd_headers_do_no_harm(value: float) -> None:
    """Limits of 0, NaN or infinity are ignored: the run goes on within seconds, or a bounded pause."""
    limits = ServerLimits(*[value] * 3)
    pacer, now = Pacer(6000, 100000), 0.0
    for index in range(40):
        now = run_until(pacer, Cost(10, 20), now, most=1000)
        ticket = pacer.start(Cost(10, 20), now)
        pacer.finish(ticket, REFUSED if index == 20 else ACCEPTED, now + 0.1, 10, limits)
        now += 0.1
    assert now < 4000


def test_many_refusals_of_one_burst_are_one_signal() -> None:
    """A hundred refusals of requests that were already under way lower the pace no further than one."""
    paces = []
    for count in (1, 100):
        pacer, now = Pacer(6000), 0.0
        tickets: list[Any] = []
        while len(tickets) < 150:
            now = run_until(pacer, ONE, now)
            tickets.append(pacer.start(ONE, now))
        for ticket in tickets[50 : 50 + count]:
            pacer.finish(ticket, REFUSED, now + 0.03)
        starts = []
        for _ in range(40):
            now = run_until(pacer, ONE, now + 1e-4)
            pacer.finish(pacer.start(ONE, now), ACCEPTED, now)
            starts.append(now)
        paces.append(starts[-1] - starts[0])
    assert paces[1] <= 2 * paces[0]


@pytest.mark.parametrize("step", [0.0, 3 * 3600.0, 1e9])
def test_a_clock_that_stands_still_or_jumps_is_harmless(step: float) -> None:
    """After a laptop's sleep the run goes on at its pace, without a burst over the ceiling."""
    pacer, now = Pacer(600), 0.0
    for _ in range(20):
        now = run_until(pacer, ONE, now)
        pacer.finish(pacer.start(ONE, now), ACCEPTED, now)
    now, started = now + step, 0
    while pacer.delay(ONE, now) == 0:
        pacer.finish(pacer.start(ONE, now), ACCEPTED, now)
        started += 1
    assert started <= 600
    assert run_until(pacer, ONE, now) < now + 61


def test_a_server_known_to_count_by_the_second_is_never_burst() -> None:
    """Even pace from the first request on."""
    run = simulate(simulation.Slots(100, phase=0.3), [Job()] * 3000, Pacer(6000, per_second=True))
    assert run.refused == 0
    assert run.seconds <= 1.05 * 30


def test_a_concurrency_hint_is_a_start_and_no_ceiling() -> None:
    """A known cap is respected from the beginning; a hint that is too low is outgrown."""
    capped = simulate(simulation.Concurrency(50), [Job()] * 3000, Pacer(concurrency_hint=50))
    assert capped.refused_share < 0.005
    free = simulate(Unlimited(), [Job()] * 6000, Pacer(6000, concurrency_hint=4))
    assert free.peak_in_flight > 20


def test_what_was_found_is_told_in_words() -> None:
    """The summary names the limit and what was allowed."""
    _, _, run = measure(next(row for row in ROWS if row.name.startswith("half")), 6000, 1.0, "none", 1)
    assert "requests a second; you allowed 100" in run.found
    assert Pacer(6000).describe() == ""


@pytest.mark.parametrize("budget", [0, 3600])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_server_that_allows_no_burst_of_a_second(budget: int, seed: int) -> None:
    """As nginx with rate=30r/s burst=5: its pace is approached step by step, and told as what it is."""
    server = simulation.Bucket(1800, 1 / 6, lambda job: 1.0)
    run = simulate(server, [Job()] * 3000, Pacer(budget), seed=seed)
    assert run.seconds <= 1.35 * 100
    assert run.refused_share < 0.01
    assert 20 < float(run.found.split()[4]) < 32


@pytest.mark.parametrize("budget", [0, 1200])
@pytest.mark.parametrize("seed", [2, 5, 9])
def test_a_server_that_allows_not_two_at_once(budget: int, seed: int) -> None:
    """As nginx with rate=10r/s and no burst: its refusals are not taken for chance, which would let go of the pace."""
    server = simulation.Bucket(600, 1 / 10, lambda job: 1.0)
    run = simulate(server, [Job()] * 1000, Pacer(budget), seed=seed)
    assert run.seconds <= 1.75 * 100
    assert run.refused_share < 0.02


def test_the_pacer_is_cheap_whatever_is_in_flight() -> None:
    """Ten thousand in flight change nothing; an hour's traffic is simulated in moments (generous bound)."""
    begun = time.process_time()
    run = simulate(Unlimited(), [Job()] * 60000, Pacer(), latency=lambda chance: 10.0)
    assert run.refused == 0
    assert time.process_time() - begun < 20
