#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.13", "tiktoken>=0.13"]
# ///
"""Process a file of LLM API requests in parallel, as fast as your rate limits allow.

    export OPENAI_API_KEY=...
    python api_request_parallel_processor.py --requests_filepath requests/openai_chat.jsonl --max_requests_per_minute 500

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

Start again with the same files to continue: the results file is the checkpoint. Ctrl-C finishes what is in flight, a
second one stops at once. Exit codes: 0 all succeeded; 1 some failed; 2 wrong usage or files; 3 stopped early, the rest
untouched; 129, 130, 143 interrupted. To add a provider, add a row to PROVIDERS; what is retried stands in station 5, a
flag and its default in Settings. For programs that import this file, __all__ and the two file formats stay as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import collections
import contextlib
import dataclasses
import enum
import functools
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
import signal
import ssl
import stat
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from fnmatch import fnmatchcase
from functools import partial
from html import unescape
from itertools import chain, count, islice
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
__all__ = ["Settings", "Tally", "UsageError", "process_api_requests_from_file"]

STATIONS = ("read", "estimate", "pace", "send", "judge", "record", "report")
LOGGER = logging.getLogger("api_request_parallel_processor")


class UsageError(Exception):
    """Wrong flags or files; nothing was touched. The text says what to do."""


def option(station: str, default: Any, text: str, choices: str = "") -> Any:
    """One setting: its station, default, help and the table of its values, for Settings and the command line alike."""
    return field(default=default, metadata={"station": station, "help": text, "choices": choices})


def choices_of(table: str) -> list[str]:
    """The values that a setting may have: auto and the names in a table; [] if it may have any."""
    return ["auto", *globals()[table]] if table else []


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
    request_url: str = option("send", "https://api.openai.com/v1/chat/completions", "the endpoint")
    provider: str = option("send", "auto", "whose rules apply", "PROVIDERS")
    api_key: str = option("send", "", "the key; other users of this machine can see it here: better --api_key_env")
    api_key_env: str = option("send", "", "environment variable with the key; default: the provider's usual one")
    request_header: tuple[str, ...] = option("send", (), "'Name: value' to send along; repeatable")
    request_timeout: float = option("send", 600.0, "seconds for one attempt")
    max_reply_megabytes: float = option("send", 256.0, "largest reply, after decompression")
    allow_plain_http: bool = option("send", default=False, text="send a key over http to a public address")
    max_attempts: int = option("judge", 5, "tries per request; refusals (rate limits) do not use them up")
    give_up_minutes: float = option("judge", 30.0, "stop after that long without one success; 0 = never")
    save_filepath: str = option("record", "", "results; default: .jsonl of the request file becomes _results.jsonl")
    save_details: bool = option("record", default=False, text="add attempts, times and tokens to result lines")
    restart: bool = option("record", default=False, text="start afresh; the old results file is kept, renamed")
    progress: str = option("report", "auto", "bar, lines or none; auto = bar on a terminal, else lines", "PROGRESS")
    logging_level: str = option("report", "20", "number or name: 10 DEBUG, 20 INFO, 30 WARNING, 40 ERROR")
    input_price: float = option("report", 0.0, "price of a million input tokens")
    output_price: float = option("report", 0.0, "price of a million output tokens")
    max_cost: float = option("report", 0.0, "stop before more is spent, in the unit of the prices; 0 = no limit")

    def check(self) -> None:
        """Refuse values that mean nothing."""
        above_0 = ("max_attempts", "request_timeout", "max_reply_megabytes")
        for knob in fields(self):
            value, choices = getattr(self, knob.name), choices_of(knob.metadata["choices"])
            number = isinstance(value, int | float)
            if (number and not 0 <= value < math.inf) or (knob.name in above_0 and not value):
                raise UsageError(
                    f"--{knob.name} {value} makes no sense: give a number from 0 up, or above 0 if it must be"
                )
            if choices and value not in choices:
                raise UsageError(f"--{knob.name} {value!r} is none of {', '.join(choices)}")
        if self.max_cost and not (self.input_price or self.output_price):
            raise UsageError("--max_cost needs --input_price or --output_price, in money per million tokens")
        if self.requests_filepath == "-" and not self.save_filepath and not self.dry_run:
            raise UsageError("requests come from standard input: say with --save_filepath where the results go")
        if (
            not (name := str(self.logging_level).strip().upper()).isdecimal()
            and name not in logging.getLevelNamesMapping()
        ):
            raise UsageError(f"--logging_level {name} is unknown; use a number or DEBUG, INFO, WARNING, ERROR")

    @property
    def results_path(self) -> str:
        """Where the results go."""
        return self.save_filepath or self.requests_filepath.removesuffix(".jsonl") + "_results.jsonl"

    @property
    def budgets(self) -> tuple[float, float]:
        """The ceilings: requests and tokens per minute."""
        return self.max_requests_per_minute, self.max_tokens_per_minute

    def price(self, prompt_tokens: float, output_tokens: float) -> float:
        """What tokens cost at the given prices."""
        return (prompt_tokens * self.input_price + output_tokens * self.output_price) / 1e6


# ==== the loop ========================================================================================================

STARTS_PER_TURN, LINES_PER_TURN = 64, 1000  # started, or skipped as finished, before replies are looked at
HELD_FOR_RETRY = 2000  # reading pauses while more requests than this wait to be tried again
SAME_FAILURES = 20  # first replies that are hopeless for one and the same reason: the file is wrong, not a line
ERRORS_KEPT = 50  # per request; only an outage makes more
CHECK_SECONDS = 1.0  # between looks at the results file
SHORTEST_WAIT = 0.001  # seconds


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
    outage: Outage = field(default_factory=lambda: Outage())
    tally: Tally = field(default_factory=lambda: Tally())
    random: random.Random = field(default_factory=random.Random)
    hand: Request | None = None  # the request at the head of the line
    retries: list[tuple[float, int, Request]] = field(default_factory=list)  # a heap by when they are due
    limbo: list[Request] = field(default_factory=list)  # out of attempts: failed, unless this becomes an outage
    in_flight: dict[int, tuple[Request, asyncio.Task[None]]] = field(default_factory=dict)  # by line, oldest first
    arrived: deque[tuple[Request, Endpoint, Ticket, Reply]] = field(default_factory=deque)
    line_before_retry: bool = False  # whose turn it is when a new line and a retry could start
    trouble_since: float = math.inf  # first failure or refusal after the last success
    first_failures: Counter[str] = field(default_factory=Counter)  # reasons of hopeless replies before any success
    expected_spend: float = 0.0  # by what is in flight
    next_check: float = 0.0  # of the results file
    stopped_by: str = ""  # "" or why nothing is started any more: signal hopeless given_up max_cost results
    signal: int = 0
    force: bool = False  # do not even wait for what is in flight

    async def process_requests(self) -> None:
        """Take every request from its line to its result line."""
        while not self.force:
            now = self.clock()
            while self.arrived:  # 5 judge, 6 record
                self.settle(*self.arrived.popleft(), now)
            wake_at = min(self.look_after(now), self.reporter.update(self, now))  # 7 report
            for _ in range(STARTS_PER_TURN):
                self.hand = self.hand or self.next_request(now)  # 1 read, 2 estimate
                if self.hand is None or self.stopped_by:
                    due = self.retries[0][0] if self.retries else math.inf
                    wake_at = wake_at if self.stopped_by else min(wake_at, due, self.reader.due)
                    break
                endpoint, delay = self.choose_endpoint(self.hand, now)  # 3 pace
                if delay > 0:
                    wake_at = min(wake_at, now + delay)
                    break
                self.start(self.hand, endpoint, now)  # 4 send
                self.hand, now = None, self.clock()
            else:
                wake_at = now  # more may start, but replies come first
            self.flush()
            if not self.in_flight and not self.arrived and (self.stopped_by or self.is_done()):
                break
            await self.wait(wake_at)

    async def wait(self, until: float) -> None:
        """Sleep until a reply, a line or a signal wakes the loop, at the latest `until`: the one place that waits."""
        seconds = until - self.clock()
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        # subtle: uvloop rounds a shorter wait to none, and the loop would spin
        timer = (
            asyncio.get_running_loop().call_later(max(seconds, SHORTEST_WAIT), self.wake.set)
            if seconds < math.inf
            else None
        )
        await self.wake.wait()
        self.wake.clear()
        if timer:
            timer.cancel()

    def next_request(self, now: float) -> Request | None:
        """Take a retry that is due or a new line, in turns, so that neither crowds out the other; None: nothing yet."""
        due = bool(self.retries) and self.retries[0][0] <= now
        if due and not self.line_before_retry:
            self.line_before_retry = True
            return heapq.heappop(self.retries)[2]
        self.line_before_retry = False
        request = self.read_line(now) if len(self.retries) + len(self.limbo) < HELD_FOR_RETRY else None
        return request or (heapq.heappop(self.retries)[2] if due else None)

    def read_line(self, now: float) -> Request | None:
        """Read up to the next line that is not finished yet; lines that cannot be sent are recorded on the way."""
        for _ in range(LINES_PER_TURN):
            request = self.reader.next(now)
            if request is None:
                return None
            self.tally.read += 1
            if self.results.take(request.identity):
                self.tally.finished_before += 1
            elif request.problem:
                self.tally.bad_lines += 1
                LOGGER.warning("%s", request.problem)
                request.errors.append({"attempt": 0, "kind": "bad_line", "status": None, "message": request.problem})
                self.record(request, request.errors)
            else:
                self.reader.estimate(request)
                return request
        self.reader.due = now
        return None

    def is_done(self) -> bool:
        """Nothing is left to read or to retry; what ran out of attempts has failed then."""
        if self.hand is not None or self.retries or not self.reader.ended:
            return False
        self.fail_limbo()
        return True

    def choose_endpoint(self, request: Request, now: float) -> tuple[Endpoint, float]:
        """The endpoint that may start this request first, and in how many seconds."""
        request.cost = cost = self.learned.cost(request.model, request.estimate or Estimate(0, 0))
        if most := self.settings.max_cost:
            request.price, spent = self.settings.price(cost.prompt, cost.worst - cost.prompt), self.tally.spent
            if spent + self.expected_spend + request.price > most:
                if not self.in_flight:
                    self.stop("max_cost", f"Spent {spent:,.4f}, one more may exceed --max_cost. Raise it to go on.")
                return self.endpoints[0], math.inf
        endpoint = self.endpoints[0]
        delay = endpoint.pacer.delay(cost, now)
        for other in self.endpoints[1:]:
            if (sooner := other.pacer.delay(cost, now)) < delay:
                endpoint, delay = other, sooner
        return endpoint, max(delay, self.outage.delay(now))

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
        self.outage.probed(now)
        self.in_flight[request.line] = (request, asyncio.create_task(attempt()))

    def settle(self, request: Request, endpoint: Endpoint, ticket: Ticket, reply: Reply, now: float) -> None:
        """Apply what a reply means: to the pacing, to what is learned, to the request and to the run."""
        del self.in_flight[request.line]
        self.expected_spend -= request.price
        verdict, usage = judge(reply, endpoint.provider, endpoint.shape), read_usage(reply.body, endpoint.shape)
        action = verdict.action
        outcome = Outcome.FAILED if action is Action.RETRY else Outcome.ACCEPTED
        outcome = Outcome.REFUSED if action is Action.REFUSED else outcome
        charged = usage.total if usage else 0 if action is Action.REFUSED or not reply.sent else None
        endpoint.pacer.finish(ticket, outcome, now, charged, read_limits(reply, endpoint.provider, time.time()))
        self.tally.count(self.settings, verdict, reply, usage)
        if usage and request.estimate:
            self.learned.learn(request.model, request.estimate, usage)
        if reply.status and (reply.status < 500 or action is not Action.RETRY):  # a sign of life
            if self.outage.answered(request.started):
                LOGGER.warning("The provider answers again; going on.")
            if self.limbo:
                self.fail_limbo(self.outage.alive)
        if action is Action.DONE:
            self.trouble_since = math.inf
            body = {"data": reply.body} if isinstance(reply.body, list) else reply.body
            self.record(request, body, reply.details, usage)
            return
        self.trouble_since = min(self.trouble_since, now)
        LOGGER.debug("line %d: %s %s", request.line, verdict.kind, verdict.message)
        if action is Action.STOP:
            self.stop("hopeless", verdict.message, likely_mistake(endpoint, verdict, reply))
            return
        self.note_error(request, verdict, reply)
        if action is Action.REFUSED:
            heapq.heappush(self.retries, (now, request.line, request))
        elif action is Action.RETRY:
            self.try_again(request, verdict, reply, now)
        else:
            self.fail_at_once(request, endpoint, verdict, reply)

    def note_error(self, request: Request, verdict: Verdict, reply: Reply) -> None:
        """Add an attempt to the request's errors; of refusals only the last is listed."""
        refused = verdict.action is Action.REFUSED
        if refused:
            request.errors = [error for error in request.errors if error["kind"] != verdict.kind]
        request.refusals, request.attempts = request.refusals + refused, request.attempts + (not refused)
        error = {"attempt": request.attempts + refused, "kind": verdict.kind, "status": reply.status or None}
        error |= {"message": verdict.message, "response": reply.text or None if reply.body is None else reply.body}
        request.errors.append(error)
        del request.errors[1:-ERRORS_KEPT]

    def try_again(self, request: Request, verdict: Verdict, reply: Reply, now: float) -> None:
        """Back off after a passing failure. In an outage the attempt is excused, except for the last request left."""
        if reply.hopeless and not self.tally.replies:
            self.stop("hopeless", reply.hopeless)
            return
        waiting = len(self.retries) + len(self.limbo) + (self.hand is not None)
        left = waiting + len(self.in_flight) + 1 if self.reader.ended else math.inf
        if (not reply.status or reply.status >= 500) and left > 1:
            enough = waiting + 1 if self.reader.ended and reply.status in (0, 503) else math.inf
            newest_first = (other for other, _ in reversed(self.in_flight.values()))
            if self.outage.failed(request, enough, newest_first, now):
                LOGGER.warning("The provider seems to be down: %s. The queue is kept, probes go on.", verdict.message)
                for other in self.limbo:
                    heapq.heappush(self.retries, (now, other.line, other))
                self.limbo.clear()
            elif self.outage.down:
                request.excused += 1
        tries = request.attempts - request.excused
        if tries < self.settings.max_attempts:
            delay = 0.0 if self.outage.down else retry_delay(tries, self.random)
            heapq.heappush(self.retries, (now + delay, request.line, request))
        elif left > 1:
            self.limbo.append(request)
        else:
            self.record(request, request.errors)

    def fail_at_once(self, request: Request, endpoint: Endpoint, verdict: Verdict, reply: Reply) -> None:
        """Record a request that no retry can help, unless the first replies show that the requests are not to blame."""
        mistake = likely_mistake(endpoint, verdict, reply)
        if self.stopped_by == "hopeless":
            return  # untouched: a later run asks again
        if self.tally.replies == 1 and reply.status in (404, 405) and "--request_url" in mistake:
            self.stop("hopeless", verdict.message, mistake)
            return
        self.record(request, request.errors)
        if not self.tally.succeeded:
            reason = f"{verdict.kind} {reply.status} {verdict.code or re.sub('[0-9]+', '', verdict.message)}"
            self.first_failures[reason] += 1
            if len(self.first_failures) == 1 and self.first_failures[reason] == SAME_FAILURES:
                self.stop("hopeless", f"The first {SAME_FAILURES} replies all say: {verdict.message}", mistake)

    def fail_limbo(self, alive: float = math.inf) -> None:
        """No outage after all: what ran out of attempts before an answered start has failed."""
        for request in [request for request in self.limbo if request.started <= alive]:
            self.limbo.remove(request)
            self.record(request, request.errors)

    def record(
        self, request: Request, outcome: Any, extra: dict[str, Any] | None = None, usage: Usage | None = None
    ) -> None:
        """Queue the one result line of a request; a list as outcome is the list of its errors."""
        failed = isinstance(outcome, list)
        self.tally.failed += failed
        details: dict[str, Any] = {}
        if self.settings.save_details:
            started = datetime.fromtimestamp(request.started_utc, UTC).isoformat(timespec="milliseconds")
            sent = request.started_utc > 0
            details = {"line": request.line, "attempts": request.attempts + (not failed), "refusals": request.refusals}
            details |= {"started": started if sent else None, "estimated_tokens": request.cost.expected}
            details |= {"seconds": round(time.time() - request.started_utc, 3) if sent else None}
            details |= {"tokens": usage.total if usage else None}
        self.results.write(request.body, outcome, request.metadata, details | (extra or {}) or None)

    def look_after(self, now: float) -> float:
        """End a run that cannot go on: a signal, no success for long, lost results. Gives when to look again."""
        if self.signal and not self.stopped_by:
            LOGGER.warning("%s: nothing new is started; once more stops at once.", signal.Signals(self.signal).name)
            self.stop("signal")
        give_up_at = self.trouble_since + (self.settings.give_up_minutes * 60 or math.inf)
        if now >= give_up_at:
            minutes, trouble = self.settings.give_up_minutes, self.tally.last_trouble
            self.stop("given_up", f"No success for {minutes:g} minutes (--give_up_minutes); last trouble: {trouble}")
        if now >= self.next_check:
            self.next_check = now + CHECK_SECONDS
            self.flush(check=True)
        return self.next_check if self.stopped_by else min(self.next_check, give_up_at)

    def flush(self, *, check: bool = False) -> None:
        """Write the result lines of this turn; stop the run if they cannot be kept."""
        try:
            if check:
                self.results.check()
            self.results.flush()
        except ResultsLost as lost:
            self.stop("results", str(lost))
            self.force = self.force or not check

    def stop(self, why: str, *reason: str) -> None:
        """Start nothing any more; the first reason counts."""
        if not self.stopped_by:
            self.stopped_by, self.tally.stop_reason = why, " ".join(f"{text.rstrip('. ')}." for text in reason if text)


