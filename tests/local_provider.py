#!/usr/bin/env python3
"""A local stand-in for LLM providers: real HTTP on loopback, limits and faults.

It speaks the providers' APIs (OpenAI chat, completions, embeddings, responses, moderations, and the event stream of
chat; Anthropic; Gemini and Vertex; DashScope and DeepInfra native; a JSON gateway), each below any URL prefix, enforces
rate limits the way real servers do, and injects faults. Nothing is generated: the answer repeats the question.

As a program (prints `listening on http://127.0.0.1:PORT`, runs until a signal comes):

    python tests/local_provider.py --port 8000 --latency 0.3 --requests_per_minute 6000 --limit_kind second_bucket

From tests:

    async with LocalProvider(Options(latency=0.1, faults={"reset": 0.1})) as provider:
        ... provider.url, provider.stats, provider.options (may be changed while it runs) ...

Over HTTP: `POST /_control` with a JSON object of options changes them (`{"reset": true}` zeroes counters and limits,
`{"outage": "refuse", "outage_seconds": 3}` starts an outage); `GET /_stats` answers the counters.

Tokens are counted by a rule that needs no vocabulary: a quarter of the characters, rounded up, plus 3 per message and 3
per chat; a list of token ids counts its ids; `tokenizer_factor` multiplies the result.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import struct
import sys
import time
import zlib
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field, fields
from heapq import heapify, heapreplace
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

MINUTE = 60.0
MEGABYTE = 1 << 20
REQUEST_ID = "req_local"
MAX_HEAD_BYTES = 256 * 1024  # of one request's headers
CREATED = 1_700_000_000  # a constant, so that equal requests get equal replies

LIMIT_KINDS = ("minute_bucket", "sliding_minute", "second_bucket", "second_slots", "minute_slots")
CHARGES = ("usage", "reserve", "max")
OUTAGES = ("", "refuse", "503", "hang")


@dataclass
class Options:
    """Everything that can be asked of the local provider; 0 or empty means off."""

    # what it is
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    provider: str = ""  # a name of PROVIDERS; "": what the path of each call suggests
    api_key: str = ""  # any other key is answered with the provider's own error
    known_models: list[str] = field(default_factory=list)  # others are answered "model not found"
    batch_provider: str = ""  # it also has the Batch API of this provider (tests/local_batches.py)
    stream_only: bool = False  # refuse chat requests without "stream": true
    seed: int = 0  # of every random draw

    # how fast it answers
    latency: float = 0.0  # median, in seconds
    latency_spread: float = 0.0  # sigma of the lognormal distribution
    refusal_latency: float = 0.01  # of refusals and other errors that need no model
    service_slots: int = 0  # queue mode: this many at a time, `latency` each, the others wait and are never refused

    # limits
    requests_per_minute: float = 0.0
    limit_kind: str = "minute_bucket"
    tokens_per_minute: float = 0.0
    token_limit_kind: str = ""  # "": as limit_kind
    token_charge: str = (
        "usage"  # usage: when the reply is made; reserve: prompt + n * cap on arrival; max: the larger one
    )
    default_max_tokens: int = 1024  # the cap that is reserved for a request that sets none
    max_in_flight: int = 0
    limit_schedule: list[list[float]] = field(default_factory=list)  # [since first call, requests/min, tokens/min] ...
    slot_phase: float = 0.0  # share of the first slot that is over when the first call comes
    count_refused: bool = False  # refused calls use up the request limit too
    headers: str = ""  # comma-separated names of RATE_HEADERS; "": what the provider sends

    # what it answers
    completion_tokens: int = 16  # median, never more than the request's cap
    completion_spread: float = 0.0  # sigma of the lognormal distribution
    cached_tokens: int = 0  # reported as part of the prompt
    tokenizer_factor: float = 1.0
    embedding_dimensions: int = 8
    reasoning: bool = False  # answer with reasoning text; also if the request asks for thinking
    tool_calls: bool = False  # call the request's first tool; also if `tool_choice` demands it
    keep_alive_lines: int = -1  # blank lines before the JSON; -1: what the provider does
    stream_comments: bool = False  # comment lines in event streams
    stream_piece_bytes: int = 0  # cut event streams into pieces of this size, wherever that falls
    gzip: bool = False

    # what goes wrong; a rule of `statuses` is {"contains": text in the body, "times": how often at most}, "latency" in
    # seconds if wanted, and one of "kind": a kind of ERROR_TABLE, "status": number (with "body" and "headers" if it
    # should), "fault": a name of FAULTS, "answer" or "finish": text; the first rule that matches counts
    faults: dict[str, float] = field(default_factory=dict)  # name of FAULTS: share of the accepted calls
    fault_script: list[str] = field(default_factory=list)  # the fault of call 0, 1, ... ("" for none); then `faults`
    statuses: list[dict[str, Any]] = field(default_factory=list)
    outage: str = ""
    outage_schedule: list[list[Any]] = field(default_factory=list)  # [from, to, kind] in seconds after start
    told_wait: float = (
        1.0  # seconds that a refusal asks for when no limit made it (faults, `statuses`); 0: it does not say
    )
    hang_seconds: float = 0.0  # 0: for ever
    trickle_seconds: float = 0.2  # between two bytes
    huge_megabytes: float = 10.0  # of the faults huge and gzip_bomb
    redirect_to: str = ""  # "": a path of our own, counted as followed_redirect

    # what it remembers
    record_calls: bool = False  # time, path, status, sha256 of the body, key header: one object per call
    record_bodies: bool = False  # the body's text and all headers too

    def check(self) -> None:
        """Raise ValueError, saying what is wrong, for names that do not exist."""
        for name, value, known in (
            ("provider", self.provider, ["", *PROVIDERS]),
            ("limit_kind", self.limit_kind, LIMIT_KINDS),
            ("token_limit_kind", self.token_limit_kind, ["", *LIMIT_KINDS]),
            ("token_charge", self.token_charge, CHARGES),
            ("outage", self.outage, OUTAGES),
            *(("headers", mode, ["", *RATE_HEADERS]) for mode in self.headers.split(",")),
            *(("faults", name, FAULTS) for name in self.faults),
            *(("fault_script", name, ["", *FAULTS]) for name in self.fault_script),
            *(("fault", rule.get("fault", ""), ["", *FAULTS]) for rule in self.statuses),
            *(("kind", rule.get("kind", "internal"), ERRORS["openai"]) for rule in self.statuses),
        ):
            if value not in known:
                message = f"{name} must be one of {', '.join(filter(None, known))}, not {value!r}"
                raise ValueError(message)


@dataclass
class Stats:
    """What happened so far; times are those of the event loop's clock, the machine's monotonic one."""

    calls: int = 0
    accepted: int = 0
    refused: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    connections: int = 0
    max_connections: int = 0
    connections_made: int = 0
    tokens_charged: float = 0.0
    started: float = 0.0
    first_call: float = 0.0
    last_accepted: float = 0.0
    paths: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)  # "0" for none
    faults: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)  # by cause: requests, tokens, in_flight, too_large
    calls_seen: list[dict[str, Any]] = field(default_factory=list)


# ==== limits ==========================================================================================================
# Pure: every method is given `now` in seconds. A cost larger than a whole bucket or slot is let in when that is full,
# and what it takes too much is owed by what follows.

SLACK = 1e-6  # forgives rounding; smaller than any cost


class Limit:
    """One limit on requests or tokens; `used` of `room` is taken at the moment that `advance` was told."""

    room = 0.0
    used = 0.0

    def advance(self, now: float) -> None:
        """Give back what time has freed."""
        raise NotImplementedError

    def wait(self, cost: float, now: float) -> float:
        """Return 0 if the cost fits now, else the seconds until it does."""
        raise NotImplementedError

    def change(self, per_minute: float, now: float) -> None:
        """Set another limit; what was used stays used."""
        raise NotImplementedError

    def reset(self, now: float) -> float:
        """Return the seconds until everything is available again."""
        raise NotImplementedError

    def take(self, cost: float, now: float) -> None:
        """Charge a cost."""
        self.advance(now)
        self.used += cost

    def punish(self, cost: float, now: float) -> None:
        """Charge a refused call, which leaves no debt."""
        self.advance(now)
        self.used = max(self.used, min(self.used + cost, self.room))

    def left(self, now: float) -> float:
        """Return what may be taken at once."""
        self.advance(now)
        return max(0.0, self.room - self.used)


class Bucket(Limit):
    """A bucket that holds the given seconds' worth, full at first, refilled continuously."""

    def __init__(self, per_minute: float, seconds: float, now: float) -> None:
        self.seconds = seconds
        self.now = now
        self.change(per_minute, now)

    def advance(self, now: float) -> None:
        self.used = max(0.0, self.used - (now - self.now) * self.room / self.seconds)
        self.now = now

    def wait(self, cost: float, now: float) -> float:
        self.advance(now)
        excess = self.used + min(cost, self.room) - self.room
        return excess * self.seconds / self.room if excess > SLACK else 0.0

    def change(self, per_minute: float, now: float) -> None:
        left = self.left(now)
        self.room = per_minute * self.seconds / MINUTE
        if self.used:  # the level stays, not what is missing
            self.used = max(0.0, self.room - left)

    def reset(self, now: float) -> float:
        self.advance(now)
        return self.used * self.seconds / self.room


