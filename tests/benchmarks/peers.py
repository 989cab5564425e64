"""Measure the program beside other tools, on the same requests and the same local provider; prints a Markdown table.

    python tests/benchmarks/peers.py                                     what is installed beside this Python
    python tests/benchmarks/peers.py --python a/bin/python --python b/bin/python --cookbook script.py
    python tests/benchmarks/peers.py --measures fast,second --tools litellm --rounds 1

Packages of one tool may exclude those of another: --python names further environments, and a tool runs with the newest
version found. --cookbook is the path of a copy of the OpenAI cookbook's api_request_parallel_processor.py. How each
tool is used stands in _peers.py. Everything is a process of its own, started anew for each job, the local provider too.

fast    2,000 requests, answers after 50 ms, 200 at once, no limits; time counts from the first call to the end of the
        process, so that answers are on disk; start-up is what comes before it.
slow    the same with answers after 1 s at the median (lognormal, 0.5) and 1,000 at once.
memory  10,000 requests as in fast: largest resident set, and CPU with the start-up; taken once, everything else three
        times (--rounds), all tools in turn, and the median told.
minute  1,200 requests a minute, a bucket that is full at the start; two minutes' worth of requests, 60 s at the least.
second  the same limit enforced by the second, 20 each; half a minute's worth, 29 s at the least.
tokens  384,000 tokens a minute, counted when the answer is made, a bucket that is full at the start; prompts of 180 and
        answers of 90 tokens (medians, lognormal 0.5), max_tokens 600; just under two minutes' worth.

Under limits answers take 0.5 s (lognormal, 0.5), the server sends the headers of OpenAI, and all tools are told the
limits. Those that know none (SDK, Router) are given as many at once as the limit has in flight at this latency, which
is the best that can be done and needs the latency to be known; "64 at once" is the same SDK with a guess. Budget use is
the least time that the server's limit needs for what it has answered, by the time taken; refused is the share of calls
that it answered 429. A tool is stopped after five times the least time. Jobs under limits run --jobs at a time; they
need little CPU. Those that start at an even pace leave a bucket full at the start unused: a minute's worth, once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._common import (
    CLIENT_CORE,
    CORES,
    SERVER_CORE,
    Process,
    Provider,
    local_provider,
    program,
    say,
    table,
    temporary_folder,
    unpack_vocabulary,
    write_lines,
)
from tests.benchmarks._peers import TOOLS, Job
from tests.benchmarks.pacing import MEAN_OF_MEDIAN, OUTPUT, PROMPT, SPREAD, text_of, usual

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PEERS = Path(__file__).with_name("_peers.py")
OURS, GUESSED = "this program", "openai SDK, 64 at once"
SCRIPT = "cookbook script"
PER_MINUTE = 1200
TOKENS_PER_MINUTE = 320 * PER_MINUTE
LATENCY = 0.5
PATIENCE = 5  # times the least time
MINUTE_BUCKET: dict[str, Any] = {"latency": LATENCY, "latency_spread": SPREAD, "limit_kind": "minute_bucket"}


@dataclass(frozen=True)
class Measure:
    """A job; under limits it is about `worth` minutes of what the server allows."""

    count: int
    in_flight: int
    server: dict[str, Any]
    requests_per_minute: int = 0  # what the tools are told
    tokens_per_minute: int = 0
    worth: float = 0.0
    head_start: float = 0.0  # seconds' worth that the server allows at once
    prompt: int = 8  # tokens
    max_tokens: int = 20
    rounds: int = 0  # 0: as many as asked for
    burst_seconds: float | None = None  # what helps a client that can be told how much it may spend at once

    @property
    def limited(self) -> bool:
        return self.requests_per_minute > 0

    def requests(self) -> Iterator[dict[str, Any]]:
        """Make the requests; each begins with its number."""
        chance = random.Random(1)
        for number in range(self.count):
            tokens = round(usual(chance)) if self.prompt == PROMPT else self.prompt
            text = f"Item {number}. {text_of(tokens, chance)}"
            messages = [{"role": "user", "content": text}]
            yield {
                "model": "gpt-4o-mini",
                "messages": messages,
                "max_tokens": self.max_tokens,
                "metadata": {"id": number},
            }

    def worth_of(self, stats: dict[str, Any]) -> float:
        """Minutes' worth of the limit that a server has let through."""
        if per_minute := self.server.get("requests_per_minute"):
            return float(stats["accepted"] / per_minute)
        return float(stats["tokens_charged"] / self.server["tokens_per_minute"])

    def least(self, worth: float) -> float:
        """Seconds that a job needs of which so many minutes' worth was done."""
        return max(1.0, 60 * worth - self.head_start)


