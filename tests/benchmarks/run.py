"""Measure what the program costs, as ratios taken in the same run; prints one Markdown table.

    python tests/benchmarks/run.py                          everything; a million requests for memory and resume
    python tests/benchmarks/run.py --requests 100000        shorter
    python tests/benchmarks/run.py throughput start         only these measures

throughput  against bare_loop.py (aiohttp, uvloop, 64 workers, no budgets, tokens, retries), each on one core, the local
            provider on another: no latency, budgets 0, --max_concurrent_requests 64, tokens counted with o200k_base,
            results written. Start-up is left out of both: requests a second count from the first call that the
            provider sees to the last one, CPU is that of a job less that of a job of 64 requests.
start       from the start of the process to the first request that the provider sees, against the time that a process
            needs to import aiohttp and tiktoken and to load the vocabulary; with a small and with an 80 MB file.
in_flight   CPU per request once 10,000 requests are in flight, against 64 in flight, both at 1,000 requests a second
            (the provider's latency is 10 s and 0.064 s); and how long it takes until 10,000 are in flight.
gap         mean time between two starts with --seconds_to_sleep_each_loop, noted where aiohttp is called.
memory      largest resident set of a run over many short requests, against 10,000 of them; vocabulary loaded.
resume      CPU time of reading all those results again (a run with --limit 1, less one over a single result), against
            json.loads over every line; with orjson and without; and the memory that each of them takes (by the resident
            set of a process before and after it has read them, after a first file has warmed it up).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._common import (
    BARE_LOOP,
    CHAT,
    CLIENT_CORE,
    NO_BUDGETS,
    PROGRAM,
    SERVER_CORE,
    Process,
    Provider,
    cpu_seconds,
    interleaved,
    local_provider,
    median_ratio,
    program,
    say,
    short_chat,
    table,
    temporary_folder,
    unpack_vocabulary,
    write_chats,
    write_lines,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Row = tuple[str, str, str, str]  # what, measured, goal, how
WORKERS = 64
FEW_REQUESTS = 10_000
LOAD_ALL = """
import aiohttp, tiktoken, time
tiktoken.get_encoding("o200k_base").encode("hello")
print(time.monotonic())
"""
HOLD_RESULTS = """
import os, runpy, sys
names = runpy.run_path(sys.argv[1])
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
names["ResultsFile"](sys.argv[3]).close()
before = resident()
results = names["ResultsFile"](sys.argv[2])
print(resident() - before)
"""
JSON_LOADS = """
import json, sys, time
with open(sys.argv[1], encoding="utf-8") as file:
    for line in file:
        json.loads(line)
print(time.process_time())
"""
NOTE_STARTS = """
import aiohttp, atexit, runpy, sys, time
moments, request, note = [], aiohttp.ClientSession._request, __file__ + ".moments"
def noting(*words, **more):
    moments.append(time.perf_counter())
    return request(*words, **more)
