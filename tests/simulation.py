"""Simulate the pacer against the known kinds of rate limits, in virtual time.

    python -m tests.simulation            the table, as Markdown
    python -m tests.simulation --quick    one seed and one limit

A job is a line of requests, strictly first come first served; refused ones go back to its head. "Possible" is the
time that a client needs which knows the server's rule and keeps both ceilings; time counts from the first start to
the start of the last request that the server accepted.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import heapq
import itertools
import math
import random
import statistics
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import Cost, Outcome, Pacer, ServerLimits, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER_MODES = ("x-ratelimit", "retry-after", "none")
MEDIAN_LATENCY, SPREAD = 0.5, 0.5


@dataclasses.dataclass(slots=True)
class Job:
    """One request: what it truly uses, and what the client sees of it before sending."""

    prompt: int = 0
    output: int = 0
    cap: int | None = None
    seen: int = 0  # the prompt as the client's tokenizer counts it


# --- servers: `admit` answers None (accepted) or the seconds after which it would; `told` is (limit, remaining, reset)


class Bucket:
    """A token bucket: full at the start, refilled continuously. Counts what `charge` says when a request arrives."""

    def __init__(self, per_minute: float, seconds: float, charge: Callable[[Job], float], late: bool = False) -> None:
        self.rate, self.seconds, self.charge, self.late = per_minute / 60, seconds, charge, late
        self.level, self.at = self.rate * seconds, 0.0

    def rate_at(self, now: float) -> float:
        return self.rate

    def _refill(self, now: float) -> float:
        rate = self.rate_at(now)
        self.level = min(rate * self.seconds, self.level + rate * max(0.0, now - self.at))
        self.at = max(self.at, now)
        return rate

    def admit(self, job: Job, now: float) -> float | None:
        rate = self._refill(now)
        need = min(float(job.prompt) if self.late else self.charge(job), rate * self.seconds)
        if self.level >= need:
            self.level -= job.prompt if self.late else self.charge(job)
            return None
        return (need - self.level) / rate

    def leave(self, job: Job, now: float) -> None:
        if self.late:
            self.level -= self.charge(job) - job.prompt

    def told(self, now: float) -> tuple[float, float, float]:
        rate = self.rate_at(now)
        return rate * 60, max(0.0, math.floor(self.level)), max(0.0, rate * self.seconds - self.level) / rate


class ChangingBucket(Bucket):
    """A second's bucket whose limit falls to a share of itself for a while."""

    def __init__(self, per_minute: float, falls: float, back: float, share: float = 1 / 3) -> None:
        super().__init__(per_minute, 1.0, lambda job: 1.0)
        self.falls, self.back, self.share = falls, back, share

    def rate_at(self, now: float) -> float:
        return self.rate * (self.share if self.falls <= now < self.back else 1.0)


class Sliding:
    """At most `limit` accepted requests in any `window` seconds."""

    def __init__(self, limit: int, window: float = 60.0) -> None:
        self.limit, self.window = limit, window
        self.seen: collections.deque[float] = collections.deque()

    def admit(self, job: Job, now: float) -> float | None:
        while self.seen and self.seen[0] <= now - self.window:
            self.seen.popleft()
        if len(self.seen) < self.limit:
            self.seen.append(now)
            return None
        return self.seen[0] + self.window - now

    def leave(self, job: Job, now: float) -> None:
        pass

    def told(self, now: float) -> tuple[float, float, float]:
        reset = self.seen[0] + self.window - now if self.seen else 0.0
        return self.limit * 60 / self.window, self.limit - len(self.seen), max(0.0, reset)


class Slots:
    """Fixed slots of the clock, `limit` accepted requests in each."""

    def __init__(self, limit: int, seconds: float = 1.0, phase: float = 0.0) -> None:
        self.limit, self.seconds, self.phase = limit, seconds, phase
        self.slot, self.used = -1, 0

    def _move(self, now: float) -> float:
        slot, into = divmod(now + self.phase, self.seconds)
        if slot != self.slot:
            self.slot, self.used = int(slot), 0
        return self.seconds - into

    def admit(self, job: Job, now: float) -> float | None:
        left = self._move(now)
        if self.used < self.limit:
            self.used += 1
            return None
        return left

    def leave(self, job: Job, now: float) -> None:
        pass

    def told(self, now: float) -> tuple[float, float, float]:
        return self.limit * 60 / self.seconds, self.limit - self.used, self._move(now)


