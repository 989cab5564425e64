#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.13", "tiktoken>=0.13"]
# ///
r"""Process a file of LLM API requests in parallel, as fast as your rate limits allow.

    export OPENAI_API_KEY=...
    python api_request_parallel_processor.py --requests_filepath requests/openai_chat.jsonl --max_requests_per_minute 60
    python api_request_parallel_processor.py --requests_filepath requests/openai_chat.jsonl --dry_run
    python api_request_parallel_processor.py --requests_filepath requests/openai_chat.jsonl \
        --request_url http://127.0.0.1:8000/v1 --max_requests_per_minute 0 --max_tokens_per_minute 0

One line in: the body to send, with an optional "metadata" that is not sent. One line out, success or failure:
    {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "What is 2+3?"}], "metadata": {"id": 7}}
    [{"model": ..., "messages": ...}, {"id": "chatcmpl-1", "choices": ...}, {"id": 7}]
    [{"model": ..., "messages": ...}, [{"attempt": 1, "kind": "server_error", "status": 500, ...}], {"id": 7}]
Every request passes seven stations, and so does the reader of this file:
    the loop      takes every request from its line to its result line
    1 read        the next line becomes a request; finished ones are skipped
    2 estimate    tokens it will be charged
    3 pace        when may it start?
    4 send        the only place that knows HTTP
    5 judge       what the reply means: done, refused, try again, hopeless
    6 record      one line, written whole, once
    7 report      counts, progress, summary
    command line  flags, checks before the first request, signals
    tables        shapes of requests and replies, providers
The same command continues: the results file is the checkpoint. Ctrl-C finishes what is in flight, twice stops at once.
Exit codes: 0 all succeeded; 1 some failed; 2 wrong usage or files; 3 stopped early; 129, 130, 143 interrupted. A new
provider is a row of PROVIDERS, a flag a field of Settings, retries are station 5; __all__ and both formats are stable.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run hears it, Ctrl-C ends all, without a traceback

import argparse
import asyncio
import base64
import codecs
import contextlib
import gc
import gzip
import hashlib
import heapq
import importlib.util
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import ssl
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from io import BytesIO
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import aiohttp

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]
try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]
try:
    import tiktoken.load
except ImportError:
    tiktoken = None  # type: ignore[assignment]

__version__ = "0.1.0"
__all__ = [
    "BLANKS", "IDENTITY_BYTES", "LOGGER", "MOST_CONCURRENT", "PROVIDERS", "Action", "ConsoleHandler", "Cost",
    "Endpoint", "LearnedTokens", "Outcome", "Pacer", "Reader", "Reply", "Reporter", "Request", "ResultsFile",
    "ResultsLost", "Run", "Secrets", "ServerLimits", "Settings", "Tally", "Tokenizer", "UsageError", "build_parser",
    "complain", "conclude", "dumps", "duration", "each_endpoint", "error_words", "estimate_text", "estimate_tokens",
    "explain", "find_provider", "find_shape", "hear_signals", "identity", "judge", "likely_mistake", "loads", "locked",
    "make_endpoint", "one_line", "open_files_for", "parse_line", "process_api_requests_from_file", "read_bounded",
    "read_limits", "read_result", "read_usage", "refuse_unfinished", "retry_delay", "run_job"]  # fmt: skip

STATIONS = ("read", "estimate", "pace", "send", "judge", "record", "report")
LOGGER = logging.getLogger("api_request_parallel_processor")


class UsageError(Exception):
    """Wrong flags or files; nothing was touched. The text says what to do."""


def option(station: str, default: Any, text: str, table: str = "") -> Any:
    """One setting: station, default, help and the table of its values beside auto, for Settings and flags alike."""
    lookup = {"choices": lambda: ["auto", *globals()[table]] if table else []}  # later, since tables stand at the end
    return field(default=default, metadata={"station": station, "help": text} | lookup)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every knob of a run; the fields are the flags of the command line."""

    requests_filepath: str = option("read", MISSING, "JSONL file of requests; - reads standard input")
    limit: int = option("read", 0, "only the first N requests of the file: a smoke run; 0 = all")
    dry_run: bool = option("read", default=False, text="read and count everything, send and write nothing")
    token_encoding_name: str = option("estimate", "auto", "auto = by model, else o200k_base; any tiktoken name")
    max_requests_per_minute: float = option("pace", 1500.0, "ceiling on requests started in any minute; 0 = find out")
    max_tokens_per_minute: float = option("pace", 125000.0, "ceiling on their tokens; 0 = find out")
    seconds_to_sleep_each_loop: float = option("pace", 0.0, "shortest time between two request starts, in seconds")
    max_concurrent_requests: int = option("pace", 0, "requests in flight at once; 0 = as many as useful")
    request_url: str = option("send", "https://api.openai.com/v1/chat/completions", "the endpoint; repeatable")
    endpoints_filepath: str = option("send", "", "`URL key_env rpm tpm` a line; read again when it changes")
    provider: str = option("send", "auto", "whose rules apply", "PROVIDERS")
    api_key: str = option("send", "", "the key; other users of this machine can see it here: better --api_key_env")
    api_key_env: str = option("send", "", "variable with the key, one for each URL; default: the provider's usual one")
    request_header: tuple[str, ...] = option("send", (), "'Name: value' to send along; repeatable")
    request_timeout: float = option("send", 600.0, "seconds for one attempt")
    max_reply_megabytes: float = option("send", 256.0, "largest reply, after decompression")
    allow_plain_http: bool = option("send", default=False, text="send a key over http to a public address")
    max_attempts: int = option("judge", 5, "tries per request; refusals (rate limits) do not use them up")
    give_up_minutes: float = option("judge", 30.0, "stop after that long without one success; 0 = never")
    save_filepath: str = option("record", "", "results; default: .jsonl of the request file becomes _results.jsonl")
    save_details: bool = option("record", default=False, text="add attempts, times and tokens to result lines")
    restart: bool = option("record", default=False, text="start afresh; the old results file is kept, renamed")
    ignore_batch: bool = option("record", default=False, text="run even if batch jobs are open for these results")
    progress: str = option("report", "auto", "bar, lines or none; auto = bar on a terminal, else lines", "PROGRESS")
    logging_level: str = option("report", "20", "number or name: 10 DEBUG, 20 INFO, 30 WARNING, 40 ERROR")
    input_price: float = option("report", 0.0, "price of a million input tokens")
    cached_input_price: float = option("report", 0.0, "of a million of those read from a cache; 0 = as all input")
    output_price: float = option("report", 0.0, "price of a million output tokens")
    max_cost: float = option("report", 0.0, "stop before more is spent, in the unit of the prices; 0 = no limit")

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """Settings of what a caller or a command line gives: None is the default, a list repeats a flag."""
        for unknown in given.keys() - cls.__dataclass_fields__.keys():
            raise UsageError(f"unknown setting {unknown!r}; the fields of Settings are what there is")
        given = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in given.items() if v is not None}
        lists = {n: [*map(str, v)] for n, v in given.items() if isinstance(v, list | tuple)}
        return cls(**given | {n: tuple(v) if n == "request_header" else " ".join(v) for n, v in lists.items()})

    def check(self) -> None:
        """Refuse values that mean nothing."""
        for knob in fields(self):
            name, value, choices = knob.name, getattr(self, knob.name), knob.metadata["choices"]()
            kind = str if knob.default is MISSING else type(knob.default)
            least = 1e-9 if name in ("max_attempts", "request_timeout", "max_reply_megabytes") else 0
            if kind in (int, float) and not (isinstance(value, int | float) and least <= value < math.inf):
                raise UsageError(f"--{name} {value!r}: give a number {'above 0' if least else 'from 0 up'}")
            if kind in (str, tuple) and not isinstance(value, kind) and name != "logging_level":
                raise UsageError(f"--{name} takes a {'text' if kind is str else 'list'}, not {type(value).__name__}")
            if choices and value not in choices:
                raise UsageError(f"--{name} {value!r} is none of {', '.join(choices)}")
        if self.max_cost and not (self.input_price or self.output_price):
            raise UsageError("--max_cost needs --input_price or --output_price, in money per million tokens")
        if self.requests_filepath == "-" and not (self.save_filepath or self.dry_run):
            raise UsageError("requests come from standard input: say with --save_filepath where the results go")
        level = str(self.logging_level).upper()
        if not (level.isdecimal() or level in logging.getLevelNamesMapping()):
            raise UsageError(f"--logging_level {level} is unknown; use a number or DEBUG, INFO, WARNING, ERROR")

    @property
    def results_path(self) -> str:
        """Where the results go."""
        return self.save_filepath or self.requests_filepath.removesuffix(".jsonl") + "_results.jsonl"

    @property
    def budgets(self) -> tuple[float, float]:
        """The ceilings: requests and tokens per minute."""
        return self.max_requests_per_minute, self.max_tokens_per_minute

    def price(self, prompt: float, output: float, cached: float = 0.0) -> float:
        """What tokens cost at the given prices; the cached ones are part of the prompt."""
        saved = cached * (self.input_price - self.cached_input_price) if self.cached_input_price else 0
        return (prompt * self.input_price - saved + output * self.output_price) / 1e6


# ==== the loop ========================================================================================================

STARTS_PER_TURN, LINES_PER_TURN = 64, 1000  # started, or skipped as finished, before replies are looked at
HELD_FOR_RETRY = 2000  # reading pauses while more requests than this wait to be tried again
SAME_FAILURES, ERRORS_KEPT = 20, 50  # when so many fail first for one reason, the file is wrong; per request
CHECK_SECONDS, SHORTEST_WAIT = 1.0, 0.001  # between looks at the results file; of a sleep


