"""Measure the pacing over real sockets: one job for each kind of limit; prints a Markdown table.

    python tests/benchmarks/pacing.py                           every row with x-ratelimit-* headers, 10 minutes
    python tests/benchmarks/pacing.py --headers none            the server tells nothing about its limits
    python tests/benchmarks/pacing.py --headers all --jobs 3    all header modes, three jobs at a time, 11 minutes
    python tests/benchmarks/pacing.py --rows slots,half         rows whose name contains one of these

"Possible" is the time of a client that knows the server's rule and keeps both ceilings. Time counts from the first call
to the last one that the local provider accepted, refused is the share of its calls that it answered 429. Latency is
0.5 s at the median, lognormal with spread 0.5; jobs take 30 s, those against limits by the minute 60 s.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._common import (
    Process,
    local_provider,
    program,
    say,
    short_chat,
    table,
    temporary_folder,
    write_lines,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADERS = {"x-ratelimit": "openai", "retry-after": "retry_after", "none": "none"}
LATENCY, SPREAD = 0.5, 0.5
MEAN_OF_MEDIAN = math.exp(SPREAD**2 / 2)
LIMIT = 6000  # requests a minute
RATE = LIMIT / 60
COUNT = 3000  # 30 s of it
PROMPT, OUTPUT, CAP = 180, 90, 1000  # tokens: medians, and the max_tokens of those who set it generously
WORDS = (
    "the and for you not are all new was can has but our one may out use any see his who now get how its top".split()
)


@dataclass(frozen=True)
class Row:
    """A kind of limit. possible: seconds, given the server's counters at the end; a few rows tell seconds alone."""

    name: str
    time: float  # goal for time / possible
    refused: float  # goal
    server: dict[str, Any]
    possible: Callable[[dict[str, Any]], float]
    requests: Callable[[], Iterator[dict[str, Any]]]
    budgets: tuple[float, float] = (LIMIT, 0)
    until_reply: bool = False  # time counts to the end of the program: the server accepts everything at once


# ---- requests


def plain(count: int = COUNT) -> Callable[[], Iterator[dict[str, Any]]]:
    return lambda: map(short_chat, range(count))


def text_of(tokens: int, chance: random.Random) -> str:
    """Text that o200k_base and the local provider count alike: words of three letters are a token each."""
    return " ".join(chance.choices(WORDS, k=max(1, tokens)))


def chats(draw: Callable[[random.Random], float], cap: int | None) -> Callable[[], Iterator[dict[str, Any]]]:
    """Make chats whose prompts have as many tokens as `draw` says."""

    def make() -> Iterator[dict[str, Any]]:
        chance = random.Random(1)
        for number in range(COUNT):
            content = text_of(round(draw(chance)), chance)
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}]}
            yield body | ({"max_tokens": cap} if cap else {}) | {"metadata": number}

    return make


def usual(chance: random.Random) -> float:
    return chance.lognormvariate(math.log(PROMPT), SPREAD)


def mixed(chance: random.Random) -> float:
    """From 10 to 20,000, evenly spread over the orders of magnitude."""
    return math.exp(chance.uniform(math.log(10), math.log(20_000)))


# ---- rows

SECONDS_BUCKET = {"requests_per_minute": LIMIT, "limit_kind": "second_bucket"}
FALL, RETURN = 10.0, 20.0  # seconds after the first call
EVEN = (COUNT - RATE) / RATE  # seconds: the first second's bucket is full


def tokens_row(name: str, goal: tuple[float, float], cap: int | None, each: float, **server: Any) -> Row:
    """Make a row with a limit on tokens by the second, such that a request of `each` tokens fits RATE times."""
    budget = round(LIMIT * each)
    server = {"tokens_per_minute": budget, "limit_kind": "second_bucket", "completion_tokens": OUTPUT} | server
    server |= {"completion_spread": SPREAD}
    return Row(
        name,
        *goal,
        server,
        lambda stats: stats["tokens_charged"] / (budget / 60) - 1,
        chats(usual, cap),
        (3 * LIMIT, budget),
    )


def mixed_row() -> Row:
    """Make the row of prompts that differ by three orders of magnitude, two minutes' worth of tokens less a fifth."""
    mean = (20_000 - 10) / math.log(2000) + 6 + OUTPUT * MEAN_OF_MEDIAN
    budget = round(COUNT * mean / 1.8)
    return Row(
        "tokens, prompts of 10 to 20,000 mixed, minute bucket",
        1.10,
        0.02,
        {"tokens_per_minute": budget, "completion_tokens": OUTPUT, "completion_spread": SPREAD},
        lambda stats: 60.0 * (math.ceil(stats["tokens_charged"] / budget) - 1),
        chats(mixed, None),
        (10 * LIMIT, budget),
    )