# ==== 1 read: the next line becomes a request; finished ones are skipped ==============================================

MAX_LINE_BYTES = 256 * 1024 * 1024
LONG_LINE_BYTES = 200_000  # longer ones are parsed and counted in a thread, so that the loop goes on
UNFINISHED_LINE_SECONDS = 2.0  # a last line without its end is being written, perhaps
RAW_TEXT_KEPT = 1000  # characters of a line that is too long


@dataclass(slots=True)
class Request:
    """One line of the request file on its way to its result line."""

    line: int  # physical line number, from 1
    body: Any  # what is sent, without metadata; the raw text of a line that cannot be sent
    metadata: Any = None
    identity: bytes = b""
    problem: str = ""  # why it cannot be sent
    model: str = ""
    estimate: Estimate | None = None
    cost: Cost = field(default_factory=lambda: Cost(0, 0))
    price: float = 0.0  # of the expected cost
    attempts: int = 0  # finished ones, without refusals
    excused: int = 0  # attempts that fell into an outage: they do not count against --max_attempts
    suspect: bool = False  # it failed while others, sent later, were answered
    refusals: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    started_utc: float = 0.0  # first start
    started: float = 0.0  # last start, on the loop's clock


class Reader:
    """Turns lines into requests, in order, numbered as in the file.

    A regular file is read to the end that it has when reached. Anything else (standard input, a pipe) may come slowly
    or never end, and is read by a thread of its own. `wake` is called, from threads, when there may be something new.
    """

    def __init__(
        self, file: IO[bytes], endpoint: Endpoint, tokens: Tokenizer, limit: int, wake: Callable[[], object]
    ) -> None:
        self.file, self.endpoint, self.tokens, self.limit, self.wake = file, endpoint, tokens, limit or math.inf, wake
        self.number, self.given, self.due, self.ended = 0, 0, 0.0, False
        self.preparing: asyncio.Future[Request] | None = None  # a long line, in a thread
        self.unfinished, self.patience_ends = b"", math.inf
        status = os.fstat(file.fileno())
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        self.queue: queue.Queue[bytes] | None = None if stat.S_ISREG(status.st_mode) else queue.Queue(maxsize=256)
        if self.queue:
            threading.Thread(target=self.pump, args=(self.queue,), daemon=True).start()

    def next(self, now: float) -> Request | None:
        """Give the next request; None if there is none (`ended`) or not yet (`due`, or `wake` is called)."""
        if self.preparing is None:
            self.due = math.inf
            raw: bytes | None = b"\n"
            while raw and not raw.strip():  # blank lines count, but are skipped
                raw = self.next_line(now) if self.given < self.limit else b""
                self.number += bool(raw)
            if not raw:
                self.ended = raw is not None
                return None
            self.given += 1
            if len(raw) <= LONG_LINE_BYTES:
                return parse_line(self.number, raw, self.endpoint)
            self.preparing = asyncio.get_running_loop().run_in_executor(None, self.prepare, self.number, raw)
            self.preparing.add_done_callback(lambda _: self.wake())
        if not self.preparing.done():
            return None
        request, self.preparing = self.preparing.result(), None
        return request

    def next_line(self, now: float) -> bytes | None:
        """Give the next line; an empty one is the end, None means not yet."""
        if self.queue:
            with contextlib.suppress(queue.Empty):
                return b"" if self.ended else self.queue.get_nowait()
            return None
        line, self.unfinished = self.unfinished + read_bounded(self.file), b""
        if line and not line.endswith(b"\n") and now < self.patience_ends:
            try:
                loads(line)  # whole, only without its line break
            except ValueError:
                self.patience_ends = min(self.patience_ends, now + UNFINISHED_LINE_SECONDS)
                self.unfinished, self.due = line, now + UNFINISHED_LINE_SECONDS / 10
                return None
        self.patience_ends = math.inf
        return line

    def pump(self, lines: queue.Queue[bytes]) -> None:
        """Pass on line after line of a stream; an empty one is the end."""
        line = b"\n"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            while line:
                line = read_bounded(self.file)
                lines.put(line)
                self.wake()

    def prepare(self, number: int, raw: bytes) -> Request:
        """Read and estimate a long line."""
        request = parse_line(number, raw, self.endpoint)
        if not request.problem:
            self.estimate(request)
        return request

    def estimate(self, request: Request) -> Estimate:
        """Count the tokens of a request, once."""
        if request.estimate is None:
            count = self.tokens.counter(request.model)
            request.estimate = estimate_tokens(request.body, self.endpoint.shape, count)
        return request.estimate

    def close(self) -> None:
        """Let go of a file; a stream may still be read by its thread, which ends with the program."""
        if not self.queue:
            self.file.close()

    def expected_total(self) -> float:
        """How many requests there are: exact at the end, before by the bytes read so far; inf for a stream."""
        share = 1.0 if self.ended else self.file.tell() / self.size if self.size else 0.0
        return min(self.given / share if share else math.inf, self.limit)


def read_bounded(file: IO[bytes]) -> bytes:
    """Read a line; of one that is too long only what shows that it is."""
    line = rest = file.readline(MAX_LINE_BYTES + 1)
    while len(line) > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
        rest = file.readline(1 << 20)
    return line


def parse_line(number: int, raw: bytes, endpoint: Endpoint) -> Request:
    r"""Turn one line into a request, or into one with a `problem`.

    {"model": "m", "input": "hi", "metadata": 7}                          -> {"model": "m", "input": "hi"}, 7
    {"custom_id": "a", "method": "POST", "url": "/v1/...", "body": {...}} -> {...}, {"custom_id": "a"}
    [{...}, response or errors, metadata]                                 -> {...}, metadata
    """
    body: Any = None
    metadata: Any = None
    problem = ""
    try:
        if len(raw) > MAX_LINE_BYTES:
            raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MB")
        value = loads(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)
        if isinstance(value, list) and len(value) in (2, 3, 4) and isinstance(value[0], dict):
            body, metadata = value[0], value[2] if len(value) > 2 else None
        elif not isinstance(value, dict):
            raise ValueError(f"a request is a JSON object, this is {str(raw[:40], errors='replace')!r}")
        elif "custom_id" in value and isinstance(value.get("body"), dict):
            body, metadata = value["body"], {"custom_id": value["custom_id"]}
            problem = check_batch_line(value, endpoint)
        else:
            body, metadata = value, value.pop("metadata", None)
        problem = problem or check_request(body, endpoint.shape, endpoint.provider)
    except ValueError as error:
        problem = str(error)
    if body is None:
        kept = raw if len(raw) <= MAX_LINE_BYTES else raw[:RAW_TEXT_KEPT]
        body = kept.decode(errors="backslashreplace").strip()
    model = body.get("model") if isinstance(body, dict) else None
    request = Request(number, body, metadata, identity(body, metadata), model=model if isinstance(model, str) else "")
    request.problem = f"line {number}: {problem}" if problem else ""
    return request


def check_batch_line(line: dict[str, Any], endpoint: Endpoint) -> str:
    """Why an OpenAI Batch line is not for this endpoint; "" if it is."""
    path = urlsplit(endpoint.url).path
    method, url = line.get("method", "POST"), line.get("url", path)
    if method != "POST":
        return f"its method is {method!r}; only POST can be sent"
    known = SHAPES[endpoint.shape].paths.split()
    same = isinstance(url, str) and path.endswith(url) and any(fnmatchcase(url, pattern) for pattern in known)
    return "" if url == path or same else f"it is for {url!r}, but --request_url is for {path}"


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

    @property
    def total(self) -> int:
        """Prompt and output."""
        return self.prompt + self.output


PROMPT_KEYS = {*"messages input prompt contents system instructions systemInstruction response_format text".split()}
CAP_KEYS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens", "maxOutputTokens")
NUMBER_KEYS = dict.fromkeys(CAP_KEYS, "cap") | dict.fromkeys(("n", "best_of", "candidateCount"), "answers")
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
VOCABULARY_LOCK = threading.Lock()


