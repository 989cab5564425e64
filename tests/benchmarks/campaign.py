"""Run many random combinations of faults, outages, kills and restarts, and check the promise after each.

    python tests/benchmarks/campaign.py 10                  ten minutes of combinations, from seed 1 on
    python tests/benchmarks/campaign.py 1 --seed 1000 --jobs 2
    python tests/benchmarks/campaign.py --only 1234         one combination again, with what the program said

A combination is drawn from its seed: a small request file (objects, Batch lines, result lines, duplicates, lines that
are no requests, blank lines), faults of up to 10 % each (500, 503, 429, reset, hang, truncated, HTML and errors under
200, an echoed key, trickle, gzip bomb, ...), rate limits, outages, settings, and up to three interruptions: kill -9,
SIGTERM, SIGINT, SIGINT twice, a run with --limit, a refused key, no money, a redirect; between them the request file
may change. The promise:

- after each interruption: whole lines are result lines, no success is gone, none is twice, no signal
  leaves a torn line;
- at the end of a run that nothing interrupts: one line for each request; each answer belongs to its request; every
  request that can succeed has done so if the attempts allow; error lists are complete and in order; each call is
  accounted for; no traceback;
- always: no trace of the key in any byte that was written or said; files are readable by the owner only; no lock,
  temporary or unreadable file is left over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import string
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._common import (
    CHAT,
    Ended,
    Lines,
    Process,
    Provider,
    identity,
    identity_of_line,
    local_provider,
    program,
    say,
    temporary_folder,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = {"bad_line", "bad_request", "content_filter", "rate_limit", "server_error", "bad_reply", "connection"}
KINDS |= {"timeout", "too_large"}
PASSING = "error_500 error_503 error_429 reset hang truncated html_200 error_200 echo_key bad_json empty early_close"
PASSING += " trickle echo_key_200 wrong_content_type"
TOO_LARGE = "huge gzip_bomb"
OUTAGES = ("refuse", "503", "hang")
STOPS: dict[str, dict[str, Any]] = {  # after these the program stops by itself
    "key refused": {"statuses": [{"kind": "auth"}]},
    "no money": {"statuses": [{"kind": "no_money"}]},
    "redirect": {"faults": {"redirect": 1.0}},
}
BREAKS = ("kill", "kill", "kill", "SIGTERM", "SIGINT", "SIGINT twice", "limit", *STOPS)
ENOUGH = 30  # attempts, whatever the faults
PATIENCE = 120.0  # seconds for one run
POISON = "cannot be answered"


@dataclass
class Line:
    """A line of the request file and what it asks for; content is empty if it cannot be sent."""

    text: str
    identity: str
    content: str = ""


@dataclass
class Combination:
    """Everything that is drawn from a seed."""

    seed: int
    short: bool = False
    lines: list[Line] = field(default_factory=list)
    server: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    breaks: list[str] = field(default_factory=list)
    key: str = ""

    def __post_init__(self) -> None:
        self.chance = chance = random.Random(self.seed)
        self.key = "".join(chance.choices(string.ascii_letters + string.digits + "-_+/=.", k=40))
        self.lines = [self.new_line(number) for number in range(chance.randint(10, 30 if self.short else 100))]
        names = chance.sample(PASSING.split(), chance.randint(0, 3)) + chance.choices([*TOO_LARGE.split(), ""], k=1)
        slow = {"hang", "trickle", "error_429"}
        server: dict[str, Any] = {
            "seed": self.seed,
            "latency": chance.choice([0.0, 0.02, 0.1]),
            "latency_spread": 0.5,
            "faults": {name: 0.03 if name in slow and self.short else 0.1 for name in names if name},
            "statuses": [{"contains": POISON, "kind": "bad_request"}],
            "huge_megabytes": 3,
            "told_wait": chance.choice([0, 0.2]),
            "headers": chance.choice(["openai", "retry_after_ms", "none"]),
            "keep_alive_lines": chance.choice([-1, 2]),
            "gzip": chance.random() < 0.3,
            "record_calls": True,
        }
        self.server = server
        limit = chance.choice(["", "", "rate", "slots", "in_flight"])
        if limit in ("rate", "slots"):
            kind = "second_bucket" if limit == "rate" else "second_slots"
            self.server |= {"requests_per_minute": chance.choice([600, 3000]), "limit_kind": kind}
        elif limit:
            self.server |= {"max_in_flight": 5}
        if not self.short and chance.random() < 0.3:
            start = chance.uniform(0.3, 2.0)
            schedule = [[start, start + chance.uniform(0.5, 4.0), chance.choice(OUTAGES)]]
            self.server |= {"outage_schedule": schedule}
        self.flags = {
            "max_attempts": chance.choice([1, 2, 5, ENOUGH, ENOUGH]),
            "request_timeout": chance.choice([1.0, 2.0]),
            "max_concurrent_requests": chance.choice([0, 8, 64]),
            "max_requests_per_minute": chance.choice([0, 6000]),
            "max_tokens_per_minute": chance.choice([0, 1_000_000]),
            "max_reply_megabytes": 1,
            "save_details": chance.random() < 0.5,
        }
        self.breaks = chance.choices(BREAKS, k=chance.choice([0, 1, 1] if self.short else [0, 0, 1, 2, 3]))

    def new_line(self, number: int) -> Line:
        """Draw a line of one of the forms that a request file may have."""
        chance = self.chance
        if self.lines and chance.random() < 0.1:
            return chance.choice(self.lines)
        draw = chance.random()
        if draw < 0.04:
            text = chance.choice(
                ['{"model": "m", "mess', '"only a string"', "[]", '{"model": "m"}', "[1, NaN]", "\ufffe"]
            )
            text = text.replace('"m"', f'"m{number}"')
            return Line(text, identity_of_line(text))
        content = chance.choice(["What is {}?", "{} 😀 Füße", "{} <|endoftext|>", "{} " + "long " * 300]).format(number)
        content += f" {POISON}" * (chance.random() < 0.03)
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": content}], "seed": number}
        metadata: Any = chance.choice([None, {"id": number}, number, 0, "", [], {"nested": {"a": [1, 2.5, None]}}])
        whole = body if metadata is None else {**body, "metadata": metadata}
        if draw < 0.14:
            metadata = {"custom_id": f"line {number}"}
            whole = metadata | {"method": "POST", "url": CHAT, "body": body}
        elif draw < 0.24:
            error = [{"attempt": 1, "kind": "timeout", "status": None, "message": "earlier"}]
            outcome = chance.choice([error, {"id": "earlier"}])
            result = [body, outcome, metadata]
            return Line(json.dumps(result), identity(body, metadata), content)
        return Line(json.dumps(whole, ensure_ascii=chance.random() < 0.5), identity(body, metadata), content)

    def write(self, path: Path) -> None:
        """Write the request file, with blank lines and either kind of line end."""
        end = self.chance.choice(["\n", "\n", "\r\n"])
        blank = end if self.chance.random() < 0.3 else ""
        path.write_bytes((blank + "".join(line.text + end for line in self.lines)).encode())

    def change(self) -> None:
        """Insert, delete and reorder lines."""
        for _ in range(self.chance.randrange(10)):
            self.lines.pop(self.chance.randrange(len(self.lines))) if len(self.lines) > 5 else None
            self.lines.insert(
                self.chance.randrange(len(self.lines)), self.new_line(10_000 + self.chance.randrange(9999))
            )
        self.chance.shuffle(self.lines)


class Trial:
    """Runs one combination in a folder, and collects what is wrong."""

    def __init__(self, combination: Combination, folder: Path, provider: Provider) -> None:
        self.plan, self.chance, self.folder, self.provider = combination, combination.chance, folder, provider
        self.requests, self.results = folder / "requests.jsonl", folder / "results.jsonl"
        self.before = Lines()
        self.problems: list[str] = []
        self.said: list[str] = []

    def start(self, **more: Any) -> Process:
        flags: list[object] = []
        for name, value in {**self.plan.flags, **more}.items():
            flags += [f"--{name}"] * (value is not False) + [value] * (not isinstance(value, bool))
        words = program(self.requests, self.results, self.provider.url, *flags)
        return Process.start(words, self.folder, env={"OPENAI_API_KEY": self.plan.key})

    def run(self) -> list[str]:
        """Run with all interruptions, then to the end; gives what is wrong."""
        self.plan.write(self.requests)
        for how in self.plan.breaks:
            self.interrupt(how)
            if self.chance.random() < 0.5:
                self.plan.change()
                self.plan.write(self.requests)
        calls = self.provider.stats()["calls"]
        ended = self.start().wait(PATIENCE)
        self.look_at_files(ended)
        self.look_at_the_end(ended)
        if not self.plan.breaks and "outage_schedule" not in self.plan.server and self.plan.flags["save_details"]:
            self.account_for_calls(self.provider.stats()["calls"] - calls)
        return self.problems

    def interrupt(self, how: str) -> None:
        """Run, and end that run before it is done."""
        if how == "limit":
            ended = self.start(limit=self.chance.randint(1, len(self.plan.lines))).wait(PATIENCE)
        elif how in STOPS:
            process = self.start()
            time.sleep(self.chance.uniform(0, 2.0))
            self.provider.change(**STOPS[how])
            ended = process.wait(PATIENCE)
            self.provider.change(**{name: self.plan.server[name] for name in STOPS[how]})
            self.expect(ended.code != 3 or "Stopped early" in ended.said, f"no reason after {how}")
        else:
            process = self.start()
            time.sleep(self.chance.choice([self.chance.uniform(0, 0.8), self.chance.uniform(0.5, 3.0)]))
            number = signal.SIGKILL if how == "kill" else signal.Signals[how.partition(" ")[0]]
            if how.endswith("twice") and process.running():
                os.kill(process.pid, number)
                time.sleep(self.chance.uniform(0.01, 0.2))
            if process.running():
                os.kill(process.pid, number)
            ended = process.wait(PATIENCE)
        allowed = {0, 1, -signal.SIGKILL, 130, 143, -signal.SIGTERM, -signal.SIGINT}
        allowed |= {3} if how in STOPS else set()
        self.expect(ended.code in allowed, f"exit code {ended.code} after {how}")
        now = self.look_at_files(ended)
        self.expect(how == "kill" or not now.torn, f"torn line after {how}")

    # ---- checks

    def expect(self, holds: object, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def look_at_files(self, ended: Ended) -> Lines:
        """Check what holds after every run."""
        self.said.append(ended.said)
        wanted = Counter(line.identity for line in self.plan.lines)
        try:
            now = Lines.read(self.results)
        except ValueError as error:
            self.problems.append(str(error))
            return self.before
        for one in self.before.succeeded - now.succeeded:
            self.problems.append(f"success gone: {one}")
        for one in now.succeeded - (self.before.succeeded | wanted):
            self.problems.append(f"success twice: {one}")
        early = "KeyboardInterrupt" in ended.said  # SIGINT while Python still imports
        self.expect("Traceback" not in ended.said or early, f"traceback: {ended.said[-2000:]}")
        key = self.plan.key
        traces = {text.encode() for text in (key, json.dumps(key)[1:-1], quote(key, safe=""), quote(key))}
        for path in self.folder.iterdir():
            if path != self.requests:
                data = path.read_bytes()
                self.expect(not any(trace in data for trace in traces), f"the key stands in {path.name}")
            if path.name.startswith("results.jsonl") and os.name == "posix":
                self.expect(path.stat().st_mode & 0o077 == 0, f"others can read {path.name}")
        self.before = now
        return now

    def look_at_the_end(self, ended: Ended) -> None:
        """Check the promise of a run that came to its end."""
        wanted, now = Counter(line.identity for line in self.plan.lines), self.before
        extra = now.succeeded + now.failed - wanted
        self.expect(not (wanted - (now.succeeded + now.failed)), f"no line for {wanted - now.succeeded - now.failed}")
        self.expect(not (extra - now.succeeded), f"more than one line for {extra - now.succeeded}")
        self.expect(not (now.failed - wanted), f"failed lines of requests that are gone: {now.failed - wanted}")
        self.expect(ended.code == (1 if now.failed else 0), f"exit code {ended.code}, {now.failed.total()} failed")
        self.expect(not now.torn, "torn line at the end")
        left = [path.name for path in self.folder.glob("results.jsonl*") if path != self.results]
        self.expect(not left, f"left over: {left}")
        contents = {line.identity: line.content for line in self.plan.lines}
        for line in self.results.read_bytes().splitlines():
            body, outcome, *rest = json.loads(line)
            content = contents.get(one := identity(body, rest[0] if rest else None))
            if isinstance(outcome, list):
                self.look_at_failure(one, content or "", outcome)
            elif content is not None:
                mark = f"[{zlib.crc32(content.encode('utf-8', 'surrogatepass')):08x}]"
                self.expect(mark in json.dumps(outcome), f"the answer {outcome} is not that of {one}")
                self.expect(POISON not in content, f"a refused request succeeded: {one}")

    def look_at_failure(self, one: str, content: str, errors: list[dict[str, Any]]) -> None:
        """Check that a request had to fail, and that its errors are complete and in order."""
        problem = f"\n  request {one}\n  errors {json.dumps(errors)}"
        self.expect(not {error.get("status") for error in errors} & {401, 402, 403, 307}, f"the run's fault{problem}")
        for error in errors:
            self.expect(
                error.get("kind") in KINDS and error.get("message"), f"an error without kind or message{problem}"
            )
        kinds = [error.get("kind") for error in errors]
        if not content:
            self.expect(kinds == ["bad_line"], f"not one bad_line{problem}")
            self.expect(errors[0]["message"].startswith("line "), f"no line number{problem}")
            return
        attempts = [error["attempt"] for error in errors if error["kind"] != "rate_limit"]
        most, outage = self.plan.flags["max_attempts"], "outage_schedule" in self.plan.server
        self.expect(attempts == list(range(1, len(attempts) + 1)), f"attempts {attempts}{problem}")
        self.expect(kinds.count("rate_limit") <= 1, f"more than the last refusal{problem}")
        last = max((error for error in errors if error["kind"] != "rate_limit"), key=lambda error: error["attempt"])
        if last["kind"] == "bad_request":
            self.expect(POISON in content, f"bad_request{problem}")
        elif last["kind"] != "too_large":
            enough = len(attempts) == most or (outage and len(attempts) > most)
            self.expect(
                enough and (most < ENOUGH or outage), f"gave up after {len(attempts)} of {most} attempts{problem}"
            )

    def account_for_calls(self, calls: int) -> None:
        """Check that attempts and refusals of all lines are the calls that the provider has seen."""
        told = 0
        for line in self.results.read_bytes().splitlines():
            details = json.loads(line)[3]
            told += details["attempts"] + details["refusals"]
        self.expect(told == calls, f"details tell of {told} calls, the provider saw {calls}")


def run_seed(seed: int, *, short: bool = False) -> tuple[Combination, list[str], list[str]]:
    """Run one combination; gives it, what is wrong with its outcome, and what the program said."""
    plan = Combination(seed, short)
    with temporary_folder() as folder, local_provider(folder, **plan.server) as provider:
        (folder / "run").mkdir()
        trial = Trial(plan, folder / "run", provider)
        try:
            problems = trial.run()
        except TimeoutError as error:
            problems = [*trial.problems, str(error)]
    return plan, problems, trial.said


def seeds(first: int, until: float) -> Iterator[int]:
    """Count up until the time is over."""
    while time.monotonic() < until:
        yield first
        first += 1


def main() -> int:
    """Run for some minutes; 1 if any combination failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="?", default=1.0)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--jobs", type=int, default=4, help="combinations at a time")
    parser.add_argument("--only", type=int, help="run this seed alone and print what the program said")
    options = parser.parse_args()
    began, failed, faults, breaks = time.monotonic(), [], Counter[str](), Counter[str]()
    lines = done = 0

    def one(seed: int) -> None:
        nonlocal lines, done
        plan, problems, said = run_seed(seed)
        lines, done = lines + len(plan.lines), done + 1
        faults.update(
            [*plan.server["faults"], *(f"outage {kind}" for *_, kind in plan.server.get("outage_schedule", []))]
        )
        breaks.update(plan.breaks)
        if problems:
            failed.append(seed)
            say(f"seed {seed} failed (flags {plan.flags}, server {plan.server}, breaks {plan.breaks}):")
            say("\n".join(f"- {problem[:1500]}" for problem in problems[:5]))
        if options.only is not None:
            print("\n----\n".join(said))

    if options.only is not None:
        one(options.only)
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            source = seeds(options.seed, began + 60 * options.minutes)

            def work() -> None:
                with suppress(StopIteration):
                    while True:
                        one(next(source))

            for worker in [pool.submit(work) for _ in range(options.jobs)]:
                worker.result()
    print(f"{done} combinations of {lines:,} requests in {(time.monotonic() - began) / 60:.1f} minutes.")
    print("faults: " + ", ".join(f"{count} x {name}" for name, count in sorted(faults.items())))
    print("interruptions: " + ", ".join(f"{count} x {name}" for name, count in sorted(breaks.items())))
    print(f"failed: {', '.join(map(str, sorted(failed))) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
