"""Measure one run over two servers, one of which allows or does twice as much as the other; prints a Markdown table.

    python tests/benchmarks/endpoints.py        3 minutes

"Of the sum" is what both servers would accept together in the time from the first call to the last accepted one,
divided into what they did accept. Latency is 0.5 s at the median, lognormal with spread 0.5; jobs take 30 s.
"""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

RATES = (6000, 3000)  # requests a minute
SLOTS = (32, 16)  # served at a time
SECONDS = 30
LATENCY, SPREAD = 0.5, 0.5
MEAN = LATENCY * math.exp(SPREAD**2 / 2)
GOAL = 0.95


@dataclass(frozen=True)
class Row:
    """Two servers, and what is written about them in the file of endpoints."""

    name: str
    servers: tuple[dict[str, Any], dict[str, Any]]
    limits: tuple[float, float]  # requests a minute
    per_second: float  # that both accept together


def slots(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = ({"requests_per_minute": rate, "limit_kind": kind} for rate in RATES)
    return first, second


ROWS = (
    Row("limits given, one-second buckets", slots("second_bucket"), RATES, sum(RATES) / 60),
    Row("limits given, fixed one-second slots", slots("second_slots"), RATES, sum(RATES) / 60),
    Row("limits to be found out, one-second buckets", slots("second_bucket"), (0, 0), sum(RATES) / 60),
    Row(
        "they queue and never refuse, 32 and 16 at a time",
        ({"service_slots": SLOTS[0]}, {"service_slots": SLOTS[1]}),
        (0, 0),
        sum(SLOTS) / MEAN,
    ),
)


def measure(row: Row, folder: Path) -> list[str]:
    """Run the job of one row; gives the cells of its line."""
    count = round(SECONDS * row.per_second)
    requests, results = write_lines(folder / "job.jsonl", map(short_chat, range(count))), folder / "results.jsonl"
    results.unlink(missing_ok=True)
    endpoints = folder / "endpoints"
    with ExitStack() as stack:
        options: dict[str, Any] = {"latency": LATENCY, "latency_spread": SPREAD}
        servers = [stack.enter_context(local_provider(folder, **options, **server)) for server in row.servers]
        lines = (f"{server.url} - {limit:g} 0\n" for server, limit in zip(servers, row.limits, strict=True))
        endpoints.write_text("".join(lines))
        process = Process.start(program(requests, results, servers[0].url, "--endpoints_filepath", endpoints), folder)
        ended = process.wait(300)
        stats = [server.stats() for server in servers]
    if ended.code:
        raise RuntimeError(f"{row.name}: exit code {ended.code}\n{ended.said}")
    queued = "service_slots" in row.servers[0]  # such a server accepts at once, so its time is that of the whole run
    last = ended.started + ended.wall if queued else max(stat["last_accepted"] for stat in stats)
    seconds = last - min(stat["first_call"] for stat in stats)
    share = count / row.per_second / seconds
    refused = sum(stat["refused"] for stat in stats) / sum(stat["calls"] for stat in stats)
    missed = " **!**" if share < GOAL else ""
    cells = [row.name, f"{share:.3f}", f"{GOAL}{missed}", f"{refused:.2%}", f"{seconds:.1f} s"]
    cells.append(f"{stats[0]['accepted'] / stats[1]['accepted']:.2f}")
    say(" | ".join(cells))
    return cells


def main() -> None:
    """Run the jobs and print the table."""
    with temporary_folder() as folder:
        cells = [measure(row, folder) for row in ROWS]
    for line in table("two servers | of the sum | goal | refused | time | calls of the faster per other", cells):
        print(line)


if __name__ == "__main__":
    main()
