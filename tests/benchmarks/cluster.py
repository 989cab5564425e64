"""Measure workflows.ray_cluster against the plain program, on a local provider and a Ray of this machine alone.

    python tests/benchmarks/cluster.py [--seconds 60] [--requests 40000] [--prompt_bytes 4000,64000]

Budgets: seconds are those between the first call and the last answer, by the provider's clock; Ray takes some more to
start. Without limits: requests a second, and the processor time of each role for one request, are those of the steady
middle, from a quarter of the requests to three quarters. Here all roles share the cores of one machine, the stand-in
for the provider too, which in truth is elsewhere: so the processor time of a role tells what it can do on a core of
its own. Workers share the requests, but there is one driver and one actor with the budgets: the busier of the two says
how much a cluster can do at most. Longer prompts are fewer, down to a tenth of the requests.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._common import (
    NO_BUDGETS,
    ROOT,
    Lines,
    Process,
    cpu_seconds,
    local_provider,
    program,
    say,
    short_chat,
    table,
    temporary_folder,
    write_chats,
    write_lines,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.benchmarks._common import Provider

ENVIRONMENT = {"OPENAI_API_KEY": "sk-a-key-for-benchmarks", "RAY_USAGE_STATS_ENABLED": "0"}
ROLES = {"ray::Worker": "workers", "ray::Budgets": "budgets"}  # by the titles that Ray gives to processes of actors
MIDDLE = (0.25, 0.75)  # of the requests


@dataclass
class Middle:
    """The steady middle of a run."""

    seconds: float = 0.0
    calls: int = 0
    cpu: dict[str, float] = field(default_factory=dict)  # seconds, by role

    def each(self, role: str) -> float:
        """Microseconds of processor time for one request."""
        return self.cpu.get(role, 0.0) / self.calls * 1e6


@dataclass
class Measured:
    """What one run took."""

    seconds: float
    calls: int
    refused: int
    wall: float
    middle: Middle


def long_chats(path: Path, count: int, size: int) -> Path:
    """Write chat requests whose prompts are pieces of the README, half as long to one and a half times as `size`."""
    text, rng = (ROOT / "README.md").read_text("utf-8"), random.Random(0)
    text *= 1 + 2 * size // len(text)

    def chat(number: int) -> dict[str, Any]:
        start, length = rng.randrange(len(text) - 2 * size), rng.randint(size // 2, size + size // 2)
        words = text[start : start + length]
        return short_chat(number) | {"messages": [{"role": "user", "content": f"{number}: sum up\n{words}"}]}

    return write_lines(path, map(chat, range(count)))


def cpu_of_roles(driver: int, provider: int) -> dict[str, float]:
    """Processor seconds so far of the driver, of the actors and of Ray's own processes, and of the provider."""
    parents, titles = dict[int, int](), dict[int, str]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = title
        except OSError:  # it has just ended
            continue
    used = {"driver": cpu_seconds(driver), "provider": cpu_seconds(provider)}
    for pid in parents:
        up = pid
        while up in parents and up != driver:
            up = parents[up]
        if up == driver != pid:
            role = next((role for start, role in ROLES.items() if titles[pid].startswith(start)), "Ray")
            used[role] = used.get(role, 0.0) + cpu_seconds(pid)
    return used


def watch(process: Process, provider: Provider, count: int) -> Middle:
    """Wait until the middle of a run is over."""
    marks = list[tuple[float, int, dict[str, float]]]()
    for share in MIDDLE:
        while provider.stats()["calls"] < share * count and process.running():
            time.sleep(0.1)
        calls = provider.stats()["calls"]
        marks.append((time.monotonic(), calls, cpu_of_roles(process.pid, provider.process.pid)))
    (began, before, cpu), (ended, after, used) = marks
    return Middle(ended - began, after - before, {role: used[role] - cpu.get(role, 0.0) for role in used})