@dataclass(slots=True)
class Run:
    """All mutable state of a run (what has a station of its own keeps its state there), and the loop over it."""

    settings: Settings
    reader: Reader
    endpoints: list[Endpoint]
    results: ResultsFile
    reporter: Reporter
    wake: asyncio.Event
    clock: Callable[[], float]
    learned: LearnedTokens = field(default_factory=lambda: LearnedTokens())
    tally: Tally = field(default_factory=lambda: Tally())
    random: random.Random = field(default_factory=random.Random)
    hand: Request | None = None  # the next one to start
    retries: list[tuple[float, int, Request]] = field(default_factory=list)  # a heap by when they are due
    limbo: dict[Request, Outage] = field(default_factory=dict)  # out of attempts: failed, unless that is an outage
    in_flight: dict[int, tuple[Request, asyncio.Task[None]]] = field(default_factory=dict)  # by line, oldest first
    arrived: deque[tuple[Request, Endpoint, Ticket, Reply]] = field(default_factory=deque)
    trouble_since: float = math.inf  # first failure or refusal after the last success
    first_failures: Counter[str] = field(default_factory=Counter)  # why requests failed at once, before any success
    expected_spend: float = 0.0  # by what is in flight
    next_check: float = 0.0  # of the results file
    limits_problem: str = ""  # with the file of limits, told already
    stopped_by: str = ""  # "" or why nothing is started any more: signal hopeless given_up max_cost results
    signal: int = 0
    force: bool = False  # do not even wait for what is in flight

    async def process_requests(self) -> None:
        """Take every request from its line to its result line."""
        while True:
            now = self.clock()
            while self.arrived:  # 5 judge, 6 record
                self.settle(*self.arrived.popleft(), now)
            self.look_after(now)
            wake_at = min(self.cancel_late(now), self.reporter.update(self, now))  # 7 report
            for _ in range(STARTS_PER_TURN):
                if self.stopped_by:
                    break
                self.hand = self.hand or self.next_request(now)  # 1 read, 2 estimate
                if self.hand is None:
                    wake_at = min(wake_at, self.reader.due, self.retries[0][0] if self.retries else math.inf)
                    break
                now = self.clock()  # reading took a while
                endpoint, delay = self.choose_endpoint(self.hand, now)  # 3 pace
                if delay > 0:
                    wake_at = min(wake_at, now + delay)
                    break
                self.start(self.hand, endpoint, now)  # 4 send
                self.hand = None
            else:
                wake_at = now  # more may start, but replies come first
            self.flush(now)
            more = not self.stopped_by and (self.hand or self.retries or not self.reader.ended)
            if self.force or not (self.in_flight or more):
                break
            await self.wait(min(wake_at, self.next_check))
        if not self.stopped_by:
            self.fail_limbo()

    async def wait(self, until: float) -> None:
        """Sleep until a reply, a line or a signal wakes the loop, at the latest `until`: the one place that waits."""
        seconds = max(0.0, until - self.clock())  # subtle: uvloop rounds less than the shortest to nothing, and spins
        timer = asyncio.get_running_loop().call_later(seconds and max(seconds, SHORTEST_WAIT), self.wake.set)
        await self.wake.wait()
        self.wake.clear()
        timer.cancel()

    def next_request(self, now: float) -> Request | None:
        """Take a retry that is due or a new line, in turns, so that neither crowds out the other; None: nothing yet."""
        due, waiting = bool(self.retries) and self.retries[0][0] <= now, len(self.retries) + len(self.limbo)
        request = self.read_line(now) if waiting < HELD_FOR_RETRY and not (due and self.tally.calls % 2) else None
        return heapq.heappop(self.retries)[2] if due and request is None else request

    def read_line(self, now: float) -> Request | None:
        """Read up to the next line that is not finished yet; lines that cannot be sent are recorded on the way."""
        for _ in range(LINES_PER_TURN):
            if (request := self.reader.next(now)) is None:
                return None
            self.tally.read += 1
            if self.results.resumed and self.results.take(identity(request.body, request.metadata)):
                self.tally.finished_before += 1
            elif not request.problem:
                self.reader.estimate(request)
                return request
            else:
                self.tally.bad_lines += 1
                LOGGER.warning("%s", request.problem)
                request.errors.append({"attempt": 0, "kind": "bad_line", "status": None, "message": request.problem})
                self.record(request)
        self.reader.due = now  # there are more lines, but replies come first
        return None

    def choose_endpoint(self, request: Request, now: float) -> tuple[Endpoint, float]:
        """The endpoint that may start this request first, and in how many seconds."""
        request.cost = cost = self.learned.cost(request.model, request.estimate or Estimate(0, 0))
        if self.settings.input_price or self.settings.output_price:
            expected, worst = (self.settings.price(cost.prompt, total - cost.prompt) for total in cost[:2])
            request.price = expected if request.model in self.learned else worst
            least = request.price if self.in_flight else expected  # alone, also a request with a large cap may go
            if (spent := self.tally.spent) + self.expected_spend + least > (self.settings.max_cost or math.inf):
                if not self.in_flight:
                    self.stop("max_cost", f"Spent {spent:,.4f}, one more may exceed --max_cost. Raise it to go on.")
                return self.endpoints[0], math.inf
        ranks = []
        for index, endpoint in enumerate(self.endpoints):
            delay = endpoint.pacer.delay(cost, now)
            delay = max(delay, endpoint.outage.delay(now)) if endpoint.outage.down else delay
            failed_here = request.attempts > 0 and endpoint is request.endpoint
            ranks.append((delay, failed_here, endpoint.pacer.in_flight, index))  # less in flight: it answers faster
        delay, _, _, index = min(ranks)
        return self.endpoints[index], delay

    def start(self, request: Request, endpoint: Endpoint, now: float) -> None:
        """Send one attempt, as a task that hands its reply to the loop."""

        async def attempt() -> None:
            reply = await endpoint.send(request.body)
            self.arrived.append((request, endpoint, ticket, reply))
            self.wake.set()

        ticket = endpoint.pacer.start(request.cost, now)
        request.started, request.started_utc = now, request.started_utc or time.time()
        self.tally.calls += 1
        self.expected_spend += request.price
        request.endpoint, endpoint.outage.last_start = endpoint, now
        self.in_flight[request.line] = (request, asyncio.get_running_loop().create_task(attempt()))

    def settle(self, request: Request, endpoint: Endpoint, ticket: Ticket, reply: Reply, now: float) -> None:
        """Apply what a reply means: to the pacing, to what is learned, to the request and to the run."""
        del self.in_flight[request.line]
        self.expected_spend -= request.price
        verdict, usage = judge(reply, endpoint.provider, endpoint.shape), read_usage(reply.body, endpoint.shape)
        outcome = ACCEPTED if (action := verdict.action) is DONE else OUTCOMES.get(action, ACCEPTED)  # hashing is slow
        charged = usage[0] + usage[1] if usage else 0 if outcome is REFUSED or not reply.sent else None  # not known
        endpoint.pacer.finish(ticket, outcome, now, charged, read_limits(reply, endpoint.provider, time.time()))
        self.tally.count(verdict, reply, usage)
        if self.settings.input_price or self.settings.output_price:
            expected = request.price if action is DONE or (reply.sent and reply.failure) else 0.0
            self.tally.spent += self.settings.price(*usage) if usage else expected
        if usage and request.estimate:
            self.learned.learn(request.model, request.estimate, usage)
        if reply.status and (reply.status < 500 or outcome is not FAILED):  # a sign of life
            if endpoint.outage.answered(request.started):
                LOGGER.warning("The provider (%s) answers again; going on.", endpoint.name)
            self.fail_limbo(endpoint.outage)
        if action is DONE:
            self.trouble_since = math.inf
            self.record(request, reply, usage)
        else:
            self.trouble_since = min(self.trouble_since, now)
            self.take_failure(request, endpoint, verdict, reply, now)

    def take_failure(self, request: Request, endpoint: Endpoint, verdict: Verdict, reply: Reply, now: float) -> None:
        """Note a failed or refused attempt; then try again, give up the request, or stop a hopeless run."""
        action, told = verdict.action, (request.line, verdict.kind, verdict.message)
        LOGGER.debug("line %d: %s %s", *told, extra={"failed_attempt": told})
        refused, mistake = action is Action.REFUSED, likely_mistake(endpoint, verdict, reply)
        wrong_url = action is Action.FAIL and mistake.startswith(WRONG_URL)
        unheard = not self.tally.replies or (self.tally.replies == 1 and wrong_url)  # this one is counted already
        if action is Action.STOP or (unheard and (reply.hopeless or wrong_url)):
            self.leave_out(endpoint, reply.hopeless or verdict.message, mistake)
        if endpoint not in self.endpoints or self.stopped_by == "hopeless":  # untouched: another, or a later run asks
            heapq.heappush(self.retries, (now, request.line, request))
            return
        request.refusals, request.attempts = request.refusals + refused, request.attempts + (not refused)
        if refused:  # only the last one is listed
            request.errors = [error for error in request.errors if error["kind"] != verdict.kind]
        error = {"attempt": request.attempts + refused, "kind": verdict.kind, "status": reply.status or None}
        error |= {"message": f"{verdict.message} {mistake}".strip()}
        error |= {"response": reply.text or None if reply.body is None else reply.body}
        request.errors.append(error)
        del request.errors[1:-ERRORS_KEPT]
        if refused:
            heapq.heappush(self.retries, (now, request.line, request))
        elif action is Action.RETRY:
            self.try_again(request, endpoint, verdict, reply, now)
        else:
            self.record(request)
            reason = f"{verdict.kind} {reply.status} {verdict.code or re.sub('[0-9]+', '', verdict.message)}"
            self.first_failures.update([reason] if not self.tally.succeeded else [])
            if self.first_failures == {reason: 1}:
                LOGGER.warning("line %d: %s", request.line, error["message"])
            if self.first_failures == {reason: SAME_FAILURES}:
                self.stop("hopeless", f"The first {SAME_FAILURES} replies all say: {verdict.message}", mistake)

    def leave_out(self, endpoint: Endpoint, *reason: str) -> None:
        """Go on without an endpoint that is of no use; without the last one the run stops."""
        if self.endpoints == [endpoint]:
            self.stop("hopeless", *reason)
        elif endpoint in self.endpoints:
            self.endpoints.remove(endpoint)
            LOGGER.warning("%s is left out from now on: %s", endpoint.name, " ".join(filter(None, reason)))

    def try_again(self, request: Request, endpoint: Endpoint, verdict: Verdict, reply: Reply, now: float) -> None:
        """Back off after a passing failure. In an outage the attempt is excused, except for the last request left."""
        waiting = len(self.retries) + len(self.limbo) + (self.hand is not None)
        left = waiting + len(self.in_flight) + 1 if self.reader.ended else math.inf  # at the end too few for a streak
        if left > 1 and (not reply.status or reply.status >= 500):
            enough = max(2, waiting + 1) if self.reader.ended and reply.status in (0, 503) else OUTAGE_STREAK
            newest_first = (other for other, _ in reversed(self.in_flight.values()) if other.endpoint is endpoint)
            if endpoint.outage.failed(request, enough, newest_first, now):
                LOGGER.warning("%s seems to be down: %s. The rest waits, probes go on.", endpoint.name, verdict.message)
                for other in [other for other, outage in self.limbo.items() if outage is endpoint.outage]:
                    heapq.heappush(self.retries, (now, other.line, other))
                    del self.limbo[other]
        tries = request.attempts - request.excused
        if tries < self.settings.max_attempts:
            limits = read_limits(reply, endpoint.provider, time.time()) or ServerLimits()
            delay = max(retry_delay(tries, self.random), limits.retry_after or 0.0)
            heapq.heappush(self.retries, (now if endpoint.outage.down else now + delay, request.line, request))
        elif left > 1:
            self.limbo[request] = endpoint.outage
        else:
            self.record(request)

    def fail_limbo(self, answered: Outage | None = None) -> None:
        """No outage after all: what ran out of attempts before an answered start has failed."""
        for request, outage in list(self.limbo.items()):
            if not answered or (outage is answered and request.started <= answered.alive):
                del self.limbo[request]
                self.record(request)

    def record(self, request: Request, reply: Reply | None = None, usage: Usage | None = None) -> None:
        """Queue the one result line of a request: with this reply, else with its errors."""
        self.tally.failed += reply is None
        outcome, details = (reply.body, reply.details) if reply else (request.errors, None)
        if reply and isinstance(outcome, list):  # a list would mean failure
            outcome = {"data": outcome}
        if self.settings.save_details:
            began, passed = request.started_utc, time.time() - request.started_utc  # 0: it was never sent
            started = datetime.fromtimestamp(began, UTC).isoformat(timespec="milliseconds") if began else None
            own = {"line": request.line, "attempts": request.attempts + bool(reply), "refusals": request.refusals}
            times = {"started": started, "seconds": round(passed, 3) if began else None}
            tokens = {"estimated_tokens": request.cost.expected, "tokens": sum(usage[:2]) if usage else None}
            details = {**own, **times, **tokens, **(details or {})}
        self.results.write(request.body, outcome, request.metadata, details or None)

    def cancel_late(self, now: float) -> float:
        """End attempts that take too long: one sweep costs less than a timer for each. Gives when the next is due."""
        for request, task in self.in_flight.values():
            if now < (due := request.started + self.settings.request_timeout):
                return due
            task.cancel(TIMED_OUT)
        return math.inf

    def look_after(self, now: float) -> None:
        """End a run that was interrupted, or that had no success for long while something was tried."""
        if self.signal and not self.stopped_by:
            notice = "%s: nothing new is started; once more stops at once. The same command continues."
            LOGGER.warning(notice, signal.Signals(self.signal).name)
            self.stop("signal")
        if not (self.hand or self.in_flight or self.retries):
            self.trouble_since = math.inf
        minutes, trouble = self.settings.give_up_minutes, self.tally.last_trouble
        if now >= self.trouble_since + (minutes * 60 or math.inf):
            self.stop("given_up", f"No success for {minutes:g} minutes (--give_up_minutes); last trouble: {trouble}")

    def flush(self, now: float) -> None:
        """Write the result lines of this turn; stop the run if they cannot be kept, and at once the second time."""
        try:
            if now >= self.next_check:
                self.next_check = now + CHECK_SECONDS
                self.results.check()
                if self.settings.endpoints_filepath:
                    reread_limits(self)
            self.results.flush()
        except ResultsLost as lost:
            self.force = self.force or self.stopped_by != ""
            self.stop("results", str(lost))

    def stop(self, why: str, *reason: str) -> None:
        """Start nothing any more; the first reason counts."""
        if not self.stopped_by:
            self.stopped_by, self.tally.stop_reason = why, " ".join(f"{one.rstrip('. 。')}." for one in reason if one)


# ==== 1 read: the next line becomes a request; finished ones are skipped ==============================================

MAX_LINE_BYTES, LONG_LINE_BYTES = 1 << 28, 200_000  # longer than the latter: prepared in a thread, the loop goes on
UNFINISHED_LINE_SECONDS, RAW_TEXT_KEPT = 2.0, 1000  # patience with a last line; characters of one that is too long
BLANKS = b" \t\r\n" + codecs.BOM_UTF8
Wake = Callable[[], object]


@dataclass(slots=True, eq=False)
class Request:
    """One line of the request file on its way to its result line."""

    line: int  # physical line number, from 1
    body: Any  # what is sent, without metadata; the raw text of a line that cannot be sent
    metadata: Any
    problem: str  # why it cannot be sent
    model: str
    estimate: Estimate | None = None
    cost: Cost = field(default_factory=lambda: NO_COST)
    price: float = 0.0  # of that cost
    attempts: int = 0  # finished ones, without refusals
    excused: int = 0  # attempts that fell into an outage: they do not count against --max_attempts
    suspect: bool = False  # it failed while others, sent later, were answered
    refusals: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    started_utc: float = 0.0  # first start
    started: float = 0.0  # last start, on the loop's clock
    endpoint: Endpoint | None = None  # of the last start


class Reader:
    """Turns lines into requests, in order, numbered as in the file.

    A file is read to the end that it has when reached. A stream (standard input, a pipe) may be slow or endless: it is
    read by a thread of its own. `wake` is called, from threads, when there may be something new.
    """

    def __init__(self, file: IO[bytes], endpoint: Endpoint, tokens: Tokenizer, limit: int, wake: Wake) -> None:
        self.file, self.endpoint, self.tokens, self.limit, self.wake = file, endpoint, tokens, limit or math.inf, wake
        self.number, self.given, self.due, self.ended, self.patience_ends = 0, 0, 0.0, False, math.inf
        self.preparing: asyncio.Future[Request] | None = None  # a long line, in a thread
        self.queue, place = queue.Queue[bytes](maxsize=256), file.fileno()
        self.size = os.fstat(place).st_size if os.path.isfile(place) else 0  # 0: read by the thread
        if not self.size:  # subtle: a file object of its own, since Python locks that of standard input when it ends
            threading.Thread(target=self._pump, args=(os.fdopen(os.dup(place), "rb"),), daemon=True).start()

    def _pump(self, file: IO[bytes]) -> None:
        line = b"\n"
        with file, contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            while line:
                line = read_bounded(file)
                self.queue.put(line)
                self.wake()

    def next(self, now: float) -> Request | None:
        """Give the next request; None if there is none (`ended`) or not yet (`due`, or `wake` is called)."""
        self.due = math.inf
        if self.preparing:
            request = self.preparing.result() if self.preparing.done() else None
            self.preparing = None if request else self.preparing
            return request
        while raw := b"" if self.ended or self.given >= self.limit else self._next_line(now):
            self.number += 1
            if raw.strip(BLANKS):  # blank lines count, but are skipped
                break
        else:
            self.ended = raw is not None  # else there may be a next line later
            return None
        self.given += 1
        if len(raw) > LONG_LINE_BYTES:
            self.preparing = asyncio.get_running_loop().run_in_executor(None, self._prepare, self.number, raw)
            self.preparing.add_done_callback(lambda _: self.wake())
            return None
        return parse_line(self.number, raw, self.endpoint)

    def _next_line(self, now: float) -> bytes | None:
        """Give the next line; an empty one is the end, None means not yet."""
        if not self.size:
            return None if self.queue.empty() else self.queue.get()
        line = read_bounded(self.file)
        torn = bool(line) and not line.endswith(b"\n")  # perhaps it is just being written
        if torn and now < self.patience_ends and parse_line(self.number + 1, line, self.endpoint).problem:
            self.patience_ends = min(self.patience_ends, now + UNFINISHED_LINE_SECONDS)
            self.due = now + UNFINISHED_LINE_SECONDS / 10
            self.file.seek(-len(line), os.SEEK_CUR)
            return None
        self.patience_ends = math.inf
        return line

    def _prepare(self, number: int, raw: bytes) -> Request:
        request = parse_line(number, raw, self.endpoint)
        if not request.problem:
            self.estimate(request)
        return request

    def estimate(self, request: Request) -> Estimate:
        """Count the tokens of a request, once."""
        if request.estimate is None:
            request.estimate = estimate_tokens(request.body, self.endpoint.shape, self.tokens.counter(request.model))
        return request.estimate

    def expected_total(self) -> float:
        """How many requests there are: exact at the end, before by the bytes read so far; inf for a stream."""
        share = 1.0 if self.ended else self.file.tell() / self.size if self.size else 0.0
        return min(self.given / share if share else math.inf, self.limit)


def read_bounded(file: IO[bytes]) -> bytes:
    """Read a line; of one that is too long only what shows that it is."""
    line = rest = file.readline(MAX_LINE_BYTES + 1)
    while len(line) > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
        rest = file.readline(1 << 20)
    return line if len(line) <= MAX_LINE_BYTES else line[:-1] + b"\n"


def parse_line(number: int, raw: bytes, endpoint: Endpoint) -> Request:
    r"""Turn one line into a request, or into one with a `problem`.

    {"model": "m", "input": "hi", "metadata": 7}                          -> {"model": "m", "input": "hi"}, 7
    {"custom_id": "a", "method": "POST", "url": "/v1/...", "body": {...}} -> {...}, {"custom_id": "a"}
    [{...}, response or errors, metadata]                                 -> {...}, metadata
    """
    metadata: Any = None
    problem = ""
    try:
        if len(raw) > MAX_LINE_BYTES:
            raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MB")
        body = loads(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)
        if isinstance(body, list) and len(body) in (2, 3, 4) and isinstance(body[0], dict):
            body, metadata = body[0], body[2] if len(body) > 2 else None
        elif not isinstance(body, dict):
            raise ValueError(f"a request is a JSON object, this is {str(raw[:40].strip(), errors='replace')!r}")
        elif "custom_id" in body and isinstance(body.get("body"), dict):
            line, path = {"method": "POST", "url": "", **body}, urlsplit(endpoint.url).path
            if line["method"] != "POST" or not path.endswith(str(line["url"])):
                problem = f"it is for {line['method']} {line['url']}, but --request_url takes POST to {path}"
            body, metadata = line["body"], {"custom_id": line["custom_id"]}
        else:
            metadata = body.pop("metadata", None)
        problem = problem or check_request(body, endpoint.shape, endpoint.provider)
    except ValueError as error:
        kept = raw if len(raw) <= MAX_LINE_BYTES else raw[:RAW_TEXT_KEPT]
        body, problem = kept.decode(errors="backslashreplace").strip(), str(error)
    problem = f"line {number}: {problem}" if problem else ""
    model = body.get("model") if isinstance(body, dict) else ""
    return Request(number, body, metadata, problem, model if isinstance(model, str) else "")


def check_request(body: dict[str, Any], shape: str, provider: Provider) -> str:
    """Why the endpoint cannot mean this request; "" if it can."""
    row = SHAPES[shape]
    need = row.needs[0] if row.needs[0] in body else next(filter(body.__contains__, row.needs), row.needs[0])
    value: Any = body.get(need)
    fits = isinstance(value, row.takes) and (value or value == "")
    if not fits or (row.takes is list and not {dict}.issuperset(map(type, value))):
        others = [r for r in SHAPES.values() if (r.needs, r.takes) != (row.needs, row.takes)]
        fitting = (r for r in others if isinstance(found := body.get(r.needs[0]), r.takes) and found not in ([], {}))
        other = next((other.paths.split()[0][1:] for other in fitting), "")
        looks = f"; this looks like a request for {other}" if other else ""
        wanted = {list: "a list of objects", dict: "an object"}.get(row.takes, "a text or a list")
        return f'"{need}" is missing or not {wanted}{looks}'
    barred = ("background", "webhook", "stream")[: 2 if shape == "chat" and provider.auth else 3]
    if name := next(filter(body.get, barred), ""):
        return f'"{name}" cannot be used here, "stream" only in OpenAI-shaped chat requests; remove it'
    known = body.get("model") or not provider.names_model or shape in ("gemini", "deepinfra", "moderations")
    return "" if known else f'"model" is missing; {provider.name} needs it'


# ==== 2 estimate: tokens it will be charged ===========================================================================


class Estimate(NamedTuple):
    """Tokens of a request as counted before it is sent."""

    prompt: int
    output_cap: int | None  # the most that all answers may have; None if the request sets no cap
    answers: int = 1


class Cost(NamedTuple):
    """Tokens that a request is expected to be charged."""

    expected: int  # learned prompt and learned output
    worst: int  # learned prompt and output cap, if there is one
    prompt: int = 0  # in both


class Usage(NamedTuple):
    """Tokens of one reply as the provider tells them."""

    prompt: int
    output: int
    cached: int = 0


NO_COST: Cost = Cost(0, 0)
KEY_KINDS = {key: kind for kind, keys in {  # what a key of a request says about its tokens
    "prompt": "messages prompt suffix contents system instructions systemInstruction system_instruction text "
        "response_format responseSchema responseJsonSchema", "input": "input", "tools": "tools functions",
    "cap": "max_completion_tokens max_tokens max_output_tokens max_new_tokens maxOutputTokens",
    "answers": "n best_of candidateCount candidate_count num_responses",
    "nested": "parameters generationConfig generation_config"}.items() for key in keys.split()}  # fmt: skip