class Concurrency:
    """At most `most` requests in flight; it has no rate and tells none."""

    def __init__(self, most: int = 50) -> None:
        self.most, self.busy = most, 0

    def admit(self, job: Job, now: float) -> float | None:
        if self.busy >= self.most:
            return 0.1
        self.busy += 1
        return None

    def leave(self, job: Job, now: float) -> None:
        self.busy -= 1

    def told(self, now: float) -> tuple[float, float, float] | None:
        return None


class Unlimited(Concurrency):
    """Takes everything."""

    def __init__(self) -> None:
        super().__init__(10**9)


class Queueing(Unlimited):
    """Never refuses: `slots` workers serve one request each, the others wait in line. latency: seconds on the way."""

    def __init__(self, slots: int, latency: float = 0.0) -> None:
        super().__init__()
        self.free, self.work, self.latency = [0.0] * slots, 0.0, latency

    @property
    def least(self) -> float:
        """Seconds that the work so far takes if no slot is ever idle."""
        return self.work / len(self.free)

    def reply_at(self, now: float, service: float) -> float:
        begin = max(now, heapq.heappop(self.free))
        heapq.heappush(self.free, begin + service)
        self.work += service
        return begin + service + self.latency


# --- the client


class Estimator:
    """What the learning of ratios and output lengths amounts to, for one model: two moving means."""

    def __init__(self, first_output: float = 256.0) -> None:
        self.ratio, self.output, self.seen = 1.0, first_output, 0

    def cost(self, job: Job) -> Cost:
        prompt = round(job.seen * self.ratio)
        output = self.output if job.cap is None else min(self.output, job.cap)
        expected = prompt + round(output)
        return Cost(expected, prompt + job.cap if job.cap is not None else expected, prompt)

    def learn(self, job: Job) -> None:
        self.seen += 1
        share = max(0.02, 1 / self.seen)
        self.output += share * (job.output - self.output)
        self.ratio += share * (job.prompt / max(1, job.seen) - self.ratio)


@dataclasses.dataclass
class Run:
    """What one simulated job came to."""

    seconds: float
    calls: int
    refused: int
    starts: list[float]
    latencies: list[float]
    finished: float
    peak_in_flight: int
    found: str

    @property
    def refused_share(self) -> float:
        return self.refused / max(1, self.calls)


def simulate(
    server: Any,
    jobs: list[Job],
    pacer: Pacer,
    *,
    mode: str = "none",
    flavour: str = "ceil",
    seed: int = 0,
    latency: Callable[[random.Random], float] | None = None,
    jitter: float = 0.002,
    refusal: tuple[float, float] = (0.02, 0.05),
    until: float = math.inf,
    origin: float = 1000.0,
) -> Run:
    """Run a job to its end in virtual time. jitter: network seconds, at random, between a start and its arrival."""
    chance = random.Random(seed)
    draw = latency or (lambda source: source.lognormvariate(math.log(MEDIAN_LATENCY), SPREAD))
    estimator, line = Estimator(), collections.deque(jobs)
    tokens = any(job.prompt for job in jobs[:10])
    replies: list[tuple[float, int, bool, Ticket, Job, ServerLimits | None]] = []
    order, now, again = itertools.count(), origin, origin
    run = Run(0.0, 0, 0, [], [], 0.0, 0, "")
    free = Cost(0, 0, 0)
    while line or replies:
        while line:
            cost = estimator.cost(line[0]) if tokens else free
            wait = pacer.delay(cost, now)
            if wait > 0:
                again = now + wait
                break
            job, ticket = line.popleft(), pacer.start(cost, now)
            arrival = now - origin + chance.random() * jitter
            run.calls += 1
            run.starts.append(now - origin)
            wait_told = server.admit(job, arrival)
            limits = server_limits(server, arrival, wait_told, mode, flavour, "tokens" if tokens else "requests")
            if wait_told is None:
                run.seconds = now - origin
                seconds = draw(chance)
                if isinstance(server, Queueing):
                    seconds = server.reply_at(arrival, seconds) - arrival
                run.latencies.append(seconds)
            else:
                run.refused += 1
                seconds = chance.uniform(*refusal)
            heapq.heappush(replies, (now + seconds, next(order), wait_told is None, ticket, job, limits))
        run.peak_in_flight = max(run.peak_in_flight, len(replies))
        if now - origin > until:
            break
        if not replies or (line and again < replies[0][0]):
            if math.isinf(again):
                raise RuntimeError("nothing in flight, and the pacer waits for a reply")
            now = again
            continue
        now, _, accepted, ticket, job, limits = heapq.heappop(replies)
        if accepted:
            server.leave(job, now - origin)
            estimator.learn(job)
            pacer.finish(ticket, Outcome.ACCEPTED, now, job.prompt + job.output if tokens else None, limits)
            run.finished = now - origin
        else:
            pacer.finish(ticket, Outcome.REFUSED, now, None, limits)
            line.appendleft(job)
    run.found = pacer.describe()
    return run