class SlidingMinute(Limit):
    """No sixty seconds may hold more than the limit."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.taken: deque[tuple[float, float]] = deque()
        self.change(per_minute, now)

    def advance(self, now: float) -> None:
        while self.taken and self.taken[0][0] <= now - MINUTE:
            self.used -= self.taken.popleft()[1]

    def wait(self, cost: float, now: float) -> float:
        self.advance(now)
        excess = self.used + min(cost, self.room) - self.room
        if excess <= SLACK:
            return 0.0
        for then, amount in self.taken:
            excess -= amount
            if excess <= SLACK:
                return then + MINUTE - now
        return MINUTE

    def take(self, cost: float, now: float) -> None:
        super().take(cost, now)
        self.taken.append((now, cost))

    punish = take

    def change(self, per_minute: float, now: float) -> None:
        self.advance(now)
        self.room = per_minute

    def reset(self, now: float) -> float:
        self.advance(now)
        return self.taken[-1][0] + MINUTE - now if self.taken else 0.0


class Slots(Limit):
    """Fixed slots of the given seconds, each with its share; fractions of a request are carried to a later slot."""

    def __init__(self, per_minute: float, seconds: float, now: float, phase: float = 0.0) -> None:
        self.seconds = seconds
        self.start = now - phase * seconds
        self.slot = 0
        self.share = 0.0
        self.change(per_minute, now)

    def _room(self, slot: int) -> float:
        return math.floor(self.share * (slot + 1) + SLACK) - math.floor(self.share * slot + SLACK)

    def advance(self, now: float) -> None:
        slot = int((now - self.start + SLACK) // self.seconds)
        if slot > self.slot:
            since = math.floor(self.share * slot + SLACK) - math.floor(self.share * self.slot + SLACK)
            self.used = max(0.0, self.used - since)
            self.slot, self.room = slot, self._room(slot)

    def wait(self, cost: float, now: float) -> float:
        self.advance(now)
        slot, room, used = self.slot, self.room, self.used
        while room <= 0 or used + min(cost, room) > room + SLACK:
            used = max(0.0, used - room)
            slot += 1
            room = self._room(slot)
        return max(0.0, self.start + slot * self.seconds - now) if slot > self.slot else 0.0

    def change(self, per_minute: float, now: float) -> None:
        self.advance(now)
        self.share = per_minute * self.seconds / MINUTE
        self.room = self._room(self.slot)

    def reset(self, now: float) -> float:
        self.advance(now)
        return self.start + (self.slot + 1) * self.seconds - now


def make_limit(kind: str, per_minute: float, now: float, phase: float = 0.0) -> Limit:
    """Build a limit of one of LIMIT_KINDS, starting at `now`."""
    if kind == "sliding_minute":
        return SlidingMinute(per_minute, now)
    seconds = 1.0 if kind.startswith("second") else MINUTE
    return Slots(per_minute, seconds, now, phase) if kind.endswith("slots") else Bucket(per_minute, seconds, now)


class Refusal(NamedTuple):
    """Why a call is refused: requests, tokens, in_flight or too_large; wait is None where no time helps."""

    cause: str
    wait: float | None
    limit: float
    requested: float


class Gate:
    """All limits of the server together; it keeps up with changed options and with the schedule."""

    def __init__(self, options: Options, now: float) -> None:
        self.options = options
        self.since = now
        self.key: tuple[Any, ...] = ()
        self.requests: Limit | None = None
        self.tokens: Limit | None = None
        self.per_minute = (0.0, 0.0)

    def refresh(self, now: float) -> None:
        """Apply options and schedule as they are now."""
        options = self.options
        wanted = (options.requests_per_minute, options.tokens_per_minute)
        for since, *limits in options.limit_schedule:
            if now - self.since >= since:
                wanted = (limits[0], limits[1] if len(limits) > 1 else wanted[1])
        kinds = (options.limit_kind, options.token_limit_kind or options.limit_kind)
        if (key := (*wanted, *kinds)) != self.key:
            same_kinds = self.key[2:] == kinds
            self.key, self.per_minute = key, wanted
            self.requests = self._changed(self.requests if same_kinds else None, kinds[0], wanted[0], now)
            self.tokens = self._changed(self.tokens if same_kinds else None, kinds[1], wanted[1], now)

    def _changed(self, limit: Limit | None, kind: str, per_minute: float, now: float) -> Limit | None:
        if per_minute <= 0:
            return None
        if limit is None:
            return make_limit(kind, per_minute, now, self.options.slot_phase)
        limit.change(per_minute, now)
        return limit

    def admit(self, tokens: float, in_flight: int, now: float) -> Refusal | None:
        """Charge one request and its tokens and return None, or say why not; tokens is what is charged on arrival."""
        self.refresh(now)
        options = self.options
        refusal = None
        if options.max_in_flight and in_flight >= options.max_in_flight:
            refusal = Refusal("in_flight", None, options.max_in_flight, 1)
        elif self.tokens and tokens > self.per_minute[1]:
            refusal = Refusal("too_large", None, self.per_minute[1], tokens)
        elif self.requests and (wait := self.requests.wait(1, now)) > 0:
            refusal = Refusal("requests", wait, self.per_minute[0], 1)
        elif self.tokens and (wait := self.tokens.wait(max(1, tokens), now)) > 0:
            refusal = Refusal("tokens", wait, self.per_minute[1], tokens)
        if refusal:
            if options.count_refused and self.requests:
                self.requests.punish(1, now)
            return refusal
        if self.requests:
            self.requests.take(1, now)
        if self.tokens and tokens:
            self.tokens.take(tokens, now)
        return None

    def settle(self, tokens: float, now: float) -> None:
        """Charge the tokens of a reply."""
        if self.tokens and tokens:
            self.tokens.take(tokens, now)

    def show(self, limit: Limit | None, which: int, now: float) -> tuple[float, float, float] | None:
        """Return what headers tell about one of the limits: per minute, left, seconds until reset."""
        return (self.per_minute[which], limit.left(now), limit.reset(now)) if limit else None


def arrival_charge(charge: str, ask: Ask, default_cap: int) -> float:
    """Return the tokens that a server takes off its budget when the request arrives, by one of CHARGES."""
    cap = ask.answers * (default_cap if ask.cap is None else ask.cap) if ask.generates else 0
    if charge == "reserve":
        return ask.prompt_tokens + cap
    return max(cap, ask.characters / 4) if charge == "max" else 0.0


# ==== rate headers ====================================================================================================


class View(NamedTuple):
    """What a reply may tell about the limits: (per minute, left, seconds until reset), and a refusal's wait."""

    requests: tuple[float, float, float] | None
    tokens: tuple[float, float, float] | None
    wait: float | None
    cost: float


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: 350ms, 1.2s, 6m0s, 1h0m2s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < MINUTE:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}h{minutes % 60}m{seconds}s" if minutes >= MINUTE else f"{minutes}m{seconds}s"


def rfc3339(seconds: float) -> str:
    """Return the moment that is so many seconds away, as 2026-01-31T23:59:59Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(math.ceil(time.time() + seconds)))


def openai_headers(view: View) -> Iterator[str]:
    for name, numbers in (("requests", view.requests), ("tokens", view.tokens)):
        if numbers:
            yield f"x-ratelimit-limit-{name}: {numbers[0]:.0f}"
            yield f"x-ratelimit-remaining-{name}: {numbers[1]:.0f}"
            yield f"x-ratelimit-reset-{name}: {duration(numbers[2])}"


def groq_headers(view: View) -> Iterator[str]:
    """Groq uses OpenAI's names, but its requests are per day."""
    daily = view.requests and (view.requests[0] * 1440, view.requests[0] * 1439 + view.requests[1], view.requests[2])
    return openai_headers(view._replace(requests=daily))


def anthropic_headers(view: View) -> Iterator[str]:
    for name, numbers in (("requests", view.requests), ("tokens", view.tokens)):
        if numbers:
            left = numbers[1] if name == "requests" else round(numbers[1], -3)
            yield f"anthropic-ratelimit-{name}-limit: {numbers[0]:.0f}"
            yield f"anthropic-ratelimit-{name}-remaining: {left:.0f}"
            yield f"anthropic-ratelimit-{name}-reset: {rfc3339(numbers[2])}"


def together_headers(view: View) -> Iterator[str]:
    """Together reports per second."""
    for name, numbers in (("ratelimit", view.requests), ("tokenlimit", view.tokens)):
        if numbers:
            yield f"x-{name}-limit: {numbers[0] / MINUTE:g}"
            yield f"x-{name}-remaining: {min(numbers[1], numbers[0] / MINUTE):.0f}"
    if view.requests:
        yield f"x-ratelimit-reset: {view.wait or 0:.3f}"


def mistral_headers(view: View) -> Iterator[str]:
    if view.tokens:
        limit, left, reset = view.tokens
        yield f"x-ratelimitbysize-limit-minute: {limit:.0f}"
        yield f"x-ratelimitbysize-remaining-minute: {left:.0f}"
        yield f"x-ratelimitbysize-limit-month: {limit * 43200:.0f}"
        yield f"x-ratelimitbysize-remaining-month: {limit * 43100:.0f}"
        yield f"ratelimitbysize-limit: {limit:.0f}"
        yield f"ratelimitbysize-reset: {math.ceil(reset)}"
        yield f"ratelimitbysize-query-cost: {view.cost:.0f}"


def plain_headers(view: View) -> Iterator[str]:
    if view.requests:
        yield f"X-RateLimit-Limit: {view.requests[0]:.0f}"
        yield f"X-RateLimit-Remaining: {view.requests[1]:.0f}"
        yield f"X-RateLimit-Reset: {math.ceil(view.requests[2])}"


def retry_after(view: View) -> Iterator[str]:
    if view.wait is not None:
        yield f"retry-after: {math.ceil(view.wait)}"


def retry_after_ms(view: View) -> Iterator[str]:
    if view.wait is not None:
        yield f"retry-after-ms: {math.ceil(view.wait * 1000)}"


def retry_after_date(view: View) -> Iterator[str]:
    if view.wait is not None:
        moment = time.gmtime(math.ceil(time.time() + view.wait))
        yield f"retry-after: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', moment)}"


RATE_HEADERS: dict[str, Callable[[View], Iterable[str]]] = {
    "retry_after": retry_after,
    "retry_after_ms": retry_after_ms,
    "retry_after_date": retry_after_date,
    "openai": openai_headers,
    "anthropic": anthropic_headers,
    "groq": groq_headers,
    "together": together_headers,
    "mistral": mistral_headers,
    "plain": plain_headers,
    "body": lambda _view: (),  # the hint stands in the error's body only
    "none": lambda _view: (),
}


# ==== shapes ==========================================================================================================
# A shape reads a request into an Ask and writes the reply of a Turn.


class BadRequestError(Exception):
    """The request cannot be served; the argument is what the provider would say."""


@dataclass(slots=True)
class Ask:
    """What the server needs to know of a request, in any shape."""

    text: str  # what the last user said
    characters: int
    prompt_tokens: int
    cap: int | None = None
    answers: int = 1
    generates: bool = True


@dataclass(slots=True)
class Turn:
    """One request together with what will be answered."""

    body: dict[str, Any]
    ask: Ask
    model: str
    row: Provider
    options: Options
    answer: str
    output_tokens: int  # of all answers
    finish: str  # stop, length or tool_calls
    reasoning: str
    mark: str  # hexadecimal, the same for the same text

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answers."""
        return self.ask.prompt_tokens + self.output_tokens


def answer_to(text: str) -> str:
    """Return the answer to the text of the last user message, so that a test can tell whose answer it is."""
    return f"You said: {text[:200]} [{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}]"


IMAGE_CHARACTERS = 340  # an image costs 85 tokens
IMAGE_KEYS = ("image_url", "image", "inlineData", "inline_data", "source", "input_audio", "audio")
TEXT_KEYS = ("text", "content", "parts", "thinking", "arguments", "function", "tool_calls", "input", "name")


def measure(value: object) -> int:
    """Return the characters of all text in a message, a list of parts, or a list of token ids."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(measure, value))
    if isinstance(value, dict):
        image = IMAGE_CHARACTERS if any(key in value for key in IMAGE_KEYS) else 0
        return image + sum(measure(value[key]) for key in TEXT_KEYS if key in value)
    return 4 if isinstance(value, int) else 0


def last_text(value: object) -> str:
    """Return the last text in a message's content."""
    if isinstance(value, list):
        return next(filter(None, map(last_text, reversed(value))), "")
    if isinstance(value, dict):
        return last_text(value.get("text") or value.get("content") or value.get("parts"))
    return value if isinstance(value, str) else ""