USED = (PROMPT + OUTPUT) * MEAN_OF_MEDIAN + 6
MINUTES = (1.10, 0.01)
SLOTS = 32
ROWS = (
    Row("minute bucket, full at the start", *MINUTES, {"requests_per_minute": LIMIT}, lambda _: 60.0, plain(9000)),
    Row(
        "sliding 60 s window",
        *MINUTES,
        {"requests_per_minute": LIMIT, "limit_kind": "sliding_minute"},
        lambda _: 60.0,
        plain(9000),
    ),
    Row("1-second bucket", 1.10, 0.02, SECONDS_BUCKET, lambda _: EVEN, plain()),
    Row(
        "fixed one-second slots",
        1.10,
        0.02,
        {"requests_per_minute": LIMIT, "limit_kind": "second_slots", "slot_phase": 0.4},
        lambda _: EVEN,
        plain(),
    ),
    Row(
        "at most 50 in flight, no rate limit",
        1.15,
        0.03,
        {"max_in_flight": 50},
        lambda _: COUNT * LATENCY * MEAN_OF_MEDIAN / 50 - LATENCY,
        plain(),
    ),
    Row("enforces half of what is configured", 1.15, 0.03, SECONDS_BUCKET, lambda _: EVEN, plain(), (2 * LIMIT, 0)),
    Row(
        "limit falls to a third and comes back",
        1.20,
        0.04,
        SECONDS_BUCKET | {"limit_schedule": [[0, LIMIT], [FALL, LIMIT / 3], [RETURN, LIMIT]]},
        lambda _: EVEN + (RETURN - FALL) * 2 / 3,
        plain(),
    ),
    tokens_row("tokens, charges usage, max_tokens ten times that", (1.10, 0.02), CAP, USED, token_charge="usage"),
    tokens_row("tokens, charges usage, no max_tokens", (1.10, 0.02), None, USED, token_charge="usage"),
    tokens_row(
        "tokens, charges prompt + max_tokens on arrival",
        (1.10, 0.02),
        CAP,
        PROMPT * MEAN_OF_MEDIAN + 6 + CAP,
        token_charge="reserve",
    ),
    mixed_row(),
    tokens_row("estimates half of the truth", (1.15, 0.03), None, USED + PROMPT * MEAN_OF_MEDIAN, tokenizer_factor=2),
    tokens_row(
        "estimates twice the truth", (1.15, 0.03), None, USED - PROMPT * MEAN_OF_MEDIAN / 2, tokenizer_factor=0.5
    ),
    Row("budgets 0, 1-second bucket", 1.20, 0.03, SECONDS_BUCKET, lambda _: EVEN, plain(), (0, 0)),
    Row(
        "queues, 32 at a time, never refuses; budgets 0",
        1 / 0.95,
        0.0,
        {"service_slots": SLOTS},
        lambda _: 2000 * LATENCY * MEAN_OF_MEDIAN / SLOTS + LATENCY,
        plain(2000),
        (0, 0),
        until_reply=True,
    ),
    Row(
        "small job (1,000) on a burstable server: seconds",
        5.0,
        0.01,
        {"requests_per_minute": LIMIT},
        lambda _: 1.0,
        plain(1000),
    ),
)


def measure(row: Row, mode: str, folder: Path) -> list[str]:
    """Run the job of one row; gives the cells of its line."""
    stem = f"{ROWS.index(row)}.{mode}"
    requests, results = write_lines(folder / f"{stem}.jsonl", row.requests()), folder / f"{stem}_results.jsonl"
    options: dict[str, Any] = {"latency": LATENCY, "latency_spread": SPREAD, "headers": HEADERS[mode]} | row.server
    with local_provider(folder, **options) as provider:
        flags = ("--max_requests_per_minute", row.budgets[0], "--max_tokens_per_minute", row.budgets[1])
        process = Process.start(program(requests, results, provider.url, *flags), folder)
        ended = process.wait(900)
        stats = provider.stats()
    if ended.code or stats["accepted"] < sum(1 for _ in row.requests()):
        raise RuntimeError(f"{row.name}: exit code {ended.code}\n{ended.said}")
    end = ended.started + ended.wall if row.until_reply else stats["last_accepted"]
    seconds, possible, share = end - stats["first_call"], row.possible(stats), stats["refused"] / stats["calls"]
    goal = row.refused * (2 if mode == "none" and possible < 40 else 1)
    missed = " **!**" if seconds / possible > row.time or share > goal else ""
    found = " ".join(re.findall(r"this server takes.*", ended.said, flags=re.IGNORECASE))
    cells = [row.name, mode, f"{seconds / possible:.3f}", f"{row.time:.2f}", f"{share:.2%}", f"{goal:.0%}{missed}"]
    cells += [f"{seconds:.1f} s", f"{stats['calls']:,}", str(stats["max_in_flight"]), found]
    say(" | ".join(cells))
    return cells


def main() -> None:
    """Run the jobs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="comma-separated parts of names")
    parser.add_argument("--headers", default="x-ratelimit", choices=[*HEADERS, "all"])
    parser.add_argument("--jobs", type=int, default=1, help="at a time; more than a core each disturb one another")
    options = parser.parse_args()
    rows = [row for row in ROWS if any(part.strip() in row.name for part in options.rows.split(","))]
    modes = list(HEADERS) if options.headers == "all" else [options.headers]
    began = time.monotonic()
    with temporary_folder() as folder, ThreadPoolExecutor(options.jobs) as pool:
        done = [pool.submit(measure, row, mode, folder) for row in rows for mode in modes]
        cells = [job.result() for job in done]
    head = "server | headers | time / possible | goal | refused | goal | time | calls | most in flight | found"
    for line in table(head, cells):
        print(line)
    print(f"\nTaken in {(time.monotonic() - began) / 60:.0f} minutes; **!** marks a goal that was missed.")


if __name__ == "__main__":
    main()