def server_limits(
    server: Any, now: float, wait: float | None, mode: str, flavour: str, unit: str
) -> ServerLimits | None:
    """What the reply's headers amount to once parsed."""
    if mode == "x-ratelimit" and (told := server.told(now)) is not None:
        limit, _, reset = told
        return ServerLimits(retry_after=None if wait is None else reset, **{f"{unit}_per_minute": limit})
    if mode == "retry-after" and wait is not None:
        seconds = {"ceil": float(math.ceil(wait)), "float": wait, "ms": math.ceil(wait * 1000) / 1000}[flavour]
        return ServerLimits(retry_after=max(seconds, 0.001))
    return None


# --- the table


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: build(limit, minutes, seed) gives server, jobs, pacer and the possible seconds."""

    name: str
    time: float
    refused: float
    build: Callable[[int, float, int], tuple[Any, list[Job], Pacer, float]]


def _one(job: Job) -> float:
    return 1.0


def _actual(job: Job) -> float:
    return float(job.prompt + job.output)


def _worst(job: Job) -> float:
    return float(job.prompt + (job.cap or job.output))


def _count(limit: float, minutes: float) -> int:
    return max(3000, int(limit * minutes))


def minute_steps(count: int, limit: float) -> float:
    """Seconds until `count` starts fit if `limit` may start at once in each minute."""
    return (math.ceil(count / limit) - 1) * 60.0


def even_time(count: float, rate: float, burst: float, ceiling: float) -> float:
    """Seconds for a bucket of `burst` refilled by `rate` a second, and a ceiling per minute."""
    return max((count - burst) / rate, minute_steps(int(count), ceiling))


def _minute_bucket(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    count = _count(limit, minutes)
    return Bucket(limit, 60, _one), [Job()] * count, Pacer(limit), minute_steps(count, limit)


def _sliding(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    count = _count(limit, minutes)
    return Sliding(limit), [Job()] * count, Pacer(limit), minute_steps(count, limit)


def _second_bucket(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    count = _count(limit, minutes)
    return Bucket(limit, 1, _one), [Job()] * count, Pacer(limit), even_time(count, limit / 60, limit / 60, limit)


def _slots(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    count, each = _count(limit, minutes), limit // 60
    phase = random.Random(seed).random()
    return Slots(each, phase=phase), [Job()] * count, Pacer(limit), (count - each) / each


def _cap(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    rate = min(limit / 60, 50 / (MEDIAN_LATENCY * math.exp(SPREAD**2 / 2)))
    count = _count(rate * 60, minutes)
    return Concurrency(50), [Job()] * count, Pacer(limit), max(count / rate - 0.5, minute_steps(count, limit))


def _half(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    count = _count(limit / 2, minutes)
    rate = limit / 120
    return Bucket(limit / 2, 1, _one), [Job()] * count, Pacer(limit), (count - rate) / rate


def _changing(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    count = _count(limit, minutes)
    whole, rate = count / limit * 60, limit / 60
    falls, back = whole / 3, whole * 2 / 3
    left = count - rate * (falls + (back - falls) / 3)
    return ChangingBucket(limit, falls, back), [Job()] * count, Pacer(limit), back + left / rate - 1


def token_jobs(count: int, seed: int, *, cap: int | None = None, wrong: float = 1.0) -> list[Job]:
    """Requests of about 300 tokens, a third of them output. wrong: factor of the client's tokenizer."""
    chance, jobs = random.Random(seed), []
    for _ in range(count):
        prompt = max(1, round(chance.lognormvariate(math.log(180), 0.5)))
        output = max(1, round(chance.lognormvariate(math.log(90), 0.5)))
        seen = max(1, round(prompt * wrong * chance.uniform(0.9, 1.1)))
        jobs.append(Job(prompt, min(output, cap or output), cap, seen))
    return jobs


def mixed_jobs(count: int, seed: int) -> list[Job]:
    """Prompts from 10 to 20,000 tokens, evenly spread over the orders of magnitude."""
    chance, jobs = random.Random(seed), []
    for _ in range(count):
        prompt = round(math.exp(chance.uniform(math.log(10), math.log(20_000))))
        jobs.append(Job(prompt, round(chance.uniform(20, 200)), None, max(1, round(prompt * chance.uniform(0.9, 1.1)))))
    return jobs