def estimate_tokens(body: Any, shape: str, count: Callable[[str], int]) -> Estimate:
    """Tokens of a request, whatever JSON it is. A chat costs 3 for the reply and 3 per message (OpenAI cookbook)."""
    flat, numbers = body if isinstance(body, dict) else {"prompt": body}, {"answers": 1}
    model = flat["model"] if isinstance(flat.get("model"), str) else shape
    prompt = reply = 3 if shape in {"chat", "responses", "dashscope", "anthropic", "gemini"} else 0
    for key, value in (fields := [*flat.items()]):
        try:
            if key in PROMPT_KEYS and not (key == "input" and isinstance(value, dict)):  # a bare text becomes a message
                prompt += content_tokens(value, model, count) + (4 if reply and isinstance(value, str) else 0)
            elif key in NUMBER_KEYS and type(value) in (int, float) and 0 <= value <= 10**9:
                numbers[NUMBER_KEYS[key]] = max(numbers.get(NUMBER_KEYS[key], 0), int(value))
            elif key in {"input", "parameters", "generationConfig"} and isinstance(value, dict):
                fields += value.items()  # as if they were not nested
            elif key in {"tools", "functions"} and value:
                prompt += 12 + sum(tool_tokens(tool, count) for tool in (value if isinstance(value, list) else [value]))
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
        ids = value and type(value[0]) is int
        return len(value) if ids else sum([content_tokens(item, model, count) for item in value])
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
        self.counter: Callable[[str], Callable[[str], int]] = functools.lru_cache(99)(self._load)  # of a model
        if tiktoken and encoding_name not in (names := ["auto", *tiktoken.list_encoding_names()]):
            raise UsageError(f"--token_encoding_name {encoding_name} is not one of {', '.join(names)}.")

    def _load(self, model: str) -> Callable[[str], int]:
        name = "cl100k_base" if re.match(r"(.*/)?(gpt-4(-|$)|gpt-3|text-embedding)", model) else "o200k_base"
        try:
            with VOCABULARY_LOCK, contextlib.ExitStack() as stack:  # tiktoken's own reader has no timeout
                stack.callback(setattr, tiktoken.load, "read_file_cached", tiktoken.load.read_file_cached)
                tiktoken.load.read_file_cached = read_vocabulary
                encode = tiktoken.get_encoding(name if self._name == "auto" else self._name).encode_ordinary
        except Exception:  # whatever is wrong with it, an estimate will do
            LOGGER.warning("Tokens are estimated; `pip install tiktoken bpe-openai` makes the counts exact.")
            self.exact, self.counter = False, lambda _: estimate_text
            return estimate_text
        short = functools.lru_cache(64)(lambda text: len(encode(text)))  # a job's requests share a system prompt
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
        estimated, charged, answers, output = self.get(model, (1, 1, 1, 0))
        prompt = int(estimate.prompt * charged / estimated + 0.5)
        answer = int((output / answers or 256) * estimate.answers + 0.5)
        cap = answer if estimate.output_cap is None else estimate.output_cap
        return Cost(prompt + min(answer, cap), prompt + cap, prompt)

    def learn(self, model: str, estimate: Estimate, usage: Usage) -> None:
        """Follow the last dozens of replies; usage that cannot be true is ignored or bounded."""
        seen, prompt, answers = self.setdefault(model, [1e-9, 1e-9, 1e-9, 0]), estimate.prompt, estimate.answers
        if usage.prompt > 0 and prompt > 0:
            seen[:2] = 0.95 * seen[0] + prompt, 0.95 * seen[1] + min(max(usage.prompt, prompt / 4), prompt * 4)
        if usage.output > 0 and estimate.output_cap != 0:
            seen[2:] = 0.95 * seen[2] + answers, 0.95 * seen[3] + min(usage.output, 10**6 * answers)

    def describe(self) -> list[str]:
        """One line per model that has answered, for the summary."""
        words = "{}: {:.2f} of the estimated input, {:.0f} output tokens on average".format
        return [words(model, seen[1] / seen[0], seen[3] / seen[2]) for model, seen in self.items()]


# ==== 3 pace: when may it start? ======================================================================================


class ServerLimits(NamedTuple):
    """What one reply says about limits; None = it does not say. Durations in seconds from now."""

    retry_after: float | None = None
    requests_per_minute: float | None = None
    requests_remaining: float | None = None
    requests_reset: float | None = None
    tokens_per_minute: float | None = None
    tokens_remaining: float | None = None
    tokens_reset: float | None = None


PACE_WINDOW = 60.05  # seconds that a start counts: a minute, and what the network may shift two arrivals
PACE_EVEN = 0.985  # share of an even rate at which one-second slots do not overflow when arrivals shift by some ms
PACE_SLACK = 0.008  # seconds of the pace that may be caught up after waking late
PACE_TICK = 0.25  # seconds between two looks at what may grow
PACE_FREE = 1e12  # "no limit known": a number, since inf * 0 is none
_Told = ServerLimits | None
Outcome = enum.Enum("Outcome", "ACCEPTED REFUSED FAILED")  # FAILED: no reply or 5xx, says nothing about the rate


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """One started attempt; amounts are (requests, tokens expected and later settled, tokens at worst)."""

    at: float
    held: list[int]
    flight: int  # requests in flight with this one
    before: list[int]  # amounts started before
    counted: bool = True  # still within the last minute


@dataclasses.dataclass(slots=True, eq=False)
class _Limit:
    """A learned limit: on what is in flight, or on the starts a second in one currency that a server may count."""

    value: float = PACE_FREE
    top: float = PACE_FREE
    hold: float = 1.0  # seconds until it may be raised again; longer each time that failed
    quiet_until: float = 0.0
    trail: list[float] = dataclasses.field(default_factory=list)  # values before each step of this raise
    minute: float = PACE_FREE  # the user's budget
    ceiling: float = PACE_FREE  # what may start in any minute
    level: float = 0.0  # what may start at once; below 0: wait
    held: int = 0  # started in the last minute
    total: int = 0  # ever started
    mark: int = 0  # of these, before the present stretch of evidence

    def settle(self, value: float, now: float, hold: float) -> None:
        self.value, self.hold, self.quiet_until, self.trail = max(value, 0.01), hold, now + hold, []

    def grow(self, least: float) -> None:
        self.trail.append(self.value)
        self.value = min(self.top, self.value + max(least, 0.01 * 2 ** min(5, len(self.trail)) * self.value))

    def revert(self, now: float, least: float) -> None:
        """Back to a safe value: not the latest ones, since a second's bucket hides an excess for a while."""
        safe, steps = self.trail[max(0, len(self.trail) - 9)], len(self.trail)
        self.settle(max(safe, min(least, self.value)), now, 2.0 if steps > 12 else min(60.0, 2 * max(1.0, self.hold)))


class Pacer:
    """Decides when the request at the head of the line may start.

    The budgets are ceilings for any minute. Within them the pace ramps up by time. A refusal is put down to the limit
    that best fits what was admitted; only that one is lowered, and later probed upward, more rarely each time it fails.
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
        self.in_flight, self.paused_until, self._most = 0, -math.inf, max_concurrent or math.inf
        self._gap, self._ramping, self._slow_start = min_gap_seconds, not per_second, True
        self._now = self._ticked = self._cut = self._mark_at = self._last = self._blamed = -math.inf
        self._starts: collections.deque[Ticket] = collections.deque()
        self._rates, self._window = (_Limit(), _Limit(), _Limit()), _Limit(concurrency_hint or PACE_FREE)
        self._capped = bool(concurrency_hint)  # the window comes from refusals, not from latencies alone
        self._bound: list[_Limit | None] = [None, None]  # what held starts back since the last tick, and before it
        self._barren = 0  # refusals in a row with next to nothing admitted between them
        self._speed = (0.0, 0)  # replies per second, and in flight
        self._since = self._latencies = self._base = self._peak = 0.0  # see _watch_queue
        self._replies = self._count = 0
        self.set_budgets(requests_per_minute, tokens_per_minute)

    def set_budgets(self, requests_per_minute: float, tokens_per_minute: float, now: float = 0.0) -> None:
        """Change the ceilings, also during a run; 0 = unknown, which ramps up from 10 requests a second."""
        budgets = (requests_per_minute, tokens_per_minute, tokens_per_minute)
        for rate, budget, start in zip(self._rates, budgets, (10.0, PACE_FREE, PACE_FREE), strict=True):
            rate.minute, even = budget or PACE_FREE, PACE_EVEN * budget / 60
            if rate is not self._rates[2]:
                rate.ceiling, rate.top = rate.minute, even or PACE_FREE
                rate.value = (even or start) if self._ramping else min(rate.value, rate.top)

    def _advance(self, now: float) -> float:
        """Move on to `now`: refill, forget what is older than a minute, let limits grow. A clock set back stands."""
        if now <= self._now:
            return self._now
        for rate in self._rates:
            rate.level = min(rate.level + rate.value * (now - self._now), rate.value * PACE_SLACK)
        self._now = now
        while self._starts and now - self._starts[0].at >= PACE_WINDOW:
            old = self._starts.popleft()
            old.counted = False
            for rate, amount in zip(self._rates, old.held, strict=True):
                rate.held -= amount
        if now - self._ticked >= PACE_TICK:
            self._tick(self._bound[0], min(now - self._ticked, 1.0), now)
        return now

    def _tick(self, bound: _Limit | None, passed: float, now: float) -> None:
        """Ramp up by time (doubling every half second), or raise the limit that binds."""
        if self._ramping and self._starts:
            for rate in self._rates[:2]:
                blind = not self._base and rate.minute == PACE_FREE > rate.value  # 10,000 in flight after some 8 s
                rate.value = min(2000.0 if blind else PACE_FREE, rate.value * 4**passed)
        growing = self._capped if bound is self._window else not self._ramping
        if bound and growing and now >= bound.quiet_until and bound.value < bound.top:
            if not bound.trail and bound is not self._window:
                self._mark(now)
            bound.grow(float(bound is self._window))
        for limit in (self._window, *self._rates):
            if limit.trail and limit not in (bound, self._bound[1]) and now > self._cut + 2:
                limit.trail = []
        self._ticked, self._bound = now, [None, bound]

    def _mark(self, now: float) -> None:
        self._mark_at = max(now, self.paused_until)
        for rate in self._rates:
            rate.mark = rate.total

    def delay(self, cost: Cost, now: float) -> float:
        """Seconds after which to ask again; 0.0: start now; inf: only a reply can free the way."""
        now, window = self._advance(now), self._window
        if self.in_flight >= self._most:
            return math.inf
        if self.in_flight >= window.value:
            self._bound[0] = window
            return max(PACE_TICK, window.quiet_until - now) if self._capped else math.inf
        wait = max(0.0, self.paused_until - now)
        if now - self._last < self._gap:
            wait = max(wait, self._gap - (now - self._last), 1e-6)  # never 0 by rounding
        for rate, amount in zip(self._rates, (1, cost.expected, cost.worst), strict=True):
            if rate.held + amount > rate.ceiling and rate.held > 0:
                wait = max(wait, PACE_WINDOW - (now - self._starts[0].at), 1e-6)
            elif rate.level < 0 and -rate.level > wait * rate.value:
                wait, self._bound[0] = max(-rate.level / rate.value, 1e-6), rate
        return wait

    def start(self, cost: Cost, now: float) -> Ticket:
        """Take the place and reserve the tokens."""
        now = self._advance(now)
        if self._last == -math.inf:
            self._mark_at = now
        if self.in_flight == 0:  # what came before says nothing about the present load
            self._since, self._replies, self._count, self._latencies = now, 0, 0, 0.0
        self.in_flight, self._last = self.in_flight + 1, now
        ticket = Ticket(now, [1, cost.expected, cost.worst], self.in_flight, [rate.total for rate in self._rates])
        for rate, amount in zip(self._rates, ticket.held, strict=True):
            rate.held, rate.total, rate.level = rate.held + amount, rate.total + amount, rate.level - amount
        self._starts.append(ticket)
        return ticket

    def finish(
        self, ticket: Ticket, outcome: Outcome, now: float, tokens: int | None = None, limits: _Told = None
    ) -> None:
        """Settle the tokens (None: unknown; a refusal uses none) and hear what the reply says about the pace."""
        now, self.in_flight, old = self._advance(now), self.in_flight - 1, ticket.held
        refused = outcome is Outcome.REFUSED
        ticket.held = [1, 0, 0] if refused else [1, old[1] if tokens is None else max(0, tokens), old[2]]
        for rate, before, after in zip(self._rates, old, ticket.held, strict=True):
            rate.held += (after - before) * ticket.counted
            rate.level -= 0 if refused else after - before
        if refused:
            self._refused(ticket, now, limits.retry_after if limits else None)
        elif outcome is Outcome.ACCEPTED:
            self._watch_queue(self._window, ticket.at, now)

    def _watch_queue(self, window: _Limit, started: float, now: float) -> None:
        """Keep the window at what raises replies per second: more would only wait in the server's queue."""
        flight, slow_start, self._replies = self.in_flight + 1, self._slow_start, self._replies + 1
        if slow_start and not self._capped:
            window.value = max(8.0, flight) if window.value == PACE_FREE else window.value
            window.value += 1.5 if flight >= window.value / 2 else 0
        if slow_start or started >= self._since:
            self._count, self._latencies = self._count + 1, self._latencies + now - started
        mean, passed = self._latencies / max(1, self._count), now - self._since
        few, short = (8, max(1.0, 2 * (self._base or mean))) if slow_start else (max(16, flight / 2), 3 * mean)
        if self._count < few or passed < short:
            return
        (before, crowd), speed, base = self._speed, self._replies / passed, self._base or mean
        self._since, self._replies, self._count, self._latencies, self._speed = now, 0, 0, 0.0, (speed, flight)
        if self._peak and (speed < 0.8 * self._peak or window.value <= 2):  # drained too far; by Little's law:
            window.settle(max(2.0, 1.3 * window.value * self._peak / speed), now, 2.0)
            self._base, self._peak = mean, 0.0
        elif self._peak or (
            mean > 2.5 * base
            and flight > 0.8 * crowd
            and (window in self._bound if self._capped else not slow_start or speed < 1.25 * before)
        ):
            self._peak, self._slow_start = max(self._peak, speed), False  # a queue: drain it until speed falls
            window.settle(max(1.0, min(0.6 * min(flight, window.value), 1.5 * speed * base)), now, 30.0)
        else:
            self._base = min(base, mean)
            window.value *= (
                1.4 if window in self._bound and mean < 1.5 * base and not (self._capped or slow_start) else 1
            )

    def _refused(self, ticket: Ticket, now: float, asked: float | None) -> None:
        """Hear a refusal; all that started before one was heard are one signal, and only prolong the pause."""
        pause = 0.0
        if ticket.at > self._cut:
            pause, self._cut = self._learn(ticket, self._window, now), now
            if self._blamed != now:
                self._mark(now)
        elif self._capped and self._window.quiet_until > now:
            self._window.value = max(1.0, min(self._window.value, ticket.flight - 1.0))
        pause = min(asked, 900.0) if asked is not None and asked > 0 else pause
        self.paused_until = max(self.paused_until, now + pause)
        if self._blamed != self._cut:
            self._mark_at = max(now, self.paused_until)

    def _learn(self, ticket: Ticket, window: _Limit, now: float) -> float:
        """Lower the limit that explains a refusal; returns the seconds to pause if the server names none."""
        taken = [before - rate.mark for before, rate in zip(ticket.before, self._rates, strict=True)]
        passed = max(0.0, ticket.at - self._mark_at)
        admitted = [PACE_EVEN * amount / (passed + 1) for amount in taken]  # if it was a second's bucket, and full
        index = next((i for i, rate in enumerate(self._rates) if rate is (self._bound[0] or self._bound[1])), 0)
        rate, self._barren = self._rates[index], self._barren + 1 if taken[0] < 3 else 0
        if self._ramping or (rate.value > 1e9 and not self._capped):
            index, fits = self._classify([amount / (passed + 0.5) * 60 for amount in taken])
            if index < 0:
                return self._starts[0].at + PACE_WINDOW - now
            even, rate = PACE_EVEN * self._rates[index].minute / 60, self._rates[index]
            rate.settle(even if fits else min(even, admitted[index]), now, 1.0 if fits else 0.5)
            if fits:
                return 1.0
        elif self._capped and ticket.flight >= (window.trail or [window.value])[0] and now - self._blamed > 3:
            self._blamed = now
            window.settle(max(1.0, ticket.flight - 1.0), now, min(120.0, max(20.0, 2 * window.hold)))
            return 0.0  # a reply will free the place
        elif any(limit.trail for limit in self._rates):
            for limit, least in zip(self._rates, admitted, strict=True):
                limit.revert(now, least) if limit.trail else None
            window.quiet_until = min(window.quiet_until, now + 1.0)  # if it was blamed just before, then wrongly
            return 0.5
        elif self._barren:
            return min(60.0, 2.0 ** min(6, self._barren))
        else:
            rate.settle(min(0.9 * rate.value, max(admitted[index], rate.value / 4)), now, 2.0)
        self._capped = True  # it may be a cap on concurrency, too: then this many fit
        window.settle(max(1.0, min(window.value, ticket.flight - 1.0)), now, 0.5)
        return 1.0

    def _classify(self, speeds: list[float]) -> tuple[int, bool]:
        """The first refusal: which budget, as a minute's (-1) or a second's, is just what was admitted, if any?"""
        self._ramping = False
        for rate in self._rates:
            rate.value = PACE_FREE
        for rate in self._rates:
            if 0.85 <= rate.held / rate.minute <= 1.2:
                rate.ceiling = rate.minute
                return -1, True
        fits = [
            (speed / rate.minute, index) for index, (rate, speed) in enumerate(zip(self._rates, speeds, strict=True))
        ]
        share, index = min((fit for fit in fits if fit[0] >= 0.8), default=(0.0, 0))
        return index, share > 0

    def last_minute(self) -> tuple[int, int]:
        """Requests and tokens started in the last minute."""
        return self._rates[0].held, self._rates[1].held

    def allowed(self) -> tuple[float, float]:
        """Starts a second, and requests in flight, that are allowed now; PACE_FREE: no limit."""
        return self._rates[0].value, self._window.value

    def describe(self) -> str:
        """What limit was found, in words; "" if there is nothing worth telling."""
        rate, allowed = self._rates[0].value, self._rates[0].minute / 60
        if self._capped and self._window in self._bound:
            return f"this server takes about {self._window.value:.0f} requests at once"
        told = f"; you allowed {allowed:.3g}" if allowed < 1e9 else ""
        found = not self._ramping and rate < min(1e9, 0.95 * allowed)
        return f"this server takes about {rate:.3g} requests a second{told}" if found else ""