MEDIA_KEYS = {*"image image_url audio input_audio video video_url file file_data source inlineData inline_data".split()}
PART_KEYS = MEDIA_KEYS | {"role", "content", "text", "parts", "name", "function", "thinking", "output"}
SILENT_KEYS = {"role", "type", "id", "call_id", "tool_call_id", "index", "status", "detail", "encrypted_content"}
# Images by the start of the model's name, from the guides of the providers: base, price of a tile, its side in pixels.
IMAGE_PRICES = {"gpt-4o-mini": (2833, 5667, 512), "gpt-5": (70, 140, 512), "o1": (75, 150, 512), "o3": (75, 150, 512),
    "claude": (0, 1, 27.386), "anthropic": (0, 1, 27.386), "gemini": (0, 258, 768), "": (85, 170, 512)}  # fmt: skip
SIDES = re.compile(rb"(?s)^\x89PNG.{12}(....)(....)|\xff[\xc0-\xc2]\0.\x08(..)(..)")  # of a PNG, of a JPEG
OPAQUE = re.compile(r"(?a)(?<![\w+/=-])(?=[a-zA-Z_+/=-]*\d)(?=[\d_+/=-]*[a-zA-Z])[\w+/=-]{40,}")  # in linear time
PIECES = re.compile(r"([A-Za-z]+)|([0-9]{1,3})|([^\sA-Za-z0-9\x80-\U0010ffff]+)|(\n\s*)|([\x80-\U0010ffff])")
PIECE_TOKENS = ((1.005, 0.116, 6), (1.049, 0, 3), (0.824, 0.084, 1), (0.795, 0, 0), (0.775, 0, 1))
VOCABULARY_LOCK, MOST_TOKENS = threading.Lock(), 10**9  # of one request; a larger count cannot be true


def estimate_tokens(body: Any, shape: str, count: Callable[[str], int]) -> Estimate:
    """Tokens of a request, whatever JSON it is. A chat costs 3 for the reply and 3 per message (OpenAI cookbook)."""
    flat, numbers = body if isinstance(body, dict) else {"prompt": body}, {"answers": 1}
    model = flat["model"] if isinstance(flat.get("model"), str) else shape
    prompt = reply = 3 if shape in {"chat", "responses", "dashscope", "anthropic", "gemini"} else 0
    for key, value in (fields := [*flat.items()]):
        try:
            match kind := KEY_KINDS.get(key):
                case None:
                    continue
                case "prompt" | "input" if kind == "prompt" or not isinstance(value, dict):
                    prompt += content_tokens(value, model, count) + (4 if reply and isinstance(value, str) else 0)
                case "cap" | "answers" if type(value) in (int, float) and numbers.get(kind, 0) <= value <= 10**9:
                    numbers[kind] = int(value)
                case "input" | "nested" if isinstance(value, dict):
                    fields += value.items()  # as if they were not nested
                case "tools" if value:
                    prompt += 12 + sum(tool_tokens(tool, count) for tool in only(list, value) or [value])
        except (AttributeError, RecursionError, TypeError, ValueError):  # strange tools, too deep, too long a number
            prompt += 1000
    if isinstance(prompts := flat.get("prompt"), list) and shape == "completions":
        numbers["answers"] *= sum(not isinstance(item, int) for item in prompts) or 1
    cap = 0 if shape in {"embeddings", "moderations"} else numbers.get("cap", 16 if shape == "completions" else None)
    return Estimate(prompt, None if cap is None else cap * numbers["answers"], numbers["answers"])


def content_tokens(value: Any, model: str, count: Callable[[str], int]) -> int:
    """Tokens of a text, token ids, a message or part of any family, or a list of these; anything else as JSON text."""
    if isinstance(value, str):
        return count(value)
    if isinstance(value, list):
        if value and type(value[0]) is int:
            return len(value)
        total = 0
        for item in value:  # a sum() of a generator takes a third longer
            total += content_tokens(item, model, count)
        return total
    if not isinstance(value, dict) or ("role" not in value and PART_KEYS.isdisjoint(value)):  # may hold base64
        return count(OPAQUE.sub("", json.dumps(value, ensure_ascii=False))) if value is not None else 0
    total = 4 if "role" in value else 0
    for key, item in value.items():
        if key in MEDIA_KEYS and item:
            total += sum(media_tokens(key, one, value, model) for one in (item if isinstance(item, list) else [item]))
        elif key not in SILENT_KEYS:
            total += (count(item) if type(item) is str else content_tokens(item, model, count)) + (key == "name")
    return total


def tool_tokens(tool: Any, count: Callable[[str], int]) -> int:
    """One tool by the OpenAI cookbook's function rule; what that does not cover (nested schemas) as JSON text."""
    if declared := tool.get("functionDeclarations") or tool.get("function_declarations"):  # Gemini
        return sum(tool_tokens(function, count) for function in declared)
    function = tool.get("function", tool)
    properties = (function.get("parameters") or function.get("input_schema") or {}).get("properties", {})
    total = count(f"{function.get('name')}:{function.get('description', '')}".removesuffix("."))
    for key, schema in properties.items():
        text = f"{key}:{(rest := dict(schema)).pop('type', '')}:{rest.pop('description', '')}".removesuffix(".")
        total += count(text) + sum(3 + count(str(item)) for item in rest.pop("enum", None) or [""])
        total += content_tokens(rest or None, "", count)
    return total + (10 if properties else 7)


def media_tokens(key: str, value: Any, part: dict[str, Any], model: str) -> int:
    """Tokens of an image by tiles; of sound as MP3 and files as PDF by their length; 1,000 of what is only named."""
    fields = value if isinstance(value, dict) else {"url": value}
    texts = [text for text in (key, part.get("type"), *fields.values()) if isinstance(text, str)]
    data, hint, sizes = max(texts, key=len), " ".join(text[:40] for text in texts), []
    if "image" not in hint:
        return len(data) // (2000 if "audio" in hint or "video" in hint else 50) if len(data) > 2000 else 1000
    with contextlib.suppress(ValueError):
        header = base64.b64decode(data[(start := data.find(",", 0, 200) + 1) : start + 2**17] + "==")
        sizes = [[int.from_bytes(side) or 1 for side in match if side] for match in SIDES.findall(header)]
    width, height = max(sizes, key=math.prod, default=(1024, 1024))  # a camera's notes may hold a smaller one
    base, price, side = next(row for name, row in IMAGE_PRICES.items() if model.rpartition("/")[2].startswith(name))
    scale = min(1, 2048 / max(width, height), 768 / min(width, height) if base else 1)
    tiles = math.ceil(round(width * scale) / side) * math.ceil(round(height * scale) / side)
    return base if base and "low" in (fields.get("detail"), part.get("detail")) else base + price * min(tiles, 1600)


class Tokenizer:
    """Counts tokens with tiktoken, else estimates them: then exact is False, and a warning says so. Safe in threads."""

    def __init__(self, encoding_name: str = "auto") -> None:
        self.exact, self._name = True, encoding_name
        self.counter: Callable[[str], Callable[[str], int]] = lru_cache(99)(self._load)  # of a model
        if tiktoken and encoding_name not in (names := ["auto", *tiktoken.list_encoding_names()]):
            raise UsageError(f"--token_encoding_name {encoding_name} is not one of {', '.join(names)}.")

    def _load(self, model: str) -> Callable[[str], int]:
        name = "cl100k_base" if re.match(r"(.*/)?(gpt-4(-|$)|gpt-3|text-embedding)", model) else "o200k_base"
        try:
            with VOCABULARY_LOCK, contextlib.ExitStack() as stack:  # tiktoken's own reader has no timeout
                stack.callback(setattr, tiktoken.load, "read_file_cached", tiktoken.load.read_file_cached)
                tiktoken.load.read_file_cached = read_vocabulary
                encode = tiktoken.get_encoding(name if self._name == "auto" else self._name).encode_ordinary
        except Exception:  # noqa: BLE001 - whatever is wrong with it, an estimate will do
            LOGGER.warning("Tokens are estimated; `pip install tiktoken bpe-openai` makes the counts exact.")
            self.exact, self.counter = False, lambda _: estimate_text
            return estimate_text
        short = lru_cache(64)(lambda text: len(encode(text)))  # a job's requests share a system prompt
        pieces = re.compile("(?s).{1,100000}").findall  # it panics on a million spaces
        return lambda text: short(text) if len(text) < 20_000 else sum(map(len, map(encode, pieces(text))))


def read_vocabulary(blobpath: str, expected_hash: str | None = None) -> bytes:
    """A vocabulary file of the right sha256: from a cache, the bpe-openai package, or downloaded into our own cache."""
    name = hashlib.sha1(blobpath.encode(), usedforsecurity=False).hexdigest()  # as tiktoken names its files
    own = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "api_request_parallel_processor", name).expanduser()
    cached = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache"), name)
    package = importlib.util.find_spec("bpe_openai")
    packed = Path(str(package and package.origin)).with_name("data") / f"{blobpath.rpartition('/')[2]}.gz"

    def download() -> None:
        with contextlib.suppress(Exception), urllib.request.urlopen(blobpath, timeout=5) as reply:
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(reply.read())

    for file in (cached, own, packed, own):
        with contextlib.suppress(Exception), (gzip.open if file == packed else Path.open)(file, "rb") as opened:
            if hashlib.sha256(data := opened.read()).hexdigest() == expected_hash:
                return data
        if file == packed:  # in a thread, since a silent peer can hold urlopen longer than its timeout
            (thread := threading.Thread(target=download, daemon=True)).start()
            thread.join(5)
    raise FileNotFoundError(blobpath)


def estimate_text(text: str) -> int:
    """Tokens of a text without a vocabulary: weights fitted to o200k_base, mean error 7 %; long runs as base64."""
    opaque = len(text) - len(rest := OPAQUE.sub("", text))
    runs = ((*PIECE_TOKENS[(run.lastindex or 1) - 1], len(run[0])) for run in PIECES.finditer(rest))
    return int(0.5 + 0.72 * opaque + sum(one + more * max(0, size - free) for one, more, free, size in runs))


class LearnedTokens(dict[str, list[float]]):
    """What replies teach per model, as fading sums: of estimated and charged input; of answers and their tokens."""

    def cost(self, model: str, estimate: Estimate) -> Cost:
        """Tokens to expect, and at worst; an answer is taken to have 256 tokens before there is one."""
        (estimated, charged, answers, output), (counted, cap, times) = self.get(model, (1, 1, 1, 0)), estimate
        prompt, answer = int(counted * charged / estimated + 0.5), int((output / answers or 256) * times + 0.5)
        cap = answer if cap is None else cap
        return Cost(prompt + (answer if answer < cap else cap), prompt + cap, prompt)

    def learn(self, model: str, estimate: Estimate, usage: Usage) -> None:
        """Follow the last dozens of replies; usage that cannot be true is ignored or bounded."""
        (prompt, cap, answers), (charged, output, _) = estimate, usage
        seen = self.setdefault(model, [1e-9, 1e-9, 1e-9, 0])
        if charged > 0 and prompt > 0:
            true = charged if prompt / 4 <= charged <= prompt * 4 else min(max(charged, prompt / 4), prompt * 4)
            seen[0], seen[1] = 0.95 * seen[0] + prompt, 0.95 * seen[1] + true
        if output > 0 and cap != 0:
            seen[2], seen[3] = 0.95 * seen[2] + answers, 0.95 * seen[3] + min(output, 10**6 * answers)


# ==== 3 pace: when may it start? ======================================================================================


class ServerLimits(NamedTuple):
    """What one reply says about limits; None = it does not say. Durations in seconds from now."""

    retry_after: float | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


PACE_WINDOW = 60.5  # seconds that a start counts: a minute, and by what a new connection may delay an arrival
PACE_EVEN = 0.985  # share of an even rate at which one-second slots do not overflow when arrivals shift by some ms
PACE_SLACK = 0.008  # seconds of the pace that may be caught up after waking late
PACE_BIN, PACE_TICK = 0.05, 0.25  # seconds of starts that are remembered together; between looks at what may grow
PACE_QUICK = 0.05  # seconds of latency in which no queue is looked for: a busy client alone takes some ms
PACE_CHANCE, PACE_SERIES = 0.3, 40  # share of refusals, starts between two: see _is_chance
PACE_FREE = 1e12  # "no limit known": a number, since inf * 0 is none
_Told = ServerLimits | None
Outcome = Enum("Outcome", "ACCEPTED REFUSED FAILED")  # FAILED: no reply or 5xx, says nothing about the rate
ACCEPTED, REFUSED, FAILED = Outcome  # subtle: in Python 3.11 a member costs as much as a call, and each reply asks


@dataclass(slots=True, eq=False)
class _Bin:
    """Starts of about one moment together, so that a minute takes little memory at any rate."""

    first: float
    last: float
    held: list[int]  # amounts as in Ticket


@dataclass(slots=True, eq=False)
class Ticket:
    """One started attempt; amounts are (requests, tokens expected and later settled, tokens at worst)."""

    at: float
    held: tuple[int, int, int]
    flight: int  # requests in flight with this one
    before: tuple[int, int, int]  # amounts taken before
    bin: _Bin


@dataclass(slots=True, eq=False)
class _Limit:
    """A learned limit: on what is in flight, or on the starts a second in one currency that a server may count."""

    value: float = PACE_FREE
    top: float = PACE_FREE
    quiet: float = 1.0  # seconds until it may be raised again; longer each time that failed
    quiet_until: float = 0.0
    trail: list[float] = field(default_factory=list)  # values before each step of this raise
    minute: float = PACE_FREE  # the budget: the user's, or a lower one that the server tells
    ceiling: float = PACE_FREE  # what may start in any minute
    level: float = 0.0  # what may start at once; below 0: wait
    held: int = 0  # started in the last minute
    taken: int = 0  # started since the last lesson: a refusal that taught something

    def settle(self, value: float, now: float, quiet: float) -> None:
        self.value, self.quiet, self.quiet_until, self.trail = max(value, 0.01), quiet, now + quiet, []