MEASURES = {
    "fast": Measure(2000, 200, {"latency": 0.05}),
    "slow": Measure(2000, 1000, {"latency": 1.0, "latency_spread": SPREAD}),
    "memory": Measure(10_000, 200, {"latency": 0.05}, rounds=1),
    "minute": Measure(
        2 * PER_MINUTE, 64, MINUTE_BUCKET | {"requests_per_minute": PER_MINUTE}, PER_MINUTE, worth=2.0, head_start=60.0
    ),
    "second": Measure(
        PER_MINUTE // 2,
        64,
        MINUTE_BUCKET | {"requests_per_minute": PER_MINUTE, "limit_kind": "second_bucket"},
        PER_MINUTE,
        worth=0.5,
        head_start=1.0,
        burst_seconds=1,
    ),
    "tokens": Measure(
        2 * PER_MINUTE,
        64,
        MINUTE_BUCKET
        | {"tokens_per_minute": TOKENS_PER_MINUTE, "completion_tokens": OUTPUT, "completion_spread": SPREAD},
        3 * PER_MINUTE,
        TOKENS_PER_MINUTE,
        worth=2.0,
        head_start=60.0,
        prompt=PROMPT,
        max_tokens=600,
    ),
}


# ---- one job


@dataclass
class Outcome:
    """How a job went; seconds are those from the first call on."""

    answered: float  # share of the requests
    faults: str  # what was not answered exactly once, with its own answer; "" if nothing
    start: float
    seconds: float
    rate: float
    cpu: float  # milliseconds per request
    memory: float  # MB
    use: float = 0.0  # of the budget
    refused: float = 0.0


def answers(results: Path) -> Iterator[tuple[int, str]]:
    """Read what a tool has written: [id, answer], or result lines of this program and of the cookbook script."""
    if not results.exists():
        return
    with results.open(encoding="utf-8") as lines:
        for line in lines:
            match json.loads(line):
                case [int() as number, str() as answer]:
                    yield number, answer
                case [_, {"choices": [{"message": {"content": answer}}]}, {"id": number}]:
                    yield number, answer


def check(results: Path, count: int) -> tuple[float, str]:
    """Tell the share of requests that have their answer, and what is wrong, in words."""
    times: Counter[int] = Counter()
    foreign = 0
    for number, answer in answers(results):
        times[number] += 1
        foreign += not answer.startswith(f"You said: Item {number}. ")
    twice, missing = sum(times.values()) - len(times), count - len(times)
    faults = {"missing": missing, "twice": twice, "of another request": foreign}
    return len(times) / count, ", ".join(f"{number:,} {what}" for what, number in faults.items() if number)