def _tokens(cap: int | None, charge: Callable[[Job], float], wrong: float, late: bool) -> Callable[..., Any]:
    def build(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
        jobs = token_jobs(_count(limit, minutes), seed, cap=cap, wrong=wrong)
        total = sum(map(charge, jobs))
        budget = float(round(limit * total / len(jobs)))
        pacer = Pacer(limit * 3, budget)
        return Bucket(budget, 1, charge, late), jobs, pacer, (total - budget / 60) / (budget / 60)

    return build


def _mixed(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    jobs = mixed_jobs(max(3000, int(limit * minutes)), seed)
    budget = float(round(sum(map(_actual, jobs)) / max(0.5, minutes - 0.2)))
    filled, steps = 0.0, 0
    for job in jobs:  # in order, each minute filled as far as it goes
        if filled + _actual(job) > budget:
            filled, steps = 0.0, steps + 1
        filled += _actual(job)
    return Bucket(budget, 60, _actual), jobs, Pacer(limit * 10, budget), steps * 60.0


def _unknown(limit: int, minutes: float, seed: int) -> tuple[Any, list[Job], Pacer, float]:
    count, rate = _count(limit, minutes), limit / 60
    return Bucket(limit, 1, _one), [Job()] * count, Pacer(), (count - rate) / rate


ROWS = (
    Row("minute bucket, full at the start", 1.10, 0.01, _minute_bucket),
    Row("sliding 60 s window", 1.10, 0.01, _sliding),
    Row("1-second bucket", 1.10, 0.02, _second_bucket),
    Row("fixed one-second slots", 1.10, 0.02, _slots),
    Row("at most 50 in flight", 1.15, 0.03, _cap),
    Row("half of what was configured", 1.15, 0.03, _half),
    Row("falls to a third and comes back", 1.20, 0.04, _changing),
    Row("tokens, actual usage, max_tokens x 10", 1.10, 0.02, _tokens(1000, _actual, 1.0, True)),
    Row("tokens, actual usage, no max_tokens", 1.10, 0.02, _tokens(None, _actual, 1.0, True)),
    Row("tokens, prompt + max_tokens on arrival", 1.10, 0.02, _tokens(1000, _worst, 1.0, False)),
    Row("tokens, prompts 10 to 20,000, minute bucket", 1.10, 0.02, _mixed),
    Row("estimates half of the truth", 1.15, 0.03, _tokens(None, _actual, 0.5, False)),
    Row("estimates twice the truth", 1.15, 0.03, _tokens(None, _actual, 2.0, False)),
    Row("budgets 0, 1-second bucket", 1.20, 0.03, _unknown),
)


def measure(row: Row, limit: int, minutes: float, mode: str, seed: int, **more: Any) -> tuple[float, float, Run]:
    """One job of a row: time / possible, share of refused calls, and the run itself."""
    server, jobs, pacer, possible = row.build(limit, minutes, seed)
    run = simulate(server, jobs, pacer, mode=mode, seed=seed, **more)
    return (run.seconds / possible if possible >= 20 else math.nan), run.refused_share, run


def table(
    limits: tuple[int, ...], minutes: tuple[float, ...], seeds: range, rows: tuple[Row, ...] = ROWS
) -> Iterator[str]:
    """The measured table, line by line, as Markdown."""
    yield "| server | headers | job | time / possible: goal | worst | median | refused: goal | worst | median |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        for mode, length in itertools.product(HEADER_MODES, minutes):
            got = [measure(row, limit, length, mode, seed)[:2] for limit in limits for seed in seeds]
            times = [time for time, _ in got if not math.isnan(time)]
            shares = [share for _, share in got]
            goal = row.refused * (2 if length < 1 and mode == "none" else 1)
            slow = f"{max(times):.3f} | {statistics.median(times):.3f}" if times else "- | -"
            bad = "" if (not times or max(times) <= row.time) and max(shares) <= goal else " **!**"
            yield (
                f"| {row.name} | {mode} | {length * 60:.0f} s | {row.time:.2f} | {slow} "
                f"| {goal:.1%} | {max(shares):.2%} | {statistics.median(shares):.2%}{bad} |"
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = tuple(row for row in ROWS if options.row in row.name)
    limits: tuple[int, ...] = (6000,) if options.quick else (1800, 6000, 12000)
    minutes = (0.5, 1.0) if options.quick else (0.5, 1.0, 2.0, 3.0)
    for text in table(limits, minutes, range(1 if options.quick else options.seeds), rows):
        print(text, flush=True)


if __name__ == "__main__":
    main()