def measure(
    folder: Path, requests: Path, count: int, workers: int, flags: tuple[object, ...], **options: Any
) -> Measured:
    """Run once over so many requests: with workers, or 0 for the plain program."""
    results = folder / "results.jsonl"
    results.unlink(missing_ok=True)
    with local_provider(folder, **options) as provider:
        words = program(requests, results, provider.url, *flags)
        if workers:
            place = ["--ray_address", "local", "--num_workers", workers]
            words = [sys.executable, "-m", "workflows.ray_cluster", *words[2:], *place]
        began = time.monotonic()
        os.chdir(ROOT)
        process = Process.start(words, folder, env=ENVIRONMENT)
        middle = watch(process, provider, count)
        ended = process.wait(900)
        wall, stats = time.monotonic() - began, provider.stats()
    lines = Lines.read(results)
    if ended.code or lines.succeeded.total() != count or max(lines.succeeded.values()) > 1:
        raise RuntimeError(f"exit {ended.code}, {lines.succeeded.total()} of {count} lines\n{ended.said}")
    return Measured(stats["last_accepted"] - stats["first_call"], stats["calls"], stats["refused"], wall, middle)


def budgets(folder: Path, seconds: int) -> Iterator[list[object]]:
    """Rows of runs under a budget that the provider enforces second by second."""
    per_minute = 3000
    count = per_minute * seconds // 60
    requests = write_chats(folder / "requests.jsonl", count)
    flags = ("--max_requests_per_minute", per_minute, "--max_tokens_per_minute", 0)
    enforced = {"requests_per_minute": per_minute, "limit_kind": "second_bucket", "latency": 0.5}
    plain = None
    for workers in (0, 1, 4):
        say(f"budget of {per_minute} a minute, {count} requests, {workers or 'no'} workers")
        run = measure(folder, requests, count, workers, flags, **enforced)
        plain = plain or run
        used = 60 * count / max(run.seconds - 0.5, 1) / per_minute
        row = [workers or "plain", f"{run.seconds:.1f} s", f"{used:.1%}", f"{run.refused / run.calls:.2%}"]
        yield [*row, f"{run.seconds / plain.seconds - 1:+.1%}", f"{run.wall - run.seconds:.0f} s"]


def throughput(folder: Path, count: int, size: int, workers: list[int]) -> Iterator[list[object]]:
    """Rows of runs without any limit, with prompts of so many bytes."""
    requests = long_chats(folder / "requests.jsonl", count, size)
    for number in workers:
        say(f"no limits, {count} requests of {size} bytes, {number or 'no'} workers")
        run = measure(folder, requests, count, number, NO_BUDGETS, latency=0.2)
        middle, central = run.middle, max(run.middle.each("driver"), run.middle.each("budgets"))
        row = [size, number or "plain", f"{middle.calls / middle.seconds:,.0f}"]
        row += [f"{middle.each(role):.0f}" for role in ("driver", "budgets", "workers", "Ray", "provider")]
        yield [*row, f"{1e6 / central:,.0f}", f"{run.wall:.0f} s"]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of a run under a budget; 0: none")
    parser.add_argument("--requests", type=int, default=40_000, help="of a run without; 0: none")
    parser.add_argument("--prompt_bytes", default="4000,64000", help="of the runs without; default: %(default)s")
    parser.add_argument("--workers", default="0,1,2,4", help="of the runs without; default: %(default)s, 0 = plain")
    arguments = parser.parse_args()
    with temporary_folder() as folder:
        if arguments.seconds:
            head = "workers | time | of the budget used | refused | against the plain program | started and ended in"
            print(*table(head, budgets(folder, arguments.seconds)), "", sep="\n")
        head = "prompt, bytes | workers | requests a second | driver, us | budgets, us | workers, us | Ray, us"
        head += "| provider, us | one cluster, a second at most | took"
        workers = [int(number) for number in arguments.workers.split(",")]
        for size in map(int, arguments.prompt_bytes.split(",") if arguments.requests else []):
            count = max(arguments.requests // 10, min(arguments.requests, arguments.requests * 4000 // size))
            print(*table(head, throughput(folder, count, size, workers)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