@dataclass
class Bench:
    """A folder, and where each tool was found: the Python to run it with and its version."""

    folder: Path
    found: dict[str, tuple[str, str]]
    script: str = ""
    env: dict[str, str] = field(default_factory=dict)

    def words(self, tool: str, measure: Measure, requests: Path, results: Path, url: str) -> list[object]:
        """Return the command line of one job."""
        if tool == OURS:
            budgets = (measure.requests_per_minute, measure.tokens_per_minute)
            flags: list[object] = ["--max_requests_per_minute", budgets[0], "--max_tokens_per_minute", budgets[1]]
            if not measure.limited:
                flags += ["--max_concurrent_requests", measure.in_flight]
            return program(requests, results, url, *flags)
        job = Job(
            str(requests),
            str(results),
            f"{url}/v1",
            self.in_flight(tool, measure),
            measure.requests_per_minute,
            measure.tokens_per_minute,
            round(OUTPUT * MEAN_OF_MEDIAN),
            measure.burst_seconds,
            self.script,
        )
        return [self.found[tool][0], PEERS, tool.partition(",")[0], json.dumps(asdict(job))]

    def in_flight(self, tool: str, measure: Measure) -> int:
        """Those that know no budgets get as many at once as the limit has in flight."""
        if tool == GUESSED or not measure.limited or TOOLS[tool].paces:
            return measure.in_flight
        return math.ceil(PER_MINUTE / 60 * LATENCY * MEAN_OF_MEDIAN)

    def run(self, tool: str, measure: Measure) -> Outcome:
        """Run one job against a local provider of its own."""
        with temporary_folder() as folder:
            requests, results = write_lines(folder / "requests.jsonl", measure.requests()), folder / "results.jsonl"
            core = None if measure.limited else SERVER_CORE
            with local_provider(folder, core=core, **measure.server) as provider:
                words = self.words(tool, measure, requests, results, provider.url)
                core = None if measure.limited else CLIENT_CORE
                process = Process.start(words, folder, core=core, env=self.env)
                with contextlib.suppress(TimeoutError):
                    process.wait(PATIENCE * measure.least(measure.worth) if measure.limited else 600.0)
                return self.outcome(process, provider, measure, results)

    def outcome(self, process: Process, provider: Provider, measure: Measure, results: Path) -> Outcome:
        ended, stats = process.ended, provider.stats()
        assert ended
        if not stats["accepted"]:
            raise RuntimeError(f"nothing was answered: {' '.join(process.words)}\n{ended.said}")
        answered, faults = check(results, measure.count)
        if faults:
            say(f"{' '.join(process.words[1:3])}, exit code {ended.code}: {faults}\n{ended.said[-1000:]}")
        start, end = stats["first_call"] - ended.started, ended.started + ended.wall - stats["first_call"]
        found = Outcome(answered, faults, start, end, answered * measure.count / end, 0.0, ended.memory / 1e6)
        found.cpu = ended.cpu / measure.count * 1000
        if measure.limited:
            found.seconds = stats["last_accepted"] - stats["first_call"]
            found.use = measure.least(measure.worth_of(stats)) / found.seconds
            found.refused = stats["refused"] / stats["calls"]
        return found


# ---- which tools, and the table


def find(pythons: Iterable[str], script: str) -> dict[str, tuple[str, str]]:
    """Look for the tools; the newest version of each counts."""
    found = {OURS: (sys.executable, "")}
    for python in pythons:
        out = subprocess.run([python, PEERS, "versions"], capture_output=True, text=True, check=True).stdout
        for package, version in json.loads(out).items():
            for name, tool in TOOLS.items():
                if tool.package == package and (name != SCRIPT or script):
                    newer = name not in found or numbers(version) > numbers(found[name][1])
                    found |= {name: (python, version)} if newer else {}
    if "openai SDK" in found:
        found[GUESSED] = found["openai SDK"]
    return found


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def takes_part(tool: str, measure: Measure) -> bool:
    """Tell whether a job says anything about a tool."""
    if tool == OURS:
        return True
    return measure.limited if tool == GUESSED else TOOLS[tool].limits or not measure.limited


Outcomes = dict[str, dict[str, list[Outcome]]]  # by tool and measure