def ask_messages(messages: object, extra: object = None, field_name: str = "messages") -> Ask:
    """Read a conversation; extra is other text that counts, such as tools."""
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        message = f"'{field_name}' must be a list of at least one message."
        raise BadRequestError(message)
    characters = len(json.dumps(extra)) if extra else 0
    text = ""
    for message in messages:
        content = message.get("content")
        if type(content) is str and len(message) == 2:  # role and content: nearly all there are
            characters += len(content)
            found = content
        else:
            characters += measure(message)
            found = last_text(message)
        if message.get("role", "user") == "user":
            text = found
    return Ask(text, characters, -(-characters // 4) + 3 * len(messages) + 3)


def ask_inputs(value: object, field_name: str) -> tuple[list[Any], int]:
    """Return the inputs of a request that may have one or many (strings or lists of token ids), and its characters."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return [value], measure(value)
    if not isinstance(value, list) or not value or not all(isinstance(item, str | list) for item in value):
        message = f"'{field_name}' must be a string or a list of strings or of token ids."
        raise BadRequestError(message)
    return value, measure(value)


def plain_text(value: object) -> str:
    """Return an input as text, token ids as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def whole(value: object) -> int | None:
    """Return a cap that was given as a positive whole number, else None."""
    return value if isinstance(value, int) and value > 0 else None


def read_chat(body: dict[str, Any]) -> Ask:
    ask = ask_messages(body.get("messages"), body.get("tools") or body.get("functions"))
    ask.cap = whole(body.get("max_completion_tokens")) or whole(body.get("max_tokens"))
    ask.answers = whole(body.get("n")) or 1
    return ask


def tool_names(body: dict[str, Any]) -> list[str]:
    """Return the names of the tools of a chat request, or of one in Anthropic's shape."""
    functions = [tool.get("function", tool) for tool in body.get("tools") or () if isinstance(tool, dict)]
    return [str(function.get("name")) for function in functions if isinstance(function, dict)]


def tool_call(turn: Turn) -> dict[str, Any]:
    arguments = json.dumps({"text": turn.ask.text[:200]})
    function = {"name": tool_names(turn.body)[0], "arguments": arguments}
    return {"id": f"call_{turn.mark}", "type": "function", "function": function}


def usage_openai(turn: Turn) -> dict[str, Any]:
    prompt = turn.ask.prompt_tokens
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": turn.output_tokens}
    reasoning = turn.output_tokens // 2 if turn.reasoning else 0
    return {
        **usage,
        "total_tokens": turn.tokens,
        "prompt_tokens_details": {"cached_tokens": min(prompt, turn.options.cached_tokens)},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def write_chat(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.answer}
    if turn.finish == "tool_calls":
        message |= {"content": None, "tool_calls": [tool_call(turn)]}
    elif turn.reasoning and turn.row.reasoning == "list":
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": turn.reasoning}]}
        message["content"] = [thinking, {"type": "text", "text": turn.answer}]
    if turn.reasoning and turn.row.reasoning.startswith("reasoning"):
        message[turn.row.reasoning] = turn.reasoning
    choices = [{"index": i, "message": message, "finish_reason": turn.finish} for i in range(turn.ask.answers)]
    top = {"id": f"chatcmpl-{turn.mark}", "object": "chat.completion", "created": CREATED, "model": turn.model}
    return {**top, "choices": choices, "usage": usage_openai(turn)}


def read_completions(body: dict[str, Any]) -> Ask:
    inputs, characters = ask_inputs(body.get("prompt"), "prompt")
    answers = len(inputs) * (whole(body.get("best_of")) or whole(body.get("n")) or 1)
    return Ask(plain_text(inputs[-1]), characters, -(-characters // 4), whole(body.get("max_tokens")), answers)


def write_completions(turn: Turn) -> dict[str, Any]:
    prompts, _ = ask_inputs(turn.body["prompt"], "prompt")
    texts = [answer_to(plain_text(prompt)) for prompt in prompts for _ in range(whole(turn.body.get("n")) or 1)]
    choices = [
        {"index": i, "text": text, "logprobs": None, "finish_reason": turn.finish} for i, text in enumerate(texts)
    ]
    top = {"id": f"cmpl-{turn.mark}", "object": "text_completion", "created": CREATED, "model": turn.model}
    return {**top, "choices": choices, "usage": usage_openai(turn)}


def read_embeddings(body: dict[str, Any]) -> Ask:
    inputs, characters = ask_inputs(body.get("input"), "input")
    return Ask(plain_text(inputs[-1]), characters, -(-characters // 4), generates=False)


def embedding_of(text: str, dimensions: int) -> list[float]:
    """Return the vector of a text: numbers in -1 .. 1 that depend on nothing else."""
    seed = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    return [(seed * (2 * i + 3) % 2001 - 1000) / 1000 for i in range(dimensions)]


def write_embeddings(turn: Turn) -> dict[str, Any]:
    inputs, _ = ask_inputs(turn.body["input"], "input")
    dimensions = whole(turn.body.get("dimensions")) or turn.options.embedding_dimensions
    vectors: list[Any] = [embedding_of(plain_text(item), dimensions) for item in inputs]
    if turn.body.get("encoding_format") == "base64":
        from base64 import b64encode  # rarely asked for

        vectors = [b64encode(struct.pack(f"<{dimensions}f", *vector)).decode() for vector in vectors]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": turn.ask.prompt_tokens, "total_tokens": turn.ask.prompt_tokens}
    return {"object": "list", "data": data, "model": turn.model, "usage": usage}


CATEGORIES = (
    "harassment harassment/threatening hate hate/threatening illicit illicit/violent self-harm self-harm/instructions "
    "self-harm/intent sexual sexual/minors violence violence/graphic"
)


def write_moderations(turn: Turn) -> dict[str, Any]:
    inputs, _ = ask_inputs(turn.body["input"], "input")
    parts = {"categories": False, "category_scores": 0.01, "category_applied_input_types": ["text"]}
    result = {"flagged": False, **{part: dict.fromkeys(CATEGORIES.split(), value) for part, value in parts.items()}}
    return {"id": f"modr-{turn.mark}", "model": turn.model, "results": [result for _ in inputs]}


def read_responses(body: dict[str, Any]) -> Ask:
    value = body.get("input")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    ask = ask_messages(value, [body.get("instructions"), body.get("tools")], "input")
    ask.cap = whole(body.get("max_output_tokens"))
    return ask


def write_responses(turn: Turn) -> dict[str, Any]:
    content = [{"type": "output_text", "text": turn.answer, "annotations": []}]
    message = {
        "type": "message",
        "id": f"msg_{turn.mark}",
        "status": "completed",
        "role": "assistant",
        "content": content,
    }
    output: list[dict[str, Any]] = [message]
    if turn.reasoning:
        summary = [{"type": "summary_text", "text": turn.reasoning}]
        output.insert(0, {"type": "reasoning", "id": f"rs_{turn.mark}", "summary": summary})
    short = turn.finish == "length"
    return {
        "id": f"resp_{turn.mark}",
        "object": "response",
        "created_at": CREATED,
        "status": "incomplete" if short else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if short else None,
        "model": turn.model,
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": turn.body.get("tools") or [],
        "usage": {
            "input_tokens": turn.ask.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": min(turn.ask.prompt_tokens, turn.options.cached_tokens),
                "cache_write_tokens": 0,
            },
            "output_tokens": turn.output_tokens,
            "output_tokens_details": {"reasoning_tokens": turn.output_tokens // 2 if turn.reasoning else 0},
            "total_tokens": turn.tokens,
        },
    }


def read_anthropic(body: dict[str, Any]) -> Ask:
    ask = ask_messages(body.get("messages"), [body.get("system"), body.get("tools")])
    ask.cap = whole(body.get("max_tokens"))
    if ask.cap is None:
        message = "max_tokens: Field required"
        raise BadRequestError(message)
    return ask


def write_anthropic(turn: Turn) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": turn.answer}]
    if turn.reasoning:
        content.insert(0, {"type": "thinking", "thinking": turn.reasoning, "signature": turn.mark})
    if turn.finish == "tool_calls":
        name, given = turn.body["tools"][0]["name"], {"text": turn.ask.text[:200]}
        content[-1] = {"type": "tool_use", "id": f"toolu_{turn.mark}", "name": name, "input": given}
    cached = min(turn.ask.prompt_tokens, turn.options.cached_tokens)
    usage = {"input_tokens": turn.ask.prompt_tokens - cached, "output_tokens": turn.output_tokens}
    return {
        "id": f"msg_{turn.mark}",
        "type": "message",
        "role": "assistant",
        "model": turn.model,
        "content": content,
        "stop_reason": {"length": "max_tokens", "tool_calls": "tool_use"}.get(turn.finish, "end_turn"),
        "stop_sequence": None,
        "usage": {**usage, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached},
    }


def read_gemini(body: dict[str, Any]) -> Ask:
    ask = ask_messages(body.get("contents"), [body.get("systemInstruction"), body.get("tools")], "contents")
    config = body.get("generationConfig") or {}
    ask.cap = whole(config.get("maxOutputTokens"))
    ask.answers = whole(config.get("candidateCount")) or 1
    return ask


def write_gemini(turn: Turn) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"text": turn.answer}]
    thoughts = 0
    if turn.reasoning:
        thoughts = turn.output_tokens // 2
        parts.insert(0, {"text": turn.reasoning, "thought": True})
    finish = "MAX_TOKENS" if turn.finish == "length" else "STOP"
    content = {"role": "model", "parts": parts}
    usage = {"promptTokenCount": turn.ask.prompt_tokens, "candidatesTokenCount": turn.output_tokens - thoughts}
    cached = min(turn.ask.prompt_tokens, turn.options.cached_tokens)
    return {
        "candidates": [{"content": content, "finishReason": finish, "index": i} for i in range(turn.ask.answers)],
        "usageMetadata": {
            **usage,
            "thoughtsTokenCount": thoughts,
            "totalTokenCount": turn.tokens,
            **({"cachedContentTokenCount": cached} if cached else {}),
        },
        "modelVersion": turn.model,
        "responseId": turn.mark,
    }


def read_dashscope(body: dict[str, Any]) -> Ask:
    value = body.get("input")
    if not isinstance(value, dict) or not (value.get("messages") or value.get("prompt")):
        message = 'Required parameter "input.messages" or "input.prompt" is missing or invalid.'
        raise BadRequestError(message)
    parameters = body.get("parameters") or {}
    messages = value.get("messages") or [{"role": "user", "content": value["prompt"]}]
    ask = ask_messages(messages, parameters.get("tools"), "input.messages")
    ask.cap = whole(parameters.get("max_tokens"))
    ask.answers = whole(parameters.get("n")) or 1
    return ask


def write_dashscope(turn: Turn) -> dict[str, Any]:
    parameters = turn.body.get("parameters") or {}
    output: dict[str, Any] = {"text": turn.answer, "finish_reason": turn.finish}
    if parameters.get("result_format") == "message" or turn.row.multimodal:
        message: dict[str, Any] = {"role": "assistant", "content": turn.answer}
        if turn.row.multimodal:
            message["content"] = [{"text": turn.answer}]
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        output = {"choices": [{"finish_reason": turn.finish, "message": message} for _ in range(turn.ask.answers)]}
    prompt, generated = turn.ask.prompt_tokens, turn.output_tokens
    usage: dict[str, Any] = {"input_tokens": prompt, "output_tokens": generated, "total_tokens": turn.tokens}
    if turn.options.cached_tokens:
        usage["prompt_tokens_details"] = {"cached_tokens": min(prompt, turn.options.cached_tokens)}
    return {"output": output, "usage": usage, "request_id": turn.mark}


def read_deepinfra(body: dict[str, Any]) -> Ask:
    text = body.get("input")
    if not isinstance(text, str):
        message = "input: field required"
        raise BadRequestError(message)
    cap = whole(body.get("max_new_tokens"))
    return Ask(text, len(text), -(-len(text) // 4), cap, whole(body.get("num_responses")) or 1)


def write_deepinfra(turn: Turn) -> dict[str, Any]:
    status = {"status": "succeeded", "runtime_ms": 10, "cost": turn.tokens / 1e7}
    counts = {"tokens_input": turn.ask.prompt_tokens, "tokens_generated": turn.output_tokens}
    results = [{"generated_text": turn.answer} for _ in range(turn.ask.answers)]
    return {"results": results, "num_tokens": turn.output_tokens, "inference_status": {**status, **counts}}


class Shape(NamedTuple):
    """How requests of one family are read and replies are written."""

    read: Callable[[dict[str, Any]], Ask]
    write: Callable[[Turn], dict[str, Any]]


SHAPES = {
    "chat": Shape(read_chat, write_chat),
    "completions": Shape(read_completions, write_completions),
    "embeddings": Shape(read_embeddings, write_embeddings),
    "responses": Shape(read_responses, write_responses),
    "moderations": Shape(read_embeddings, write_moderations),
    "dashscope": Shape(read_dashscope, write_dashscope),
    "deepinfra": Shape(read_deepinfra, write_deepinfra),
    "anthropic": Shape(read_anthropic, write_anthropic),
    "gemini": Shape(read_gemini, write_gemini),
}


def pieces_of(text: str | None) -> list[str]:
    """Cut a text into about four pieces."""
    step = max(1, -(-len(text or "") // 4))
    return [(text or "")[i : i + step] for i in range(0, len(text or ""), step)]


def deltas_of(message: dict[str, Any], reasoning_field: str) -> Iterator[dict[str, Any]]:
    """Yield the deltas that add up to a chat message."""
    yield {"role": "assistant", "content": None if message["content"] is None else ""}
    for piece in pieces_of(message.get(reasoning_field)):
        yield {reasoning_field: piece}
    content = message["content"]
    if isinstance(content, list):
        for piece in pieces_of(content[0]["thinking"][0]["text"]):
            yield {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": piece}]}]}
        content = content[1]["text"]
    for piece in pieces_of(content):
        yield {"content": piece}
    for i, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        yield {"tool_calls": [{"index": i, **call, "function": {"name": function["name"], "arguments": ""}}]}
        for piece in pieces_of(function["arguments"]):
            yield {"tool_calls": [{"index": i, "function": {"arguments": piece}}]}


def stream_of(reply: dict[str, Any], turn: Turn) -> list[bytes]:
    """Return a chat reply as server-sent events."""
    top = {"id": reply["id"], "object": "chat.completion.chunk", "created": CREATED, "model": reply["model"]}
    with_usage = bool((turn.body.get("stream_options") or {}).get("include_usage"))
    if with_usage:
        top["usage"] = None
    lines = []
    for choice in reply["choices"]:
        number, finish = choice["index"], choice["finish_reason"]
        deltas = [(delta, None) for delta in deltas_of(choice["message"], turn.row.reasoning)]
        for delta, reason in [*deltas, ({}, finish)]:
            lines.append({**top, "choices": [{"index": number, "delta": delta, "finish_reason": reason}]})
    if with_usage:
        lines.append({**top, "choices": [], "usage": reply["usage"]})
    elif not turn.row.stream_options:
        lines[-1]["usage"] = reply["usage"]
    events = [b"data: " + json.dumps(line).encode() + b"\n\n" for line in lines]
    if comment := turn.row.comment or (turn.options.stream_comments and "keep-alive"):
        events[1:1] = [f": {comment}\n\n".encode()]
    return [*events, b"data: [DONE]\n\n"]


# ==== providers =======================================================================================================
# One row per provider; what a row leaves out is as at OpenAI. Adding a provider is adding a row, and its errors if they
# differ.

# The errors by kind, the same kinds for all: status, code ("-" for null, "=" before a number), type, message.
ERROR_TABLE = """
[openai]
requests    429 rate_limit_exceeded requests Rate limit reached for {model} on requests per min (RPM): {figures}.{hint}
tokens      429 rate_limit_exceeded tokens Rate limit reached for {model} on tokens per min (TPM): {figures}.{hint}
too_large   429 rate_limit_exceeded tokens Request too large for {model} on tokens per min (TPM): {figures}.
in_flight   429 rate_limit_exceeded requests Too many concurrent requests.{hint}
ramp        429 slow_down           requests Slow down: your request rate is increasing too quickly.{hint}
auth        401 invalid_api_key      invalid_request_error Incorrect API key provided.
no_money    429 insufficient_quota   insufficient_quota    You exceeded your current quota.
missing     404 model_not_found      invalid_request_error The model `{model}` does not exist.
bad_request 400 -                    invalid_request_error {why}
filtered    400 content_filter       invalid_request_error The request was rejected by the content filter.
overloaded  503 server_is_overloaded server_error          The engine is currently overloaded, please try again later.
internal    500 -                    server_error          The server had an error while processing your request.
path        404 -                    invalid_request_error Invalid URL ({why})
[azure]
requests    429 429                - Requests have exceeded call rate limit of your current pricing tier.{hint}
tokens      429 429                - Requests have exceeded token rate limit of your current pricing tier.{hint}
auth        401 401                - Access denied due to invalid subscription key or wrong API endpoint.
missing     404 DeploymentNotFound - The API deployment for this resource does not exist.
overloaded  429 429                - The system is currently experiencing high demand.
path        404 404                - Resource not found
[dashscope]
requests    429 limit_requests         limit_requests         You exceeded your current requests list.{hint}
tokens      429 insufficient_quota     insufficient_quota     Allocated quota exceeded, please increase it.{hint}
ramp        429 limit_burst_rate       limit_burst_rate       Request rate increased too quickly.{hint}
no_money    400 Arrearage              Arrearage              Please make sure your account is in good standing.
filtered    400 data_inspection_failed data_inspection_failed Input data may contain inappropriate content.
[dashscope/dashscope]
requests    429 Throttling.RateQuota       - Requests rate limit exceeded, please try again later.{hint}
tokens      429 Throttling.AllocationQuota - Allocated quota exceeded, please increase it.{hint}
in_flight   429 Throttling                 - Requests throttling triggered.{hint}
ramp        429 Throttling.BurstRate       - Request rate increased too quickly.{hint}
too_large   400 InvalidParameter           - Range of input length should be [1, {limit}]
auth        401 InvalidApiKey              - Invalid API-key provided.
no_money    400 Arrearage                  - Please make sure your account is in good standing.
missing     404 ModelNotFound              - Model not exist.
bad_request 400 InvalidParameter           - {why}
filtered    400 DataInspectionFailed       - Input data may contain inappropriate content.
overloaded  503 ModelServingError          - Too many requests, please try again later.
internal    500 InternalError              - An internal error has occured, please try again later.
[deepinfra]
requests    429 - - Rate limited
tokens      429 - - Rate limited
in_flight   429 - - Rate limited
auth        401 - - User is not authenticated
no_money    402 - - Payment required
missing     404 - - Model is not available
[deepseek]
in_flight   429 rate_limit_reached    rate_limit_error     Rate limit reached.{hint}
auth        401 invalid_request_error authentication_error Authentication Fails (governor)
no_money    402 invalid_request_error unknown_error        Insufficient Balance
overloaded  503 -                     server_error         Service is too busy.
[moonshot]
requests    429 - rate_limit_reached_error     Your account reached max RPM: {limit}.{hint}
tokens      429 - rate_limit_reached_error     Your account reached TPM rate limit: {limit}.{hint}
in_flight   429 - rate_limit_reached_error     Your account reached max concurrency: {limit}.
auth        401 - invalid_authentication_error Invalid Authentication
no_money    429 - exceeded_current_quota_error You exceeded your current token quota.
missing     404 - resource_not_found_error     Not found the model {model} or Permission denied
filtered    400 - content_filter               The request was rejected because it was considered high risk
overloaded  429 - engine_overloaded_error      The engine is currently overloaded.
[ark]
requests    429 ModelAccountRpmRateLimitExceeded  TooManyRequests     RPM limit exceeded.{hint}
tokens      429 ModelAccountTpmRateLimitExceeded  TooManyRequests     TPM limit exceeded.{hint}
in_flight   429 InflightBatchsizeExceeded         TooManyRequests     In-flight limit exceeded.
ramp        429 RequestBurstTooFast               TooManyRequests     Requests grow too fast.
auth        401 AuthenticationError               Unauthorized        The API key is missing or invalid.
no_money    403 AccountOverdueError               Forbidden           The account has an overdue balance.
missing     404 InvalidEndpointOrModel.NotFound   NotFound            The endpoint {model} does not exist.
bad_request 400 InvalidParameter                  BadRequest          {why}
filtered    400 InputTextSensitiveContentDetected BadRequest          The input may contain sensitive text.
overloaded  429 ServerOverloaded                  TooManyRequests     The service is overloaded.
internal    500 InternalServiceError              InternalServerError Internal error.
[baichuan]
requests    429 rate_limit_exceeded  rate_limit_error      Rate limit reached for requests.{hint}
no_money    429 insufficient_balance invalid_request_error insufficient balance
[zhipu]
requests    429 1302 - Rate limit reached for requests.{hint}
tokens      429 1303 - Token rate limit reached.{hint}
in_flight   429 1302 - Too much concurrency for this account.{hint}
ramp        429 1305 - Too many requests for this model, please try again later.
auth        401 1000 - Authentication failed
no_money    429 1113 - Your account is in arrears, please recharge.
missing     400 1211 - The model does not exist, please check the model code.
bad_request 400 1210 - {why}
filtered    400 1301 - The input or output may contain unsafe or sensitive content.
overloaded  429 1312 - The model is under heavy load, please try again later.
internal    500 500  - Internal error
[jiekou]
requests    429 429 rate_limit RPM limit exceeded.{hint}
no_money    403 403 billing    balance not enough
overloaded  429 429 overload   server overload
[mistral]
requests    429 1300 rate_limited                   Rate limit exceeded
tokens      429 1300 rate_limited                   Rate limit exceeded
auth        401 -    unauthorized                   Unauthorized
bad_request 422 -    invalid_request_error          {why}
missing     400 1500 invalid_model                  Invalid model: {model}
overloaded  429 3505 service_tier_capacity_exceeded Service tier capacity exceeded for this model.
[gemini]
requests    429 PerMinute          RESOURCE_EXHAUSTED You exceeded your current quota, please check your plan.{hint}
tokens      429 PerMinute          RESOURCE_EXHAUSTED You exceeded your current quota for input tokens.{hint}
in_flight   429 -                  RESOURCE_EXHAUSTED Resource has been exhausted (e.g. check quota).
ramp        429 -                  RESOURCE_EXHAUSTED Resource exhausted. Please try again later.
auth        400 API_KEY_INVALID    INVALID_ARGUMENT   API key not valid. Please pass a valid API key.
no_money    429 -                  RESOURCE_EXHAUSTED Your prepayment credits are depleted.
missing     404 -                  NOT_FOUND          models/{model} is not found for API version v1beta.
bad_request 400 -                  INVALID_ARGUMENT   {why}
too_large   400 -                  INVALID_ARGUMENT   The input token count exceeds the maximum.
overloaded  503 -                  UNAVAILABLE        The model is overloaded. Please try again later.
internal    500 -                  INTERNAL           An internal error has occurred.
filtered    200 PROHIBITED_CONTENT -                  -
[vertex: gemini]
requests    429 -                             RESOURCE_EXHAUSTED Resource exhausted. Please try again later.
tokens      429 -                             RESOURCE_EXHAUSTED Resource exhausted. Please try again later.
auth        401 ACCESS_TOKEN_TYPE_UNSUPPORTED UNAUTHENTICATED    Request had invalid authentication credentials.
[anthropic]
requests    429 - rate_limit_error      This request would exceed your limit of {limit} requests per minute.{hint}
tokens      429 - rate_limit_error      This request would exceed your limit of {limit} input tokens per minute.{hint}
in_flight   429 - rate_limit_error      Number of concurrent connections has exceeded your rate limit.{hint}
ramp        429 - rate_limit_error      This request would exceed your acceleration limit.{hint}
too_large   413 - request_too_large     Request exceeds the maximum size
auth        401 - authentication_error  invalid x-api-key
no_money    402 - billing_error         Your credit balance is too low to access the Anthropic API.
missing     404 - not_found_error       model: {model}
path        404 - not_found_error       Not Found
bad_request 400 - invalid_request_error {why}
filtered    400 - invalid_request_error Output blocked by content filtering policy
overloaded  529 - overloaded_error      Overloaded
internal    500 - api_error             Internal server error
[siliconflow]
requests    429 -      -      Request was rejected due to rate limiting. Details: RPM limit reached.{hint}
tokens      429 -      -      Request was rejected due to rate limiting. Details: TPM limit reached.{hint}
auth        401 -      string Invalid token
path        404 -      text   404 page not found
no_money    403 =30001 -      Sorry, your account balance is insufficient
missing     400 =20012 -      Model does not exist. Please check it carefully.
bad_request 400 =20015 -      {why}
overloaded  503 =50505 -      Model service overloaded. Please try again later.
internal    500 =50507 -      Unknown error, please retry.
[openrouter]
auth        401 - - No auth credentials found
no_money    402 - - Insufficient credits
filtered    403 - - The input was flagged by moderation
[together]
requests    429 rate_limit   rate_limit            You have reached the rate limit specific to this model.{hint}
too_large   403 context      invalid_request_error prompt and max_tokens exceed the context length.
no_money    402 credit_limit credit_limit          Your account has reached its monthly spending limit.
[groq]
too_large   413 rate_limit_exceeded tokens Request too large for {model} on tokens per min (TPM): {figures}.
overloaded  498 capacity_exceeded   flex   Flex tier capacity exceeded.
[local]
overloaded  503 =503 unavailable_error Loading model
missing     404 =404 NotFoundError     The model `{model}` does not exist.
auth        401 =401 Unauthorized      Unauthorized
"""
REFUSALS = ("requests", "tokens", "in_flight", "too_large", "ramp")


class ErrorWords(NamedTuple):
    """One row of the table of errors."""

    status: int
    code: str | int | None
    type: str
    message: str


def read_errors(table: str) -> dict[str, dict[str, ErrorWords]]:
    """Read the table: "[name]" starts a provider, which has OpenAI's errors where it has no own, or another's named."""
    found: dict[str, dict[str, ErrorWords]] = {}
    rows: dict[str, ErrorWords] = {}
    for line in table.strip().splitlines():
        if line.startswith("["):
            name, _, other = line.strip("[]").partition(": ")
            rows = found[name] = dict(found.get(other or "openai", {}))
        else:
            kind, status, code, type_, message = line.split(None, 4)
            own_code = int(code[1:]) if code.startswith("=") else code
            rows[kind] = ErrorWords(
                int(status), None if code == "-" else own_code, type_.strip("-"), message.strip("-")
            )
    return found


ERRORS = read_errors(ERROR_TABLE)


class Provider(NamedTuple):
    """How one provider differs from OpenAI."""

    errors: str  # a heading of ERROR_TABLE
    envelope: str = "openai"  # a name of ENVELOPES
    headers: str = "none"  # names of RATE_HEADERS
    keys: tuple[str, ...] = ("authorization",)  # headers that may hold the key
    reasoning: str = "reasoning_content"  # field of a chat message, or "list"
    comment: str = ""  # of event streams
    keep_alive_lines: int = 0
    multimodal: bool = False
    request_id: str = ""  # the header that names the call
    stream_options: bool = True  # a stream tells its usage if asked to; others tell it unasked and refuse the question


# A name with a slash is the row of that provider's native shape.
PROVIDERS: dict[str, Provider] = {
    "openai": Provider(
        "openai", headers="openai,retry_after_ms,retry_after,body", reasoning="", request_id="x-request-id"
    ),
    "azure": Provider(
        "azure",
        envelope="azure",
        headers="openai,retry_after,retry_after_ms,body",
        keys=("api-key", "authorization"),
        reasoning="",
    ),
    "dashscope": Provider("dashscope"),
    "dashscope/dashscope": Provider("dashscope/dashscope", envelope="flat"),
    "dashscope/multimodal": Provider("dashscope/dashscope", envelope="flat", multimodal=True),
    "deepinfra": Provider("deepinfra", envelope="text_in_error"),
    "deepseek": Provider("deepseek", comment="keep-alive", keep_alive_lines=2),
    "moonshot": Provider("moonshot", headers="plain"),
    "ark": Provider("ark", headers="retry_after"),
    "baichuan": Provider("baichuan"),
    "zhipu": Provider("zhipu", envelope="code_message"),
    "jiekou": Provider("jiekou"),
    "mistral": Provider("mistral", envelope="object", headers="mistral", reasoning="list", stream_options=False),
    "gemini": Provider("gemini", envelope="google_list", headers="body", reasoning=""),
    "gemini/gemini": Provider("gemini", envelope="google", headers="body", keys=("x-goog-api-key", "?key")),
    "vertex": Provider("vertex", envelope="google_list", reasoning=""),
    "vertex/gemini": Provider("vertex", envelope="google"),
    "vertex/anthropic": Provider("vertex", envelope="google"),
    "anthropic": Provider(
        "anthropic",
        envelope="anthropic",
        headers="anthropic,retry_after",
        keys=("x-api-key", "authorization"),
        request_id="request-id",
    ),
    "infinigence": Provider("openai"),
    "siliconflow": Provider("siliconflow", envelope="data"),
    "openrouter": Provider(
        "openrouter",
        envelope="status_code",
        headers="plain,retry_after",
        reasoning="reasoning",
        comment="OPENROUTER PROCESSING",
    ),
    "together": Provider("together", headers="together", reasoning="reasoning"),
    "groq": Provider("groq", headers="groq,retry_after,body", reasoning="reasoning"),
    "local": Provider("local", envelope="status_code", reasoning="reasoning"),
    "json_gateway": Provider("openai", envelope="text_in_error", keys=("username",), reasoning=""),
}
NATIVE_ROWS = {"anthropic": "anthropic", "gemini": "gemini/gemini", "dashscope": "dashscope/dashscope"}


class Problem(NamedTuple):
    """One error as a provider words it."""

    kind: str
    status: int
    code: str | int | None
    type: str
    message: str
    wait: float | None = None  # for bodies that tell it


def google_error(error: Problem) -> dict[str, Any]:
    """See https://cloud.google.com/apis/design/errors: details hold the reason, the quota, and the delay."""
    if error.kind == "filtered":
        return {
            "promptFeedback": {"blockReason": error.code},
            "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 1},
        }
    prefix = "type.googleapis.com/google.rpc."
    details: list[dict[str, Any]] = []
    if error.status == 429 and error.code:
        quota = f"GenerateRequests{error.code}PerProjectPerModel"
        details.append({"@type": f"{prefix}QuotaFailure", "violations": [{"quotaId": quota}]})
        if error.wait is not None:
            details.append({"@type": f"{prefix}RetryInfo", "retryDelay": f"{math.ceil(error.wait)}s"})
    elif error.code:
        details.append({"@type": f"{prefix}ErrorInfo", "reason": error.code, "domain": "googleapis.com"})
    body = {"code": error.status, "message": error.message, "status": error.type}
    return {"error": {**body, "details": details} if details else body}


def google_list_error(error: Problem) -> Any:
    """What Google's OpenAI-shaped endpoint makes of it."""
    if error.kind != "filtered":
        return [google_error(error)]
    choice = {"index": 0, "message": {"role": "assistant"}, "finish_reason": f"content_filter: {error.code}"}
    return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def azure_error(error: Problem) -> dict[str, Any]:
    body: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.kind == "filtered":
        body |= {"status": 400, "innererror": {"code": "ResponsibleAIPolicyViolation"}}
    return {"error": body}


def openai_error(error: Problem) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": None, "code": error.code}}


ENVELOPES: dict[str, Callable[[Problem], Any]] = {
    "openai": openai_error,
    "azure": azure_error,
    "google": google_error,
    "google_list": google_list_error,
    "anthropic": lambda error: {
        "type": "error",
        "error": {"type": error.type, "message": error.message},
        "request_id": REQUEST_ID,
    },
    "flat": lambda error: {"code": error.code, "message": error.message, "request_id": "local"},
    "object": lambda error: {
        "object": "error",
        "message": error.message,
        "type": error.type,
        "param": None,
        "code": error.code,
    },
    "code_message": lambda error: {"error": {"code": error.code, "message": error.message}},
    "status_code": lambda error: {"error": {"code": error.status, "message": error.message, "type": error.type}},
    "data": lambda error: {"code": error.code, "message": error.message, "data": None},
    "text_in_error": lambda error: {"error": error.message},
}


class Route(NamedTuple):
    """What a path means."""

    shape: str
    row: Provider
    gateway: bool
    model: str


# Parts of a path ("$" is its end) that tell the provider when no --provider is given; the first match wins.
PATH_PROVIDERS = {
    "/openai/deployments/": "azure",
    "/services/aigc/": "dashscope",
    "/compatible-mode/": "dashscope",
    "/v1/inference/": "deepinfra",
    "/projects/": "vertex",
    "/v1beta/": "gemini",
    ":generateContent$": "gemini",
    "/api/v3/": "ark",
    "/paas/v4/": "zhipu",
    "/maas/v1/": "infinigence",
    "/messages$": "anthropic",
    "/gpt$": "json_gateway",
    "/claude$": "json_gateway",
}
PATH_SHAPES = {
    "/chat/completions$": "chat",
    "/completions$": "completions",
    "/embeddings$": "embeddings",
    "/responses$": "responses",
    "/moderations$": "moderations",
    "/messages$": "anthropic",
    ":rawPredict$": "anthropic",
    ":generateContent$": "gemini",
    "-generation/generation$": "dashscope",
    "/v1/inference/": "deepinfra",
    "/gpt$": "chat",
    "/claude$": "anthropic",
}


def find_route(path: str, provider: str) -> tuple[Route | None, Provider]:
    """Return the route of a path (None if there is nothing) and the row whose errors are used."""
    name = provider or next((name for part, name in PATH_PROVIDERS.items() if part in path + "$"), "openai")
    shape = next((shape for part, shape in PATH_SHAPES.items() if part in path + "$"), "")
    row = PROVIDERS.get(f"{name}/{shape}") or PROVIDERS[name]
    gateway = name == "json_gateway"
    if "/multimodal-generation/" in path:
        row = PROVIDERS["dashscope/multimodal"]
    elif shape in NATIVE_ROWS and not gateway and f"{name}/{shape}" not in PROVIDERS:
        row = PROVIDERS[NATIVE_ROWS[shape]]
    model = ""
    for marker in ("/deployments/", "/v1/inference/", "/models/"):
        if marker in path:
            model = path.partition(marker)[2]
    model = model.partition(":")[0] if shape != "deepinfra" else model
    model = model.partition("/")[0] if "/deployments/" in path else model
    return (Route(shape, row, gateway, model) if shape else None), row


# ==== faults ==========================================================================================================
# A fault spoils the answer of a call that was accepted and would have succeeded.


@dataclass(slots=True)
class Call:
    """One request as it came in."""

    number: int
    head: Head
    raw: bytes
    row: Provider
    model: str = ""
    key: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)  # of Options.statuses
    record: dict[str, Any] | None = None


@dataclass(slots=True)
class Answer:
    """One reply as it goes out."""

    status: int
    body: bytes
    row: Provider
    delay: float = 0.0
    content_type: str = "application/json"
    headers: str = ""  # lines, each with its line end
    accepted: bool = False
    tokens: float = 0.0  # charged when it is made
    wait: float | None = None  # what a refusal tells
    shown: int | None = None  # only so many bytes of the body are sent
    pieces: Iterable[bytes] | None = None  # instead of the body
    events: list[bytes] | None = None  # of a stream
    interval: float = 0.0  # between two pieces
    ending: str = ""  # close, reset, or hang
    headless: bool = False  # not even a status line


def spoil_kind(kind: str, status: int = 0) -> Callable[[LocalProvider, Call, Answer], None]:
    """Make a fault that answers the provider's own error of a kind, with the given status if any."""

    def spoil(server: LocalProvider, call: Call, answer: Answer) -> None:
        error = server.problem(call, kind, status=status)
        answer.status, answer.body, answer.events, answer.tokens = error.status, error.body, None, 0
        answer.content_type = error.content_type
        if kind in REFUSALS:
            answer.delay, answer.wait = error.delay, error.wait

    return spoil


def spoil_text(text: str, content_type: str = "application/json") -> Callable[[LocalProvider, Call, Answer], None]:
    """Make a fault that answers 200 with a fixed text."""

    def spoil(_server: LocalProvider, _call: Call, answer: Answer) -> None:
        answer.body, answer.content_type, answer.events = text.encode(), content_type, None

    return spoil


def spoil_reset(_server: LocalProvider, _call: Call, answer: Answer) -> None:
    answer.headless, answer.ending = True, "reset"


def spoil_early_close(_server: LocalProvider, _call: Call, answer: Answer) -> None:
    answer.headless, answer.ending, answer.delay = True, "close", 0.0


def spoil_hang(server: LocalProvider, _call: Call, answer: Answer) -> None:
    if server.options.hang_seconds:
        answer.delay += server.options.hang_seconds
    else:
        answer.headless, answer.ending, answer.delay = True, "hang", 0.0


def spoil_truncated(_server: LocalProvider, _call: Call, answer: Answer) -> None:
    answer.shown, answer.ending = len(answer.body) // 2, "close"
    if answer.events:
        answer.events = answer.events[: len(answer.events) // 2]


def spoil_trickle(server: LocalProvider, _call: Call, answer: Answer) -> None:
    answer.events, body = None, answer.body
    answer.pieces, answer.interval = (body[i : i + 1] for i in range(len(body))), server.options.trickle_seconds


def big_pieces(server: LocalProvider, answer: Answer) -> list[bytes]:
    """Return the JSON reply with many megabytes of one letter in front, in pieces (one object, many times)."""
    megabytes = max(1, round(server.options.huge_megabytes))
    return [b'{"filler": "', *[b"a" * MEGABYTE] * megabytes, b'", ' + answer.body[1:]]


def spoil_huge(server: LocalProvider, _call: Call, answer: Answer) -> None:
    answer.pieces, answer.events = big_pieces(server, answer), None


def spoil_gzip_bomb(server: LocalProvider, _call: Call, answer: Answer) -> None:
    """Compress one megabyte once: after a full flush, a deflate block may be repeated."""
    first, *middle, last = big_pieces(server, answer)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = [packer.compress(first) + packer.flush(zlib.Z_FULL_FLUSH)]
    packed += [packer.compress(middle[0]) + packer.flush(zlib.Z_FULL_FLUSH)] * len(middle)
    crc = size = 0
    for piece in (first, *middle, last):
        crc, size = zlib.crc32(piece, crc), size + len(piece)
    end = packer.compress(last) + packer.flush() + struct.pack("<LL", crc, size & 0xFFFFFFFF)
    answer.pieces, answer.events = [b"\x1f\x8b\x08\0\0\0\0\0\0\xff", *packed, end], None
    answer.headers += "Content-Encoding: gzip\r\n"


def spoil_redirect(server: LocalProvider, _call: Call, answer: Answer) -> None:
    target = server.options.redirect_to or f"{server.url}/_redirected"
    answer.status, answer.body, answer.events, answer.tokens = 307, b"", None, 0
    answer.headers += f"Location: {target}\r\n"


def spoil_echo_key(server: LocalProvider, call: Call, answer: Answer) -> None:
    error = server.problem(call, "internal", message=f"Internal error while serving the key {call.key!r}")
    answer.status, answer.body, answer.events, answer.tokens = error.status, error.body, None, 0


def spoil_echo_key_200(_server: LocalProvider, call: Call, answer: Answer) -> None:
    key = json.dumps(call.key).encode()[1:-1]
    answer.body = answer.body.replace(b"You said: ", b"You, who hold the key " + key + b", said: ")


def spoil_error_200(server: LocalProvider, call: Call, answer: Answer) -> None:
    answer.body = server.problem(call, "internal").body
    if answer.events:
        answer.events[len(answer.events) // 2 :] = [b"data: " + answer.body + b"\n\n"]


def spoil_stream_cut(_server: LocalProvider, _call: Call, answer: Answer) -> None:
    """End the stream properly, but before a finish reason was sent."""
    if answer.events:
        answer.events = [event for event in answer.events if b'"delta": {}' not in event][:-1]


def spoil_no_raw(_server: LocalProvider, call: Call, answer: Answer) -> None:
    answer.body, answer.events = json.dumps({"request": call.body.get("request")}).encode(), None


FAULTS: dict[str, Callable[[LocalProvider, Call, Answer], None]] = {
    "error_500": spoil_kind("internal", 500),
    "error_429": spoil_kind("requests", 429),
    "error_503": spoil_kind("overloaded", 503),
    "reset": spoil_reset,
    "hang": spoil_hang,
    "truncated": spoil_truncated,
    "html_200": spoil_text("<!DOCTYPE html><html><body><h1>Welcome</h1></body></html>", "text/html"),
    "error_200": spoil_error_200,
    "trickle": spoil_trickle,
    "huge": spoil_huge,
    "gzip_bomb": spoil_gzip_bomb,
    "redirect": spoil_redirect,
    "echo_key": spoil_echo_key,
    "echo_key_200": spoil_echo_key_200,
    "bad_json": spoil_text('{"choices": [{"message": {"content": "cut'),
    "empty": spoil_text(""),
    "early_close": spoil_early_close,
    "wrong_content_type": lambda _server, _call, answer: setattr(answer, "content_type", "text/plain"),
    "stream_cut": spoil_stream_cut,
    "no_raw": spoil_no_raw,
}


# ==== http ============================================================================================================


class Head(NamedTuple):
    """The head of an HTTP request."""

    method: str
    path: str
    query: str
    headers: dict[str, str]  # names in lower case
    length: int
    chunked: bool
    close: bool
    proxied: bool  # asked for with the whole URL


def parse_head(data: bytes) -> Head:
    """Parse a request line and its headers; raise ValueError if it is no HTTP/1 request."""
    first, *lines = data.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    proxied = not target.startswith("/")
    if proxied:
        target = "/" + target.partition("://")[2].partition("/")[2]
    path, _, query = target.partition("?")
    if "%" in path:
        from urllib.parse import unquote  # rarely needed

        path = unquote(path)
    chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    close = headers.get("connection", "").lower() == "close" or version == "HTTP/1.0"
    return Head(method, path, query, headers, int(headers.get("content-length", 0)), chunked, close, proxied)


def chunk(data: bytes) -> bytes:
    """Frame one piece of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One client: requests are read one after the other, each is answered before the next is looked at."""

    __slots__ = ("answer", "body", "counted", "head", "paused", "pending", "pieces", "server", "timer", "transport")

    def __init__(self, server: LocalProvider) -> None:
        self.server = server
        self.transport: Any = None
        self.pending = b""  # what came and was not looked at
        self.head: Head | None = None  # of the request that is being read or answered
        self.body: bytearray | None = None  # of the request that is being read
        self.answer: Answer | None = None
        self.pieces: Iterator[bytes] | None = None  # still to be written
        self.timer: asyncio.TimerHandle | None = None
        self.paused = False
        self.counted = False  # in stats.in_flight

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.server.connections.add(self)
        stats = self.server.stats
        stats.connections_made += 1
        stats.connections = len(self.server.connections)
        stats.max_connections = max(stats.max_connections, stats.connections)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self.timer:
            self.timer.cancel()
        self.pieces = None
        self.leave()
        self.server.connections.discard(self)
        self.server.stats.connections = len(self.server.connections)

    def leave(self) -> None:
        """No longer count as in flight."""
        if self.counted:
            self.counted = False
            self.server.stats.in_flight -= 1

    def data_received(self, data: bytes) -> None:
        if self.body is not None:
            self.body += data
            self.read_body()
        elif self.head is not None:  # still busy with the request before
            self.pending += data
        else:
            self.read_head(self.pending + data if self.pending else data)

    def read_head(self, data: bytes) -> None:
        """Start a request, if its head is complete."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.pending = data
            if len(data) > MAX_HEAD_BYTES:
                self.transport.abort()
            return
        try:
            head = self.head = self.server.head_of(data[:end])
        except ValueError:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.transport.close()
            return
        end += 4
        if not head.chunked and len(data) >= end + head.length:
            self.pending = data[end + head.length :]
            self.server.serve(self, head, data[end : end + head.length])
            return
        self.pending = b""
        if head.headers.get("expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.body = bytearray(data[end:])
        self.read_body()

    def read_body(self) -> None:
        """Serve the request if its body is complete."""
        head, body = self.head, self.body
        if head is None or body is None:
            return
        if not head.chunked:
            if len(body) >= head.length:
                self.pending = bytes(body[head.length :])
                self.body = None
                self.server.serve(self, head, bytes(memoryview(body)[: head.length]))
        elif body.endswith(b"0\r\n\r\n") and (whole_body := unchunk(body)) is not None:
            self.body = None
            self.server.serve(self, head, whole_body)

    def reply(self, answer: Answer) -> None:
        """Send the answer when its time has come."""
        self.answer = answer
        if answer.accepted:
            stats = self.server.stats
            self.counted = True
            stats.in_flight += 1
            stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        if answer.delay > 0:
            self.timer = self.server.loop.call_later(answer.delay, self.deliver)
        else:
            self.deliver()

    def deliver(self) -> None:
        """Write the answer, all at once unless it comes in pieces."""
        answer, self.timer = self.answer, None
        if answer is None or self.transport.is_closing():
            return
        headers = self.server.final_headers(answer)
        if answer.row.request_id:
            headers += f"{answer.row.request_id}: {REQUEST_ID}\r\n"
        if answer.headless:
            self.end()
            return
        reason = "OK" if answer.status == 200 else "Error"
        length = f"Content-Length: {len(answer.body)}" if answer.pieces is None else "Transfer-Encoding: chunked"
        start = f"HTTP/1.1 {answer.status} {reason}\r\nContent-Type: {answer.content_type}\r\n{length}\r\n{headers}\r\n"
        if answer.pieces is None:
            self.transport.write(start.encode("latin-1") + answer.body[: answer.shown])
            self.end()
            return
        self.transport.write(start.encode("latin-1"))
        self.pieces = iter(answer.pieces)
        self.pump()

    def pump(self) -> None:
        """Write the next pieces: one by one if there is an interval, else as fast as the client reads."""
        self.timer = None
        if self.pieces is None or self.answer is None:
            return
        for piece in self.pieces:
            self.transport.write(chunk(piece))
            if self.answer.interval:
                self.timer = self.server.loop.call_later(self.answer.interval, self.pump)
                return
            if self.paused:
                return
        self.pieces = None
        if not self.answer.ending:
            self.transport.write(b"0\r\n\r\n")
        self.end()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.pieces is not None and self.timer is None:
            self.pump()

    def end(self) -> None:
        """Finish the request and look at the next one."""
        answer, head = self.answer, self.head
        if answer is None or answer.ending == "hang":
            return
        self.leave()
        self.answer = self.head = None
        if answer.ending == "reset":
            linger = struct.pack("ii", 1, 0) if os.name != "nt" else struct.pack("hh", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()
        elif answer.ending == "close" or (head and head.close):
            self.transport.close()
        elif self.pending:
            self.read_head(self.pending)


def unchunk(body: bytearray) -> bytes | None:
    """Return the content of a chunked body, None if it is not complete."""
    parts: list[bytes] = []
    position = 0
    while (end := body.find(b"\r\n", position)) >= 0:
        size = int(bytes(body[position:end]).split(b";")[0], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(bytes(body[end + 2 : end + 2 + size]))
        position = end + size + 4
    return None


class LocalProvider:
    """The server: `async with LocalProvider(Options(...)) as provider`."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.options.check()
        self.stats = Stats()
        self.connections: set[Connection] = set()
        self.port = self.options.port
        self.loop: asyncio.AbstractEventLoop
        self._server: asyncio.Server | None = None
        self._holder: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._heads: dict[bytes, Head] = {}
        self._routes: dict[tuple[str, str], tuple[Route | None, Provider]] = {}
        self._batches: Any = None
        self._forget()

    def _forget(self) -> None:
        """Start the random draws, limits and rules anew."""
        seed = self.options.seed
        self._latencies, self._faults = Random(seed), Random(seed + 1)
        self._gate: Gate | None = None
        self._service: list[float] = []
        self._rule_uses: Counter[int] = Counter()

    @property
    def url(self) -> str:
        """The base URL, without a path."""
        return f"http://{self.options.host}:{self.port}"

    # ---- life

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, and plan the outages."""
        raise_file_limit()
        self.loop = asyncio.get_running_loop()
        self.stats.started = self.loop.time()
        await self._listen()
        for start, end, kind in self.options.outage_schedule:
            self._timers.append(self.loop.call_later(start, self.set_outage, kind, end - start))
        if self.options.outage == "refuse":
            self.set_outage("refuse")

    async def stop(self) -> None:
        """Close everything at once."""
        for timer in self._timers:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        self._close()
        if self._holder:
            self._holder.close()
        await asyncio.sleep(0)

    async def _listen(self) -> None:
        listener = socket.socket()
        listener.setblocking(False)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.options.host, self.port))
        self.port = listener.getsockname()[1]
        if sys.platform == "linux" and not self._holder:
            # subtle: a second socket that never listens keeps the port ours during an outage; a client that connects
            # to a free port of the ephemeral range could otherwise be given that very port and meet itself
            self._holder = socket.socket()
            self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._holder.bind((self.options.host, self.port))
        self._server = await self.loop.create_server(lambda: Connection(self), sock=listener, backlog=16384)

    def _close(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.transport.abort()

    def set_outage(self, kind: str, seconds: float = 0.0) -> None:
        """Begin an outage of one of OUTAGES, for some seconds if given; "" ends it."""
        self.options.outage = kind
        if kind == "refuse":
            self._close()
        elif not self._server and not self._tasks:
            task = self.loop.create_task(self._listen())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if kind and seconds > 0:
            self._timers.append(self.loop.call_later(seconds, self.set_outage, ""))

    def change(self, changes: Mapping[str, Any]) -> None:
        """Change options by name, as /_control does; raise ValueError or TypeError for what does not exist."""
        values = dict(changes)
        reset, seconds = values.pop("reset", False), values.pop("outage_seconds", 0.0)
        Options(**{**{item.name: getattr(self.options, item.name) for item in fields(Options)}, **values}).check()
        for name, value in values.items():
            setattr(self.options, name, value)
        if reset:
            self.stats = Stats(started=self.loop.time(), in_flight=self.stats.in_flight)
            self._forget()
        if "outage" in values:  # later, so that the one who asks gets an answer
            self._timers.append(self.loop.call_later(0.05, self.set_outage, values["outage"], seconds))

    # ---- one call

    def head_of(self, data: bytes) -> Head:
        """Parse a head; clients send the same few again and again."""
        head = self._heads.get(data)
        if head is None:
            if len(self._heads) >= 1000:
                self._heads.clear()
            head = self._heads[data] = parse_head(data)
        return head

    def serve(self, connection: Connection, head: Head, raw: bytes) -> None:
        """Answer one request."""
        if head.path.startswith("/_"):
            connection.reply(self._own_path(head, raw))
            return
        now = self.loop.time()
        stats = self.stats
        if not stats.calls:
            stats.first_call = now
        if self._gate is None:
            self._gate = Gate(self.options, now)
        found = self._routes.get((head.path, self.options.provider))
        if found is None:
            found = self._routes[head.path, self.options.provider] = find_route(head.path, self.options.provider)
        if self.options.batch_provider and found[0] is None:
            connection.reply(self._batch_answer(head, raw, found[1]))
            return
        call = Call(stats.calls, head, raw, found[1])
        stats.calls += 1
        stats.paths[head.path] += 1
        if self.options.record_calls:
            self._record(call, now)
        answer = self._decide(call, found[0], now)
        status = 0 if answer.headless else answer.status
        stats.statuses[str(status)] += 1
        if call.record:
            call.record["status"] = status
        connection.reply(answer)

    def _batch_answer(self, head: Head, raw: bytes, row: Provider) -> Answer:
        """Answer a call to the Batch API, whose state machine is imported at the first one."""
        if self._batches is None:
            sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - a run as a program
            from tests.local_batches import Batches, BatchOptions

            self._batches = Batches(BatchOptions(provider=self.options.batch_provider, api_key=self.options.api_key))
        path = f"{head.path}?{head.query}" if head.query else head.path
        status, headers, body = self._batches.handle(head.method, path, head.headers, bytes(raw), time.time())
        return Answer(status, body, row, content_type=headers.get("Content-Type", "application/json"))

    def _decide(self, call: Call, route: Route | None, now: float) -> Answer:
        options = self.options
        if options.outage:
            return self._outage_answer(call)
        if route is None or call.head.method != "POST":
            status = 0 if route is None else 405
            return self.problem(call, "path", why=f"{call.head.method} {call.head.path}", status=status)
        try:
            call.body = json.loads(call.raw)
            body = json.loads(call.body["request"]) if route.gateway else call.body
            if not isinstance(body, dict):
                return self.problem(call, "bad_request", why="The body must be a JSON object.")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return self.problem(call, "bad_request", why=f"We could not parse the JSON body of your request: {error}")
        call.model = route.model or str(body.get("model", ""))
        call.key = key_of(call)
        if options.api_key and call.key != options.api_key:
            return self.problem(call, "auth")
        call.rule = self._rule_for(call)
        if "status" in call.rule or "kind" in call.rule:
            return self._ruled(call, call.rule)
        if options.known_models and call.model not in options.known_models:
            return self.problem(call, "missing")
        if why := objection(call, route, body, options):
            return self.problem(call, "bad_request", why=why)
        try:
            ask = SHAPES[route.shape].read(body)
        except (BadRequestError, AttributeError) as error:
            return self.problem(call, "bad_request", why=str(error))
        ask.prompt_tokens = max(1, round(ask.prompt_tokens * options.tokenizer_factor))
        return self._admitted(call, route, body, ask, now)

    def _outage_answer(self, call: Call) -> Answer:
        if self.options.outage == "503":
            return self.problem(call, "overloaded", status=503)
        return Answer(0, b"", call.row, headless=True, ending="hang")

    def _rule_for(self, call: Call) -> dict[str, Any]:
        """Return the first of the `statuses` rules that this call meets, an empty one if there is none."""
        for rule in self.options.statuses:
            spent = self._rule_uses[id(rule)] >= rule.get("times", math.inf)
            if not spent and rule.get("contains", "").encode() in call.raw:
                return rule
        return {}

    def _ruled(self, call: Call, rule: dict[str, Any]) -> Answer:
        """Return the answer that a rule fixes."""
        self._rule_uses[id(rule)] += 1
        status = rule.get("status", 0)
        kind = rule.get("kind") or KIND_OF_STATUS.get(status, "internal")
        answer = self.problem(call, kind, status=status, why="The request cannot be served.")
        if "body" in rule:
            body = rule["body"]
            answer.body = (body if isinstance(body, str) else json.dumps(body)).encode()
            answer.content_type = "text/plain" if isinstance(body, str) else "application/json"
        headers = dict(rule.get("headers", {}))
        answer.content_type = headers.pop("Content-Type", answer.content_type)
        answer.headers += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        answer.delay = rule.get("latency", answer.delay)
        return answer

    def _admitted(self, call: Call, route: Route, body: dict[str, Any], ask: Ask, now: float) -> Answer:
        """Let the call through the limits and answer it, or refuse it."""
        options, stats, gate = self.options, self.stats, self._gate
        assert gate  # made with the first call
        charge = arrival_charge(options.token_charge, ask, options.default_max_tokens)
        if refusal := gate.admit(charge, stats.in_flight, now):
            stats.refused += 1
            stats.refusals[refusal.cause] += 1
            return self.problem(call, refusal.cause, refusal=refusal)
        if call.rule:
            self._rule_uses[id(call.rule)] += 1
        stats.accepted += 1
        stats.last_accepted = now
        stats.tokens_charged += charge
        turn = self._turn(call, route, body, ask)
        reply = SHAPES[route.shape].write(turn)
        if route.gateway:
            raw = json.dumps(reply)
            credits_ = {"credits_consumed": f"{turn.tokens / 1000:.3f}", "credits_total": "1000.000"}
            reply = {"request": call.body["request"], "raw": raw, **credits_}
        answer = Answer(200, json.dumps(reply).encode(), call.row, self._latency(now), accepted=True)
        answer.tokens = turn.tokens if options.token_charge == "usage" else 0
        answer.delay = call.rule.get("latency", answer.delay)
        if body.get("stream") is True and route.shape == "chat" and not route.gateway:
            answer.events = stream_of(reply, turn)
        fault = call.rule.get("fault") or self._pick_fault(call.number)
        if fault:
            stats.faults[fault] += 1
            FAULTS[fault](self, call, answer)
        self._shape_delivery(answer, call)
        return answer

    def _turn(self, call: Call, route: Route, body: dict[str, Any], ask: Ask) -> Turn:
        """Decide what the answer is; the same for the same request."""
        options = self.options
        mark = zlib.crc32(ask.text.encode("utf-8", "surrogatepass"))
        wanted: float = options.completion_tokens
        if options.completion_spread:
            spread = Random(mark ^ options.seed).gauss(0, options.completion_spread)
            wanted = max(1, round(wanted * math.exp(spread)))
        if not ask.generates:
            wanted = 0
        finish = "stop" if ask.cap is None or wanted <= ask.cap else "length"
        tokens = int(wanted if ask.cap is None else min(wanted, ask.cap))
        thinks = options.reasoning or any(map(body.get, ("thinking", "enable_thinking", "reasoning_effort")))
        choice = body.get("tool_choice")
        demanded = choice == "required" or (isinstance(choice, dict) and choice.get("type") not in ("auto", "none"))
        if route.shape in ("chat", "anthropic") and (options.tool_calls or demanded) and tool_names(body):
            finish = "tool_calls"
        return Turn(
            body=body,
            ask=ask,
            model=call.model,
            row=call.row,
            options=options,
            answer=call.rule.get("answer") or answer_to(ask.text),
            output_tokens=tokens * ask.answers,
            finish=call.rule.get("finish") or finish,
            reasoning=f"The user said something of {len(ask.text)} characters." if thinks else "",
            mark=f"{mark:08x}",
        )

    def _pick_fault(self, number: int) -> str:
        script, faults = self.options.fault_script, self.options.faults
        if number < len(script):
            return script[number]
        if faults:
            draw = self._faults.random()
            for name, rate in faults.items():
                draw -= rate
                if draw < 0:
                    return name
        return ""

    def _latency(self, now: float) -> float:
        """Draw how long the answer takes; in queue mode, the wait for a service slot included."""
        options = self.options
        latency = options.latency
        if latency and options.latency_spread:
            latency *= math.exp(self._latencies.gauss(0, options.latency_spread))
        if not options.service_slots:
            return latency
        if len(self._service) != options.service_slots:
            busy = sorted(self._service, reverse=True)[: options.service_slots]
            self._service = busy + [now] * (options.service_slots - len(busy))
            heapify(self._service)
        finish = max(now, self._service[0]) + latency
        heapreplace(self._service, finish)
        return finish - now

    def _shape_delivery(self, answer: Answer, call: Call) -> None:
        """Turn streams, keep-alive lines and compression into pieces and bytes."""
        options = self.options
        if answer.events is not None and not answer.headless:
            data, size = b"".join(answer.events), options.stream_piece_bytes
            answer.content_type = "text/event-stream"
            pieces = [data[i : i + size] for i in range(0, len(data), size)] if size else answer.events
            answer.pieces, answer.delay = pieces, answer.delay / 2
            answer.interval = answer.delay / len(pieces)
        elif answer.status == 200 and answer.pieces is None and answer.shown is None and not answer.headless:
            lines = options.keep_alive_lines if options.keep_alive_lines >= 0 else call.row.keep_alive_lines
            if lines:
                answer.pieces, answer.interval = [*[b"\n"] * lines, answer.body], answer.delay / lines
                answer.delay = 0.0
            elif options.gzip and "gzip" in call.head.headers.get("accept-encoding", ""):
                packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS | 16)
                answer.body = packer.compress(answer.body) + packer.flush()
                answer.headers += "Content-Encoding: gzip\r\n"

    def problem(
        self,
        call: Call,
        kind: str,
        *,
        why: str = "",
        status: int = 0,
        message: str = "",
        refusal: Refusal | None = None,
    ) -> Answer:
        """Return the provider's own error of a kind of ERRORS."""
        row = call.row
        own_status, code, type_, words = ERRORS[row.errors][kind]
        wait = refusal.wait if refusal else ((self.options.told_wait or None) if kind in REFUSALS else None)
        in_body = "body" in (self.options.headers or row.headers).split(",")
        hint = f" Please try again in {duration(wait)}." if in_body and wait is not None else ""
        limit, requested = (refusal.limit, refusal.requested) if refusal else (0, 0)
        figures = f"Limit {limit:.0f}, Requested {requested:.0f}"
        message = message or words.format(model=call.model, why=why, hint=hint, figures=figures, limit=f"{limit:.0f}")
        error = Problem(kind, status or own_status, code, type_, message, wait if in_body else None)
        content_type = "application/json"
        if type_ == "text":
            body, content_type = message.encode(), "text/plain"
        else:
            content = message if type_ == "string" else ENVELOPES[row.envelope](error)
            body = json.dumps(content).encode()
        return Answer(error.status, body, row, self.options.refusal_latency, content_type, wait=wait)

    def final_headers(self, answer: Answer) -> str:
        """Charge the reply, and return its headers, with the limits as they are at this moment."""
        stats, gate = self.stats, self._gate
        if gate is None:
            return answer.headers
        now = self.loop.time()
        if answer.tokens:
            gate.settle(answer.tokens, now)
            stats.tokens_charged += answer.tokens
        modes = self.options.headers or answer.row.headers
        if modes == "none" or not (answer.accepted or answer.wait is not None):
            return answer.headers
        shown = (gate.show(gate.requests, 0, now), gate.show(gate.tokens, 1, now))
        view = View(*shown, answer.wait, answer.tokens)
        lines = [line for mode in modes.split(",") for line in RATE_HEADERS[mode](view)]
        return answer.headers + "".join(f"{line}\r\n" for line in lines)

    # ---- what tests look at

    def _record(self, call: Call, now: float) -> None:
        from hashlib import sha256

        headers = call.head.headers
        names = ("authorization", "x-api-key", "api-key", "x-goog-api-key")
        call.record = {
            "time": now,
            "path": call.head.path,
            "status": 0,
            "sha256": sha256(call.raw).hexdigest(),
            "key": next((f"{name}: {headers[name]}" for name in names if name in headers), ""),
            "proxied": call.head.proxied,
        }
        if self.options.record_bodies:
            call.record |= {"body": call.raw.decode("utf-8", "replace"), "headers": headers}
        self.stats.calls_seen.append(call.record)

    def _own_path(self, head: Head, raw: bytes) -> Answer:
        """Serve /_stats and /_control; anything else was reached through a redirect."""
        row = PROVIDERS["openai"]
        if head.path == "/_stats":
            return Answer(200, json.dumps(vars(self.stats)).encode(), row)
        if head.path != "/_control":
            self.stats.paths["followed_redirect"] += 1
            return Answer(404, b"{}", row)
        try:
            self.change(json.loads(raw or b"{}"))
        except (ValueError, TypeError) as error:
            return Answer(400, json.dumps({"error": str(error)}).encode(), row)
        return Answer(200, json.dumps(vars(self.options)).encode(), row)


KIND_OF_STATUS = {
    400: "bad_request",
    401: "auth",
    402: "no_money",
    403: "auth",
    404: "missing",
    429: "requests",
    503: "overloaded",
}


def key_of(call: Call) -> str:
    """Return the key, from where the provider wants it."""
    headers = call.head.headers
    for place in call.row.keys:
        if place == "username":
            return str(call.body.get("username", ""))
        if place == "?key" and "key=" in call.head.query:
            return call.head.query.partition("key=")[2].partition("&")[0]
        if place in headers:
            scheme, _, key = headers[place].rpartition(" ")
            return key if place != "authorization" or scheme.lower() == "bearer" else ""
    return ""


def objection(call: Call, route: Route, body: dict[str, Any], options: Options) -> str:
    """Return what a provider would say to a request that lacks something; "" if nothing."""
    if not call.model:
        return "you must provide a model parameter"
    versioned = "anthropic-version" in call.head.headers or route.gateway
    if route.shape == "anthropic" and call.row.envelope == "anthropic" and not versioned:
        return "anthropic-version: header is required"
    if options.stream_only and route.shape == "chat" and body.get("stream") is not True:
        return "This model only support stream mode, please enable the stream parameter to access the model."
    if "stream_options" in body and not call.row.stream_options:
        return "Extra inputs are not permitted: stream_options"
    if body.get("stream") and route.shape != "chat":
        return "stream: the local provider streams chat only"
    return ""


def raise_file_limit() -> None:
    """Let this process have as many connections as the system allows."""
    try:
        import resource  # POSIX only
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 65536, 10240):  # macOS refuses "unlimited"
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            continue
        return


# ==== command line ====================================================================================================


def parse_arguments(argv: list[str] | None) -> tuple[Options, Any]:
    """Make a flag of every option, and one of every fault."""
    from argparse import ArgumentParser  # not needed as a library

    parser = ArgumentParser(description="A local stand-in for LLM providers; its file explains every option.")
    plain = Options()
    readers: dict[object, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    for item in fields(Options):
        default = getattr(plain, item.name)
        if item.type == "bool":
            parser.add_argument(f"--{item.name}", action="store_true")
        elif item.type in readers:
            parser.add_argument(
                f"--{item.name}", type=readers[item.type], default=default, help=f"default: {default!r}"
            )
        else:
            parser.add_argument(f"--{item.name}", type=json.loads, default=default, help="JSON", metavar="JSON")
    for name in FAULTS:
        parser.add_argument(f"--{name}", type=float, metavar="RATE", help=f"rate of the fault {name}")
    parser.add_argument("--port_file", default="", help="write the port to this file once listening")
    parser.add_argument(
        "--exit_with_parent", action="store_true", help="stop when the process that started this is gone"
    )
    arguments = parser.parse_args(argv)
    values = {item.name: getattr(arguments, item.name) for item in fields(Options)}
    rates = {name: rate for name in FAULTS if (rate := getattr(arguments, name)) is not None}
    try:
        options = Options(**{**values, "faults": {**values["faults"], **rates}})
        options.check()
    except ValueError as error:
        parser.error(str(error))
    return options, arguments


async def run(options: Options, port_file: str, parent: int) -> None:
    """Serve until a signal comes or the parent process (0: nobody) is gone."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    if os.name == "posix":
        from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, signal  # not all exist elsewhere

        loop.add_signal_handler(SIGTERM, done.set)
        for number in (SIGINT, SIGHUP):
            if parent:
                signal(number, SIG_IGN)  # Ctrl-C is for the parent, which may still finish what it has sent
            else:
                loop.add_signal_handler(number, done.set)
    async with LocalProvider(options) as provider:
        if port_file:
            temporary = f"{port_file}.{os.getpid()}"
            with open(temporary, "w", encoding="ascii") as file:  # noqa: ASYNC230, PTH123 - tiny; pathlib is slow to import
                file.write(f"{provider.port}\n")
            os.replace(temporary, port_file)  # noqa: PTH105
        print(f"listening on {provider.url}", flush=True)
        while not done.is_set() and (not parent or os.getppid() == parent):
            try:
                await asyncio.wait_for(done.wait(), 0.5 if parent else None)
            except TimeoutError:
                continue


def main(argv: list[str] | None = None) -> int:
    """Run as a program."""
    parent = os.getppid()
    options, arguments = parse_arguments(argv)
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        from uvloop import new_event_loop  # optional, twice as fast
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(run(options, arguments.port_file, parent if arguments.exit_with_parent else 0))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"local provider: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