aiohttp.ClientSession._request = noting
atexit.register(lambda: open(note, "w").write(" ".join(map(str, moments))))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Bench:
    """A folder, a local provider, and what later measures reuse of earlier ones."""

    def __init__(self, folder: Path, provider: Provider, requests: int, rounds: int) -> None:
        self.folder, self.provider, self.requests, self.rounds = folder, provider, requests, rounds
        self.env = unpack_vocabulary(folder)
        self.results = folder / "many_results.jsonl"

    def start(
        self, words: list[object], env: dict[str, str] | None = None, *, core: int | None = CLIENT_CORE
    ) -> Process:
        return Process.start(words, self.folder, core=core, env={**self.env, **(env or {})})

    # ---- throughput

    def job(self, kind: str, requests: Path, count: int) -> tuple[float, float]:
        """Run one job; gives requests a second and CPU seconds."""
        self.provider.change(reset=True)
        results = self.folder / f"{kind}_results.jsonl"
        results.unlink(missing_ok=True)
        words: list[object] = [sys.executable, BARE_LOOP, requests, results, self.provider.url + CHAT]
        if kind == "program":
            flags = ("--max_concurrent_requests", WORKERS)
            words = program(requests, results, self.provider.url, *NO_BUDGETS, *flags)
        ended = self.start(words).wait()
        with results.open("rb") as file:
            lines = sum(1 for _ in file)
        stats = self.provider.stats()
        if ended.code or lines != count or stats["accepted"] != count:
            raise RuntimeError(f"{kind}: {lines} of {count} results\n{ended.said}")
        return count / max(1e-3, stats["last_accepted"] - stats["first_call"]), ended.cpu

    def throughput(self) -> Iterator[Row]:
        count = min(self.requests, 40_000)
        many, few = write_chats(self.folder / "jobs.jsonl", count), write_chats(self.folder / "few.jsonl", WORKERS)
        speeds: dict[str, list[float]] = {"program": [], "bare": []}
        costs: dict[str, list[float]] = {"program": [], "bare": []}
        starting = {kind: min(self.job(kind, few, WORKERS)[1] for _ in range(2)) for kind in speeds}
        server = cpu_seconds(self.provider.process.pid)
        for _, kind in itertools.product(range(self.rounds), speeds):
            speed, cpu = self.job(kind, many, count)
            speeds[kind].append(speed)
            costs[kind].append((cpu - starting[kind]) / (count - WORKERS) * 1e6)
            say(f"{kind}: {speed:,.0f} requests/s, {costs[kind][-1]:.0f} us of CPU per request")
        server = (cpu_seconds(self.provider.process.pid) - server) / (2 * self.rounds * count) * 1e6
        cpu_of = {kind: statistics.median(values) for kind, values in costs.items()}
        speed_of = {kind: statistics.median(values) for kind, values in speeds.items()}
        ratio = median_ratio(costs["bare"], costs["program"])
        how = f"{cpu_of['program']:.0f} us against {cpu_of['bare']:.0f} us; {self.rounds} x {count:,} requests in turn"
        yield "throughput by CPU per request, of the bare loop's", f"{ratio:.2f}", ">= 1.0", how
        ratio = median_ratio(speeds["program"], speeds["bare"])
        how = f"{speed_of['program']:,.0f} against {speed_of['bare']:,.0f}; the provider: {server:.0f} us per request"
        yield "throughput by requests a second, of the bare loop's", f"{ratio:.2f}", ">= 1.0", how

    # ---- start-up

    def first_call(self, requests: Path) -> float:
        """Seconds from the start of the program to its first request, as the provider sees it."""
        self.provider.change(reset=True)
        results = self.folder / "start_results.jsonl"
        results.unlink(missing_ok=True)
        process = self.start(program(requests, results, self.provider.url, *NO_BUDGETS))
        while not (seen := self.provider.stats()["first_call"]):
            if not process.running():
                raise RuntimeError(process.text())
            time.sleep(0.02)
        process.kill()
        return float(seen) - process.started

    def loaded(self) -> float:
        """Seconds that it takes to import aiohttp and tiktoken and to load the vocabulary."""
        ended = self.start([sys.executable, "-c", LOAD_ALL]).wait()
        return float(ended.said) - ended.started

    def start_up(self) -> Iterator[Row]:
        small = write_chats(self.folder / "small.jsonl", 100)
        long = ({**short_chat(n), "user": "x" * 8000} for n in range(10_000))
        large = write_lines(self.folder / "large.jsonl", long)
        runs = (self.loaded, partial(self.first_call, small), partial(self.first_call, large))
        bare, with_small, with_large = interleaved(self.rounds + 2, *runs)
        seconds = [statistics.median(times) for times in (bare, with_small, with_large)]
        how = f"{seconds[1]:.2f} s to the first request, {seconds[0]:.2f} s to import and load; {self.rounds + 2} times"
        yield "start, of importing and loading the vocabulary", f"{median_ratio(with_small, bare):.2f}", "<= 2", how
        how = f"{seconds[2]:.2f} s with {large.stat().st_size / 1e6:.0f} MB"
        ratio = median_ratio(with_large, with_small)
        yield "start with an 80 MB file, of that with a small one", f"{ratio:.2f}", "about 1", how
        large.unlink()

    # ---- in flight

    def cpu_per_request(self, in_flight: int, seconds: float) -> tuple[float, float, int]:
        """Microseconds per request at 1,000 requests a second, seconds until all are in flight, most in flight."""
        rate = 1000
        latency = in_flight / rate
        requests = write_chats(self.folder / "in_flight.jsonl", int(rate * (2 * latency + seconds + 60)))
        with local_provider(self.folder, core=SERVER_CORE, latency=latency) as provider:
            results = self.folder / "in_flight_results.jsonl"
            results.unlink(missing_ok=True)
            flags = (*NO_BUDGETS, "--max_concurrent_requests", in_flight)
            process = self.start(program(requests, results, provider.url, *flags))
            while not (stats := provider.stats())["first_call"]:
                time.sleep(0.02)
            full, patience = 0.0, 60.0
            while not full and time.monotonic() - stats["first_call"] < patience:
                time.sleep(0.05)
                if provider.stats()["max_in_flight"] >= in_flight:
                    full = time.monotonic() - stats["first_call"]
            time.sleep(max(latency, 3.0))
            before, calls = cpu_seconds(process.pid), provider.stats()["calls"]
            time.sleep(seconds)
            used, calls = cpu_seconds(process.pid) - before, provider.stats()["calls"] - calls
            most = int(provider.stats()["max_in_flight"])
            say(f"{in_flight} in flight: {used / calls * 1e6:.0f} us, {calls / seconds:.0f}/s, most {most}")
            process.kill()
        return used / calls * 1e6, full, most

    def in_flight(self) -> Iterator[Row]:
        few = [self.cpu_per_request(WORKERS, 10.0)[0]]
        cost, full, most = self.cpu_per_request(10_000, 20.0)
        few.append(self.cpu_per_request(WORKERS, 10.0)[0])
        ratio = cost / statistics.mean(few)
        how = f"{cost:.0f} us against {statistics.mean(few):.0f} us, both at 1,000 requests a second"
        yield "CPU per request with 10,000 in flight, of that with 64", f"{ratio:.2f}", "<= 1.3", how
        reached = f"{full:.1f} s" if full else f"never: {most:,}"
        yield "until 10,000 requests are in flight", reached, "about 10 s", "latency 10 s, no limits, budgets 0"

    # ---- gaps

    def gaps(self, seconds: float, count: int) -> tuple[float, float]:
        """Mean and least time between two starts."""
        launcher = self.folder / "launcher.py"
        launcher.write_text(NOTE_STARTS, "utf-8")
        requests, results = write_chats(self.folder / "gaps.jsonl", count), self.folder / "gaps_results.jsonl"
        results.unlink(missing_ok=True)
        flags = (*NO_BUDGETS, "--seconds_to_sleep_each_loop", seconds)
        python, target, *rest = program(requests, results, self.provider.url, *flags)
        self.start([python, launcher, target, *rest], core=None).wait(300)
        moments = [float(moment) for moment in (self.folder / "launcher.py.moments").read_text("utf-8").split()]
        between = [b - a for a, b in itertools.pairwise(moments)]
        return statistics.mean(between), min(between)

    def gap(self) -> Iterator[Row]:
        for seconds, count, goal in ((0.15, 41, "<= 1 %"), (0.01, 801, "<= 10 %")):
            mean, least = self.gaps(seconds, count)
            what = f"mean gap error, --seconds_to_sleep_each_loop {seconds}"
            how = f"mean {mean * 1000:.2f} ms, least {least * 1000:.2f} ms of {count} starts"
            yield what, f"{mean / seconds - 1:+.1%}", goal, how

    # ---- memory and resume

    def resident(self, count: int, results: Path) -> float:
        """Megabytes of the program at its largest, over so many short requests."""
        requests = self.folder / "memory.jsonl"
        write_chats(requests, count)
        results.unlink(missing_ok=True)
        began = time.monotonic()
        ended = self.start(program(requests, results, self.provider.url, *NO_BUDGETS)).wait()
        if ended.code:
            raise RuntimeError(ended.said)
        say(f"{count:,} requests: {ended.memory / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
        return ended.memory / 1e6

    def memory(self) -> Iterator[Row]:
        few = statistics.median(self.resident(FEW_REQUESTS, self.folder / "few_results.jsonl") for _ in range(3))
        many = self.resident(self.requests, self.results)
        how = f"{many:.0f} MB against {few:.0f} MB with {FEW_REQUESTS:,}"
        yield f"peak memory with {self.requests:,} requests", f"{many:.0f} MB", "< 200 MB", "resident set"
        yield f"peak memory with {self.requests:,}, of that with 10,000", f"{many / few:.2f}", "<= 1.1", how

    def resumed(self, results: Path, env: dict[str, str]) -> float:
        """CPU seconds of a run that finds its only request finished."""
        flags = (*NO_BUDGETS, "--limit", 1)
        ended = self.start(program(self.folder / "one.jsonl", results, self.provider.url, *flags), env).wait()
        if ended.code:
            raise RuntimeError(ended.said)
        return ended.cpu

    def resume(self) -> Iterator[Row]:
        if not self.results.exists():
            self.resident(self.requests, self.results)
        write_chats(self.folder / "one.jsonl", 1)
        with self.results.open(encoding="utf-8") as file:
            first = next(line for line in file if '{"id":0}' in line.replace(" ", "")[-20:])
        one = self.folder / "one_result.jsonl"
        one.write_text(first, "utf-8")
        blocked = self.folder / "blocked"
        blocked.mkdir()
        (blocked / "orjson.py").write_text('raise ImportError("blocked by the benchmark")\n', "utf-8")
        for what, goal, env in (
            ("with orjson", ">= 0.5", {}),
            ("without orjson", ">= 0.33", {"PYTHONPATH": str(blocked)}),
        ):

            def reading(env: dict[str, str] = env) -> float:
                return self.resumed(self.results, env) - self.resumed(one, env)

            def bare() -> float:
                return float(self.start([sys.executable, "-c", JSON_LOADS, self.results]).wait().said)

            theirs, ours = interleaved(max(2, self.rounds - 2), bare, reading)
            lines = [self.requests / statistics.median(times) for times in (ours, theirs)]
            how = f"{lines[0]:,.0f} lines a second of CPU against {lines[1]:,.0f}"
            yield f"resume speed {what}, of json.loads", f"{median_ratio(theirs, ours):.2f}", goal, how
        if Path("/proc/self/statm").exists():
            ended = self.start([sys.executable, "-c", HOLD_RESULTS, PROGRAM, self.results, one]).wait()
            size = self.results.stat().st_size / self.requests
            how = f"growth of the resident set, {self.requests:,} results of {size:.0f} bytes"
            yield "memory per finished request", f"{float(ended.said) / self.requests:.0f} bytes", "< 120 bytes", how


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "throughput": Bench.throughput,
    "start": Bench.start_up,
    "in_flight": Bench.in_flight,
    "gap": Bench.gap,
    "memory": Bench.memory,
    "resume": Bench.resume,
}


def main() -> None:
    """Take the measures and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"of {', '.join(MEASURES)}; default: all")
    parser.add_argument("--requests", type=int, default=1_000_000, help="for memory and resume (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput, A B A B (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.measures) - MEASURES.keys():
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(MEASURES)}")
    rows, began = [], time.monotonic()
    with temporary_folder() as folder, local_provider(folder, core=SERVER_CORE) as provider:
        bench = Bench(folder, provider, options.requests, options.rounds)
        for name in options.measures or MEASURES:
            for row in MEASURES[name](bench):
                say(" | ".join(row))
                rows.append(row)
    for line in table("what | measured | goal | how", rows):
        print(line)
    print(f"\nTaken in {(time.monotonic() - began) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