OUTAGE_STREAK = 10  # different requests without an answer, in the order of their starts
PROBE_SECONDS = (1.0, 5.0)  # between probes: at first, at most


class Outage:
    """Tells a provider that is down from requests that fail, and lets only probes through meanwhile.

    Evidence goes by the time of the start: an answer speaks for what was sent before, not for what was sent later.
    """

    def __init__(self) -> None:
        self.alive = -math.inf  # the latest start that was answered
        self.streak: dict[int, tuple[float, Request]] = {}  # later starts that failed, by line
        self.down_since = math.inf
        self.next_probe, self.interval = 0.0, PROBE_SECONDS[0]

    @property
    def down(self) -> bool:
        """Whether only probes may start."""
        return self.down_since < math.inf

    def failed(self, request: Request, enough: float, in_flight: Iterable[Request], now: float) -> bool:
        """Hear of an attempt without an answer; true if it shows an outage: so many in a row, and few still open."""
        request.suspect = request.suspect or request.started <= self.alive
        if self.down or request.suspect:
            return False
        self.streak.setdefault(request.line, (request.started, request))
        first, many = next(iter(self.streak.values()))[0], len(self.streak)
        if (
            many < min(OUTAGE_STREAK, max(2.0, enough))
            or sum(r.started > first for r in islice(in_flight, many + 1)) > many
        ):
            return False
        self.down_since, self.next_probe, self.interval = now, now + PROBE_SECONDS[0], PROBE_SECONDS[0]
        for _, excused in self.streak.values():
            excused.excused += 1
        self.streak.clear()
        return True

    def answered(self, started: float) -> bool:
        """Hear of an answer; true if it ends an outage."""
        self.alive = max(self.alive, started)
        for line, (at, request) in list(self.streak.items()):
            if at <= self.alive:
                request.suspect = True
                del self.streak[line]
        ended = started >= self.down_since
        self.down_since = math.inf if ended else self.down_since
        return ended

    def probed(self, now: float) -> None:
        """Hear of a start: while the provider is down, the next one waits longer."""
        self.next_probe, self.interval = now + self.interval, min(self.interval * 1.5, PROBE_SECONDS[1])

    def delay(self, now: float) -> float:
        """Seconds until the next probe."""
        return max(0.0, self.next_probe - now) if self.down else 0.0


# ==== 4 send: the only place that knows HTTP ==========================================================================

CONNECT_SECONDS = 30.0
SPARE_OPEN_FILES, MOST_CONCURRENT = 64, 20_000  # of no connections; fewer than the ports that an address has
SHORTEST_SECRET, REDACTED = 12, "[REDACTED]"  # shorter ones would be found in ordinary words
TEXT_KEPT = 2000  # bytes of a reply that is no JSON


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

    texts: frozenset[str] = frozenset()

    def add(self, text: str) -> None:
        """Look for this text from now on, also as JSON and as URLs write it."""
        if len(text) >= SHORTEST_SECRET:
            self.texts |= {text, json.dumps(text)[1:-1], quote(text, safe="")}

    def redact(self, text: str) -> str:
        """Replace every secret."""
        for secret in self.texts:
            text = text.replace(secret, REDACTED)
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace every secret in a log line."""
        record.msg, record.args = self.redact(record.getMessage()), ()
        return True


@dataclass(slots=True)
class Endpoint:
    """One URL with its key, its rules and its pacing."""

    url: str
    provider: Provider
    shape: str
    key: str
    headers: Mapping[str, str]
    pacer: Pacer
    proxy: str | None
    max_reply_bytes: int
    secrets: Secrets
    session: aiohttp.ClientSession | None = None

    async def open(self, stack: contextlib.AsyncExitStack, timeout_seconds: float) -> None:
        """Open the connection pool, without aiohttp's limit of connections; `stack` closes it."""
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_SECONDS)
        pool, jar = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300), aiohttp.DummyCookieJar()
        session = aiohttp.ClientSession(connector=pool, cookie_jar=jar, headers=self.headers, timeout=timeout)
        self.session = await stack.enter_async_context(session)

    async def send(self, body: dict[str, Any]) -> Reply:
        """Send one attempt and read the whole reply. Raises nothing, except when it is cancelled."""
        assert self.session is not None
        if self.provider.name == "json_gateway":
            body = wrap_gateway(body, self.key)
        elif body.get("stream") is True and "stream_options" not in body:  # for its usage; the user's line stays
            body = {**body, "stream_options": {"include_usage": True}}
        reply, data = Reply(), dumps(body)
        try:
            async with self.session.post(self.url, data=data, allow_redirects=False, proxy=self.proxy) as response:
                reply.status, reply.headers = response.status, response.headers
                await self.read(response, reply)
        except Exception as error:  # noqa: BLE001 - whatever the network does, the run goes on
            explain(error, reply)
        reply.message = self.secrets.redact(reply.message)
        return reply

    async def read(self, response: aiohttp.ClientResponse, reply: Reply) -> None:
        """Read a body of bounded size and parse it, whatever its content type claims."""
        chunks, size = [], 0
        while chunk := await response.content.readany():
            chunks.append(chunk)
            size += len(chunk)
            if size > self.max_reply_bytes:
                response.close()
                reply.failure, reply.message = "too_large", "the reply is larger than --max_reply_megabytes"
                return
        raw = b"".join(chunks)
        for secret in self.secrets.texts:
            raw = raw.replace(secret.encode(), REDACTED.encode())
        if reply.status == 200 and "event-stream" in reply.headers.get("Content-Type", ""):
            reply.body, reply.message = assemble_stream(raw)
            reply.failure = "connection" if reply.body is None else ""
            return
        try:
            reply.body = loads(raw)
        except ValueError:
            reply.text = raw[:TEXT_KEPT].decode(errors="replace")
        if 300 <= reply.status < 400:
            reply.message = self.secrets.redact(reply.headers.get("Location", "nowhere"))
        if self.provider.name == "json_gateway" and reply.status == 200:
            reply.body, reply.details, reply.message = unwrap_gateway(reply.body)
            reply.failure = "bad_reply" if reply.message else ""


