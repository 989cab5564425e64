"""Measure workflows.ray_cluster against the plain program, on a local provider and a Ray of this machine alone.

    python tests/benchmarks/cluster.py [--seconds 60] [--requests 20000]

Seconds are those between the first call and the last answer, by the provider's clock: Ray takes some more to start.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._common import (
    NO_BUDGETS,
    ROOT,
    Lines,
    Process,
    local_provider,
    program,
    say,
    table,
    temporary_folder,
    write_chats,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVIRONMENT = {"OPENAI_API_KEY": "sk-a-key-for-benchmarks", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass
class Measured:
    """What one run took."""

    seconds: float
    calls: int
    refused: int
    wall: float

    @property
    def rate(self) -> float:
        return (self.calls - self.refused) / self.seconds


def measure(folder: Path, count: int, workers: int, flags: tuple[object, ...], **options: Any) -> Measured:
    """Run once over so many requests: with workers, or 0 for the plain program."""
    requests, results = write_chats(folder / "requests.jsonl", count), folder / "results.jsonl"
    results.unlink(missing_ok=True)
    with local_provider(folder, **options) as provider:
        words = program(requests, results, provider.url, *flags)
        if workers:
            place = ["--ray_address", "local", "--num_workers", workers]
            words = [sys.executable, "-m", "workflows.ray_cluster", *words[2:], *place]
        began = time.monotonic()
        os.chdir(ROOT)
        ended = Process.start(words, folder, env=ENVIRONMENT).wait(900)
        wall, stats = time.monotonic() - began, provider.stats()
    lines = Lines.read(results)
    if ended.code or lines.succeeded.total() != count or max(lines.succeeded.values()) > 1:
        raise RuntimeError(f"exit {ended.code}, {lines.succeeded.total()} of {count} lines\n{ended.said}")
    return Measured(stats["last_accepted"] - stats["first_call"], stats["calls"], stats["refused"], wall)


def budgets(folder: Path, seconds: int) -> Iterator[list[object]]:
    """Rows of runs under a budget that the provider enforces second by second."""
    per_minute = 3000
    count = per_minute * seconds // 60
    flags = ("--max_requests_per_minute", per_minute, "--max_tokens_per_minute", 0)
    enforced = {"requests_per_minute": per_minute, "limit_kind": "second_bucket", "latency": 0.5}
    plain = None
    for workers in (0, 1, 4):
        say(f"budget of {per_minute} a minute, {count} requests, {workers or 'no'} workers")
        run = measure(folder, count, workers, flags, **enforced)
        plain = plain or run
        used = 60 * count / max(run.seconds - 0.5, 1) / per_minute
        row = [workers or "plain", f"{run.seconds:.1f} s", f"{used:.1%}", f"{run.refused / run.calls:.2%}"]
        yield [*row, f"{run.seconds / plain.seconds - 1:+.1%}", f"{run.wall - run.seconds:.0f} s"]


def throughput(folder: Path, count: int) -> Iterator[list[object]]:
    """Rows of runs without any limit."""
    for workers in (0, 1, 2, 4):
        say(f"no limits, {count} requests, {workers or 'no'} workers")
        run = measure(folder, count, workers, NO_BUDGETS, latency=0.2)
        yield [workers or "plain", f"{run.seconds:.1f} s", f"{run.rate:,.0f}", f"{run.wall - run.seconds:.0f} s"]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of a run under a budget")
    parser.add_argument("--requests", type=int, default=20_000, help="of a run without")
    arguments = parser.parse_args()
    with temporary_folder() as folder:
        head = "workers | time | of the budget used | refused | against the plain program | started and ended in"
        print(*table(head, budgets(folder, arguments.seconds)), "", sep="\n")
        head = "workers | time | requests a second | started and ended in"
        print(*table(head, throughput(folder, arguments.requests)), sep="\n")


if __name__ == "__main__":
    main()