class Pacer:
    """Decides when the next request may start.

    Budgets are ceilings for any minute; 0 = unknown. Within them the pace ramps up by time, without them by replies.
    A refusal lowers only the limit that best fits what was admitted; it is probed upward later, ever more rarely.
    """

    def __init__(
        self,
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        max_concurrent: int = 0,
        min_gap_seconds: float = 0.0,
        per_second: bool = False,
        concurrency_hint: int = 0,
    ) -> None:
        self.in_flight, self._most, self._starts = 0, max_concurrent or math.inf, deque[_Bin]()  # starts of a minute
        self.paused_until = self._now = self._ticked = self._last = -math.inf  # the latest: time told, tick, start
        self._gap, self._ramping = min_gap_seconds, not (per_second and requests_per_minute)  # ramping: until a refusal
        self._slow_start, self._capped = True, concurrency_hint > 0  # no queue found yet; a cap in flight is suspected
        self._rates = (_Limit(PACE_FREE if requests_per_minute else 10.0), _Limit(), _Limit())  # amounts as in Ticket
        self._window = _Limit(concurrency_hint or PACE_FREE)  # on what is in flight
        self._bound: tuple[_Limit | None, _Limit | None] = (None, None)  # what binds since the last tick, and before it
        self._speed, self._base, self._peak = (0.0, 0), 0.0, 0.0  # replies a second, and in flight; see _watch_queue
        self._since, self._latencies, self._replies, self._count = 0.0, 0.0, 0, 0  # of what it measures at present
        self._cut = self._blamed = self._mark_at = -math.inf  # last lesson, last one on the window, start of `taken`
        self._barren, self._share, self._deaf_until = 0, 0.0, -math.inf  # refusals: barren in a row, share, deaf until
        self._cuts, self._earlier = -2, [PACE_FREE] * 4  # lessons, and the limits before them; see _is_chance
        self._budgets = (requests_per_minute or PACE_FREE, tokens_per_minute or PACE_FREE)
        self._believe(None, None)

    def set_budgets(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        """Change the ceilings during a run."""
        self._budgets = (requests_per_minute or PACE_FREE, tokens_per_minute or PACE_FREE)
        self._believe(*self._told)

    def _believe(self, *told: float | None) -> None:
        """Take the lower of both words, the server's as a ceiling only until it has shown what it enforces."""
        for rate, budget, limit in zip(self._rates[:2], self._budgets, told, strict=True):
            rate.minute = min(budget, limit) if limit and limit >= 1 else budget
            even = PACE_EVEN * rate.minute / 60 if rate.minute < PACE_FREE else PACE_FREE
            if even != rate.top and (self._ramping or rate.value >= min(rate.top, even)):
                rate.value = even
            rate.top, rate.ceiling = even, rate.minute if self._ramping else budget
        self._rates[2].minute, self._told = self._rates[1].minute, told

    def _advance(self, now: float) -> float:
        """Move on to `now`: refill, forget what is older than a minute, let limits grow. A clock set back stands."""
        if now <= self._now:
            return self._now
        passed, starts = now - self._now, self._starts
        for rate in self._rates:
            level, most = rate.level + rate.value * passed, rate.value * PACE_SLACK
            rate.level = level if level < most else most  # min() takes longer than all of this, and each start asks
        self._now, since_tick, window, bound = now, now - self._ticked, self._window, self._bound[0]
        while starts and now - starts[0].last >= PACE_WINDOW:
            old = starts.popleft()
            for index, rate in enumerate(self._rates):
                rate.held, old.held[index] = rate.held - old.held[index], 0
        if since_tick < PACE_TICK:
            return now
        for rate in self._rates[:2] if self._ramping and starts else ():
            most = 2000.0 if rate.minute == PACE_FREE > rate.value else PACE_FREE  # 10,000 in flight after some 8 s
            rate.value = min(most, rate.value * 4 ** min(since_tick, 1.0))
        growing = self._capped if bound is window else not self._ramping
        if bound and growing and now >= bound.quiet_until and bound.value < bound.top:
            bound.trail.append(bound.value)
            share = 0.01 * 2 ** min(5, max(1, len(bound.trail) - 20 * (bound.quiet > 4)))  # gently after three failures
            bound.value = min(bound.top, bound.value + max(bound is window, share * bound.value))
        self._ticked, self._bound = now, (None, bound)
        return now

    def delay(self, cost: Cost, now: float) -> float:
        """Seconds after which to ask again; 0.0: start now; inf: only a reply can free the way."""
        now, window = self._advance(now), self._window
        if self.in_flight >= self._most or self.in_flight >= window.value:
            self._bound = (window if self.in_flight >= window.value else self._bound[0], self._bound[1])
            return max(PACE_TICK, window.quiet_until - now) if self._capped else math.inf
        pause = self.paused_until - now
        wait = max(0.0, pause, self._gap - (now - self._last)) if pause > 0 or self._gap else 0.0
        (first, second, third), (expected, worst, _) = self._rates, cost
        for rate, amount in ((first, 1), (second, expected), (third, worst)):
            if rate.held + amount > rate.ceiling and rate.held > 0:
                wait = max(wait, PACE_WINDOW - (now - self._starts[0].last))
            elif rate.level < 0 and -rate.level > wait * rate.value:
                wait, self._bound = -rate.level / rate.value, (rate, self._bound[1])
        return wait and max(wait, 1e-6)  # less may be lost when added to the time

    def start(self, cost: Cost, now: float) -> Ticket:
        """Take the place and reserve the tokens."""
        now, rates, (expected, worst, _) = self._advance(now), self._rates, cost
        if self.in_flight == 0:  # what came before says nothing about the present load
            self._since, self._replies, self._count, self._latencies = now, 0, 0, 0.0
            self._mark_at = now if self._last == -math.inf else self._mark_at
        self.in_flight, self._last, (first, second, third) = self.in_flight + 1, now, rates
        if not self._starts or now - self._starts[-1].first >= PACE_BIN:
            self._starts.append(_Bin(now, now, [0, 0, 0]))
        place, held, taken = self._starts[-1], (1, expected, worst), (first.taken, second.taken, third.taken)
        place.last = now
        for index, rate in enumerate(rates):
            place.held[index] += (amount := held[index])
            rate.held, rate.taken, rate.level = rate.held + amount, rate.taken + amount, rate.level - amount
        return Ticket(now, held, self.in_flight, taken, place)

    def finish(self, ticket: Ticket, outcome: Outcome, now: float, used: int | None = None, told: _Told = None) -> None:
        """Settle the tokens used (None: unknown; a refusal uses none) and hear what the reply says about the pace."""
        now, self.in_flight, refused = self._advance(now), self.in_flight - 1, outcome is REFUSED
        _, was, worst = ticket.held
        used = 0 if refused else was if used is None else used if used > 0 else 0
        ticket.held = (1, used, worst)
        if ticket.bin.held[0]:  # still within the last minute
            ticket.bin.held[1] += used - was
            self._rates[1].held += used - was
        self._rates[1].level -= 0 if refused else used - was
        limits = (told.requests_per_minute, told.tokens_per_minute) if told else (None, None)
        if limits != self._told and (told or outcome is ACCEPTED):
            self._believe(*limits)
        self._share += 0.05 * (refused - self._share) * (outcome is not FAILED)
        if outcome is ACCEPTED:
            self._watch_queue(self._window, ticket.at, now)
        elif refused:
            pause, asked = 0.0, (told.retry_after if told else None) or None  # 0 is no word about the pace
            if ticket.at > self._cut and asked is None and self._is_chance(now):
                self._cut = now
            elif ticket.at > self._cut:  # what started before a refusal was heard only prolongs the pause
                pause, self._cut = self._learn(ticket, self._window, now), now
                for rate in self._rates:
                    rate.taken = rate.taken if self._blamed == now else 0  # it goes on if the window is to blame
            elif self._capped and self._window.quiet_until > now:
                self._window.value = max(1.0, min(self._window.value, ticket.flight - 1.0))
            self.paused_until = max(self.paused_until, now + (min(asked, 900.0) if asked else pause))
            self._mark_at = self._mark_at if self._blamed == self._cut else max(now, self.paused_until)

    def _is_chance(self, now: float) -> bool:
        """Whether refusals stay rare, but do not end however slow it goes: they are no news about the pace then."""
        if (often := self._share > PACE_CHANCE) or now < self._deaf_until:
            return not often
        limits = (*self._rates, self._window)
        if (proven := self._rates[0].taken > PACE_SERIES) or self._cuts < 0:  # at first there were but beliefs
            self._cuts, self._earlier = 0 if proven else self._cuts, [limit.value for limit in limits]
        self._cuts, pairs = self._cuts + 1, list(zip(limits, self._earlier, strict=True))
        slower = any(limit.value < before / 2 < PACE_FREE / 2 for limit, before in pairs)  # and yet refused
        if self._cuts > 5 and slower and not self._ramping:
            for limit, before in pairs:
                limit.value, limit.trail = before, []
            self._deaf_until = now + 60
        return self._deaf_until > now

    def _watch_queue(self, window: _Limit, started: float, now: float) -> None:
        """Keep the window at what raises replies per second: more would only wait in the server's queue."""
        flight, slow_start, rate = self.in_flight + 1, self._slow_start, self._rates[0]
        self._replies += 1
        if slow_start and not self._capped:
            if self._ramping and rate.value < rate.top:
                rate.value = rate.top  # without a budget replies are the clock from now on
            window.value = max(8.0, flight) if window.value == PACE_FREE else window.value
            window.value += 1.5 if flight >= window.value / 2 else 0
        if slow_start or started >= self._since:  # else it began under another load
            self._count, self._latencies = self._count + 1, self._latencies + now - started
        passed = now - self._since
        if self._count < (8 if slow_start else 16 if flight < 32 else flight / 2) or passed < 2 * PACE_QUICK:
            return
        mean = max(PACE_QUICK, self._latencies / self._count)
        base = self._base or mean  # as without a queue
        if passed < (max(min(1.0, 40 * base**2), 2 * base) if slow_start else 3 * mean):
            return
        (before, flight_before), speed, binds = self._speed, self._replies / passed, window in self._bound
        self._since, self._replies, self._count, self._latencies, self._speed = now, 0, 0, 0.0, (speed, flight)
        queue = binds if self._capped else not slow_start or speed < 1.25 * before  # more in flight, hardly faster
        if self._peak and (speed < 0.8 * self._peak or window.value <= 2):  # drained too far; by Little's law:
            window.settle(max(2.0, 1.3 * window.value * self._peak / speed), now, 2.0)
            self._base, self._peak = mean, 0.0
        elif (mean > PACE_QUICK) if self._peak else (queue and mean > 2.5 * base and flight > 0.8 * flight_before):
            self._peak, self._slow_start = max(self._peak, speed), False  # a queue: drain it until speed falls
            window.settle(max(1.0, min(0.6 * min(flight, window.value), 1.5 * speed * base)), now, 30.0)
        else:
            self._base, self._peak = min(base, mean), 0.0
            window.value *= 1.4 if binds and mean < 1.5 * base and not (self._capped or slow_start) else 1

    def _learn(self, ticket: Ticket, window: _Limit, now: float) -> float:
        """Lower the limit that explains a refusal; returns the seconds to pause if the server names none."""
        rates, bound, passed = self._rates, self._bound[0] or self._bound[1], max(0.0, ticket.at - self._mark_at)
        admitted = [PACE_EVEN * amount / (passed + 1) for amount in ticket.before]  # a second if its bucket was full
        self._barren = self._barren + 1 if ticket.before[0] < 3 else 0  # refused though next to nothing was started
        index = rates.index(bound) if bound in rates else 0
        if self._ramping or (rates[index].value > 1e9 and not self._capped):  # no limit is known yet
            self._ramping = False
            full = next((rate for rate in rates if 0.85 <= rate.held / rate.minute <= 1.2), None)
            for rate, budget in zip(rates, (*self._budgets, PACE_FREE), strict=True):
                rate.value, rate.ceiling = PACE_FREE, rate.minute if rate is full else budget
            if full:  # a minute's budget, just used up
                return self._starts[0].last + PACE_WINDOW - now
            fits = [(60 * speed / rate.minute, i) for i, (speed, rate) in enumerate(zip(admitted, rates, strict=True))]
            share, index = min((fit for fit in fits if fit[0] >= 0.8), default=(0.0, 0))  # of the budget just reached
            even = PACE_EVEN * rates[index].minute / 60
            rates[index].settle(even if share else min(even, admitted[index]), now, 1.0)
        elif self._capped and ticket.flight >= window.value and now - self._blamed > 3:  # the window was full
            self._blamed = now
            window.settle(max(1.0, ticket.flight - 1.0), now, min(120.0, max(20.0, 2 * window.quiet)))
            return 0.0  # a reply will free the place
        elif raised := [(rate, least) for rate, least in zip(rates, admitted, strict=True) if rate.trail]:
            for rate, least in raised:  # not to the latest values, since a second's bucket hides an excess for a while
                rate.settle(max(rate.trail[-9:][0], min(least, rate.value)), now, min(60.0, 2 * rate.quiet))
            window.quiet_until = min(window.quiet_until, now + 1.0)  # if it was blamed just before, then wrongly
            return 0.5
        elif self._barren:  # no rate is slow enough, so pause longer each time
            rates[index].settle(0.9 * rates[index].value, now, 2.0)
            return min(60.0, 1.3 ** min(16, self._barren))
        else:
            rates[index].settle(min(0.9 * rates[index].value, max(admitted[index], rates[index].value / 4)), now, 2.0)
        self._capped = True  # it may be a cap on concurrency, too: then this many fit
        window.settle(max(1.0, min(window.value, ticket.flight - 1.0)), now, 0.5)
        return 1.0

    def last_minute(self) -> tuple[int, int]:
        """Requests and tokens started in the last minute."""
        return self._rates[0].held, self._rates[1].held

    def describe(self) -> str:
        """What limit was found, in words; "" if there is nothing worth telling."""
        limit, allowed = self._rates[0], self._budgets[0] / 60
        rate = limit.top if self._ramping or limit.value >= limit.top else [*limit.trail[-9:], limit.value][0]
        if self._capped and self._window in self._bound:
            return f"this server takes about {self._window.value:.0f} requests at once"
        more = f"; you allowed {allowed:.3g}" if allowed < 1e9 else ""
        return f"this server takes about {rate:.3g} requests a second{more}" if rate < min(1e9, 0.95 * allowed) else ""


# ==== 4 send: the only place that knows HTTP ==========================================================================

CONNECT_SECONDS, TIMED_OUT = 30.0, "no whole reply within --request_timeout"
SPARE_OPEN_FILES, MOST_CONCURRENT = 64, 20_000  # of no connections; fewer than the ports that an address has
ZLIB_OR_GZIP, SHORTEST_SECRET = 47, 12  # the header tells (zlib manual); shorter ones are found in ordinary words
TEXT_KEPT, LARGE_BODY = 2000, 1 << 20  # bytes of a reply that is no JSON; aiohttp sends more only from a file


@dataclass(slots=True)
class Reply:
    """What came back for one attempt; errors of the network are values here."""

    status: int = 0  # 0 = no HTTP answer
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None  # parsed JSON, None if it is none
    text: str = ""  # the start of a body that is no JSON
    failure: str = ""  # "" or the kind of error: connection timeout too_large bad_reply
    message: str = ""  # in words
    sent: bool = True  # False: it surely never left this machine
    hopeless: str = ""  # why the whole run is pointless, if nothing else has been heard of the provider yet
    details: dict[str, Any] | None = None  # what a gateway says beside the reply


class Secrets(logging.Filter):
    """What must never reach a file, a log or a message: keys, proxy passwords, headers that look like keys."""

    patterns: tuple[re.Pattern[bytes], ...] = ()

    def add(self, text: str, *, always: bool = False) -> None:
        """Look for this text from now on, however JSON and URLs write it; a short one as a word, and if `always`."""
        pattern = ""
        for sign in text:
            ways = (sign, f"\\{sign}", json.dumps(sign)[1:-1], f"\\u{ord(sign):04x}", quote(sign, safe=""))
            pattern += sign if re.match(r"(?a)[\w-]", sign) else f"(?i:{'|'.join(map(re.escape, ways))})"
        if short := len(text) < SHORTEST_SECRET:
            pattern = rf"(?:(?<!\w)|(?<=\\[bfnrt])){pattern}(?!\w)"
        self.patterns += (re.compile(pattern.encode()),) if text and (always or not short) else ()

    def clean(self, data: bytes) -> bytes:
        """Replace every secret."""
        for pattern in self.patterns:
            data = pattern.sub(b"[REDACTED]", data)
        return data

    def redact(self, text: str) -> str:
        """Replace every secret."""
        return self.clean(text.encode(errors="surrogatepass")).decode(errors="surrogatepass")

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace every secret in a log line."""
        record.msg, record.args = self.redact(record.getMessage()), ()
        return True


@dataclass(slots=True)
class Endpoint:
    """One URL with its key, its rules and its pacing."""

    url: str
    name: str  # its host, and the variable of its key if there may be several
    provider: Provider
    shape: str
    key: str
    headers: Mapping[str, str]
    pacer: Pacer
    proxy: str | None
    max_reply_bytes: int
    secrets: Secrets
    settings: Settings  # of this endpoint: its URL, key and limits
    outage: Outage = field(default_factory=lambda: Outage())
    session: aiohttp.ClientSession = field(init=False)

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """Open the connection pool, without aiohttp's limits of connections, time and headers; `stack` closes it."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)  # the loop ends what takes too long
        pool, jar = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300), aiohttp.DummyCookieJar()
        more = {"headers": {"Accept-Encoding": "gzip", **self.headers}, "auto_decompress": False, "timeout": timeout}
        session = aiohttp.ClientSession(connector=pool, cookie_jar=jar, max_field_size=1 << 16, **more)  # type: ignore[arg-type]
        self.session = await stack.enter_async_context(session)

    async def send(self, body: dict[str, Any]) -> Reply:
        """Send one attempt and read the whole reply. Raises nothing, except when it is cancelled."""
        if not self.provider.auth:
            body = {"username": self.key, "request": dumps(body).decode()}
        elif body.get("stream") is True and self.provider.asks_usage:  # the user's line stays
            body = {**body, "stream_options": {"include_usage": True, **only(dict, body.get("stream_options"))}}
        reply, raw, data = Reply(), bytearray(), dumps(body)
        content = BytesIO(data) if len(data) > LARGE_BODY else aiohttp.BytesPayload(data)
        try:
            response = await self.session.post(self.url, data=content, allow_redirects=False, proxy=self.proxy)
            try:  # subtle: `async with` would cost a twentieth of all that a request costs
                reply.status, reply.headers = response.status, response.headers
                coding = reply.headers.get("Content-Encoding")
                packed = coding and re.search("(?i)gzip|deflate", coding)  # some say "utf-8"
                unpacker = zlib.decompressobj(ZLIB_OR_GZIP) if packed else None
                while not response.content.at_eof():
                    chunk = await response.content.readany()
                    if unpacker:  # subtle: aiohttp would unpack a whole bomb before anybody can measure it
                        chunk = unpacker.decompress(chunk, self.max_reply_bytes - len(raw) + 1)
                    if len(raw) + len(chunk) > self.max_reply_bytes:
                        reply.failure, reply.message = "too_large", "the reply is larger than --max_reply_megabytes"
                        return reply
                    raw += chunk
            finally:
                if not response.closed:
                    response.close()
            if unpacker and not unpacker.eof:
                raise aiohttp.ClientPayloadError("the packed reply broke off")
            self._parse(self.secrets.clean(bytes(raw)).removeprefix(codecs.BOM_UTF8), reply)
        except asyncio.CancelledError as cancelled:
            if cancelled.args != (TIMED_OUT,):
                raise
            reply.failure, reply.message = "timeout", TIMED_OUT
        except Exception as error:  # noqa: BLE001 - whatever the network does, the run goes on
            explain(error, reply)
            reply.message = self.secrets.redact(reply.message)
        return reply

    def _parse(self, raw: bytes, reply: Reply) -> None:
        try:
            reply.body = loads(raw, mend=True)  # whatever its content type claims
        except ValueError:
            reply.text = raw[:TEXT_KEPT].decode(errors="replace")
            if reply.status == 200 and re.match(rb"\s*(data|event|id|retry)?:", raw):
                reply.body, reply.message = assemble_stream(raw)
                reply.failure = "connection" if reply.body is None else ""
        if 300 <= reply.status < 400:
            reply.headers = {"Location": self.secrets.redact(reply.headers.get("Location", "nowhere"))}
        elif not self.provider.auth and reply.status == 200:
            reply.body, reply.details, reply.message = unwrap_gateway(reply.body)
            reply.failure = "bad_reply" if reply.message else ""