def explain(error: Exception, reply: Reply) -> None:
    """Put an error of the network in words, and tell whether the request may have reached the provider."""
    reply.failure, reply.message = "connection", f"{type(error).__name__}: {error}"
    reply.sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    if isinstance(error, TimeoutError):
        reply.failure, reply.message = "timeout", "no whole reply within --request_timeout"
    elif isinstance(error, aiohttp.ClientConnectorDNSError):
        reply.hopeless = f"The host {error.host} cannot be found. Check --request_url, the network and the proxy."
    elif isinstance(error, ssl.SSLError | aiohttp.ClientSSLError):
        reply.hopeless = f"No secure connection: {error}. Check --request_url (https or http? the port?) and the clock."


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
    try:
        import resource
    except ImportError:  # Windows has no such limit for sockets
        return wanted
    soft, hard = (math.inf if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < wanted + SPARE_OPEN_FILES:
        soft = min(wanted + SPARE_OPEN_FILES, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(1, min(wanted, int(soft) - SPARE_OPEN_FILES)) if soft < math.inf else wanted


# ==== 5 judge: what the reply means ===================================================================================

T = TypeVar("T")
Action = Enum("Action", "DONE REFUSED RETRY FAIL STOP")  # success; rate limit; passing; hopeless request; hopeless run
Meaning = tuple[Action, str]  # with the kind of error
ANSWERED, THROTTLED, BUSY = (Action.DONE, ""), (Action.REFUSED, "rate_limit"), (Action.RETRY, "server_error")
NO_ANSWER, REJECTED = (Action.RETRY, "bad_reply"), (Action.FAIL, "bad_request")
FILTERED, BAD_KEY = (Action.FAIL, "content_filter"), (Action.STOP, "auth")
NO_MONEY, REDIRECTED = (Action.STOP, "no_money"), (Action.STOP, "redirect")
BY_STATUS = {402: NO_MONEY, 429: THROTTLED} | dict.fromkeys((401, 403, 407), BAD_KEY)
BY_STATUS |= dict.fromkeys((408, 409, 425, 498, 499), BUSY)  # 498: Groq is out of flexible capacity
BY_CENTURY = {3: REDIRECTED, 4: REJECTED}  # all else is the provider's fault
EVERYWHERE = {"context_length_exceeded model_not_found": REJECTED, "content_filter content_policy*": FILTERED}
UNDER_200 = {"invalid* bad*": 400, "auth*": 401, "billing*": 402, "permission*": 403, "rate_limit* throttl*": 429}
BLOCKED = set("content_filter sensitive refusal safety recitation blocklist prohibited_content spii other".split())
UNFINISHED = set("insufficient_system_resource network_error error malformed_function_call failed queued".split())
CACHED = ("cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens", "cachedContentTokenCount")
ENDS = ("finish_reason", "finishReason", "stop_reason", "reason", "status")
ERROR_KEYS = "loc message msg detail error error_code metadata raw details reason violations quotaId retryDelay".split()
OWN_SIZE = re.compile(r"limit:? ?(\d{1,18})\b.{0,80}requested:? ?(\d{1,18})", re.IGNORECASE)
TRY_AGAIN = re.compile(r"\b(?:try again|retry) (?:in|after) ((?:\d[\d.]* ?[a-z]+ ?)+)", re.IGNORECASE)
DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(ms|milli|[smhd])[a-z]*[. ]*", re.IGNORECASE)
SECONDS_IN = {"ms": 0.001, "milli": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LIMIT_NAME = re.compile(  # whose limit, of what, which figure, of what, by when
    r"(?:[a-z]+-)?(rate-?limit|tokenlimit|ratelimitbysize)-(?:(.+)-)?(limit|remaining|reset)(?:-(.+?))??"
    r"(?:-(minute|day|month))?"
)
WORDS_KEPT, LONGEST_WAIT_SECONDS, LONGEST_RETRY_SECONDS = 600, 600.0, 60.0
MOST, EPOCH = 1e13, 1e9  # no count is higher; a larger number of seconds is a date


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reply means: what to do, the kind of error, the provider's own words and code."""

    action: Action
    kind: str = ""
    message: str = ""
    code: str = ""


def judge(reply: Reply, provider: Provider, shape: str) -> Verdict:
    """Decide by what the network did, then by the provider's own words and codes, then by the status."""
    status, meaning = reply.status, None
    if reply.failure and status < 300:
        return Verdict(Action.FAIL if reply.failure == "too_large" else Action.RETRY, reply.failure, reply.message)
    if status < 300 and (meaning := look_inside(reply.body, SHAPES[shape].answer)) is ANSWERED:
        return Verdict(Action.DONE)
    code, family, message = error_words(reply.body, reply.text)
    if status < 300:  # an error under 200 is judged like the status that it deserves
        status = int(code) if re.fullmatch("[45][0-9]{2}", code) else first_match(UNDER_200, code, family) or 500
    elif status < 400:
        message = f"redirected to {reply.headers.get('Location')}: if you trust it, set --request_url to it"
    if (size := OWN_SIZE.search(message)) and int(size[2]) > int(size[1]):
        meaning = REJECTED  # no waiting makes room for this request
    told = (value for text, value in provider.texts.items() if re.search(text, message, re.IGNORECASE))
    for table in (provider.codes, EVERYWHERE):
        meaning = meaning or next(told, None) or first_match(table, code, family, f"http{status}")
    action, kind = meaning or BY_STATUS.get(status) or BY_CENTURY.get(status // 100, BUSY)
    return Verdict(action, kind, message or f"status {reply.status} without a usable answer", code or family)


def first_match(table: Mapping[str, Any], *words: str) -> Any:
    """The value of the first row with a pattern for one of the words: {"1302 13*": x}, "1302" -> x; or None."""
    rows = ((pattern, value) for patterns, value in table.items() for pattern in patterns.lower().split())
    return next((value for pattern, value in rows for word in words if fnmatchcase(word.lower(), pattern)), None)


def look_inside(body: Any, answer: str) -> Meaning | None:
    """What the content of a reply under 200 means; None if its error words have to tell."""
    if isinstance(body, list) and body:  # so do some servers of embeddings; Gemini puts a list around an error
        return None if "error" in only(dict, body[0]) else ANSWERED
    if not isinstance(body, dict):
        return NO_ANSWER
    found = body.get(answer)
    plain = [only(dict, choice).get("finish_reason") in ("stop", "length") for choice in only(list, found)]
    if plain and all(plain) and answer == "choices":
        return ANSWERED  # subtle: the rest decides the same, slower
    if not found and only(dict, body.get("promptFeedback")).get("blockReason"):
        return FILTERED
    if body.get("error") or (not found and found != []):
        return None if any(error_words(body)) else NO_ANSWER
    if answer not in ("choices", "candidates"):
        output, *more = (only(dict, body.get(name)) for name in ("output", "incomplete_details", "inference_status"))
        found = output.get("choices") or [{**body, **output, **more[0], **more[1]}]
    choices = [{**choice, **only(dict, choice.get("message"))} for choice in only(list, found) if only(dict, choice)]
    ends = {str(next((choice[name] for name in ENDS if choice.get(name)), "")).lower() for choice in choices}
    if not choices or ends & UNFINISHED:
        return BUSY if choices else NO_ANSWER
    texts = [choice[name] for choice in choices for name in ("content", "text", "output") if choice.get(name)]
    empty = not any(text.get("parts") if isinstance(text, dict) else text for text in texts)
    return FILTERED if empty and ends <= BLOCKED else ANSWERED


def error_words(body: Any, text: str = "") -> tuple[str, str, str]:
    """Code, type and message of an error body: nested, flat, in a list, FastAPI's detail, a string, HTML."""
    body = body[0] if isinstance(body, list) and body else body
    error = only(dict, only(dict, body).get("error")) or only(dict, body)
    title = re.search("<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    message = one_line(error or body) or one_line(unescape(title[1]) if title else text)
    return one_line(error.get("code")), one_line(error.get("type") or error.get("status")), message


def one_line(value: Any, depth: int = 6) -> str:
    """A bounded line of the words in a value: a text, a small number, or what an error of any form has to say."""
    if isinstance(value, dict):
        names = (name for name in ERROR_KEYS if value.get(name))
        value = [["retry in", value[name]] if name == "retryDelay" else value[name] for name in names]
    if isinstance(value, list):
        value = " ".join(filter(None, (one_line(item, depth - 1) for item in value[:10] if depth)))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST:
        return str(value)
    return " ".join(only(str, value)[: 4 * WORDS_KEPT].split())[:WORDS_KEPT]


def only(kind: type[T], value: Any) -> T:
    """The value if it is of this kind, else an empty one."""
    return value if isinstance(value, kind) else kind()


def read_limits(reply: Reply, provider: Provider, utc_now: float) -> ServerLimits | None:
    """What a reply tells about limits and, if it is an error, how long to wait; None if nothing."""
    refused = reply.status >= 400 or (isinstance(reply.body, dict) and bool(reply.body.get("error")))
    if not refused and "limit" not in " ".join(reply.headers).lower():
        return None
    headers = {name.lower(): text for name, text in reply.headers.items()}
    buckets: dict[str, dict[str, float]] = {}
    for name, text in headers.items():
        if "limit" in name and (match := LIMIT_NAME.fullmatch(name)):
            whose, before, figure, after, window = match.groups()
            what = before or after or ("requests" if whose in ("ratelimit", "rate-limit") else "tokens")
            window = window or provider.windows.get(what, "minute")
            value = seconds_in(text, utc_now) if figure == "reset" else number_in(text)
            if value is not None and (value or figure != "limit"):  # a limit by the day or month is no pace
                bucket = buckets.setdefault(what if window in ("minute", "second") else f"{what} by the {window}", {})
                bucket[figure] = value * 60 if figure == "limit" and window == "second" else value
    waits: list[float | None] = []
    if refused:
        told = TRY_AGAIN.search(error_words(reply.body, reply.text)[2])
        texts = (f"{headers.get('retry-after-ms')}ms", headers.get("retry-after", ""), told[1] if told else "")
        resets = (bucket.get("reset", 0.0) for bucket in buckets.values() if bucket.get("remaining") == 0)
        waits = [*(seconds_in(text, utc_now) for text in texts), max(resets, default=0.0) or None]
    wait = next((wait for wait in waits if wait is not None), None)
    half, rest = (buckets.get(name, {}) for name in ("input-tokens", "output-tokens"))  # Anthropic
    both = {k: max(half[k], rest[k]) if k == "reset" else half[k] + rest[k] for k in half.keys() & rest}
    tokens = buckets.get("tokens") or buckets.get("project-tokens") or both
    requests = buckets.get("requests") or buckets.get("req", {})
    figures = [bucket.get(figure) for bucket in (requests, tokens) for figure in ("limit", "remaining", "reset")]
    return ServerLimits(wait, *figures) if any(figure is not None for figure in (wait, *figures)) else None


def number_in(text: str) -> float | None:
    """A count from a header; None if it is no sane number."""
    try:
        return number if 0 <= (number := float(text)) <= MOST else None
    except ValueError:
        return None


def seconds_in(text: str, utc_now: float) -> float | None:
    """Seconds from now of "1.5", "6m0s", "350ms", an epoch time or a date; bounded, None if it is past."""
    try:
        if (seconds := number_in(text)) is not None:
            seconds = seconds / 1000 if seconds > EPOCH * 100 else seconds
            seconds -= utc_now if seconds > EPOCH else 0
        elif text and not DURATION.sub("", text):
            seconds = sum(float(number) * SECONDS_IN[unit.lower()] for number, unit in DURATION.findall(text))
        else:
            date = datetime.fromisoformat(text) if text[:1].isdigit() else parsedate_to_datetime(text)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - utc_now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(seconds, LONGEST_WAIT_SECONDS) if seconds >= 0 else None


def read_usage(body: Any, shape: str) -> Usage | None:
    """Tokens that a reply says it used, in any family's words; None if it does not say."""
    row = SHAPES[shape]
    usage = only(dict, only(dict, body).get(row.usage))

    def total(names: Iterable[str], counts: dict[str, Any] = usage) -> int:
        return sum([n for name in names if type(n := counts.get(name)) is int and 0 < n < MOST])

    output = total(row.output)
    prompt = total(row.prompt) or max(0, total(("total_tokens",)) - output)
    details = only(dict, usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    cached = total(("cached_tokens",), details) or total(CACHED)
    return Usage(prompt, output, min(cached, prompt)) if prompt or output else None


def retry_delay(attempt: int, rng: random.Random) -> float:
    """Seconds until a failed attempt (from 1) is tried again: exponential with full jitter, capped."""
    return rng.uniform(0.0, min(LONGEST_RETRY_SECONDS, 2.0 ** min(attempt - 1, 30)))


# ==== 6 record: one line, written whole, once =========================================================================


MAX_NESTING = 500  # levels: what can be read can be written, whatever the Python version and with or without orjson
IDENTITY_BYTES, BUCKETS, BLOCK = 12, 4096, 1 << 20
DIGITS = bytes.maketrans(b"123456789[:- \t\r\n", b"000000000,,,,,,,")
LONG_INTEGER = b"," + b"0" * 19  # after DIGITS: may be beyond 64 bits, which orjson makes a float
PRIVATE = partial(os.open, mode=0o600)  # opener of files that only their owner can read


class ResultsLost(Exception):  # noqa: N818 - it is no error of this program
    """Results cannot be recorded any more: the run stops with exit code 3; the text is the message."""


def finite(text: str) -> float:
    """Float of a JSON number; ValueError for NaN and what is beyond a double."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no JSON number that a double can hold")
    return number


DECODE = json.JSONDecoder(parse_float=finite, parse_constant=finite).decode


def loads(data: bytes | str) -> Any:
    """Value of strict JSON: '[1e2, 18446744073709551616]' -> [100.0, 18446744073709551616]. ValueError for all else."""
    data, value = data.encode(errors="surrogatepass") if isinstance(data, str) else data, None
    if orjson is not None and LONG_INTEGER not in (b"," + data).translate(DIGITS):
        with contextlib.suppress(ValueError):  # a lone surrogate, or an error that the standard library words better
            value = orjson.loads(data)
    try:
        level = [value := DECODE(data.decode()) if value is None else value]
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if data.count(b"[") + data.count(b"{") > MAX_NESTING:
        for _ in range(MAX_NESTING):
            level = [node for node in level if isinstance(node, dict | list)]
            level = list(chain.from_iterable(node.values() if isinstance(node, dict) else node for node in level))
        if any(isinstance(node, dict | list) for node in level):
            raise ValueError("nested too deep")
    return value


def dumps(value: Any, *, sort_keys: bool = False) -> bytes:
    """One line of JSON in UTF-8, a lone surrogate as its escape; whatever loads gave can be written."""
    if orjson is not None:
        with contextlib.suppress(TypeError):  # integers beyond 64 bits, lone surrogates, deep nesting
            return orjson.dumps(value, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys, separators=(",", ":"))
    return text.encode(errors="backslashreplace")  # subtle: Python's escape of a surrogate is also JSON's


def identity(body: Any, metadata: Any) -> bytes:
    """What a request is recognised by: the same for equal JSON, in whatever order its keys stand; 1 and 1.0 differ."""
    return hashlib.blake2b(dumps((body, metadata), sort_keys=True), digest_size=IDENTITY_BYTES).digest()


def read_result(line: bytes) -> tuple[bytes, bool] | None:
    """Identity and success of a result line, also of the cookbook script's; None if it is none."""
    with contextlib.suppress(ValueError):
        match loads(line):
            case [dict() | str() as body, outcome, *rest] if len(rest) <= 2:
                if isinstance(body, dict) or isinstance(outcome, list):
                    return identity(body, rest[0] if rest else None), not isinstance(outcome, list)
    return None


def beside(path: Path, what: str) -> Path:
    """A free name: 'results.jsonl' -> 'results.20261121T034500Z.jsonl'."""
    stem = f"{path.name.removesuffix('.jsonl')}{what}.{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (path.with_name(f"{stem}{f'.{n}' if n else ''}.jsonl") for n in count())
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def explained(kind: type[Exception], problem: str, advice: str) -> Iterator[None]:
    """Turn an error of the file system into one that tells what to do."""
    try:
        yield
    except OSError as error:
        raise kind(f"{problem} ({error.strerror}). {advice}") from None


def guard(path: Path, requests: Path) -> None:
    """UsageError for a results file that must not be touched."""
    problem = ""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        problem = f"its folder is missing (then: mkdir -p '{path.parent}') or not writable"
    elif path.exists() and not path.is_file():
        problem = "it is no regular file"
    elif path.exists() and requests.exists() and path.samefile(requests):
        problem = "it is the request file too"
    elif path.exists():
        with path.open("r+b", BLOCK) as file:
            first = next((line for line in file if not line.isspace()), b"[")
        torn = first == b"[" or (not first.endswith(b"\n") and first.startswith((b"[{", b'["')))
        with contextlib.suppress(ValueError):
            loads(first)
            torn = False  # it is complete
        if not torn and read_result(first) is None:
            problem = f"its first line is no result line, it begins {first[:60].decode(errors='replace')!r}"
    if problem:
        raise UsageError(f"Results file {path}: {problem}. Nothing was touched; or choose another --save_filepath.")


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
        except (BlockingIOError, PermissionError):
            holder = (
                f"Process {path.read_text().strip() or '(just starting)'} is writing these results (it holds {path})"
            )
            raise UsageError(f"{holder}. Wait until it ends, or choose another --save_filepath.") from None
        except OSError as error:
            notice = f"No locks on this file system ({error.strerror}): start no second process for these results."
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            path.write_text(f"{os.getpid()}\n")
            try:
                yield notice
            finally:
                with contextlib.suppress(OSError):  # removed while it is held: never a newer one
                    path.unlink()
            return
    with locked(path) as notice:  # its former holder has just removed it
        yield notice


class ResultsFile:
    """The results file, which is the checkpoint too: it loses nothing and has nothing twice.

    finished_before, failed_before, unreadable: lines that it had. foreign: finished, but not asked for; after finish.
    """

    def __init__(self, path: str, requests_path: str = "", *, restart: bool = False) -> None:
        """Guard, lock, read and repair the file; UsageError if that cannot be."""
        self.path = Path(os.path.realpath(path))
        self.finished_before = self.failed_before = self.unreadable = self.foreign = self._old_lines = 0
        self._finished = [bytearray() for _ in range(BUCKETS)]  # identities end to end: a fifth of the size of a set
        self._failed: set[bytes] = set()
        self._queue = bytearray()
        problem, advice = f"The results file {path} cannot be used", "Choose another --save_filepath."
        with explained(UsageError, problem, advice), contextlib.ExitStack() as stack:
            guard(self.path, Path("/dev/stdin" if requests_path == "-" else requests_path))
            self.notices = list(filter(None, [stack.enter_context(locked(Path(f"{self.path}.lock")))]))
            if restart and self.path.exists():
                self.notices.append(f"The former results are kept as {self.path.rename(beside(self.path, ''))}.")
            self._file = stack.enter_context(open(self.path, "a+b", buffering=0, opener=PRIVATE))
            self._size = self._read()
            with contextlib.suppress(OSError):
                self.path.chmod(0o600)
                Path(f"{self.path}.rewrite").unlink()
            self._held = stack.pop_all()
        self.close = self._held.close

    def _read(self) -> int:
        """Read the old results and repair a torn end; gives the size."""
        size, line = 0, b"\n"
        self._file.seek(0)
        with open(self._file.fileno(), "rb", BLOCK, closefd=False) as file:
            for line in file:
                result = read_result(line)
                if result is None and not line.endswith(b"\n"):
                    if size == 0:
                        self._set_aside([line])
                    self.notices.append(f"A torn last line was cut off{'' if size else ', it is kept as .unreadable'}.")
                    self._file.truncate(size)
                    return size
                if result is None:
                    self.unreadable += not line.isspace()
                elif result[1]:
                    self.finished_before += 1
                    self._finished[int.from_bytes(result[0][:2]) % BUCKETS] += result[0]
                else:
                    self.failed_before += 1
                    self._failed.add(result[0])
                size += len(line)
                self._old_lines += 1
        return size if line.endswith(b"\n") else size + self._file.write(b"\n")

    def _set_aside(self, lines: list[bytes]) -> None:
        with open(Path(f"{self.path}.unreadable"), "ab", opener=PRIVATE) as file:
            file.writelines(line.rstrip(b"\n") + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def take(self, identity: bytes) -> bool:
        """Whether this request is finished already: true once for each of its successful lines."""
        self._failed.discard(identity)  # this run replaces those lines
        bucket = self._finished[int.from_bytes(identity[:2]) % BUCKETS]
        if (at := bucket.find(identity)) >= 0:
            del bucket[at : at + IDENTITY_BYTES]
        return at >= 0

    def write(self, body: Any, outcome: Any, metadata: Any = None, details: Any = None) -> None:
        """Queue one result line. outcome: the response, or the list of errors."""
        width = 4 if details is not None else 3 if metadata is not None else 2
        self._queue += dumps([body, outcome, metadata, details][:width]) + b"\n"

    def flush(self) -> None:
        """Write the queued lines, each whole or not at all; after ResultsLost the rest is still queued."""
        if not self._queue:
            return
        self.check()
        data, done = bytes(self._queue), 0
        advice = "The last results are not recorded: make room, then start again with the same files to continue."
        with explained(ResultsLost, f"{self.path} cannot be written", advice):
            try:
                while done < len(data):
                    done += self._file.write(data[done:])
            finally:
                done = data.rfind(b"\n", 0, done) + 1
                self._size += done
                del self._queue[:done]
                if self._queue:
                    self._file.truncate(self._size)

    def check(self) -> None:
        """ResultsLost if the file is not there as we left it; what is held goes on under a second name."""
        now, same = os.fstat(self._file.fileno()), False
        with contextlib.suppress(FileNotFoundError):
            same = self.path.stat().st_ino == now.st_ino
        if same and now.st_size >= self._size:
            self._size = now.st_size
            return
        place = self.path if self.path.parent.is_dir() else Path(tempfile.gettempdir(), self.path.name)
        rescue = beside(place, ".rescued")
        problem = f"{self.path} was {'truncated' if same else 'deleted or replaced'} by someone during the run"
        with explained(ResultsLost, f"{problem}, and {rescue} cannot be written", "Make room and start again."):
            with open(rescue, "xb", opener=PRIVATE) as copy:
                copy.write(b"\n" if same else b"")  # subtle: the truncated file may end within a line
                self._file.seek(0, os.SEEK_END if same else os.SEEK_SET)
                shutil.copyfileobj(self._file, copy, BLOCK)
            self._file = self._held.enter_context(rescue.open("a+b", buffering=0))
        advice = f"cat '{rescue}' >> '{self.path}'" if same else f"mv '{rescue}' '{self.path}' (look what is there now)"
        self.path, self._size, self._old_lines = rescue, rescue.stat().st_size, 0
        raise ResultsLost(f"{problem}; what is still held goes to {rescue}. To continue: {advice}, then start again.")

    def finish(self, *, whole: bool, limited: bool = False) -> None:
        """End the run. whole: every request was read and has its line; limited: only those at the head were read."""
        problem = f"All results are in {self.path}, but old failed lines could not be dropped"
        with self._held, explained(ResultsLost, problem, "Make room, then start again with the same files."):
            self.flush()
            self.check()
            os.fsync(self._file.fileno())
            if whole and not limited:
                self.foreign = sum(map(len, self._finished)) // IDENTITY_BYTES
            if whole and self._old_lines > self.finished_before:
                self._rewrite(self._failed if limited else set())

    def _rewrite(self, staying: set[bytes]) -> None:
        """Drop the old failed lines, but those staying, and the unreadable ones: at once or not at all."""
        unreadable, new = [], Path(f"{self.path}.rewrite")
        self._file.seek(0)
        with open(self._file.fileno(), "rb", BLOCK, closefd=False) as old, open(new, "wb", opener=PRIVATE) as target:
            for line in islice(old, self._old_lines):
                result = read_result(line)
                if result is not None and (result[1] or result[0] in staying):
                    target.write(line)
                elif result is None and not line.isspace():
                    unreadable.append(line)
            shutil.copyfileobj(old, target, BLOCK)
            target.flush()
            os.fsync(target.fileno())
        if unreadable:
            self._set_aside(unreadable)
        self._file.close()  # for Windows
        new.replace(self.path)


# ==== 7 report: counts, progress, summary =============================================================================

PROGRESS = {"bar": 0.25, "lines": 5.0, "none": math.inf}  # seconds between two looks


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
    spent: float = 0.0  # in the unit of the prices given
    kinds: Counter[str] = field(default_factory=Counter)  # attempts that did not succeed
    seconds: float = 0.0
    last_trouble: str = ""
    stop_reason: str = ""  # "" if the run came to its end
    exit_code: int = 0

    def count(self, settings: Settings, verdict: Verdict, reply: Reply, usage: Usage | None) -> None:
        """Count one reply."""
        self.succeeded += verdict.action is Action.DONE
        self.refused += verdict.action is Action.REFUSED
        self.replies += reply.status > 0 and verdict.action is not Action.REFUSED
        self.never_sent += not reply.sent
        self.answer_lost += reply.sent and reply.failure in ("connection", "timeout")
        if verdict.action is not Action.DONE:
            self.kinds[verdict.kind] += 1
            self.last_trouble = verdict.message
        if usage:
            self.prompt_tokens += usage.prompt
            self.cached_tokens += usage.cached
            self.output_tokens += usage.output
            self.spent += settings.price(usage.prompt, usage.output)


class Reporter:
    """Shows a run: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, mode: str) -> None:
        self.live: Any = None
        terminal = sys.stderr is not None and sys.stderr.isatty()
        if mode == "bar" or (mode == "auto" and terminal):
            with contextlib.suppress(ImportError):  # without rich: lines
                from rich.console import Console
                from rich.live import Live

                self.live = Live(console=Console(stderr=True), auto_refresh=False, vertical_overflow="crop")
                self.live.start()
        self.every = PROGRESS["bar" if self.live else "lines" if mode == "auto" else mode.replace("bar", "lines")]
        self.next_time = -math.inf if self.live else 0.0
        self.history: deque[tuple[float, int]] = deque(maxlen=60)  # (time, requests done), for the time left

    def update(self, run: Run, now: float) -> float:
        """Show the state if it is time; gives the time of the next look."""
        if now >= self.next_time and self.every < math.inf:
            self.history.append((now, run.tally.succeeded + run.tally.failed))
            if self.live:
                self.live.update(self.picture(run, now), refresh=True)
            elif self.next_time:
                LOGGER.info("%s", ", ".join(self.words(run, now)))
            self.next_time = now + self.every
        return max(self.next_time, now) if self.every < math.inf else math.inf

    def words(self, run: Run, now: float) -> list[str]:
        """Say where a run stands, the most important first."""
        tally, settings, waiting = run.tally, run.settings, len(run.retries) + len(run.limbo)
        words = [f"{tally.succeeded + tally.finished_before:,} done", f"{tally.failed:,} failed"]
        words += [f"{len(run.in_flight):,} in flight", f"{waiting:,} to retry"]
        used = map(sum, zip(*(endpoint.pacer.last_minute() for endpoint in run.endpoints), strict=True))
        for name, budget, amount in zip(("requests", "tokens"), settings.budgets, used, strict=True):
            words.append(f"{amount:,.0f}{f' of {budget:,.0f}' if budget else ''} {name}/min")
        words += [f"spent {tally.spent:,.4f}"] if tally.spent else []
        (then, done_then), (_, done) = self.history[0], self.history[-1]
        if run.stopped_by and run.in_flight:
            oldest = next(iter(run.in_flight.values()))[0].started
            wait = duration(oldest + settings.request_timeout - now)
            words.insert(0, f"finishing what is in flight, {wait} at most (Ctrl-C again: at once)")
        elif run.outage.down:
            words.insert(0, "the provider is down, probing")
        elif done > done_then:
            left = (run.reader.expected_total() - tally.finished_before - done) * (now - then) / (done - done_then)
            words += [f"about {duration(left)} left"] if left < math.inf else []
        return words

    def picture(self, run: Run, now: float) -> Any:
        """The bar and two lines of numbers, cut to the width of the terminal."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        total, done = run.reader.expected_total(), run.tally.finished_before + run.tally.succeeded + run.tally.failed
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        bar = ProgressBar(total=total if total < math.inf else None, completed=done)
        row.add_row(
            bar, f"{done:,} of {'' if run.reader.ended else 'about '}{total:,.0f}".removesuffix(" of about inf")
        )
        words = self.words(run, now)
        return Group(row, *(Text(", ".join(w), no_wrap=True, overflow="ellipsis") for w in (words[:4], words[4:])))

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


def summarize(run: Run) -> list[str]:
    """Say at the end what happened, where the results are and what to do about failures."""
    tally, minutes = run.tally, max(run.tally.seconds / 60, 1.0)
    tokens = tally.prompt_tokens + tally.output_tokens
    lines = [f"{tally.succeeded:,} succeeded, {tally.failed:,} failed, {tally.finished_before:,} were finished before."]
    if tally.calls:
        lines.append(f"Calls: {tally.calls:,} in {duration(tally.seconds)}, {tally.refused / tally.calls:.1%} refused.")
    kinds = ", ".join(f"{times:,} {kind}" for kind, times in tally.kinds.most_common())
    lines += [f"Attempts without success: {kinds}."] if kinds else []
    if tally.answer_lost or tally.never_sent:
        lines.append(f"Sent, answer lost (perhaps billed): {tally.answer_lost:,}. Never sent: {tally.never_sent:,}.")
    cached = f" ({tally.cached_tokens:,} of them cached)" if tally.cached_tokens else ""
    lines += [f"Tokens: {tally.prompt_tokens:,} in{cached}, {tally.output_tokens:,} out."] if tokens else []
    lines += [f"Spent: {tally.spent:,.4f}."] if tally.spent else []
    for name, budget, used in zip(("requests", "tokens"), run.settings.budgets, (tally.calls, tokens), strict=True):
        lines += [f"Budget of {budget:,.0f} {name} a minute: {used / minutes / budget:.0%} used."] if budget else []
    lines += [words for endpoint in run.endpoints if (words := endpoint.pacer.describe())] + run.learned.describe()
    lines.append(f"Results: {run.results.path}")
    if tally.failed:
        lines.append("Failed lines hold their reasons. The same command tries them again; --save_details tells more.")
    return lines


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


async def process_api_requests_from_file(requests_filepath: str, **settings: Any) -> Tally:
    """Process a request file; the keyword arguments are the flags of the command line.

    Returns the tally, also of a run that stopped early (see its `stop_reason` and `exit_code`). Raises UsageError for
    wrong settings or files. Installs no signal handlers.
    """
    unknown = sorted(settings.keys() - Settings.__dataclass_fields__.keys())
    if unknown:
        raise UsageError(f"unknown setting {unknown[0]!r}; the fields of Settings are what there is")
    return await run_job(Settings(requests_filepath=requests_filepath, **settings))


async def run_job(settings: Settings, *, main_program: bool = False) -> Tally:
    """Check and open everything, run the loop, tidy up. The main program also hears signals."""
    settings.check()
    secrets, wake, loop, began = Secrets(), asyncio.Event(), asyncio.get_running_loop(), time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        LOGGER.addFilter(secrets)
        stack.callback(LOGGER.removeFilter, secrets)
        endpoint = make_endpoint(settings, secrets)
        tokenizer = Tokenizer(settings.token_encoding_name)
        reader = open_requests(settings, endpoint, tokenizer, lambda: loop.call_soon_threadsafe(wake.set))
        stack.callback(reader.close)
        if settings.dry_run:
            return await dry_run(settings, reader, endpoint)
        results = ResultsFile(settings.results_path, settings.requests_filepath, restart=settings.restart)
        stack.callback(results.close)
        clock = time.monotonic if "uvloop" in type(loop).__module__ else loop.time  # uvloop's moves by milliseconds
        run = Run(settings, reader, [endpoint], results, Reporter(settings.progress), wake, clock)
        stack.callback(run.reporter.close)
        if main_program:
            stack.enter_context(signals_noticed(run))
        for notice in results.notices:
            LOGGER.warning("%s", notice)
        await endpoint.open(stack, settings.request_timeout)
        try:
            await run.process_requests()
        finally:
            tasks = [task for _, task in run.in_flight.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        run.tally.seconds = time.monotonic() - began
        finish(run)
        return run.tally


def finish(run: Run) -> None:
    """Tidy the results file if the run came to its end, settle the exit code, tell the summary."""
    tally = run.tally
    try:
        run.results.finish(whole=not run.stopped_by, limited=run.settings.limit > 0)
    except ResultsLost as lost:
        run.stop("results", str(lost))
    tally.exit_code = 128 + run.signal if run.signal else 3 if run.stopped_by else 1 if tally.failed else 0
    run.reporter.close()
    if not (tally.calls or run.stopped_by or tally.failed):
        again = "--restart starts afresh, another --save_filepath keeps both"
        LOGGER.info("Nothing to do, all %s requests have their results; %s.", f"{tally.read:,}", again)
    for line in summarize(run):
        LOGGER.info("%s", line)


@contextlib.contextmanager
def signals_noticed(run: Run) -> Iterator[None]:
    """Let a first signal stop the run gently and a second one at once; what nohup ignores stays ignored."""
    loop = asyncio.get_running_loop()

    def notice(number: int) -> None:
        run.signal, run.force = run.signal or number, bool(run.signal)
        run.wake.set()

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in [number for number in numbers if before[number] != signal.SIG_IGN]:
        signal.signal(number, lambda number, _: loop.call_soon_threadsafe(notice, number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_endpoint(settings: Settings, secrets: Secrets) -> Endpoint:
    """Find the provider, its key and its rules; refuse what cannot work or is not safe."""
    parts = urlsplit(settings.request_url.strip())
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError("--request_url is no http(s) address such as https://api.openai.com/v1/chat/completions")
    if parts.path in ("", "/") or parts.path.rstrip("/").endswith("/v1"):
        parts = parts._replace(path=parts.path.rstrip("/") + "/chat/completions")
        LOGGER.warning("--request_url names no endpoint: sending to %s", parts.path)
    url = urlunsplit(parts)
    provider = find_provider(url, settings.provider)
    names = [settings.api_key_env] if settings.api_key_env else provider.key_env
    keys = {"--api_key": settings.api_key.strip()} | {name: os.environ.get(name, "").strip() for name in names}
    source, key = next(((source, key) for source, key in keys.items() if key), ("", ""))
    if not key and not is_private(host) and not settings.dry_run:
        raise UsageError(f"no key for {host}: export {' or '.join(names)}, or name another variable with --api_key_env")
    if key and parts.scheme == "http" and not is_private(host) and not settings.allow_plain_http:
        raise UsageError(f"http would show the key to everybody on the way to {host}: use https, or --allow_plain_http")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the key from {source} holds characters that no key has, a line break perhaps: copy it again")
    LOGGER.info("%s: %s", host, f"key from {source}" if key else "no key")
    if 0 < len(key) < SHORTEST_SECRET:
        LOGGER.warning("The key is shorter than %d characters: it is not searched for in replies.", SHORTEST_SECRET)
    secrets.add(key)
    headers = {"Content-Type": "application/json", "User-Agent": f"api_request_parallel_processor/{__version__}"}
    headers |= provider.auth_headers(key)
    for line in settings.request_header:
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or not name:
            raise UsageError("--request_header has no colon; write 'Name: value'")
        headers[name] = value
        secrets.add(
            value.removeprefix("Bearer ") if re.search("auth|key|token|secret|cookie", name, re.IGNORECASE) else ""
        )
    wanted = settings.max_concurrent_requests or MOST_CONCURRENT
    allowed = open_files_for(wanted)
    if allowed < min(wanted, MOST_CONCURRENT // 2):
        LOGGER.warning("Open files are limited to at most %d requests in flight; `ulimit -n` raises that.", allowed)
    per_second, at_once = provider.per_second, provider.concurrency
    pacer = Pacer(*settings.budgets, allowed, settings.seconds_to_sleep_each_loop, per_second, at_once)
    shape, max_bytes = find_shape(parts.path, provider), int(settings.max_reply_megabytes * 2**20)
    return Endpoint(url, provider, shape, key, headers, pacer, find_proxy(url, secrets), max_bytes, secrets)


def is_private(host: str, *, loopback_only: bool = False) -> bool:
    """Tell an address of this machine or of a private network: a key may travel openly there, and is optional."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or (address.is_private and not loopback_only)


def open_requests(settings: Settings, endpoint: Endpoint, tokens: Tokenizer, wake: Callable[[], object]) -> Reader:
    """Open the request file, or standard input."""
    path = settings.requests_filepath
    try:
        file = sys.stdin.buffer if path == "-" else open(path, "rb", buffering=1 << 20)
    except OSError as error:
        raise UsageError(
            f"the request file {path} cannot be read ({error.strerror}); see --requests_filepath"
        ) from None
    return Reader(file, endpoint, tokens, settings.limit, wake)


async def dry_run(settings: Settings, reader: Reader, endpoint: Endpoint) -> Tally:
    """Read and count everything, print what a run would mean. Nothing is sent, locked or written."""
    tally, learned = Tally(), LearnedTokens()
    while not reader.ended:
        if (request := reader.next(time.monotonic())) is None:
            await asyncio.sleep(0.01)
            continue
        tally.read += 1
        if request.problem:
            tally.failed = tally.bad_lines = tally.bad_lines + 1
            print(request.problem)
            continue
        cost = learned.cost(request.model, reader.estimate(request))
        tally.prompt_tokens += cost.prompt
        tally.output_tokens += cost.expected - cost.prompt
    good, tokens = tally.read - tally.bad_lines, tally.prompt_tokens + tally.output_tokens
    wanted = zip((good, tokens), settings.budgets, strict=True)
    minutes = max(amount / budget if budget else 0.0 for amount, budget in wanted)
    print(f"{good:,} requests can be sent, {tally.bad_lines:,} lines cannot.")
    print(f"About {tally.prompt_tokens:,} tokens in and {tally.output_tokens:,} out (a guess until replies tell).")
    print(
        f"The limits given take {duration(minutes * 60)} for that." if minutes else "No limits given: a run finds out."
    )
    print(f"{endpoint.provider.name} limits {endpoint.provider.limits}.")
    if cost_of_all := settings.price(tally.prompt_tokens, tally.output_tokens):
        print(f"Expected cost: {cost_of_all:,.4f}.")
    tally.exit_code = 1 if tally.bad_lines else 0
    return tally


def build_parser() -> argparse.ArgumentParser:
    """One flag per field of Settings, in groups named after the stations."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage="%(prog)s --requests_filepath FILE [flags]",
        description=summary,
        epilog=rest,
        formatter_class=layout,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    groups = {name: parser.add_argument_group(name) for name in STATIONS}
    for knob in fields(Settings):
        more: dict[str, Any] = {"help": knob.metadata["help"]}
        kind: type = str if knob.default is MISSING else type(knob.default)
        if kind is bool:
            more["action"] = "store_true"
        elif kind is tuple:
            more |= {"action": "append", "metavar": "TEXT", "default": []}
        else:
            choices = choices_of(knob.metadata["choices"])
            more |= {"type": kind, "required": knob.default is MISSING, "choices": choices or None}
            more["metavar"] = None if choices else kind.__name__.upper()
        if kind in (int, float) or (kind is str and knob.default not in ("", MISSING)):
            more |= {"default": knob.default, "help": f"{more['help']} (default: {knob.default})".replace(".0)", ")")}
        groups[knob.metadata["station"]].add_argument(f"--{knob.name}", **more)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    words = [word.partition("=") for word in (sys.argv[1:] if argv is None else argv)]
    flags = [
        (name.replace("-", "_").replace("__", "--", 1) if name[:2] == "--" else name) + "".join(rest)
        for name, *rest in words
    ]
    given = {name: value for name, value in vars(build_parser().parse_args(flags)).items() if value is not None}
    settings = Settings(**{**given, "request_header": tuple(given["request_header"])})
    handler = ConsoleHandler()
    LOGGER.addHandler(handler)
    try:
        settings.check()
        LOGGER.setLevel(int(level) if (level := settings.logging_level.upper()).isdecimal() else level)
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
        complain(f"Stopped early: {tally.stop_reason} Then the same command continues.")
    return tally.exit_code


# ==== tables: shapes of requests and replies, providers ===============================================================


@dataclass(frozen=True, slots=True)
class Shape:
    """What a family of endpoints takes and gives."""

    paths: str  # patterns of the paths that speak it
    needs: str  # fields of a request, one of which it must have
    takes: str  # what that field must be
    answer: str  # the field that makes a reply an answer
    usage: str = "usage"  # the field of a reply with its tokens
    prompt: tuple[str, ...] = ("prompt_tokens",)  # fields of that, to be added up
    output: tuple[str, ...] = ("completion_tokens",)


OBJECTS, OBJECT, ANYTHING = "a list of objects", "an object", "a text, a list or an object"
IN_OUT = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"), ("output_tokens",)
IN_OUT_GOOGLE = ("promptTokenCount", "toolUsePromptTokenCount"), ("candidatesTokenCount", "thoughtsTokenCount")
SHAPES = {
    "chat": Shape("*/chat/completions */gpt", "messages", OBJECTS, "choices"),
    "completions": Shape("*/completions", "prompt", ANYTHING, "choices"),
    "embeddings": Shape("*/embeddings", "input", ANYTHING, "data"),
    "responses": Shape("*/responses", "input prompt", ANYTHING, "output", "usage", *IN_OUT),
    "moderations": Shape("*/moderations", "input", ANYTHING, "results"),
    "anthropic": Shape("*/messages *:rawPredict */claude", "messages", OBJECTS, "content", "usage", *IN_OUT),
    "gemini": Shape("*:generateContent", "contents", OBJECTS, "candidates", "usageMetadata", *IN_OUT_GOOGLE),
    "dashscope": Shape("*/api/v1/services/*", "input", OBJECT, "output", "usage", *IN_OUT),
    "deepinfra": Shape(
        "*/v1/inference/*",
        "input inputs prompt",
        ANYTHING,
        "inference_status",
        "inference_status",
        ("tokens_input",),
        ("tokens_generated",),
    ),
}
BEARER = "Authorization: Bearer "
KEY_STARTS = {
    "sk-ant-": "anthropic",
    "sk-or-": "openrouter",
    "gsk_": "groq",
    "AIza": "gemini",
    "[a-f0-9]{32}[.]": "zhipu",
}
OPENAI_CODES = {
    "insufficient_quota credit_balance_exhausted *spend_limit_exceeded *usage_limit_exceeded billing*": NO_MONEY,
    "slow_down": THROTTLED,
}
GOOGLE_TEXTS = {"PerDay|credits are depleted": NO_MONEY, "API_KEY_INVALID|API key not valid": BAD_KEY}


@dataclass(frozen=True, slots=True)
class Provider:
    """How the URL tells a provider, its keys, what its limits count, its own error codes."""

    name: str
    urls: str = ""  # patterns of hosts, or of host and path
    key_env: tuple[str, ...] = ()  # environment variables with the key; the first that is set counts
    limits: str = "requests and tokens per minute"
    codes: Mapping[str, Meaning] = field(default_factory=dict)  # patterns of error codes and types, "http403"
    texts: Mapping[str, Meaning] = field(default_factory=dict)  # what error messages say; comes before codes
    auth: str = BEARER
    headers: Mapping[str, str] = field(default_factory=dict)
    native: str = ""  # the shape for which auth and headers hold; elsewhere the key is a Bearer one
    per_second: bool = False  # the minute's limits are enforced in slices of a second
    concurrency: int = 0  # in flight at once, to start with; 0 = no such limit is known
    windows: Mapping[str, str] = field(default_factory=dict)  # what its headers count by, if not by the minute
    names_model: bool = True  # a request must have "model"
    check_key: str = "what it may do"  # what to look at when the key is refused

    def auth_headers(self, key: str) -> dict[str, str]:
        """The headers that carry the key, with what else it wants; Entra tokens of Azure are Bearer tokens."""
        name, _, prefix = (BEARER if key.startswith("eyJ") and self.auth else self.auth).partition(": ")
        return {**self.headers, **({name: prefix + key} if name and key else {})}


# fmt: off
PROVIDERS = {row.name: row for row in (
    Provider("azure", "*.openai.azure.com *.cognitiveservices.azure.com *.services.ai.azure.com */openai/deployments/*",
        ("AZURE_OPENAI_API_KEY",), "requests and tokens per minute and deployment, in slices of 1 or 10 seconds",
        texts={"out of call volume quota": NO_MONEY}, auth="api-key: ", per_second=True, names_model=False,
        check_key="that it belongs to the resource in the host name"),
    Provider("openai", "*api.openai.com", ("OPENAI_API_KEY",), codes=OPENAI_CODES, texts={"resource unavailable": BUSY}),
    Provider("dashscope", "*dashscope*.aliyuncs.com *.maas.aliyuncs.com", ("DASHSCOPE_API_KEY",),
        "requests and tokens per minute and model, a sixtieth of them per second", per_second=True, codes={
        "Arrearage *BillOverdue CommodityNotPurchased AllocationQuota.FreeTierOnly": NO_MONEY,
        "Throttling* LimitRequests limit_requests limit_burst_rate insufficient_quota": THROTTLED,
        "DataInspectionFailed data_inspection_failed": FILTERED, "InvalidApiKey invalid_api_key": BAD_KEY},
        texts={"free (allocated |tier )?quota|free tier": NO_MONEY},
        check_key="its region: dashscope, dashscope-intl and each workspace have their own keys"),
    Provider("deepinfra", "api.deepinfra.com", ("DEEPINFRA_TOKEN", "DEEPINFRA_API_KEY"), "200 at once per model",
        concurrency=200),
    Provider("deepseek", "api.deepseek.com", ("DEEPSEEK_API_KEY",), "500 to 2500 at once per model", concurrency=500),
    Provider("moonshot", "api.moonshot.cn api.moonshot.ai", ("MOONSHOT_API_KEY",),
        "requests at once and per minute, tokens per minute and day, shared by all models",
        {"exceeded_current_quota_error": NO_MONEY, "engine_overloaded_error": BUSY}, {r"\bTPD\b": NO_MONEY},
        check_key="its site: keys of api.moonshot.cn and api.moonshot.ai are not exchangeable"),
    Provider("ark", "ark.*.volces.com", ("ARK_API_KEY",), "requests and tokens per minute and endpoint, growth", {
        "AccountOverdueError QuotaExceeded SetLimitExceeded": NO_MONEY, "*SensitiveContent* *RiskDetection*": FILTERED,
        "*RateLimitExceeded* InflightBatchsizeExceeded RequestBurstTooFast ServerOverloaded": THROTTLED,
        "InvalidParameter* OutofContextError InvalidEndpointOrModel* ModelNotOpen": REJECTED}),
    Provider("baichuan", "api.baichuan-ai.com", ("BAICHUAN_API_KEY",), "requests per minute",
        texts={"insufficient|balance|余额|欠费": NO_MONEY}),
    Provider("zhipu", "open.bigmodel.cn api.z.ai", ("ZHIPUAI_API_KEY", "ZHIPU_API_KEY", "ZAI_API_KEY"),
        "requests at once per model, then by the minute, day, week and month", {
        "1302 1303 1305": THROTTLED, "1312 1120 1230 1234 500": BUSY, "1113 1304 1308 1309 1310": NO_MONEY,
        "100[0-4] 111[0-2] 1121 1220": BAD_KEY, "121[0-5] 1261": REJECTED, "1301": FILTERED},
        concurrency=20, check_key="its site: keys of open.bigmodel.cn and api.z.ai are not exchangeable"),
    Provider("jiekou", "api.jiekou.ai", ("JIEKOU_API_KEY",), texts={"balance": THROTTLED}),  # so its FAQ, for 403
    Provider("mistral", "*.mistral.ai", ("MISTRAL_API_KEY",), "requests per second, tokens per minute and month",
        {"3505 service_tier_capacity_exceeded": BUSY}, per_second=True),
    Provider("gemini", "generativelanguage.googleapis.com", ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
        "requests and tokens per minute, requests per day", {"FAILED_PRECONDITION": BAD_KEY}, GOOGLE_TEXTS,
        "x-goog-api-key: ", native="gemini", check_key="billing and region"),
    Provider("vertex", "*aiplatform.googleapis.com", ("VERTEX_ACCESS_TOKEN",), "a quota, and capacity that all share",
        texts=GOOGLE_TEXTS, names_model=False, check_key="its age: tokens of `gcloud auth` live for an hour"),
    Provider("anthropic", "api.anthropic.com", ("ANTHROPIC_API_KEY",), "requests, input and output tokens per minute",
        {"billing_error": NO_MONEY}, {"enforced_spend_limit|credit balance is too low|usage limits": NO_MONEY},
        "x-api-key: ", {"anthropic-version": "2023-06-01"}, "anthropic"),
    Provider("infinigence", "cloud.infini-ai.com", ("INFINI_API_KEY", "INFINIAI_API_KEY")),
    Provider("siliconflow", "api.siliconflow.cn api.siliconflow.com", ("SILICONFLOW_API_KEY",),
        "requests and tokens per minute and day", {"30001": NO_MONEY, "50505": BUSY},
        check_key="its site: keys of the .cn and the .com site are not exchangeable"),
    Provider("openrouter", "openrouter.ai", ("OPENROUTER_API_KEY",), "credits; free models by the minute and day",
        {"http403": FILTERED}, {"key limit|per-day": NO_MONEY}),
    Provider("together", "api.together.xyz api.together.ai", ("TOGETHER_API_KEY",), "requests and tokens per second",
        {"http403": REJECTED}, per_second=True, windows={"requests": "second", "tokens": "second"}),
    Provider("groq", "api.groq.com", ("GROQ_API_KEY",), "requests and tokens per minute and day",
        texts={"try again in": THROTTLED}, windows={"requests": "day"}),
    Provider("json_gateway", "*/gpt */claude", ("GATEWAY_USERNAME",), "as behind it", auth="", names_model=False),
    Provider("local", "", ("OPENAI_API_KEY",), "what the machine can do; it queues", OPENAI_CODES, names_model=False),
)}
# fmt: on


def find_provider(url: str, name: str = "auto") -> Provider:
    """The rules for a URL: the named row, else the first that fits, else local or OpenAI's with a Bearer key."""
    if name not in ("auto", *PROVIDERS):
        raise UsageError(f"--provider {name} is unknown; known are auto, {', '.join(PROVIDERS)}")
    parts = urlsplit(url)
    place = f"{parts.hostname}/{parts.path.lstrip('/')}"
    patterns = ((pattern, row) for row in PROVIDERS.values() for pattern in row.urls.split())
    fitting = (row for pattern, row in patterns if fnmatchcase(place, pattern if "/" in pattern else f"{pattern}/*"))
    other = PROVIDERS["local"] if is_private(parts.hostname or "") else replace(PROVIDERS["openai"], names_model=False)
    provider = PROVIDERS.get(name) or next(fitting, other)
    shape = find_shape(parts.path, provider)
    if provider.native and shape != provider.native:
        provider = replace(provider, auth=BEARER, headers={})
    return replace(provider, headers=PROVIDERS["anthropic"].headers) if shape == "anthropic" else provider


def find_shape(path: str, provider: Provider) -> str:
    """The shape that a path speaks. Raises UsageError, which lists the endings that are known, if it is none."""
    for shape, row in SHAPES.items():
        if any(fnmatchcase(path.rstrip("/"), pattern) for pattern in row.paths.split()):
            return shape
    endings = ", ".join(pattern.replace("*", "") for row in SHAPES.values() for pattern in row.paths.split())
    raise UsageError(f"--request_url: {path or '/'} is no known endpoint of {provider.name}; known are {endings}")


def check_request(body: dict[str, Any], shape: str, provider: Provider) -> str:
    """Why the endpoint cannot mean this request; "" if it can."""
    row = SHAPES[shape]
    need = next((name for name in row.needs.split() if name in body), "")
    value, kind = body.get(need), {OBJECTS: list, OBJECT: dict, ANYTHING: str | list | dict}[row.takes]
    plain = row.takes is OBJECTS and not all(only(dict, item) for item in only(list, value))
    if plain or not isinstance(value, kind) or value in ([], {}):
        other = next((r.paths.split()[0][1:] for r in SHAPES.values() if r.needs in body and not need), "")
        looks = f"; this looks like a request for {other}" if other else ""
        return f'"{need or row.needs.split()[0]}" is missing or not {row.takes}{looks}'
    if body.get("stream") and (shape != "chat" or provider.name == "json_gateway"):
        return '"stream" is only supported for OpenAI-shaped chat requests; remove it'
    if body.get({"responses": "background", "deepinfra": "webhook"}.get(shape, "")):
        return '"background" and "webhook" leave no answer to wait for; remove them'
    needs_model = provider.names_model and shape not in ("gemini", "deepinfra", "moderations")
    return f'"model" is missing; {provider.name} needs it' if needs_model and not body.get("model") else ""


def wrap_gateway(body: Any, key: str) -> dict[str, str]:
    """The body that a JSON gateway wants: the key as user name, the request as a text."""
    return {"username": key, "request": dumps(body).decode()}


def unwrap_gateway(body: Any) -> tuple[Any, dict[str, Any], str]:
    """The provider's reply inside a gateway's, the credits beside it, and "" or why there is no reply."""
    outer = only(dict, body)
    beside = {name: value for name, value in outer.items() if name.startswith("credits")}
    try:
        return loads(outer["raw"]), beside, ""
    except KeyError:
        return None, beside, f"the gateway answered without `raw`: {one_line(body) or 'no error message'}"
    except (ValueError, TypeError, AttributeError):
        return None, beside, "the gateway's `raw` is no JSON"


def assemble_stream(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """Turn the server-sent events of a chat into the reply that it would have been without "stream".

    An error event is given as it is, to be judged like any error; a stream that broke off is (None, why).
    """
    lines = (line[5:].strip() for line in raw.splitlines() if line.startswith(b"data:"))
    try:
        events = [only(dict, loads(line)) for line in lines if line not in (b"", b"[DONE]")]
        reply = only(dict, joined(events))
    except (ValueError, RecursionError):
        return None, "the stream broke off within an event, or is none"
    for event in events:
        if event.get("error") or ("choices" not in event and error_words(event)[2]):
            return event, ""
    choices = [choice for choice in only(list, reply.get("choices")) if only(dict, choice)]
    if not choices or not all(choice.get("finish_reason") for choice in choices):
        return None, "the stream broke off before a finish reason"
    usage = reply.get("usage") or only(dict, reply.get("x_groq")).get("usage")
    for choice in choices:
        usage = usage or choice.pop("usage", None)  # Moonshot
        told = choice.pop("delta", None) or choice.get("message")
        choice["message"] = {"role": "assistant", "content": None, **only(dict, told)}
        for call in only(list, choice["message"].get("tool_calls")):
            only(dict, call).pop("index", None)
    choices.sort(key=lambda choice: only(int, choice.get("index")))
    return {**reply, "object": "chat.completion", "choices": choices, **({"usage": usage} if usage else {})}, ""


def joined(values: list[Any], name: str = "", *, streamed: bool = False) -> Any:
    """The whole that values are pieces of: lists go on, texts in a delta too, of all else the last one counts."""
    values = [value for value in values if value is not None]
    if values and all(isinstance(value, dict) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        return {n: joined([v.get(n) for v in values], n, streamed=streamed or n == "delta") for n in names}
    if streamed and name not in ("id", "type", "role", "name") and values and all(isinstance(v, str) for v in values):
        return "".join(values)
    if not any(isinstance(value, list) for value in values):
        return next(filter(None, reversed(values)), values[0] if values else None)
    parts: list[list[Any]] = []
    texts = ([{"type": "text", "text": value}] if isinstance(value, str) and value else value for value in values)
    for item in (item for items in texts for item in only(list, items)):
        near = reversed(parts) if "index" in only(dict, item) else parts[-1:]
        part = next((part for part in near if goes_on(only(dict, part[0]), only(dict, item))), None)
        if part is None:
            parts.append(part := [])
        part.append(item)
    return [joined(part, streamed=streamed) for part in parts]


def goes_on(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether an item of a streamed list continues the one that began with `old`."""
    named = only(dict, new.get("function")).get("name")
    if "index" in new or "delta" in new:  # subtle: Gemini gives all calls one index, but each its id
        return old.get("index") == new.get("index") and not (named and new.get("id") not in (None, "", old.get("id")))
    same = new.get("type", old.get("type")) == old.get("type")
    return same and old.get("type") in ("text", "thinking", "function") and not named


def likely_mistake(endpoint: Endpoint, verdict: Verdict, reply: Reply) -> str:
    """What the user has probably done wrong, as a sentence; "" if nothing is known."""
    provider, url = endpoint.provider, urlsplit(endpoint.url)
    if verdict.kind == "no_money":
        return "Top up, raise the spending limit or wait for the new quota, then start again: what is done is kept."
    if verdict.kind == "auth":
        owner = next((name for start, name in KEY_STARTS.items() if re.match(start, endpoint.key)), provider.name)
        looks = f"The key looks like one of {owner}, this is {provider.name}. " if owner != provider.name else ""
        return f"{looks}Check the key ({' or '.join(provider.key_env)}) and {provider.check_key}."
    if re.search("model|deployment", f"{verdict.code} {verdict.message * (reply.status == 404)}", re.IGNORECASE):
        return 'Check "model": the provider does not know it, or the key may not use it.'
    return f"Check --request_url: {url.hostname} has nothing at {url.path}." if reply.status in (404, 405) else ""


if __name__ == "__main__":
    raise SystemExit(main())