def run_all(bench: Bench, names: list[str], measures: dict[str, Measure], rounds: int, jobs: int) -> Outcomes:
    """Run everything, all tools in turn in each round; at first what takes a whole core, one by one."""
    done: Outcomes = defaultdict(lambda: defaultdict(list))
    for limited, at_a_time in ((False, 1), (True, jobs)):
        with ThreadPoolExecutor(at_a_time) as pool:
            running = {
                pool.submit(bench.run, tool, measure): (turn, name, tool)
                for turn in range(rounds)
                for name, measure in measures.items()
                for tool in names
                if measure.limited == limited and turn < (measure.rounds or rounds)
                if tool in bench.found and takes_part(tool, measure)
            }
            for job in as_completed(running):
                turn, name, tool = running[job]
                done[tool][name].append(job.result())
                say(f"{turn + 1} {name} {tool}: {job.result()}")
    return done


def cells(bench: Bench, tool: str, mine: dict[str, list[Outcome]], measures: dict[str, Measure]) -> list[str]:
    """Make one row of the table."""
    row = [tool if tool in (OURS, SCRIPT) else f"{tool} ({bench.found[tool][1]})"]
    for name, measure in measures.items():
        outcomes = mine.get(name, [])
        if not outcomes:
            row += ["-"] * len(columns(name, measure))
            continue
        middle = {
            key: statistics.median(getattr(outcome, key) for outcome in outcomes)
            for key in ("start", "rate", "cpu", "memory", "use", "refused")
        }
        worst = min(outcomes, key=lambda outcome: outcome.answered).faults
        shown = [what.format(**middle) for what in columns(name, measure).values()]
        row += [*shown[:-1], f"{shown[-1]} ({worst})" if worst else shown[-1]]
    return row


def columns(name: str, measure: Measure) -> dict[str, str]:
    """Headings of a measure and how their figures are shown."""
    if measure.limited:
        return {f"limit {name}: use": "{use:.0%}", "refused": "{refused:.1%}"}
    return {
        "fast": {"start-up, s": "{start:.1f}", "requests/s at 50 ms": "{rate:.0f}"},
        "slow": {"requests/s at 1 s": "{rate:.0f}"},
        "memory": {"CPU each, ms": "{cpu:.2f}", "memory, MB": "{memory:.0f}"},
    }[name]


def report(bench: Bench, names: list[str], done: Outcomes, measures: dict[str, Measure]) -> Iterator[str]:
    """Make the lines of the table; tools that are not installed say what to do."""
    head = ["tool", *(column for name, measure in measures.items() for column in columns(name, measure))]
    rows = [
        cells(bench, name, done[name], measures)
        if name in bench.found
        else [name, f"not installed: {TOOLS[name.partition(',')[0]].install}", *[""] * (len(head) - 2)]
        for name in names
    ]
    yield from table(" | ".join(head), rows)


def main() -> None:
    """Run the jobs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="another Python with tools; repeatable")
    parser.add_argument("--cookbook", default="", metavar="PATH", help="a copy of the cookbook's script")
    parser.add_argument("--measures", default=",".join(MEASURES), help="default: %(default)s")
    parser.add_argument("--tools", default="", help="comma-separated parts of names; the program always takes part")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=4, help="under limits, at a time (default: 4)")
    options = parser.parse_args()
    measures = {name: MEASURES[name] for name in options.measures.split(",")}
    parts = options.tools.split(",")
    names = [OURS, *(name for name in [*TOOLS, GUESSED] if any(part in name for part in parts))]
    began = time.monotonic()
    with temporary_folder() as folder:
        found = find([sys.executable, *options.python], options.cookbook)
        env = unpack_vocabulary(folder, "o200k_base", "cl100k_base")
        bench = Bench(folder, found, str(Path(options.cookbook).resolve()) if options.cookbook else "", env)
        done = run_all(bench, names, measures, options.rounds, options.jobs)
        for line in report(bench, names, done, measures):
            print(line)
    minutes, python = (time.monotonic() - began) / 60, platform.python_version()
    print(f"\nTaken in {minutes:.0f} minutes, on {len(CORES)} cores, Python {python}, {platform.system()}.")


if __name__ == "__main__":
    main()