def explain(error: Exception, reply: Reply) -> None:
    """Put an error of the network in words, and tell whether the request may have reached the provider."""
    words = f"{error.status} {error.message}" if isinstance(error, aiohttp.ClientResponseError) else str(error)
    reply.failure, reply.message = "connection", one_line(f"{type(error).__name__}: {words}")
    reply.sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    if isinstance(error, TimeoutError):
        reply.failure, reply.message = "timeout", f"no connection within {CONNECT_SECONDS:.0f} s"
    elif isinstance(error, aiohttp.ClientConnectorDNSError):
        reply.hopeless = f"The host {error.host} cannot be found. Check --request_url, the network and the proxy."
    elif isinstance(error, ssl.SSLError | aiohttp.ClientSSLError):
        reply.hopeless = f"No secure connection: {error}. Check --request_url (https or http? the port?) and the clock."


def unwrap_gateway(body: Any) -> tuple[Any, dict[str, Any], str]:
    """The provider's reply inside a gateway's, the credits beside it, and "" or why there is no reply."""
    beside = {name: value for name, value in only(dict, body).items() if name.startswith("credits")}
    try:
        return loads(body["raw"]), beside, ""
    except (KeyError, ValueError, TypeError, AttributeError):
        return None, beside, f"the gateway answered without JSON in `raw`: {one_line(body)}"


