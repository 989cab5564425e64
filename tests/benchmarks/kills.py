"""Kill the program again and again, restart it each time, and check that nothing is lost and nothing is twice.

    python tests/benchmarks/kills.py                       100 kills, 3 minutes
    python tests/benchmarks/kills.py --kills 10 --seed 7

The request file holds deliberate duplicates, requests with and without metadata and lines that are no requests; the
results file starts with successes and failures of an earlier run. Before each start lines are reordered, inserted and
deleted. kill -9 comes at a random moment of a kind:

start     while the program starts: it reads the file, the results, the vocabulary
running   while requests are in flight
write     when the results file has just grown
repair    when a torn last line (as a kill within a write leaves it) is being cut off
rewrite   during the final rewrite that drops old failed lines, or just after it

After each kill every whole line must be a result line, no success may be gone, no request may have more successes than
it stands in the file, and the calls of this start that left no result must not be more than were in flight. The end,
without a kill: exactly one line per request.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._common import (
    Ended,
    Lines,
    Process,
    Provider,
    identity_of_line,
    local_provider,
    program,
    say,
    table,
    temporary_folder,
)

if TYPE_CHECKING:
    from collections.abc import Callable

IN_FLIGHT = 64
FLAGS = ("--max_requests_per_minute", 600_000, "--max_tokens_per_minute", 0, "--max_concurrent_requests", IN_FLIGHT)
KINDS = {"start": 0.15, "running": 0.4, "write": 0.15, "repair": 0.15, "rewrite": 0.15}  # share of the kills
PATIENCE = 60.0  # seconds; no start takes that long


class Job:
    """A request file and its results, killed, changed and started again."""

    def __init__(self, folder: Path, provider: Provider, seed: int) -> None:
        self.chance, self.folder, self.provider = random.Random(seed), folder, provider
        self.requests, self.results = folder / "requests.jsonl", folder / "results.jsonl"
        self.made = self.calls = self.torn = self.repeated = self.recorded = 0
        self.before = Lines()
        self.lines: list[str] = []
        self.waiting: list[int] = []  # in flight at each kill, as the provider counts them
        self.kinds: Counter[str] = Counter()
        self.seconds: list[float] = []  # from start to kill
        self.start_with_an_earlier_run()

    # ---- files

    def new_line(self) -> str:
        """Make a request: a fifth repeats an earlier one, half have metadata, a few are none."""
        self.made += 1
        if self.lines and self.chance.random() < 0.2:
            return self.chance.choice(self.lines)
        if self.chance.random() < 0.01:
            return f'{{"model": "m", "messages": [broken {self.made}\n'
        content = f"{self.made} " + "word " * self.chance.randrange(200)
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": content}]}
        if self.chance.random() < 0.5:
            body["metadata"] = self.chance.choice([{"id": self.made}, self.made, "", [], False, "Füße"])
        return json.dumps(body, ensure_ascii=self.chance.random() < 0.5) + "\n"

    def start_with_an_earlier_run(self) -> None:
        """Results of an earlier run: some succeeded, some failed, some are of requests that are gone."""
        self.lines = [self.new_line() for _ in range(300)] + ['{"model": "m", "messages": [broken 0\n']
        with self.results.open("w", encoding="utf-8") as file:
            for line in [self.new_line() for _ in range(20)] + self.chance.sample(self.lines[:300], 60):
                if "broken" in line:
                    continue
                body = json.loads(line)
                tail = [body.pop("metadata")] if "metadata" in body else []
                error = [{"attempt": 1, "kind": "server_error", "status": 500, "message": "earlier"}]
                file.write(json.dumps([body, self.chance.choice([error, {"id": "earlier"}]), *tail]) + "\n")
        self.before = Lines.read(self.results)

    def change_requests(self, more: int) -> None:
        """Reorder, insert and delete lines."""
        for _ in range(self.chance.randrange(more // 4 + 1)):
            self.lines.pop(self.chance.randrange(len(self.lines)))
        for _ in range(more):
            self.lines.insert(self.chance.randrange(len(self.lines) + 1), self.new_line())
        if self.chance.random() < 0.5:
            self.chance.shuffle(self.lines)
        self.requests.write_text("".join(self.lines), "utf-8")

    def tear(self) -> None:
        """Leave a torn last line, as a kill within a write does."""
        last = self.results.read_bytes().splitlines(keepends=True)[-1]
        with self.results.open("ab") as file:
            file.write(last[: self.chance.randrange(1, len(last) - 1)])

    # ---- moments

    def start(self) -> Process:
        return Process.start(program(self.requests, self.results, self.provider.url, *FLAGS), self.folder)

    def until(self, process: Process, happens: Callable[[], bool]) -> bool:
        """Wait for something; False if the process ends before."""
        give_up = time.monotonic() + PATIENCE
        while not happens():
            if not process.running():
                return False
            if time.monotonic() > give_up:
                raise TimeoutError(process.text())
            time.sleep(0.0002)
        return True

    def size(self) -> int:
        return self.results.stat().st_size if self.results.exists() else 0

    def await_moment(self, process: Process, kind: str, size: int) -> bool:
        """Wait for a moment of the given kind; False if the program ended before it came."""
        copy = Path(f"{self.results}.rewrite")
        if kind == "start":
            time.sleep(self.chance.uniform(0, 1.2))
        elif kind == "running":
            done = self.until(process, lambda: bool(self.provider.stats()["in_flight"]))
            time.sleep(self.chance.uniform(0, 0.6))
            return done
        elif kind == "write":
            grown = size + self.chance.randrange(200_000)
            return self.until(process, lambda: self.size() > grown)
        elif kind == "repair":
            return self.until(process, lambda: self.size() != size)
        elif kind == "rewrite":
            if not self.until(process, copy.exists):
                return False
            if self.chance.random() < 0.25:
                return self.until(process, lambda: not copy.exists())
            time.sleep(self.chance.uniform(0, 0.01))
        return process.running()

    # ---- one kill

    def kill_once(self, kind: str) -> bool:
        """Start, kill and check; False if the program ended before the moment came."""
        self.change_requests(20 if kind in ("repair", "rewrite") else 150)
        if kind == "repair":
            self.tear()
        size, process = self.size(), self.start()
        came = self.await_moment(process, kind, size)
        waiting = 0
        if came and process.running():
            os.kill(process.pid, signal.SIGSTOP)  # so that what is in flight can be counted at this very moment
            waiting = self.provider.stats()["in_flight"]
        ended = process.kill()
        if ended.code == -signal.SIGKILL:
            self.kinds[kind] += 1
            self.waiting.append(waiting)
            self.seconds.append(ended.wall)
        elif ended.code != 1:
            raise AssertionError(f"exit code {ended.code}\n{ended.said}")
        self.check(ended)
        return ended.code == -signal.SIGKILL

    def check(self, ended: Ended) -> Lines:
        """Check what a kill, or the end, left behind."""
        killed = ended.code == -signal.SIGKILL
        time.sleep(0.05)  # what is still in the sockets reaches the provider
        now, wanted = Lines.read(self.results), Counter(map(identity_of_line, self.lines))
        calls = self.provider.stats()["accepted"]
        recorded = now.succeeded.total() - self.before.succeeded.total()
        lost = calls - self.calls - recorded
        self.torn += bool(now.torn)
        problems = [f"gone: {one}" for one in (self.before.succeeded - now.succeeded)]
        problems += [f"twice: {one}" for one in now.succeeded - (self.before.succeeded | wanted)]
        if not 0 <= lost <= (IN_FLIGHT if killed else 0):
            problems.append(f"{lost} calls left no result, {IN_FLIGHT} may be in flight")
        if not killed:
            wanted_failures = {one: count for one, count in wanted.items() if "broken" in one}
            if now.failed != wanted_failures:
                problems.append(f"failed lines: {now.failed} instead of {wanted_failures}")
            missing = [one for one in wanted - now.succeeded if one not in wanted_failures]
            problems += [f"missing: {one}" for one in missing] + (["torn end"] if now.torn else [])
            problems += [f"left over: {path.name}" for path in self.folder.glob("results.jsonl.*")]
        if problems:
            raise AssertionError("\n".join([*problems[:10], ended.said]))
        self.calls, self.before = calls, now
        self.repeated += lost
        self.recorded += recorded
        return now

    def finish(self) -> Lines:
        """Let the program come to its end."""
        self.change_requests(50)
        ended = self.start().wait(120)
        if ended.code != 1:  # some lines are no requests
            raise AssertionError(f"exit code {ended.code}\n{ended.said}")
        return self.check(ended)


def kill_often(folder: Path, kills: int, seed: int) -> Job:
    """Kill so many times, then finish; AssertionError if a promise is broken."""
    with local_provider(folder, latency=0.1, latency_spread=0.7, seed=seed) as provider:
        job = Job(folder, provider, seed)
        while (done := job.kinds.total()) < kills:
            kind = job.chance.choices(list(KINDS), list(KINDS.values()))[0]
            if done < len(KINDS):
                kind = list(KINDS)[done]
            killed = job.kill_once(kind)
            if done % 10 == 0:
                say(f"{done}: {kind} {'killed' if killed else 'ended before'}, {len(job.lines):,} requests")
        job.finish()
    return job


def main() -> None:
    """Kill, and tell the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with temporary_folder() as folder:
        job = kill_often(folder, options.kills, options.seed)
        end = job.before
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(job.kinds.items()))
    rows = [
        ("kills", f"{job.kinds.total()} ({kinds}), seed {options.seed}"),
        ("seconds from start to kill", f"median {statistics.median(job.seconds):.2f}, to {max(job.seconds):.2f}"),
        ("torn last lines left by kills", job.torn),
        ("requests at the end", f"{len(job.lines):,}; one line each, {end.failed.total()} of them are no requests"),
        ("results of requests that are gone", f"{end.succeeded.total() + end.failed.total() - len(job.lines):,}, kept"),
        ("calls accepted by the provider", f"{job.calls:,}, for {job.recorded:,} results"),
        ("calls repeated", f"{job.repeated:,}; in flight at the kills: {sum(job.waiting):,} as the provider counts"),
        ("lost, twice, not valid", "none"),
        ("taken", f"{(time.monotonic() - began) / 60:.1f} minutes"),
    ]
    for line in table("what | measured", rows):
        print(line)


if __name__ == "__main__":
    main()