def assemble_stream(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """The reply that a streamed chat would have been, or the error event in it; (None, why) if it broke off."""
    for apart in (b"\n", b"\n\n"):  # an event is one line as all providers send it, but may be several
        blocks = (re.findall(rb"(?m)^data:(.*)", block) for block in b"\n".join(raw.splitlines()).split(apart))
        data = [text for text in (b"\n".join(block).strip() for block in blocks) if text not in (b"", b"[DONE]")]
        with contextlib.suppress(ValueError):
            events = [only(dict, loads(text, mend=True)) for text in data]
            break
    else:
        return None, "the stream broke off within an event, or is none"
    for event in events:
        if event.get("error") or ("choices" not in event and any(map(event.get, ("message", "msg", "detail")))):
            return event, ""
    reply = only(dict, joined(events))
    choices = only(list, reply.get("choices"))
    if not choices or not all(only(dict, choice).get("finish_reason") for choice in choices):
        return None, "the stream broke off before a finish reason"
    for choice in choices:
        said = {**only(dict, choice.get("message")), **only(dict, choice.pop("delta", None))}
        choice["message"] = {"role": "assistant", "content": None, **said}
        for call in only(list, choice["message"].get("tool_calls")):
            only(dict, call).pop("index", None)
    choices.sort(key=lambda choice: only(int, choice.get("index")))
    usage = reply.get("usage") or only(dict, reply.get("x_groq")).get("usage") or choices[0].get("usage")  # Moonshot
    return {**reply, "object": "chat.completion", "choices": choices, **({"usage": usage} if usage else {})}, ""


def joined(values: list[Any], name: str = "", *, in_delta: bool = False) -> Any:
    """The whole that values are pieces of: lists go on, texts in a delta too, of all else the last one counts."""
    values = [value for value in values if value is not None]
    kinds = {type(value) for value in values}
    if kinds == {dict}:
        names = dict.fromkeys(chain.from_iterable(values))
        return {n: joined([v.get(n) for v in values], n, in_delta=in_delta or n == "delta") for n in names}
    if kinds == {str} and in_delta and name not in ("id", "type", "role", "name", "format"):
        return "".join(values)
    if list not in kinds:
        return next(filter(None, reversed(values)), values[0] if values else None)
    items: dict[str, list[Any]] = {}  # the pieces of each item, by its index and what else tells it
    newest: dict[str, Any] = {}  # what else tells the newest item of an index; the kind of the newest of all
    texts = ([{"type": "text", "text": value}] if isinstance(value, str) and value else value for value in values)
    for piece in chain.from_iterable(only(list, value) for value in texts):  # Mistral mixes texts and lists
        part = only(dict, piece)
        index, kind = part.get("index", 0 if name == "choices" else None), part.get("type")
        own, new = index is not None and kind, kind != newest.get("kind") or kind not in ("text", "thinking")
        if name == "tool_calls":  # Gemini numbers all of them 0, others none
            own, new = part.get("id"), only(dict, part.get("function")).get("name")
        mark = own or (len(items) if new and index is None else newest.get(str(index)))
        newest |= {str(index): mark, "kind": kind}
        items.setdefault(str((index, mark)), []).append(piece)
    return [joined(pieces, in_delta=in_delta) for pieces in items.values()]


def find_proxy(url: str, secrets: Secrets) -> str | None:
    """The proxy that the environment names for this URL; never one for this machine itself."""
    parts = urlsplit(url)
    proxy, host = urllib.request.getproxies().get(parts.scheme), parts.hostname or ""
    if not proxy or is_private(host, loopback_only=True) or urllib.request.proxy_bypass(host):
        return None
    if not proxy.startswith(("http://", "https://")):
        raise UsageError(f"the proxy of the environment for {parts.scheme} is no http proxy; use one, or unset it")
    secrets.add(unquote(urlsplit(proxy).password or ""))
    return proxy


def open_files_for(wanted: int) -> int:
    """Raise the soft limit on open files as far as needed and allowed; gives the requests that may be in flight."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit for sockets
        import resource

        limits, endless = resource.getrlimit(resource.RLIMIT_NOFILE), resource.RLIM_INFINITY
        soft, hard = (math.inf if limit == endless else limit for limit in limits)
        if soft < (needed := wanted + SPARE_OPEN_FILES):
            wanted = max(1, int(min(needed, hard)) - SPARE_OPEN_FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + SPARE_OPEN_FILES, limits[1]))
    return wanted


# ==== 5 judge: what the reply means ===================================================================================

T = TypeVar("T")
Action = Enum("Action", "DONE REFUSED RETRY FAIL STOP")  # success; rate limit; passing; hopeless request; hopeless run


class Verdict(NamedTuple):
    """What a reply means: what to do, the kind of error, the provider's own words and code."""

    action: Action
    kind: str = ""
    message: str = ""
    code: str = ""


DONE, OUTCOMES = Action.DONE, {Action.REFUSED: REFUSED, Action.RETRY: FAILED}
ANSWERED, WRONG_URL = Verdict(DONE), "Check --request_url"  # starts an advice; a first reply that gets it stops the run
# fmt: off
ACTIONS = {kind: action for action, kinds in {  # what each kind of error asks for
    Action.RETRY: "connection timeout bad_reply server_error", Action.FAIL: "bad_request content_filter too_large",
    Action.REFUSED: "rate_limit", Action.STOP: "auth no_money redirect"}.items() for kind in kinds.split()}
RULES = {  # what a whole code, type, status or message is like, in order; the provider's own rules come first
    "context_length_exceeded|model_not_found": "bad_request", r"content_(filter|policy)\w*": "content_filter",
    "http(401|403|407)": "auth", "http402": "no_money", "http429|slow_down": "rate_limit", "http3..": "redirect",
    "http(408|409|425|498|499|5..)": "server_error", "http4..": "bad_request",  # below: with 200 only words tell
    r"(auth|permission)\w*": "auth", r"billing\w*": "no_money", r"(rate_limit|throttl)\w*": "rate_limit",
    r"(invalid|bad_)\w*": "bad_request", ".*": "server_error"}
BLOCKED = set("content_filter sensitive refusal safety recitation blocklist prohibited_content spii other".split())
UNFINISHED = set("insufficient_system_resource network_error error malformed_function_call failed queued".split())
ENDS = ("finish_reason", "finishReason", "stop_reason", "reason", "status")
ERROR_KEYS = ("message", "msg", "detail", "error", "error_code", "metadata", "details")
CACHED = {"cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens", "cachedContentTokenCount"}
LIMIT_NAMES = {
    "requests": "x-ratelimit-{}-requests anthropic-ratelimit-requests-{} x-ratelimit-{}-req-minute x-ratelimit-{}",
    "tokens": "x-ratelimit-{}-tokens anthropic-ratelimit-tokens-{} x-tokenlimit-{} x-ratelimitbysize-{}-minute"}
LIMIT_HEADERS = {name.format("limit"): what for what, names in LIMIT_NAMES.items() for name in names.split()}
# fmt: on
OWN_SIZE = re.compile(r"limit:? ?(\d{1,18})\b.{0,80}requested:? ?(\d{1,18})", re.IGNORECASE)
TRY_AGAIN = re.compile(r'(?:(?:again|retry) (?:in|after)|retryDelay":) ?"?((?:\d[\d.]* ?[a-z]+ ?)+)', re.IGNORECASE)
NUMBER = re.compile(r"\d{1,13}(?:\.\d{1,9})?")
DURATION = re.compile(rf"({NUMBER.pattern}) ?(ms|milli|[smhd]|$)[a-z]*[. ]*", re.IGNORECASE)
UNIT_SECONDS = {"": 1.0, "ms": 0.001, "milli": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
OUTAGE_STREAK, PROBE_SECONDS = 10, (1.0, 5.0)  # requests in a row without an answer; between probes: at first, at most
WORDS_READ, WORDS_KEPT, LONGEST_WAIT_SECONDS, LONGEST_RETRY_SECONDS, EPOCH = 6000, 1500, 600.0, 60.0, 10**9


def judge(reply: Reply, provider: Provider, shape: str) -> Verdict:
    """Decide by what the network did, then by the provider's own words and codes, then by the status."""
    status = reply.status
    if reply.failure and status < 300:
        return Verdict(ACTIONS[reply.failure], reply.failure, reply.message)
    kind = look_inside(reply.body, SHAPES[shape].answer) if status < 300 else None
    if kind == "":
        return ANSWERED
    code, family, message = error_words(reply.body, reply.text)
    if 300 <= status < 400:
        message = f"redirected to {reply.message or reply.headers.get('Location')}: if trusted, set --request_url to it"
    if (size := OWN_SIZE.search(message)) and int(size[2]) > int(size[1]):
        kind = "bad_request"  # no waiting makes room for this request
    words = (code, family, f"http{code if status < 300 else status}", message)
    rules = chain(provider.codes.items(), RULES.items())
    kind = kind or next(told for pattern, told in rules for word in words if re.fullmatch(pattern, word, re.IGNORECASE))
    return Verdict(ACTIONS[kind], kind, message[:WORDS_KEPT] or f"status {status}: no usable answer", code or family)


def look_inside(body: Any, answer: str) -> str | None:
    """The kind of error of a reply with status 200: "" if it is an answer, None if its error words have to tell."""
    if isinstance(body, list) and body and "error" not in only(dict, body[0]):
        return ""  # so do some servers of embeddings; Gemini puts a list around an error
    whole = only(dict, body)
    match found := whole.get(answer):
        case [{"finish_reason": "stop" | "length" | "tool_calls"}] | [{"embedding": _}, *_] if not whole.get("error"):
            return ""  # subtle: the rest decides the same, slower
    if whole.get("error") or not (found or (found == [] and answer in ("content", "output"))):
        blocked = only(dict, whole.get("promptFeedback")).get("blockReason")
        return "content_filter" if blocked else None if any(error_words(body)) else "bad_reply"
    for name in ("output", "incomplete_details", "inference_status"):
        whole = whole | only(dict, whole.get(name))
    found = only(list, whole.get("choices") or whole.get("candidates") or [whole])
    choices = [{**choice, **only(dict, choice.get("message"))} for choice in found if only(dict, choice)]
    ends = {str(choice.get(name)).lower().partition(":")[0] for choice in choices for name in ENDS}
    if not choices or ends & UNFINISHED:
        return "server_error" if choices else "bad_reply"
    texts = [choice.get(name) for choice in choices for name in ("content", "text", "output")]
    empty = not any(text.get("parts") if isinstance(text, dict) else text for text in texts)
    return "content_filter" if empty and ends & BLOCKED else ""


def error_words(body: Any, text: str = "") -> tuple[str, str, str]:
    """Code, type and message of an error body: nested, flat, in a list, FastAPI's detail, a string, plain text."""
    body = body[0] if isinstance(body, list) and body else body
    error = only(dict, only(dict, body).get("error")) or only(dict, body)
    said = " ".join(one_line(error[name]) for name in ERROR_KEYS if error.get(name)) or only(str, body) or text
    return one_line(error.get("code")), one_line(error.get("type") or error.get("status")), one_line(said)


def one_line(value: Any) -> str:
    """What a value says, on one bounded line: a text itself, all else as JSON."""
    text = value if isinstance(value, str) else dumps(value).decode() if value else ""
    return " ".join(text[:WORDS_READ].split())


def only(kind: type[T], value: Any) -> T:
    """The value if it is of this kind, else an empty one."""
    return value if isinstance(value, kind) else kind()


def likely_mistake(endpoint: Endpoint, verdict: Verdict, reply: Reply) -> str:
    """What the user has probably done wrong, as a sentence; "" if nothing is known."""
    provider, url = endpoint.provider, urlsplit(endpoint.url)
    if verdict.kind == "no_money":
        return "Top up, raise the spending limit or wait for the new quota, then start again: what is done is kept."
    if verdict.kind == "auth":
        owner = next((name for start, name in KEY_STARTS.items() if re.match(start, endpoint.key)), "")
        looks = f"The key looks like one of {owner}. " if owner not in ("", provider.name) else ""
        keys = " or ".join(provider.key_env)
        return f"{looks}Check that the key ({keys}) is one of {provider.name} for this site and region: {url.hostname}."
    missing = "model|deployment" if reply.status == 404 else MODEL_MISSING
    if verdict.action is Action.FAIL and re.search(missing, f"{verdict.code} {verdict.message}", re.IGNORECASE):
        return 'Check "model": the provider does not know it, or the key may not use it.'
    return f"{WRONG_URL}: {url.hostname} has nothing at {url.path}." if reply.status in (404, 405) else ""


@lru_cache(9999)
def limited(header: str) -> str | None:
    """What the header tells the limit of, if any: requests or tokens."""
    return LIMIT_HEADERS.get(header.lower().removeprefix("llm_provider-"))  # so does LiteLLM hand on what it is told


def read_limits(reply: Reply, provider: Provider, utc_now: float) -> ServerLimits | None:
    """What a reply tells about limits and, if it is an error, how long to wait; None if nothing."""
    wait, limits = None, {}
    for name, text in reply.headers.items():
        what = limited(name)
        if what and NUMBER.fullmatch(text) and (limit := float(text) * provider.windows.get(what, 1)):
            limits[what] = limit
    if reply.status >= 400 or (isinstance(reply.body, dict) and reply.body.get("error")):
        headers = {name.lower().removeprefix("llm_provider-"): text for name, text in reply.headers.items()}
        hint = TRY_AGAIN.search(error_words(reply.body, reply.text)[2])
        texts = [f"{headers.get('retry-after-ms')}ms", headers.get("retry-after", ""), hint[1] if hint else ""]
        names = [name for what in LIMIT_NAMES if provider.windows.get(what, 1) for name in LIMIT_NAMES[what].split()]
        used_up = (name for name in names if headers.get(name.format("remaining")) in ("0", "0.0"))
        texts += [headers.get(name.format("reset"), "") for name in used_up]
        wait = next((wait for text in texts if (wait := seconds_in(text, utc_now)) is not None), None)
    return ServerLimits(wait, *map(limits.get, LIMIT_NAMES)) if limits or wait is not None else None


def seconds_in(text: str, utc_now: float) -> float | None:
    """Seconds from now of "1.5", "6m0s", "350ms", an epoch time or a date; bounded, None if it is past."""
    try:
        if text and not DURATION.sub("", text):
            seconds = sum(float(number) * UNIT_SECONDS[unit.lower()] for number, unit in DURATION.findall(text))
            seconds = seconds / 1000 if seconds > EPOCH * 100 else seconds  # milliseconds
            seconds -= utc_now if seconds > EPOCH else 0  # nobody means to wait that long: it is a time
        else:
            date = datetime.fromisoformat(text) if text[:1].isdigit() else parsedate_to_datetime(text)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - utc_now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(seconds, LONGEST_WAIT_SECONDS) if seconds >= 0 else None


def read_usage(body: Any, shape: str) -> Usage | None:
    """Tokens that a reply says it used, in any family's words; None if it does not say."""
    row = SHAPES[shape]
    usage = only(dict, body.get(row.usage) if isinstance(body, dict) else None)
    prompt, output = count_in(usage, row.prompt), count_in(usage, row.output)
    prompt = prompt or max(0, count_in(usage, ("total_tokens",)) - output)
    details = only(dict, usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    cached = count_in(details, ("cached_tokens",)) or (0 if CACHED.isdisjoint(usage) else count_in(usage, CACHED))
    return Usage(prompt, output, cached and min(cached, prompt)) if prompt or output else None


def count_in(usage: dict[str, Any], names: Iterable[str]) -> int:
    """Add up the counts of these names that are there and can be true."""
    total = 0
    for name in names:
        if type(value := usage.get(name)) is int and 0 < value < MOST_TOKENS:
            total += value
    return total


def retry_delay(attempt: int, rng: random.Random) -> float:
    """Seconds until a failed attempt (from 1) is tried again: exponential with full jitter, capped."""
    return rng.uniform(0.0, min(LONGEST_RETRY_SECONDS, 2.0 ** min(attempt - 1, 30)))


@dataclass(slots=True)
class Outage:
    """Tells a provider that is down from requests that fail, and lets only probes through meanwhile.

    Evidence goes by the time of the start: an answer speaks for what was sent before, not for what was sent later.
    """

    alive: float = -math.inf  # the latest start that was answered
    streak: dict[Request, float] = field(default_factory=dict)  # starts after that, in a row, that failed
    down: bool = False
    since: float = 0.0  # when the latest outage was noticed
    last_start: float = 0.0

    def failed(self, request: Request, enough: int, in_flight: Iterable[Request], now: float) -> bool:
        """Hear of an attempt without an answer; true if it shows an outage: so many in a row, and few still open."""
        request.excused += self.down
        request.suspect = request.suspect or request.started <= self.alive
        if self.down or request.suspect:
            return False
        self.streak.setdefault(request, request.started)
        first, many = next(iter(self.streak.values())), len(self.streak)
        still_open = (other for other in islice(in_flight, many + 1) if other.started > first)
        if many >= min(enough, OUTAGE_STREAK) and len(list(still_open)) <= many:
            self.down, self.since = True, now
            for excused in self.streak:
                excused.excused += 1
            self.streak.clear()
        return self.down

    def answered(self, started: float) -> bool:
        """Hear of an answer; true if it ends an outage."""
        self.alive = started if started > self.alive else self.alive
        for request in [request for request, at in self.streak.items() if at <= self.alive] if self.streak else ():
            request.suspect = True
            del self.streak[request]
        was_down, self.down = self.down, self.down and started < self.since
        return was_down and not self.down

    def delay(self, now: float) -> float:
        """Seconds until the next probe of a provider that is down: rarer the longer it is."""
        last, (least, most) = max(self.last_start, self.since), PROBE_SECONDS
        return max(0.0, last + min(max((last - self.since) / 2, least), most) - now)


# ==== 6 record: one line, written whole, once =========================================================================


class ResultsLost(Exception):  # noqa: N818 - it is no error of this program
    """Results cannot be recorded any more: the run stops with exit code 3; the text is the message."""


def finite(text: str) -> float:
    """Float of a JSON number; ValueError for NaN and what is beyond a double."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no JSON number that a double can hold")
    return number


DECODE = json.JSONDecoder(parse_float=finite, parse_constant=finite).decode
MEND = json.JSONDecoder(parse_float=finite, parse_constant=lambda _: None, strict=False).decode  # NaN is null
MAX_NESTING = 500  # levels: what can be read can be written, whatever the Python version and with or without orjson
LEVELS, NO_BRACKETS = {91: 1, 93: -1, 123: 1, 125: -1}, bytes(set(range(256)) - set(b'[]{}"'))
DIGITS = bytes.maketrans(b"123456789[:- \t\r\n", b"000000000,,,,,,,")
LONG_INTEGER = b"," + b"0" * 19  # after DIGITS: perhaps beyond 64 bits, a float to orjson; of every 6th byte 3 show it
IDENTITY_BYTES, BUCKETS, BLOCK = 12, 4096, 1 << 20
STAMP = ".%Y%m%dT%H%M%S.%fZ.jsonl"  # makes a name that is free
PRIVATE = partial(os.open, mode=0o600)  # opener of files that only their owner can read


def loads(data: bytes | str, *, mend: bool = False) -> Any:
    """Value of strict JSON, or of what can be mended: '[1e2, 1e400]' -> ValueError, '[1e2, NaN]' -> [100.0, None]."""
    data = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    if len(data) > MAX_NESTING < 2 * len(data) - len(data.replace(b"[", b"")) - len(data.replace(b"{", b"")):
        marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, NO_BRACKETS).replace(b'""', b"")
        if max(accumulate(LEVELS[mark] for mark in b"".join(marks.split(b'"')[::2])), default=0) > MAX_NESTING:
            raise ValueError("nested too deep")
    try:
        if orjson and not (b"000" in data[::6].translate(DIGITS) and LONG_INTEGER in (b"," + data).translate(DIGITS)):
            return orjson.loads(data)
    except ValueError:
        pass  # a lone surrogate, or an error that the standard library words better
    try:
        return MEND(data.decode(json.detect_encoding(data), "replace")) if mend else DECODE(data.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} (character {error.pos + 1})") from None


def dumps(value: Any, *, sort_keys: bool = False) -> bytes:
    """One line of JSON in UTF-8, a lone surrogate as its escape; whatever loads gave can be written."""
    try:
        if orjson is not None:
            return orjson.dumps(value, option=orjson.OPT_SORT_KEYS) if sort_keys else orjson.dumps(value)
    except TypeError:
        pass  # integers beyond 64 bits, lone surrogates, deep nesting
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys, separators=(",", ":"))
    return text.encode(errors="backslashreplace")  # subtle: Python's escape of a surrogate is also JSON's


def identity(body: Any, metadata: Any) -> bytes:
    """What a request is recognised by: the same for equal JSON, in whatever order its keys stand; 1 and 1.0 differ."""
    return hashlib.blake2b(dumps((body, metadata), sort_keys=True), digest_size=IDENTITY_BYTES).digest()


def read_result(line: bytes) -> tuple[bytes, bool] | None:
    """Identity and success of a result line, also of the cookbook script's; None if it is none."""
    with contextlib.suppress(ValueError):
        match loads(line):
            case [dict() as body, outcome, *rest] | [str() as body, list() as outcome, *rest] if len(rest) <= 2:
                return identity(body, rest[0] if rest else None), not isinstance(outcome, list)
    return None


@contextlib.contextmanager
def errors_as(kind: type[Exception], problem: str) -> Iterator[None]:
    """Turn an error of the file system into one that tells what to do."""
    try:
        yield
    except OSError as error:
        advice = "Make room or choose another --save_filepath, then start again with the same files."
        raise kind(f"{problem} ({error.strerror}). {advice}") from None


def guard(path: Path, requests: Path) -> bool:
    """UsageError for a results file that must not be touched. Gives whether there is nothing in it but a torn line."""
    folder = path.parent
    with path.open("r+b", BLOCK) if path.is_file() else BytesIO() as file:
        first = next((line for line in file if not line.isspace()), b"")
    alien = first > b"" and read_result(first) is None
    torn = alien and re.fullmatch(rb'\[(["{].*)?', first) is not None
    problems = {
        f"its folder is missing (mkdir -p '{folder}')": not folder.is_dir(),
        f"its folder {folder} is not writable for you": not os.access(folder, os.W_OK | os.X_OK),
        "it is no regular file": path.exists() and not path.is_file(),
        "it is the request file too": path.is_file() and requests.exists() and path.samefile(requests),
        f"its first line is no result line: {str(first[:60])[2:-1]}": alien and not torn,
    }
    if problem := next((text for text, holds in problems.items() if holds), ""):
        raise UsageError(f"Results file {path}: {problem}. Nothing was touched; or choose another --save_filepath.")
    return torn


@contextlib.contextmanager
def locked(path: Path) -> Iterator[str]:
    """Hold the lock file, with our pid in it. Gives a notice if the file system has no locks."""
    notice = ""
    with open(path, "a+", opener=PRIVATE) as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                os.lseek(file.fileno(), BLOCK, os.SEEK_SET)  # subtle: locked bytes are unreadable, the pid must not be
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samefile(path, file.fileno()):  # noqa: PTH121 - Path.samefile takes no descriptor
                raise BlockingIOError  # it was removed meanwhile, a later file of this name may be locked
        except (BlockingIOError, FileNotFoundError, PermissionError):
            file.seek(0)
            busy = f"Process {file.read().strip() or '(starting)'} is writing these results (it holds {path})"
            raise UsageError(f"{busy}. Wait until it ends, or choose another --save_filepath.") from None
        except OSError as error:
            notice = f"No locks on this file system ({error.strerror}): start no second process for these results."
        path.write_text(f"{os.getpid()}\n")
        try:
            yield notice
        finally:
            with contextlib.suppress(OSError):  # removed while it is held: never a newer one
                path.unlink()


class ResultsFile:
    """The results file, which is the checkpoint too. Opening guards, locks, reads and repairs it, or UsageError."""

    def __init__(self, path: str, requests_path: str = "", *, restart: bool = False) -> None:
        self.path = Path(os.path.realpath(path))
        self.finished_before = self.failed_before = self.unreadable = 0  # lines that it had
        self.foreign = 0  # finished requests that were not asked for, known after finish
        self._finished = [bytearray() for _ in range(BUCKETS)]  # identities end to end: a fifth of the size of a set
        self.failed: set[bytes] = set()  # requests with failed lines that this run did not come to
        self.queue = bytearray()  # whole lines, until they are flushed
        with errors_as(UsageError, f"The results file {path} cannot be used"), contextlib.ExitStack() as stack:
            torn = guard(self.path, Path("/dev/stdin" if requests_path == "-" else requests_path))
            self.notices = list(filter(None, [stack.enter_context(locked(Path(f"{self.path}.lock")))]))
            if self.path.exists() and (restart or torn):
                former = self.path.rename(self.path.with_suffix(f"{datetime.now(UTC):{STAMP}}"))
                self.notices.append(f"The former results are kept as {former}.")
            self._file = stack.enter_context(open(self.path, "a+b", buffering=0, opener=PRIVATE))
            self._size = self._old_size = self._read()  # bytes that we know of, and those from before
            self.resumed = self._old_size > 0  # else nothing can be finished
            with contextlib.suppress(OSError):
                self.path.chmod(0o600)
                Path(f"{self.path}.rewrite").unlink()
            self._held = stack.pop_all()
        self.close = self._held.close

    def _lines(self, left: int) -> Iterator[tuple[bytes, tuple[bytes, bool] | None]]:
        self._file.seek(0)
        with open(self._file.fileno(), "rb", BLOCK, closefd=False) as file:
            while line := file.readline(left):
                left -= len(line)
                yield line, read_result(line)

    def _read(self) -> int:
        size, line, result = self._file.seek(0, os.SEEK_END), b"\n", None
        for line, result in self._lines(size):
            if result is None:
                self.unreadable += line.endswith(b"\n") and not line.isspace()
            elif result[1]:
                self.finished_before += 1
                self._finished[int.from_bytes(result[0][:2]) % BUCKETS] += result[0]
            else:
                self.failed_before += 1
                self.failed.add(result[0])
        if line.endswith(b"\n"):
            return size
        if result:
            return size + self._file.write(b"\n")
        self.notices.append("A torn last line was cut off.")
        return self._file.truncate(size - len(line))

    def take(self, identity: bytes) -> bool:
        """Whether this request is finished already: true once for each of its successful lines."""
        self.failed.discard(identity)  # this run replaces those lines
        bucket = self._finished[int.from_bytes(identity[:2]) % BUCKETS]
        if (at := bucket.find(identity)) >= 0:
            del bucket[at : at + IDENTITY_BYTES]
        return at >= 0

    def write(self, body: Any, outcome: Any, metadata: Any = None, details: Any = None) -> None:
        """Queue one result line. outcome: the response, or the list of errors."""
        width = 4 if details is not None else 3 if metadata is not None else 2
        self.queue += dumps([body, outcome, metadata, details][:width]) + b"\n"

    def flush(self) -> None:
        """Write the queued lines, each whole or not at all; after ResultsLost the rest is still queued."""
        with errors_as(ResultsLost, f"{self.path} cannot be written"):
            if (end := self._file.seek(0, os.SEEK_END)) < self._size:
                self.check()  # at once: behind the cut, a line would be glued to half of another
            self._size, done = end, 0
            try:
                while done < len(self.queue):
                    done += self._file.write(memoryview(self.queue)[done:])
            finally:
                whole = self.queue.rfind(b"\n", 0, done) + 1
                del self.queue[:whole]
                self._size += whole
                if whole < done:
                    self._file.truncate(self._size)

    def check(self) -> None:
        """ResultsLost if the file is not there as we left it; what is held goes on under a second name."""
        same = os.path.exists(self.path) and os.path.samefile(self.path, self._file.fileno())  # noqa: PTH110, PTH121
        if same and self._file.seek(0, os.SEEK_END) >= self._size:
            return
        rescue = self.path.with_suffix(f".rescued{datetime.now(UTC):{STAMP}}")
        problem = f"{self.path} was {'truncated' if same else 'deleted or replaced'} by someone during the run"
        advice = f"cat '{rescue}' >> '{self.path}'" if same else f"mv '{rescue}' '{self.path}' (look what is there now)"
        with errors_as(ResultsLost, f"{problem}, and {rescue} failed"), open(rescue, "xb", opener=PRIVATE) as copy:
            copy.write(b"\n" if same else b"")  # subtle: the truncated file may end within a line
            self._file.seek(0, os.SEEK_END if same else os.SEEK_SET)
            shutil.copyfileobj(self._file, copy, BLOCK)
        self._file = self._held.enter_context(rescue.open("a+b", buffering=0))
        self.path, self._size, self._old_size = rescue, rescue.stat().st_size, 0
        raise ResultsLost(f"{problem}; what is still held goes to {rescue}. To continue: {advice}, then start again.")

    def finish(self, *, whole: bool, limited: bool = False) -> None:
        """End the run. whole: every request was read and has its line; limited: only those at the head were read."""
        with self._held, errors_as(ResultsLost, f"Old failed lines could not be dropped from {self.path}, it is whole"):
            self.flush()
            self.check()
            os.fsync(self._file.fileno())
            if whole and not limited:
                self.failed.clear()
                self.foreign = sum(map(len, self._finished)) // IDENTITY_BYTES
            if whole and self.failed_before + self.unreadable:
                self._rewrite()

    def _rewrite(self) -> None:
        new, aside = Path(f"{self.path}.rewrite"), f"{self.path}.unreadable" if self.unreadable else os.devnull
        with open(new, "wb", opener=PRIVATE) as target, open(aside, "ab", opener=PRIVATE) as unreadable:
            for line, result in self._lines(self._old_size):
                if result is None:
                    unreadable.write(b"" if line.isspace() else line)
                elif result[1] or result[0] in self.failed:
                    target.write(line)
            self._file.seek(self._old_size)
            shutil.copyfileobj(self._file, target, BLOCK)
            target.flush()
            os.fsync(target.fileno())
        self._file.close()  # for Windows
        new.replace(self.path)


# ==== 7 report: counts, progress, summary =============================================================================

PROGRESS = {"bar": 0.25, "lines": 5.0, "none": math.inf}  # seconds between two looks
WIDTH = 76  # of the bar: a terminal that is made narrower than its lines breaks them


@dataclass(slots=True)
class Tally:
    """What happened in a run; returned to Python callers."""

    read: int = 0  # requests of the file, so far
    finished_before: int = 0  # already in the results when the run began
    succeeded: int = 0
    failed: int = 0  # bad lines included
    bad_lines: int = 0
    calls: int = 0  # attempts started
    refused: int = 0
    replies: int = 0  # with an HTTP status, refusals left out
    answer_lost: int = 0  # sent, but no reply: may have been billed
    never_sent: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    spent: float = 0.0  # in the unit of the prices given; where a reply does not tell its tokens, what was expected
    kinds: Counter[str] = field(default_factory=Counter)  # attempts that did not succeed
    seconds: float = 0.0
    last_trouble: str = ""
    stop_reason: str = ""  # "" if the run came to its end
    exit_code: int = 0

    def count(self, verdict: Verdict, reply: Reply, usage: Usage | None) -> None:
        """Count one reply."""
        if verdict.action is DONE:
            self.succeeded += 1
            self.replies += 1
        else:
            self.refused += verdict.action is Action.REFUSED
            self.replies += reply.status > 0 and verdict.action is not Action.REFUSED
            self.never_sent += not reply.sent
            self.answer_lost += reply.sent and reply.failure in ("connection", "timeout")
            self.kinds[verdict.kind] += 1
            self.last_trouble = verdict.message
        prompt, output, cached = usage or (0, 0, 0)
        self.prompt_tokens += prompt
        self.output_tokens += output
        self.cached_tokens += cached


class Reporter:
    """Shows a run: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, mode: str) -> None:
        self.live: Any = None
        if mode == "bar" or (mode == "auto" and sys.stderr is not None and sys.stderr.isatty()):
            with contextlib.suppress(ImportError):  # without rich: lines
                from rich import console, live

                self.live = live.Live(console=console.Console(stderr=True), auto_refresh=False, transient=True)
                self.live.start()
        self.every = PROGRESS["bar" if self.live else "none" if mode == "none" else "lines"]
        self.next_time, self.history = 0.0, deque[tuple[float, int]](maxlen=60)  # (time, done), for the time left

    def update(self, run: Run, now: float) -> float:
        """Show where the run stands if it is time; gives the time of the next look."""
        if now < self.next_time:
            return self.next_time
        tally, total, done = run.tally, run.reader.expected_total(), run.tally.succeeded + run.tally.failed
        self.next_time = now + self.every
        self.history.append((now, done))
        then, done_then = self.history[0]
        of = f" of {'' if run.reader.ended else 'about '}{total:,.0f}" if total < math.inf else ""
        words = [f"{tally.succeeded + tally.finished_before:,}{of} done", f"{tally.failed:,} failed"]
        words += [f"{len(run.in_flight):,} in flight", f"{len(run.retries) + len(run.limbo):,} to retry"]
        if run.stopped_by and run.in_flight:
            wait = duration(next(iter(run.in_flight.values()))[0].started + run.settings.request_timeout - now)
            words.append(f"finishing what is in flight, {wait} at most (Ctrl-C again: at once)")
        elif all(endpoint.outage.down for endpoint in run.endpoints):
            words.append("the provider is down, probing")
        elif done > done_then and total < math.inf:
            left = (total - tally.finished_before - done) * (now - then) / (done - done_then)
            words.append(f"about {duration(left)} left")
        used = map(sum, zip(*(endpoint.pacer.last_minute() for endpoint in run.endpoints), strict=True))
        for name, budget, amount in zip(("requests", "tokens"), total_budgets(run.endpoints), used, strict=True):
            words.append(f"{amount:,.0f}{f' of {budget:,.0f}' if budget else ''} {name}/min")
        text = ", ".join(words) + (f", spent {tally.spent:,.4f}{spend_forecast(run)}" if tally.spent else "")
        if self.live:
            from rich import console, progress_bar

            bar = progress_bar.ProgressBar(total, tally.finished_before + done, width=WIDTH)
            lines = "\n".join(["", *textwrap.wrap(text, WIDTH)])  # a bar ends without a line break
            try:
                self.live.update(console.Group(bar, lines), refresh=True)
            except OSError:  # the terminal is gone
                self.close()
        elif len(self.history) > 1:
            LOGGER.info("%s", text)
        return self.next_time

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live:
            with contextlib.suppress(OSError):
                self.live.stop()
        self.live = None


def duration(seconds: float) -> str:
    """59 -> 59 s, 61 -> 1 min 1 s, 7300 -> 2 h 1 min."""
    minutes, rest = divmod(max(0, math.ceil(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def spend_forecast(run: Run) -> str:
    """What the whole file will have cost by the price of what is done, in words; "" if that is not known."""
    done, total = run.tally.succeeded + run.tally.failed, run.reader.expected_total() - run.tally.finished_before
    return f" of about {run.tally.spent / done * total:,.4f}" if 0 < done < total < math.inf else ""


def summarize(run: Run) -> list[str]:
    """Say at the end what happened, where the results are and what to do next."""
    tally, minutes = run.tally, max(run.tally.seconds / 60, 1.0)
    calls, tokens = tally.calls, tally.prompt_tokens + tally.output_tokens
    kinds = ", ".join(f"{times:,} {kind}" for kind, times in tally.kinds.most_common())
    cached = f" ({tally.cached_tokens:,} of them cached)" if tally.cached_tokens else ""
    lines: list[Any] = [  # what is false is left out
        f"{tally.succeeded:,} succeeded, {tally.failed:,} failed, {tally.finished_before:,} were finished before.",
        calls and f"Calls: {calls:,} in {duration(tally.seconds)}, {tally.refused / calls:.1%} refused.",
        kinds and f"Attempts without success: {kinds}.",
        tally.answer_lost and f"Sent, answer lost (perhaps billed): {tally.answer_lost:,}.",
        tally.never_sent and f"Never sent: {tally.never_sent:,}.",
        tokens and f"Tokens: {tally.prompt_tokens:,} in{cached}, {tally.output_tokens:,} out.",
        tally.spent and f"Spent: {tally.spent:,.4f}{spend_forecast(run)}.",
        0 < run.settings.max_cost < tally.spent and "Answers were longer than expected, hence more than --max_cost.",
        run.results.foreign and f"Kept: {run.results.foreign:,} results of requests that are not in the file any more.",
        run.results.unreadable and f"Set aside in {run.results.path}.unreadable: {run.results.unreadable:,} lines.",
    ]
    for name, budget, amount in zip(("requests", "tokens"), total_budgets(run.endpoints), (calls, tokens), strict=True):
        lines.append(budget and f"Budget of {budget:,.0f} {name} a minute: {amount / minutes / budget:.0%} used.")
    lines += [f"{endpoint.name}: {found}" for endpoint in run.endpoints if (found := endpoint.pacer.describe())]
    words = "{}: {:.2f} of the estimated input, {:.0f} output tokens on average".format
    lines += [words(model or "no model", seen[1] / seen[0], seen[3] / seen[2]) for model, seen in run.learned.items()]
    if not (calls or tally.failed or run.stopped_by):
        lines.append("Nothing to do, all are finished; --restart starts afresh, another --save_filepath keeps both.")
    advice = "Failed lines hold their reasons. The same command tries them again; --save_details tells more."
    return [line for line in (*lines, f"Results: {run.results.path}", tally.failed and advice) if line]


def total_budgets(endpoints: list[Endpoint]) -> list[float]:
    """What all endpoints together allow in a minute: requests and tokens; 0 = not known."""
    columns = zip(*(endpoint.settings.budgets for endpoint in endpoints), strict=True)
    return [sum(column) if all(column) else 0.0 for column in columns]


def expected_cost(settings: Settings, url: str, models: dict[str, list[int]]) -> str:
    """What requests cost, given as number, tokens in and out by model: by the prices given, else of genai-prices."""
    if settings.input_price or settings.output_price:
        return f" Expected cost: {sum(settings.price(*sums[1:]) for sums in models.values()):,.4f}."
    try:
        import genai_prices as list_prices

        cost = 0.0
        for model, (times, prompt, output) in models.items():  # a price may depend on the size of a request
            mean = list_prices.Usage(input_tokens=prompt // times, output_tokens=output // times)
            cost += times * float(list_prices.calc_price(mean, model, provider_api_url=url).total_price)
    except ImportError:
        return ""
    except LookupError:
        return f" No list price for {model} at {urlsplit(url).hostname}: --input_price and --output_price would tell."
    return f" Expected cost: {cost:,.4f} dollars, by the list prices of genai-prices."


class ConsoleHandler(logging.Handler):
    """Log lines on standard error, above the bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        complain(f"{time.strftime('%H:%M:%S')} {record.getMessage()}")


def complain(text: str) -> None:
    """Print a line on standard error, whatever the logging level; a vanished terminal is no error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - else the flush at exit fails, too


# ==== command line ====================================================================================================


async def process_api_requests_from_file(requests_filepath: str | os.PathLike[str], **settings: Any) -> Tally:
    """Process a request file; keyword arguments are flags of the command line: None is the default, a list repeats one.

    Returns the tally, also of a run that stopped early. Raises UsageError. Installs no signal handlers.
    """
    return await run_job(Settings.of(requests_filepath=requests_filepath, **settings))


async def run_job(settings: Settings, *, main_program: bool = False) -> Tally:
    """Check and open everything, run the loop, tidy up, tell the summary. The main program also hears signals."""
    settings.check()
    sys.set_int_max_str_digits(0)  # integers of any size come back as they were
    secrets, wake, loop, began = Secrets(), asyncio.Event(), asyncio.get_running_loop(), time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        LOGGER.addFilter(secrets)
        stack.callback(LOGGER.removeFilter, secrets)
        endpoints, path = [make_endpoint(row, secrets) for row in each_endpoint(settings)], settings.requests_filepath
        if len({endpoint.shape for endpoint in endpoints}) != 1:
            raise UsageError("the endpoints take requests of different shapes; give each shape its own request file")
        tokenizer = Tokenizer(settings.token_encoding_name)
        try:  # subtle: sys.stdin would be closed at exit, while a thread still reads from it
            file = open(0 if path == "-" else path, "rb", buffering=1 << 20, closefd=path != "-")  # noqa: SIM115, ASYNC230
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}); see --requests_filepath") from None
        stack.callback(file.close)
        reader = Reader(file, endpoints[0], tokenizer, settings.limit, lambda: loop.call_soon_threadsafe(wake.set))
        if settings.dry_run:
            return await dry_run(settings, reader, endpoints)
        refuse_unfinished(settings)
        results = ResultsFile(settings.results_path, path, restart=settings.restart)
        stack.callback(results.close)
        clock = time.monotonic if "uvloop" in type(loop).__module__ else loop.time  # uvloop's moves by milliseconds
        run = Run(settings, reader, endpoints, results, Reporter(settings.progress), wake, clock)
        stack.callback(run.reporter.close)
        if main_program:
            hear_signals(run, stack)
        for notice in results.notices:
            LOGGER.warning("%s", notice)
        for endpoint in endpoints:
            await endpoint.open(stack)
        try:
            await run.process_requests()
        finally:
            lost = [task for _, task in run.in_flight.values() if task.cancel()]
            await asyncio.gather(*lost, return_exceptions=True)
            run.tally.answer_lost += len(lost)  # a second signal does not wait for them
            run.tally.spent += run.expected_spend if lost else 0.0
        return conclude(run, began)


def conclude(run: Run, began: float) -> Tally:
    """End the results file of a run and tell the summary; gives the tally. began: by time.monotonic."""
    try:
        run.results.finish(whole=not run.stopped_by, limited=run.settings.limit > 0)
    except ResultsLost as lost:
        run.stop("results", str(lost))
    run.tally.seconds = time.monotonic() - began
    run.tally.exit_code = 128 + run.signal if run.signal else 3 if run.stopped_by else 1 if run.tally.failed else 0
    run.reporter.close()
    for line in summarize(run):
        LOGGER.info("%s", line)
    return run.tally


def refuse_unfinished(settings: Settings, *, shards: bool = True) -> None:
    """Refuse results of which the rest is elsewhere: with a provider's Batch API, or in the shards of a cluster run."""
    path = os.path.realpath(settings.results_path)
    ledger = Path(f"{path}.batch.json")
    try:
        listed = loads(ledger.read_bytes())["jobs"] if ledger.exists() else []
        jobs = [str(job.get("id") or job.get("name")) for job in listed if job.get("open")]
        problem = f"batch jobs are open for these results: {', '.join(jobs[:3])}" if jobs else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"batch jobs may be open for these results, but {ledger} cannot be read ({error})"
    if problem and not settings.ignore_batch:
        raise UsageError(f"{problem}. `python -m workflows.provider_batch run` collects them; --ignore_batch overrides")
    if shards and Path(f"{path}.shards").is_dir():
        raise UsageError(f"{path}.shards holds results of a cluster: `python -m workflows.ray_cluster` goes on with it")


def hear_signals(run: Run, stack: contextlib.AsyncExitStack) -> None:
    """Let a first signal stop the run gently and a second one at once; what nohup ignores stays ignored."""
    loop = asyncio.get_running_loop()

    def notice(number: int, _: object) -> None:
        run.signal, run.force = run.signal or number, bool(run.signal)
        loop.call_soon_threadsafe(run.wake.set)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if (number := getattr(signal, name, None)) and (before := signal.getsignal(number)) != signal.SIG_IGN:
            signal.signal(number, notice)
            stack.callback(signal.signal, number, before)


def each_endpoint(settings: Settings) -> Iterator[Settings]:
    """The settings of each endpoint: of the lines of --endpoints_filepath, else of each URL with its key."""
    urls, keys = settings.request_url.split() or [""], settings.api_key_env.split() or [""]
    if 1 < len(urls) != len(keys) > 1:
        raise UsageError("give as many --api_key_env as --request_url, or one of them for all")
    rows = [[urls[i % len(urls)], keys[i % len(keys)]] for i in range(max(len(urls), len(keys)))]
    if path := settings.endpoints_filepath:
        try:
            lines = [line.partition("#")[0].split() for line in Path(path).read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeError) as error:
            raise UsageError(f"--endpoints_filepath {path} cannot be read ({error})") from None
        for number, words in enumerate(lines, 1):
            if words and not (2 <= len(words) <= 4 and all(map(NUMBER.fullmatch, words[2:]))):
                form = "URL key_env requests_per_minute tokens_per_minute"
                raise UsageError(f"--endpoints_filepath {path}, line {number}: a line is `{form}`; key_env may be -")
        rows = list(filter(None, lines))
    if not rows:
        raise UsageError(f"--endpoints_filepath {path} names no endpoint; write one a line: `URL key_env rpm tpm`")
    for url, variable, *limits in rows:
        requests, tokens = [*map(float, limits), *settings.budgets[len(limits) :]]
        one = replace(settings, request_url=url, api_key_env=variable.removeprefix("-"))
        yield replace(one, max_requests_per_minute=requests, max_tokens_per_minute=tokens)


def reread_limits(run: Run) -> None:
    """Take over limits that were changed in --endpoints_filepath; what is wrong there changes nothing."""
    try:
        rows, problem = {(row.request_url, row.api_key_env): row for row in each_endpoint(run.settings)}, ""
    except UsageError as error:
        rows, problem = {}, str(error)
    if problem and problem != run.limits_problem:
        LOGGER.warning("%s. The limits stay as they were.", problem)
    run.limits_problem = problem
    for endpoint in run.endpoints:
        row = rows.get((endpoint.settings.request_url, endpoint.settings.api_key_env))
        if row and row.budgets != endpoint.settings.budgets:
            endpoint.settings = row
            endpoint.pacer.set_budgets(*row.budgets)
            LOGGER.warning("%s: from now on %g requests and %g tokens a minute.", endpoint.name, *row.budgets)


def make_endpoint(settings: Settings, secrets: Secrets) -> Endpoint:
    """Find the provider, its key and its rules; refuse what cannot work or is not safe."""
    host = ""
    with contextlib.suppress(ValueError):  # a port, a name or an address in brackets that is none
        parts = urlsplit(settings.request_url.strip())
        host = (parts.hostname or "").encode("idna").decode() if parts.port != 0 and "@" not in parts.netloc else ""
    if not host or parts.scheme not in ("http", "https"):
        raise UsageError("--request_url must be like https://api.openai.com/v1; a password goes into --request_header")
    if parts.path in ("", "/") or parts.path.rstrip("/").endswith("/v1"):
        parts = parts._replace(path=parts.path.rstrip("/") + "/chat/completions")
        LOGGER.warning("--request_url names no endpoint: sending to %s", parts.path)
    url, private = urlunsplit(parts), is_private(host)
    provider = find_provider(url, settings.provider)
    names = [settings.api_key_env] if settings.api_key_env else provider.key_env
    if not all(map(str.isidentifier, names)) or any(re.match(start, name) for start in KEY_STARTS for name in names):
        raise UsageError("--api_key_env takes the name of a variable, and this looks like a key: `export NAME=...` it")
    keys = {"--api_key": settings.api_key} | {name: os.environ.get(name, "") for name in names}
    source, key = next(((source, key.strip()) for source, key in keys.items() if key.strip()), ("", ""))
    if not (key or private or settings.dry_run):
        raise UsageError(f"no key for {host}: export {' or '.join(names)}, or name another variable with api_key_env")
    if key and parts.scheme == "http" and not (private or settings.allow_plain_http):
        raise UsageError(f"http would show the key to everybody on the way to {host}: use https, or --allow_plain_http")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the key from {source} holds characters that no key has, a line break perhaps: copy it again")
    LOGGER.info("%s: %s", host, f"key from {source}" if key else "no key")
    secrets.add(key, always=not provider.auth)  # a user name, which may be short
    if 0 < len(key) < SHORTEST_SECRET and provider.auth:
        LOGGER.warning("The key is shorter than %d characters: it is not searched for in replies.", SHORTEST_SECRET)
    headers = {"Content-Type": "application/json", "User-Agent": f"api_request_parallel_processor/{__version__}"}
    headers |= provider.auth_headers(key)
    for line in settings.request_header:
        header = re.fullmatch(r"([\w!#$%&'*+.^`|~-]+) *: *([ -~\t]*)", line.strip(), re.ASCII)
        if not header:
            raise UsageError("--request_header is no header; write 'Name: value', in ASCII")
        name, value = header.groups()
        headers = {known: old for known, old in headers.items() if known.lower() != name.lower()} | {name: value}
        if re.search("auth|key|token|secret|cookie", name, re.IGNORECASE):
            secrets.add(value.removeprefix("Bearer "))
    allowed = open_files_for(wanted := settings.max_concurrent_requests or MOST_CONCURRENT)
    if allowed < min(wanted, MOST_CONCURRENT // 2):
        LOGGER.warning("Open files are limited to at most %d requests in flight; `ulimit -n` raises that.", allowed)
    per_second, at_once = provider.per_second, provider.concurrency
    pacer = Pacer(*settings.budgets, allowed, settings.seconds_to_sleep_each_loop, per_second, at_once)
    shape, most = find_shape(parts.path, provider), int(settings.max_reply_megabytes * 2**20)
    name, proxy = f"{parts.netloc} ({settings.api_key_env})".removesuffix(" ()"), find_proxy(url, secrets)
    return Endpoint(url, name, provider, shape, key, headers, pacer, proxy, most, secrets, settings)


def is_private(host: str, *, loopback_only: bool = False) -> bool:
    """Tell an address of this machine or of a private network: a key may travel openly there, and is optional."""
    with contextlib.suppress(ValueError):
        return (address := ipaddress.ip_address(host)).is_loopback or (address.is_private and not loopback_only)
    return host == "localhost" or host.endswith(".localhost")


async def dry_run(settings: Settings, reader: Reader, endpoints: list[Endpoint]) -> Tally:
    """Read and count everything, print what a run would mean. Nothing is sent, locked or written."""
    tally, learned, models = Tally(), LearnedTokens(), dict[str, list[int]]()
    while not reader.ended:
        request = reader.next(time.monotonic())
        if request is None:
            await asyncio.sleep(0.01)
        elif request.problem:
            tally.bad_lines += 1
            print(request.problem)
        else:
            cost = learned.cost(request.model, reader.estimate(request))
            sums = models.setdefault(request.model, [0, 0, 0])
            sums[:] = sums[0] + 1, sums[1] + cost.prompt, sums[2] + cost.expected - cost.prompt
    sendable, tally.prompt_tokens, tally.output_tokens = (sum(sums[i] for sums in models.values()) for i in range(3))
    amounts, budgets = (sendable, tally.prompt_tokens + tally.output_tokens), total_budgets(endpoints)
    minutes = max(amount / (budget or math.inf) for amount, budget in zip(amounts, budgets, strict=True))
    takes = f"The limits given take {duration(minutes * 60)}" if any(budgets) else "No limits given: a run finds out"
    print(f"{sendable:,} requests can be sent, {tally.bad_lines:,} lines cannot.")
    print(f"About {tally.prompt_tokens:,} tokens in and {tally.output_tokens:,} out (a guess until replies tell).")
    limits = {f"{endpoint.provider.name} limits {endpoint.provider.limits}": 0 for endpoint in endpoints}
    print(f"{takes}; {'; '.join(limits)}.{expected_cost(settings, endpoints[0].url, models)}")
    tally.read, tally.failed, tally.exit_code = sendable + tally.bad_lines, tally.bad_lines, int(tally.bad_lines > 0)
    return tally


def build_parser() -> argparse.ArgumentParser:
    """One flag per field of Settings, in groups named after the stations."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    usage, layout = "%(prog)s --requests_filepath FILE [flags]", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(None, usage, summary, rest, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    groups = {name: parser.add_argument_group(name) for name in STATIONS}
    for knob in fields(Settings):
        default, choices, text = knob.default, knob.metadata["choices"](), knob.metadata["help"]
        name = None if choices else type(default).__name__.upper()
        more: dict[str, Any] = {"type": type(default), "choices": choices or None, "metavar": name}
        if default is MISSING:
            more = {"required": True, "metavar": "STR"}
        elif isinstance(default, bool):
            more = {"action": "store_true", "default": None}
        elif knob.name in ("request_header", "request_url", "api_key_env"):
            more = {"type": str, "action": "append", "metavar": "STR"}
        if "type" in more and default not in ("", ()):
            text += f" (default: {default})".replace(".0)", ")")
        flag = groups[knob.metadata["station"]].add_argument(f"--{knob.name}", help=text, **more)
        if knob.name.endswith("filepath"):  # for shtab, which makes the completion of shells from this parser
            flag.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # type: ignore[attr-defined]
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # one that is closed would be given to a socket
        pass
    os.close(descriptor)
    gc.set_threshold(100_000, 20, 100)  # a request in flight is hundreds of objects: look less often for garbage
    words = sys.argv[1:] if argv is None else argv
    flags = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]
    settings, handler = Settings.of(**vars(build_parser().parse_args(flags))), ConsoleHandler()
    LOGGER.addHandler(handler)
    try:
        settings.check()
        level = settings.logging_level.upper()
        LOGGER.setLevel(max(1, int(level)) if level.isdecimal() else level)  # 0 would stand for that of the root logger
        with asyncio.Runner(loop_factory=getattr(uvloop, "new_event_loop", None)) as runner:
            tally = runner.run(run_job(settings, main_program=True))
    except UsageError as error:
        complain(f"Cannot start: {error}")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        LOGGER.removeHandler(handler)
    if tally.stop_reason:
        complain(f"Stopped early: {tally.stop_reason} The same command continues.")
    return tally.exit_code


# ==== tables: shapes of requests and replies, providers ===============================================================

BEARER = "Authorization: Bearer "


class Shape(NamedTuple):
    """What a family of endpoints takes and gives."""

    paths: str  # patterns of the paths that speak it
    needs: tuple[str, ...]  # fields of a request, one of which it must have
    answer: str  # the field that makes a reply an answer
    takes: Any = (str, list)  # what the needed field may be; a list alone is one of objects
    usage: str = "usage"  # the field of a reply with its tokens
    prompt: tuple[str, ...] = ("prompt_tokens",)  # fields of that, to be added up
    output: tuple[str, ...] = ("completion_tokens",)


class Provider(NamedTuple):
    """How the URL tells a provider, its keys, what its limits count, its own error codes."""

    name: str
    urls: str  # patterns of hosts, or of host and path
    key_env: tuple[str, ...]  # environment variables with the key; the first that is set counts
    limits: str = "requests and tokens per minute"
    codes: Mapping[str, str] = {}  # like RULES, which come after them
    auth: str = BEARER  # the header with the key, if a shape has this name only there; "": a gateway, the key is a user
    per_second: bool = False  # the minute's limits are enforced in slices of a second
    concurrency: int = 0  # in flight at once, to start with; 0 = no such limit is known
    windows: Mapping[str, int] = {}  # of its headers in a minute, if not one; 0: by the day, which is no pace
    names_model: bool = True  # a request must have "model"
    asks_usage: bool = True  # a stream tells its usage if asked to; others refuse the question
    headers: Mapping[str, str] = {}  # what it wants besides

    def auth_headers(self, key: str) -> dict[str, str]:
        """The headers that carry the key, with what else it wants; Entra tokens of Azure are Bearer tokens."""
        name, _, prefix = (BEARER if key.startswith("eyJ") and self.auth else self.auth).partition(": ")
        return {**self.headers, **({name: prefix + key} if name and key else {})}


# fmt: off
TOKENS = "usage", ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"), ("output_tokens",)
SHAPES = {
    "chat": Shape("*/chat/completions */gpt", ("messages",), "choices", list),
    "completions": Shape("*/completions", ("prompt",), "choices"),
    "embeddings": Shape("*/embeddings", ("input",), "data"),
    "dashscope": Shape("*/api/v1/services/*", ("input",), "output", dict, *TOKENS),
    "responses": Shape("*/responses", ("input", "prompt"), "output", (str, list, dict), *TOKENS),
    "moderations": Shape("*/moderations", ("input",), "results"),
    "anthropic": Shape("*/messages *:rawPredict */claude", ("messages",), "content", list, *TOKENS),
    "gemini": Shape("*:generateContent", ("contents",), "candidates", list, "usageMetadata",
        ("promptTokenCount", "toolUsePromptTokenCount"), ("candidatesTokenCount", "thoughtsTokenCount")),
    "deepinfra": Shape("*/v1/inference/*", ("input", "inputs", "prompt"), "inference_status", (str, list, dict),
        "inference_status", ("tokens_input",), ("tokens_generated",))}
MODEL_MISSING = r"^\S*(model|deployment)|valid model|model.{0,99}not exist|模型.{0,9}不存在"  # its start is the code
KEY_STARTS = {"sk-ant-": "anthropic", "sk-or-": "openrouter", "sk-(proj|svcacct|admin)-": "openai", "gsk_": "groq",
    "AIza": "gemini", r"\w{32}\.": "zhipu"}
OPENAI_CODES = {r"(insufficient_quota|credit_balance|billing)\w*|\w+(spend|usage)_limit\w*": "no_money"}
GOOGLE_CODES = {".*(PerDay|credits.*depleted).*": "no_money", ".*API.KEY.(not |in)valid.*|FAILED_PRECONDITION": "auth"}
PROVIDERS = {row.name: row for row in (
    Provider("azure", "*.openai.azure.com *.cognitiveservices.azure.com *.services.ai.azure.com */openai/deployments/*",
        ("AZURE_OPENAI_API_KEY",), "requests and tokens per minute and deployment, in slices of 1 or 10 seconds",
        {".*out of call volume quota.*": "no_money"}, "api-key: ", per_second=True, names_model=False),
    Provider("openai", "*api.openai.com", ("OPENAI_API_KEY",), codes=OPENAI_CODES),
    Provider("dashscope", "*dashscope*.aliyuncs.com *.maas.aliyuncs.com", ("DASHSCOPE_API_KEY",),
        "requests and tokens per minute and model, a sixtieth of them per second", per_second=True, codes={
        r".*\bfree (allocated |tier )?quota.*|.*free tier.*|AllocationQuota.FreeTierOnly": "no_money",
        r"Arrearage|\w+BillOverdue|CommodityNotPurchased": "no_money", "data_?inspection_?failed": "content_filter",
        "Throttling.*|limit_?requests|limit_burst_rate|insufficient_quota": "rate_limit", "InvalidApiKey": "auth"}),
    Provider("deepinfra", "api.deepinfra.com", ("DEEPINFRA_TOKEN", "DEEPINFRA_API_KEY"), "200 at once per model",
        concurrency=200),
    Provider("deepseek", "api.deepseek.com", ("DEEPSEEK_API_KEY",), "500 to 2500 at once per model", concurrency=500),
    Provider("moonshot", "api.moonshot.cn api.moonshot.ai", ("MOONSHOT_API_KEY",),
        "requests at once and per minute, tokens per minute and day, shared by all models",
        {r"exceeded_current_quota_error|.*\bTPD\b.*": "no_money", "engine_overloaded_error": "server_error"}),
    Provider("ark", "ark.*.volces.com", ("ARK_API_KEY",), "requests and tokens per minute and endpoint, growth", {
        "AccountOverdueError|QuotaExceeded|SetLimitExceeded": "no_money", r"\w*(Sensitive|Risk)\S*": "content_filter",
        r"\S*RateLimitExceeded\S*|InflightBatchsizeExceeded|RequestBurstTooFast|ServerOverloaded": "rate_limit",
        "(InvalidParameter|InvalidEndpointOrModel).*|OutofContextError|ModelNotOpen": "bad_request"}),
    Provider("baichuan", "api.baichuan-ai.com", ("BAICHUAN_API_KEY",), "requests per minute",
        {".*(insufficient|balance|余额|欠费).*": "no_money"}),
    Provider("zhipu", "open.bigmodel.cn api.z.ai", ("ZHIPUAI_API_KEY", "ZHIPU_API_KEY", "ZAI_API_KEY"),
        "requests at once per model, then by the minute, day, week and month", concurrency=20, codes={
        "130[235]": "rate_limit", "1312|1120|1230|1234|500": "server_error", "1113|1304|1308|1309|1310": "no_money",
        "100[0-4]|111[0-2]|1121|1220": "auth", "121[0-5]|1261": "bad_request", "1301": "content_filter"}),
    Provider("jiekou", "*.jiekou.ai", ("JIEKOU_API_KEY",), codes={"http402": "no_money", ".*balance.*": "rate_limit"}),
    Provider("mistral", "*.mistral.ai", ("MISTRAL_API_KEY",), "requests per second, tokens per minute and month",
        {"3505|service_tier_capacity_exceeded": "server_error"}, per_second=True, asks_usage=False),
    Provider("gemini", "generativelanguage.googleapis.com", ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
        "requests and tokens per minute, requests per day", GOOGLE_CODES, "x-goog-api-key: "),
    Provider("vertex", "*aiplatform.googleapis.com", ("VERTEX_ACCESS_TOKEN",), "a quota, and capacity that all share",
        GOOGLE_CODES, names_model=False),
    Provider("anthropic", "api.anthropic.com", ("ANTHROPIC_API_KEY",), "requests, input and output tokens per minute",
        {".*(spend.limit|credit balance|usage limit).*|billing_error": "no_money"}, "x-api-key: "),
    Provider("infinigence", "cloud.infini-ai.com", ("INFINI_API_KEY", "INFINIAI_API_KEY")),
    Provider("siliconflow", "api.siliconflow.cn api.siliconflow.com", ("SILICONFLOW_API_KEY",),
        "requests and tokens per minute and day", {"30001": "no_money"}),
    Provider("openrouter", "openrouter.ai", ("OPENROUTER_API_KEY",), "credits; free models by the minute and day",
        {".*(key limit|per-day).*": "no_money", "http403": "content_filter"}),
    Provider("together", "api.together.xyz api.together.ai", ("TOGETHER_API_KEY",), "requests and tokens per second",
        {"http403": "bad_request"}, per_second=True, windows={"requests": 60, "tokens": 60}),
    Provider("groq", "api.groq.com", ("GROQ_API_KEY",), "requests and tokens per minute and day",
        {".*try again in.*": "rate_limit"}, windows={"requests": 0}),
    Provider("json_gateway", "*/gpt */claude", ("GATEWAY_USERNAME",), "as behind it", auth="", names_model=False),
    Provider("local", "", ("OPENAI_API_KEY",), "what the machine can do; it queues", OPENAI_CODES, names_model=False))}
# fmt: on


def find_provider(url: str, name: str = "auto") -> Provider:
    """The rules for a URL: the named row, else the first that fits, else local or OpenAI's with a Bearer key."""
    if name not in ("auto", *PROVIDERS):
        raise UsageError(f"--provider {name} is unknown; known are auto, {', '.join(PROVIDERS)}")
    parts = urlsplit(url)
    place = f"{parts.hostname}/{parts.path.lstrip('/')}"
    rows = ((pattern, row) for row in PROVIDERS.values() for pattern in row.urls.split())
    fitting = (row for pattern, row in rows if fnmatchcase(place, pattern if "/" in pattern else f"{pattern}/*"))
    other = PROVIDERS["local"] if is_private(parts.hostname or "") else PROVIDERS["openai"]._replace(names_model=False)
    provider = PROVIDERS.get(name) or next(fitting, other)
    shape = find_shape(parts.path, provider)
    auth = BEARER if provider.name in SHAPES and provider.name != shape else provider.auth
    return provider._replace(auth=auth, headers={"anthropic-version": "2023-06-01"} if shape == "anthropic" else {})


def find_shape(path: str, provider: Provider) -> str:
    """The shape that a path speaks. Raises UsageError, which lists the endings that are known, if it is none."""
    for shape, row in SHAPES.items():
        if any(fnmatchcase(path.rstrip("/"), pattern) for pattern in row.paths.split()):
            return shape
    known = " ".join(row.paths for row in SHAPES.values()).replace("*", "")
    raise UsageError(f"--request_url: {path or '/'} is no known endpoint of {provider.name}; known are {known}")


if __name__ == "__main__":
    raise SystemExit(main())
