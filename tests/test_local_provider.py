"""The local provider: its limits, its faults, and the families of APIs that it speaks."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import pytest

from tests.local_provider import (
    ERRORS,
    FAULTS,
    LIMIT_KINDS,
    PROVIDERS,
    RATE_HEADERS,
    Ask,
    Gate,
    LocalProvider,
    Options,
    Slots,
    View,
    answer_to,
    arrival_charge,
    duration,
    embedding_of,
    find_route,
    make_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PROGRAM = Path(__file__).with_name("local_provider.py")
CHAT = "/v1/chat/completions"
KEY = "sk-a-key-for-tests"


# ==== a client that sees everything ===================================================================================


class Got(NamedTuple):
    """What came back: status 0 if the connection ended without a reply."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def as_bytes(path: str, body: Any, headers: dict[str, str], method: str = "POST") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "x", "Authorization": f"Bearer {KEY}", "Content-Length": str(len(data)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


async def read_reply(reader: asyncio.StreamReader) -> Got:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode().strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    status, body = int(first.split()[1]), b""
    try:
        if headers.get("transfer-encoding") != "chunked":
            return Got(status, headers, await reader.readexactly(int(headers["content-length"])), complete=True)
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        return Got(status, headers, body, complete=False)
    return Got(status, headers, body, complete=True)


async def post(
    server: LocalProvider, body: Any, path: str = CHAT, headers: dict[str, str] | None = None, method: str = "POST"
) -> Got:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(as_bytes(path, body, headers or {}, method))
        return await read_reply(reader)
    except asyncio.IncompleteReadError:
        return Got(0, {}, b"", complete=False)
    finally:
        writer.close()


def with_server(options: Options, scenario: Callable[[LocalProvider], Awaitable[Any]]) -> Any:
    """Run a scenario against a server; return what it returns."""

    async def run() -> Any:
        async with LocalProvider(options) as server:
            return await scenario(server)

    return asyncio.run(run())


def once(options: Options, body: Any = None, path: str = CHAT, headers: dict[str, str] | None = None) -> Got:
    got = with_server(options, lambda server: post(server, body or chat(), path, headers))
    assert isinstance(got, Got)
    return got


# ==== limits: pure, with a clock of our own ===========================================================================


def accepted_per_second(kind: str, per_minute: float, offered_per_second: int, seconds: int) -> list[int]:
    limit = make_limit(kind, per_minute, 0.0)
    counts = [0] * seconds
    for step in range(seconds * offered_per_second):
        now = step / offered_per_second
        if limit.wait(1, now) == 0:
            limit.take(1, now)
            counts[int(now)] += 1
    return counts


def test_minute_bucket_is_full_at_first_and_refills_evenly() -> None:
    """A minute's worth passes at once, then the even rate."""
    counts = accepted_per_second("minute_bucket", 600, 1000, 20)
    assert counts[0] == 609
    assert set(counts[1:]) == {10}


def test_sliding_minute_frees_what_is_a_minute_old() -> None:
    """The whole limit passes at once, and again when a minute is over."""
    counts = accepted_per_second("sliding_minute", 600, 1000, 62)
    assert counts[0] == 600
    assert sum(counts[1:60]) == 0
    assert counts[60] == 600


def test_second_bucket_allows_one_second_of_burst() -> None:
    """A sixtieth of the limit passes at once, then the even rate."""
    counts = accepted_per_second("second_bucket", 600, 1000, 5)
    assert counts == [19, 10, 10, 10, 10]


def test_second_slots_hold_exactly_their_share() -> None:
    """Each second has its share, and a fraction is carried to a later one."""
    assert accepted_per_second("second_slots", 600, 1000, 4) == [10, 10, 10, 10]
    assert accepted_per_second("second_slots", 90, 1000, 4) == [1, 2, 1, 2]
    assert accepted_per_second("second_slots", 30, 1000, 4) == [0, 1, 0, 1]


def test_minute_slots_start_anew_each_minute() -> None:
    """A slot's share passes at once, whenever in the minute it comes."""
    counts = accepted_per_second("minute_slots", 600, 1000, 121)
    assert [count for count in counts if count] == [600, 600, 600]
    late = make_limit("minute_slots", 600, 0.0, phase=0.75)
    late.take(600, 0.0)
    assert late.wait(1, 0.0) == pytest.approx(15)


@pytest.mark.parametrize("kind", LIMIT_KINDS)
@pytest.mark.parametrize("per_minute", [30, 100, 6000])
def test_wait_is_true(kind: str, per_minute: float) -> None:
    """Whoever waits as long as told is let in, and not much sooner."""
    limit = make_limit(kind, per_minute, 0.0)
    now = 0.0
    for _ in range(400):
        if wait := limit.wait(1, now):
            assert limit.wait(1, now + wait * 0.99) > 0
            now += wait
            assert limit.wait(1, now + 1e-9) == 0
        limit.take(1, now)
    assert now >= 60 * 400 / per_minute - 60.001


@pytest.mark.parametrize("kind", LIMIT_KINDS)
def test_large_cost_passes_when_full_and_is_owed(kind: str) -> None:
    """What is larger than a bucket or slot is let in once it is full, and the mean rate holds all the same."""
    limit = make_limit(kind, 6000, 0.0)
    now = 0.0
    for _ in range(10):
        now += limit.wait(5000, now)
        assert limit.wait(5000, now) == 0
        limit.take(5000, now)
    assert 60 * 45000 / 6000 - 60 <= now <= 60 * 10


@pytest.mark.parametrize("kind", LIMIT_KINDS)
def test_limit_may_change_and_tells_what_is_left(kind: str) -> None:
    """A lower limit holds from now on; left and reset fit what was taken."""
    limit = make_limit(kind, 6000, 0.0)
    full = limit.left(0.0)
    limit.take(40, 0.0)
    assert limit.left(0.0) == pytest.approx(full - 40)
    assert 0 < limit.reset(0.0) <= 60
    limit.change(600, 0.0)
    assert limit.left(0.0) <= 600
    limit.change(6000, 0.0)
    limit.punish(10_000, 0.0)
    assert limit.left(0.0) == 0
    assert limit.wait(1, 0.0) > 0


def test_gate_checks_every_limit_and_follows_its_schedule() -> None:
    """Each cause of refusal has its name, and the schedule changes the limit since the first call."""
    options = Options(requests_per_minute=60, tokens_per_minute=1000, max_in_flight=5, limit_kind="second_bucket")
    options.limit_schedule = [[0, 60, 1000], [10, 600, 1000]]
    gate = Gate(options, 0.0)
    assert gate.admit(10, 0, 0.0) is None
    causes = [gate.admit(1, 5, 0.0), gate.admit(2000, 0, 0.0), gate.admit(1, 0, 0.0), gate.admit(900, 0, 1.0)]
    assert [refusal and refusal.cause for refusal in causes] == ["in_flight", "too_large", "requests", None]
    tokens = gate.admit(10, 0, 3.0)
    assert tokens
    assert tokens.cause == "tokens"
    assert tokens.wait == pytest.approx(52.0, abs=1)
    gate.refresh(10.0)
    assert list(gate.per_minute) == [600, 1000]
    assert isinstance(make_limit("second_slots", 1, 0.0), Slots)


def test_refused_calls_may_count() -> None:
    """With count_refused, a client that never pauses never gets in again."""
    options = Options(requests_per_minute=60, limit_kind="second_bucket", count_refused=True)
    gate = Gate(options, 0.0)
    passed = [gate.admit(0, 0, step / 10) is None for step in range(100)]
    assert sum(passed) == 1
    assert gate.admit(0, 0, 12.0) is None


def test_tokens_charged_on_arrival() -> None:
    """Usage charges nothing, reserve prompt and cap, max the larger of cap and characters."""
    ask = Ask("", characters=400, prompt_tokens=100, cap=50, answers=3)
    assert [arrival_charge(charge, ask, 1024) for charge in ("usage", "reserve", "max")] == [0, 250, 150]
    ask.cap, ask.answers = None, 1
    assert arrival_charge("reserve", ask, 1024) == 1124
    ask.generates = False
    assert [arrival_charge(charge, ask, 1024) for charge in ("reserve", "max")] == [100, 100]


# ==== headers =========================================================================================================


def test_durations() -> None:
    """Durations are written as OpenAI writes them."""
    assert [duration(seconds) for seconds in (0.35, 1.2, 360, 3662)] == ["350ms", "1.2s", "6m0s", "1h1m2s"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("retry_after", {"retry-after": "2"}),
        ("retry_after_ms", {"retry-after-ms": "1500"}),
        ("openai", {"x-ratelimit-limit-requests": "60", "x-ratelimit-reset-tokens": "6m0s"}),
        ("groq", {"x-ratelimit-limit-requests": "86400", "x-ratelimit-remaining-tokens": "1234"}),
        ("anthropic", {"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-tokens-remaining": "1000"}),
        ("together", {"x-ratelimit-limit": "1", "x-tokenlimit-limit": "100", "x-ratelimit-reset": "1.500"}),
        ("mistral", {"x-ratelimitbysize-limit-minute": "6000", "ratelimitbysize-reset": "360"}),
        ("plain", {"X-RateLimit-Limit": "60", "X-RateLimit-Reset": "60"}),
        ("body", {}),
    ],
)
def test_rate_headers(mode: str, expected: dict[str, str]) -> None:
    """Each provider's headers carry the same figures in its own way."""
    view = View((60, 0, 59.2), (6000, 1234, 360), 1.5, 10)
    headers = dict(line.split(": ", 1) for line in RATE_HEADERS[mode](view))
    assert {name: headers[name] for name in expected} == expected


def test_moments_are_rounded_up() -> None:
    """HTTP dates and RFC 3339 times never lie before the moment meant."""
    view = View((60, 0, 5.0), None, 5.0, 0)
    date = dict(line.split(": ", 1) for line in RATE_HEADERS["retry_after_date"](view))["retry-after"]
    moment = time.strptime(date, "%a, %d %b %Y %H:%M:%S GMT")
    lines = dict(line.split(": ", 1) for line in RATE_HEADERS["anthropic"](view))
    other = time.strptime(lines["anthropic-ratelimit-requests-reset"], "%Y-%m-%dT%H:%M:%SZ")
    assert 0 <= time.mktime(other) - time.mktime(moment) <= 1


# ==== families ========================================================================================================

NATIVE = {"input": {"messages": [{"role": "user", "content": "hello"}]}, "model": "m"}
CLAUDE = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
GOOGLE = {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}
ANTHROPIC = {"x-api-key": KEY, "anthropic-version": "2023-06-01", "Authorization": ""}
GOOGLE_KEY = {"x-goog-api-key": KEY, "Authorization": ""}
GATEWAY = {"username": KEY, "request": json.dumps(chat())}

# provider, path, body, headers: one for each row of the table
CALLS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "openai": (CHAT, chat(), {}),
    "azure": ("/openai/deployments/m/chat/completions?api-version=1", chat(), {"api-key": KEY, "Authorization": ""}),
    "dashscope": ("/compatible-mode/v1/chat/completions", chat(), {}),
    "dashscope/dashscope": ("/api/v1/services/aigc/text-generation/generation", NATIVE, {}),
    "dashscope/multimodal": ("/api/v1/services/aigc/multimodal-generation/generation", NATIVE, {}),
    "deepinfra": ("/v1/inference/org/m", {"input": "hello"}, {"Authorization": f"bearer {KEY}"}),
    "deepseek": ("/chat/completions", chat(), {}),
    "moonshot": (CHAT, chat(), {}),
    "ark": ("/api/v3/chat/completions", chat(), {}),
    "baichuan": (CHAT, chat(), {}),
    "zhipu": ("/api/paas/v4/chat/completions", chat(), {}),
    "jiekou": ("/openai/v1/chat/completions", chat(), {}),
    "mistral": (CHAT, chat(), {}),
    "gemini": ("/v1beta/openai/chat/completions", chat(), {}),
    "gemini/gemini": ("/v1beta/models/m:generateContent", GOOGLE, GOOGLE_KEY),
    "vertex": ("/v1/projects/p/locations/l/endpoints/openapi/chat/completions", chat(), {}),
    "vertex/gemini": ("/v1/projects/p/locations/l/publishers/google/models/m:generateContent", GOOGLE, {}),
    "vertex/anthropic": ("/v1/projects/p/locations/l/publishers/anthropic/models/m:rawPredict", CLAUDE, {}),
    "anthropic": ("/v1/messages", CLAUDE, ANTHROPIC),
    "infinigence": ("/maas/v1/chat/completions", chat(), {}),
    "siliconflow": (CHAT, chat(), {}),
    "openrouter": ("/api/v1/chat/completions", chat(), {}),
    "together": (CHAT, chat(), {}),
    "groq": ("/openai/v1/chat/completions", chat(), {}),
    "local": (CHAT, chat(), {}),
    "json_gateway": ("/gpt", GATEWAY, {"Authorization": ""}),
}


def answer_of(reply: Any) -> str:
    """Find the answer in a reply of any family."""
    if "raw" in reply:
        reply = json.loads(reply["raw"])
    found = json.dumps(reply, ensure_ascii=False)
    return answer_to("hello") if answer_to("hello") in found else found


def test_every_provider_answers_and_words_its_own_errors() -> None:
    """Each row of the table: an answer, a refusal, a wrong key, as that provider does it."""
    assert set(CALLS) == set(PROVIDERS)

    async def scenario(server: LocalProvider) -> None:
        for name, (path, body, headers) in CALLS.items():
            server.change({"reset": True, "provider": name.partition("/")[0], "requests_per_minute": 1, "api_key": KEY})
            row = PROVIDERS[name]
            good = await post(server, body, path, headers)
            assert good.status == 200, (name, good)
            assert answer_of(good.json) == answer_to("hello"), name
            refused = await post(server, body, path, headers)
            assert refused.status == ERRORS[row.errors]["requests"].status == 429
            code = ERRORS[row.errors]["requests"].code
            assert not code or str(code) in refused.body.decode() or row.envelope in ("status_code", "text_in_error")
            server.change({"api_key": "another"})
            wrong = await post(server, body, path, headers)
            assert wrong.status == ERRORS[row.errors]["auth"].status
            assert KEY not in wrong.body.decode()
        assert server.stats.refused == 1

    with_server(Options(refusal_latency=0), scenario)


def test_every_kind_of_error_can_be_asked_for() -> None:
    """All rows have all kinds, and each makes a body."""

    async def scenario(server: LocalProvider) -> None:
        for name in ("openai", "anthropic", "gemini/gemini", "siliconflow", "zhipu"):
            path, body, headers = CALLS[name]
            for kind, error in ERRORS[PROVIDERS[name].errors].items():
                server.change({"provider": name.partition("/")[0], "statuses": [{"kind": kind}]})
                got = await post(server, body, path, headers)
                assert got.status == error.status
                assert got.body

    with_server(Options(refusal_latency=0), scenario)
    assert {len(errors) for errors in ERRORS.values()} == {len(ERRORS["openai"])}


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        ("zhipu", {"error": {"code": "1302", "message": "Rate limit reached for requests."}}),
        ("siliconflow", {"code": None, "data": None}),
        ("mistral", {"object": "error", "code": "1300", "type": "rate_limited"}),
        ("deepinfra", {"error": "Rate limited"}),
    ],
)
def test_refusal_bodies(provider: str, expected: dict[str, Any]) -> None:
    """Refusals have the provider's own body."""
    got = once(Options(provider=provider, refusal_latency=0, statuses=[{"kind": "requests"}])).json
    assert {name: got[name] for name in expected} == expected


def test_hints_in_the_body() -> None:
    """Gemini tells the delay in its details, compatible mode in a list, and OpenAI in the text."""
    rules = [{"kind": "requests"}]
    native = once(Options(statuses=rules), GOOGLE, "/v1beta/models/m:generateContent").json
    assert native["error"]["status"] == "RESOURCE_EXHAUSTED"
    assert native["error"]["details"][1]["retryDelay"] == "1s"
    assert once(Options(statuses=rules), path="/v1beta/openai/chat/completions").json[0]["error"]["code"] == 429
    assert "Please try again in 1s." in once(Options(statuses=rules)).json["error"]["message"]
    assert "try again" not in once(Options(statuses=rules, headers="none")).json["error"]["message"]


def test_openai_families() -> None:
    """Completions, embeddings, responses and moderations answer every input that they were given."""

    async def scenario(server: LocalProvider) -> None:
        got = (await post(server, {"model": "m", "prompt": ["a", "b"], "n": 2}, "/v1/completions")).json
        assert [choice["text"] for choice in got["choices"]] == [answer_to(text) for text in "aabb"]
        got = (await post(server, {"model": "m", "input": ["a", [1, 2]]}, "/v1/embeddings")).json
        assert [item["embedding"] for item in got["data"]] == [embedding_of("a", 8), embedding_of("[1, 2]", 8)]
        body = {"model": "m", "input": "a", "encoding_format": "base64", "dimensions": 3}
        got = (await post(server, body, "/v1/embeddings")).json
        assert len(got["data"][0]["embedding"]) == 16
        got = (await post(server, {"model": "m", "input": "a", "max_output_tokens": 5}, "/v1/responses")).json
        assert got["output"][0]["content"][0]["text"] == answer_to("a")
        assert (got["status"], got["usage"]["output_tokens"]) == ("incomplete", 5)
        got = (await post(server, {"model": "m", "input": ["a", "b"]}, "/v1/moderations")).json
        assert len(got["results"]) == 2

    with_server(Options(), scenario)


def test_dashscope_formats() -> None:
    """The native family answers as text unless a message is asked for; multimodal ones answer parts."""
    path = "/api/v1/services/aigc/text-generation/generation"
    assert once(Options(), NATIVE, path).json["output"]["text"] == answer_to("hello")
    message = once(Options(), {**NATIVE, "parameters": {"result_format": "message"}}, path).json
    assert message["output"]["choices"][0]["message"]["content"] == answer_to("hello")
    parts = once(Options(), NATIVE, path.replace("text-", "multimodal-")).json
    assert parts["output"]["choices"][0]["message"]["content"] == [{"text": answer_to("hello")}]


def test_usage_follows_its_rule() -> None:
    """Prompt tokens follow the documented rule, completion tokens the option and the cap."""
    got = once(Options(completion_tokens=20, tokenizer_factor=2.0, cached_tokens=3), chat("x" * 40, n=2)).json["usage"]
    assert (got["prompt_tokens"], got["completion_tokens"], got["total_tokens"]) == (32, 40, 72)
    assert got["prompt_tokens_details"]["cached_tokens"] == 3
    spread = Options(completion_tokens=20, completion_spread=0.5)
    drawn = [once(spread, chat(str(i))).json["usage"]["completion_tokens"] for i in range(5)]
    assert len(set(drawn)) > 1
    assert drawn == [once(spread, chat(str(i))).json["usage"]["completion_tokens"] for i in range(5)]
    capped = once(Options(completion_tokens=20), chat(max_tokens=5)).json
    assert (capped["choices"][0]["finish_reason"], capped["usage"]["completion_tokens"]) == ("length", 5)


def test_reasoning_and_tool_calls() -> None:
    """Reasoning stands where the provider puts it; tools are called when demanded."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    message = once(Options(), chat(tools=tools, tool_choice="required")).json["choices"][0]["message"]
    assert (message["content"], message["tool_calls"][0]["function"]["name"]) == (None, "look")
    for provider, field in (("deepseek", "reasoning_content"), ("openrouter", "reasoning")):
        got = once(Options(provider=provider, reasoning=True, keep_alive_lines=0)).json["choices"][0]["message"]
        assert got[field]
    content = once(Options(provider="mistral", reasoning=True)).json["choices"][0]["message"]["content"]
    assert [part["type"] for part in content] == ["thinking", "text"]


def events_of(body: bytes) -> list[Any]:
    lines = body.decode().split("\n\n")
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("piece_bytes", [0, 7])
def test_stream_adds_up_to_the_plain_reply(piece_bytes: int) -> None:
    """The events of a stream hold the text, the reasoning, the usage, and the end."""
    options = Options(provider="deepseek", reasoning=True, stream_piece_bytes=piece_bytes)
    got = once(options, chat("häl" * 9, stream=True, stream_options={"include_usage": True}))
    assert got.headers["content-type"] == "text/event-stream"
    assert b": keep-alive\n\n" in got.body
    *chunks, done = events_of(got.body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == answer_to("häl" * 9)
    assert "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 16
    assert done == "[DONE]"


def test_stream_of_tool_calls() -> None:
    """Names and arguments of tool calls come in pieces."""
    tools = [{"type": "function", "function": {"name": "look"}}]
    got = once(Options(tool_calls=True), chat(tools=tools, stream=True))
    calls = [call for event in events_of(got.body)[:-1] for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "look"
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"text": "hello"}


def test_blank_lines_before_the_json() -> None:
    """DeepSeek sends blank lines while it thinks."""
    got = once(Options(provider="deepseek", latency=0.02))
    assert got.body.startswith(b"\n\n{")
    assert got.json["choices"]


def test_what_cannot_be_served() -> None:
    """Bad JSON, missing fields, unknown models and paths get the provider's own error."""
    assert once(Options(), b"{").status == 400
    assert once(Options(), {"model": "m"}).status == 400
    assert once(Options(), {"messages": chat()["messages"]}).status == 400
    assert once(Options(), CLAUDE, "/v1/messages").status == 400  # no anthropic-version
    assert once(Options(stream_only=True)).status == 400
    assert once(Options(known_models=["other"])).json["error"]["code"] == "model_not_found"
    assert once(Options(), path="/v1/nothing").status == 404
    assert once(Options(provider="siliconflow"), path="/v1/nothing").body == b"404 page not found"
    assert with_server(Options(), lambda server: post(server, b"", method="GET")).status == 405
    assert find_route("/v1/chat/completions", "")[0]


# ==== faults ==========================================================================================================


def test_errors_as_faults() -> None:
    """The faults that are proper HTTP replies."""
    for fault, status in (("error_500", 500), ("error_429", 429), ("error_503", 503), ("html_200", 200)):
        got = once(Options(faults={fault: 1}, refusal_latency=0))
        assert (got.status, got.complete) == (status, True)
    assert once(Options(faults={"html_200": 1})).headers["content-type"] == "text/html"
    assert "error" in once(Options(faults={"error_200": 1})).json
    assert once(Options(faults={"error_429": 1})).headers["retry-after"] == "1"
    assert "retry-after" not in once(Options(faults={"error_429": 1}, told_wait=0)).headers
    assert once(Options(faults={"empty": 1})).body == b""
    assert once(Options(faults={"wrong_content_type": 1})).headers["content-type"] == "text/plain"
    with pytest.raises(ValueError, match="Unterminated"):
        assert once(Options(faults={"bad_json": 1})).json
    assert KEY in once(Options(faults={"echo_key": 1})).json["error"]["message"]
    assert KEY in once(Options(faults={"echo_key_200": 1})).json["choices"][0]["message"]["content"]
    assert "raw" not in once(Options(faults={"no_raw": 1}), GATEWAY, "/gpt").json


def test_broken_connections() -> None:
    """Reset, early close, truncation and hanging as the client sees them."""
    with pytest.raises(ConnectionResetError):
        once(Options(faults={"reset": 1}))
    assert once(Options(faults={"early_close": 1})).status == 0
    truncated = once(Options(faults={"truncated": 1}))
    assert (truncated.status, truncated.complete) == (200, False)
    assert once(Options(faults={"hang": 1}, hang_seconds=0.05)).status == 200

    async def hang(server: LocalProvider) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(server, chat()), 0.1)
        await asyncio.sleep(0.02)
        assert server.stats.in_flight == 0

    with_server(Options(faults={"hang": 1}), hang)


def test_streams_that_break_off() -> None:
    """A cut stream ends properly without a finish reason; a truncated one does not even end."""
    body = chat(stream=True)
    cut = once(Options(faults={"stream_cut": 1}), body)
    assert cut.complete
    assert b'"stop"' not in cut.body
    assert not once(Options(faults={"truncated": 1}), body).complete
    assert "error" in events_of(once(Options(faults={"error_200": 1}), body).body)[-1]


def test_redirect_is_told_and_following_it_is_seen() -> None:
    """A redirect names a path of our own, and a call there is counted."""

    async def scenario(server: LocalProvider) -> None:
        got = await post(server, chat())
        assert (got.status, got.headers["location"]) == (307, f"{server.url}/_redirected")
        await post(server, chat(), "/_redirected")
        assert server.stats.paths["followed_redirect"] == 1

    with_server(Options(faults={"redirect": 1}), scenario)


def test_large_replies() -> None:
    """A huge reply and a bomb are valid JSON of the asked size; the bomb is small on the wire."""
    assert len(once(Options(faults={"huge": 1}, huge_megabytes=3)).json["filler"]) == 3 << 20
    bomb = once(Options(faults={"gzip_bomb": 1}, huge_megabytes=3))
    assert len(bomb.body) < 10_000
    assert len(json.loads(gzip.decompress(bomb.body))["filler"]) == 3 << 20


def test_trickle_is_slow_and_complete() -> None:
    """A trickle sends byte by byte."""
    options = Options(faults={"trickle": 1}, trickle_seconds=0.0001)
    assert once(options).json["choices"]


def test_fault_rates_and_script() -> None:
    """Rates are shares drawn from the seed; a script names the fault of each call."""

    async def scenario(server: LocalProvider) -> list[int]:
        return [(await post(server, chat())).status for _ in range(60)]

    options = Options(faults={"error_500": 0.3, "error_503": 0.2}, fault_script=["error_503", ""], refusal_latency=0)
    statuses = with_server(options, scenario)
    assert statuses[:2] == [503, 200]
    assert 10 <= statuses.count(500) <= 26
    assert statuses == with_server(options, scenario)
    assert set(FAULTS) >= {"reset", "hang", "truncated", "trickle", "huge", "gzip_bomb", "redirect", "echo_key"}


def test_rules_for_some_requests() -> None:
    """A rule answers what contains its text, as often as it says."""

    async def scenario(server: LocalProvider) -> None:
        assert (await post(server, chat("bad one"))).json["error"]["code"] == "invalid_api_key"
        assert (await post(server, chat("bad one"))).json["error"]["code"] == "invalid_api_key"
        assert (await post(server, chat("bad one"))).status == 200
        assert (await post(server, chat("odd one"))).body == b"teapot"
        choice = (await post(server, chat("four"))).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("4", "content_filter")

    rules: list[dict[str, Any]] = [
        {"contains": "bad", "kind": "auth", "times": 2},
        {"contains": "odd", "status": 418, "body": "teapot", "headers": {"x-tea": "1"}},
        {"contains": "four", "answer": "4", "finish": "content_filter"},
    ]
    with_server(Options(statuses=rules, refusal_latency=0), scenario)


# ==== http ============================================================================================================


def test_connections_are_kept_and_bodies_may_be_chunked() -> None:
    """Several requests over one connection, the head in pieces, a chunked body, a chunk's end inside a piece."""

    async def scenario(server: LocalProvider) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        data = json.dumps(chat()).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        chunks = b"%x\r\n%b\r\n%x;x=y\r\n%b\r\n0\r\n\r\n" % (5, data[:5], len(data) - 5, data[5:])
        for message in (as_bytes(CHAT, chat(), {}), head + chunks, as_bytes(CHAT, chat(), {"Connection": "close"})):
            for i in range(0, len(message), 30):
                writer.write(message[i : i + 30])
                await asyncio.sleep(0)
            assert (await read_reply(reader)).json["choices"]
        assert await reader.read() == b""
        assert server.stats.connections_made == 1
        writer.close()

    with_server(Options(), scenario)


def test_expectation_large_body_and_gzip() -> None:
    """100-continue is answered, a large body is taken, a compressed reply is sent to who accepts it."""

    async def scenario(server: LocalProvider) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head, _, body = as_bytes(CHAT, chat("x" * 5_000_000), {"Expect": "100-continue"}).partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await read_reply(reader)).json["usage"]["prompt_tokens"] == 1_250_006
        writer.close()
        packed = await post(server, chat(), headers={"Accept-Encoding": "gzip"})
        assert json.loads(gzip.decompress(packed.body))["choices"]

    with_server(Options(gzip=True), scenario)


def test_no_http_at_all() -> None:
    """What is not HTTP is answered 400."""

    async def scenario(server: LocalProvider) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"nonsense\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()

    with_server(Options(), scenario)


# ==== life ============================================================================================================


def test_queue_mode_delays_and_never_refuses() -> None:
    """With two slots of 50 ms, six calls at once take three turns."""

    async def scenario(server: LocalProvider) -> float:
        start = time.monotonic()
        got = await asyncio.gather(*(post(server, chat()) for _ in range(6)))
        assert {reply.status for reply in got} == {200}
        return time.monotonic() - start

    assert with_server(Options(service_slots=2, latency=0.05), scenario) >= 0.149


def test_in_flight_limit_and_counts() -> None:
    """More at once than allowed are refused; the counters agree."""

    async def scenario(server: LocalProvider) -> None:
        got = await asyncio.gather(*(post(server, chat()) for _ in range(5)))
        assert sorted(reply.status for reply in got) == [200, 200, 429, 429, 429]
        stats = server.stats
        assert (stats.calls, stats.accepted, stats.refused, stats.in_flight, stats.max_in_flight) == (5, 2, 3, 0, 2)
        assert stats.refusals == {"in_flight": 3}
        assert stats.tokens_charged == 2 * 24

    with_server(Options(max_in_flight=2, latency=0.3, refusal_latency=0), scenario)


def test_usage_is_charged_with_the_reply() -> None:
    """Actual usage is taken off the token budget when the reply is made, and shows in the headers."""

    async def scenario(server: LocalProvider) -> None:
        got = await post(server, chat())
        assert got.headers["x-ratelimit-remaining-tokens"] == "9"
        assert (await post(server, chat())).status == 200
        assert (await post(server, chat())).json["error"]["type"] == "tokens"

    options = Options(tokens_per_minute=33, limit_kind="sliding_minute", completion_tokens=16, refusal_latency=0)
    with_server(options, scenario)


def test_outages() -> None:
    """While it refuses nobody can connect and connections are gone; then it is back on the same port."""

    async def scenario(server: LocalProvider) -> None:
        assert (await post(server, chat())).status == 200
        server.set_outage("refuse")
        await asyncio.sleep(0.01)
        with pytest.raises(ConnectionRefusedError):
            await post(server, chat())
        server.set_outage("refuse", 0.01)
        while server.options.outage or not server._server:  # noqa: ASYNC110 - it ends by itself
            await asyncio.sleep(0.01)
        assert (await post(server, chat())).status == 200
        server.set_outage("503")
        assert (await post(server, chat())).status == 503
        server.set_outage("hang")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(server, chat()), 0.05)
        server.set_outage("")
        assert (await post(server, chat())).status == 200

    with_server(Options(refusal_latency=0), scenario)


def test_control_stats_and_records() -> None:
    """Options change over HTTP, wrong ones are refused, and what came in is remembered."""

    async def scenario(server: LocalProvider) -> None:
        await post(server, chat("first"))
        stats = (await post(server, b"", "/_stats", method="GET")).json
        assert stats["calls"] == 1
        (call,) = stats["calls_seen"]
        assert (call["path"], call["status"], call["key"]) == (CHAT, 200, f"authorization: Bearer {KEY}")
        assert json.loads(call["body"]) == chat("first")
        assert (await post(server, {"latency": 0.01, "reset": True}, "/_control")).json["latency"] == 0.01
        assert server.stats.calls == 0
        assert (await post(server, {"no_such": 1}, "/_control")).status == 400
        assert (await post(server, {"limit_kind": "odd"}, "/_control")).status == 400

    with_server(Options(record_calls=True, record_bodies=True), scenario)


def test_latency_is_drawn_from_the_seed() -> None:
    """Equal seeds give equal latencies, lognormal around the median."""
    first, second = (LocalProvider(Options(latency=0.5, latency_spread=0.5)) for _ in range(2))
    drawn = sorted(first._latency(0.0) for _ in range(999))
    assert drawn == sorted(second._latency(0.0) for _ in range(999))
    assert drawn[499] == pytest.approx(0.5, rel=0.1)
    assert drawn[839] / drawn[499] == pytest.approx(1.65, rel=0.1)


def test_as_a_program(tmp_path: Path) -> None:
    """It prints its address, writes its port, answers, and stops on a signal; wrong options are told."""
    port_file = tmp_path / "port"
    command = [sys.executable, str(PROGRAM), "--requests_per_minute", "60", "--reset", "0.0"]
    with subprocess.Popen([*command, "--port_file", str(port_file)], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        line = program.stdout.readline()
        assert line == f"listening on http://127.0.0.1:{port_file.read_text().strip()}\n"
        with urllib.request.urlopen(line.split()[-1] + "/_stats") as reply:
            assert json.load(reply)["calls"] == 0
        program.send_signal(signal.SIGTERM)
        assert program.wait(5) == 0
    wrong = subprocess.run([*command, "--limit_kind", "odd"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "limit_kind must be one of" in wrong.stderr


def test_goes_with_its_parent() -> None:
    """With --exit_with_parent it ends when the process that started it is gone, whatever killed that."""
    start = f"subprocess.Popen([sys.executable, {str(PROGRAM)!r}, '--exit_with_parent'])"
    script = f"import subprocess, sys, time; {start}; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert parent.stdout.readline().startswith("listening")
        parent.kill()
        assert parent.stdout.read() == ""  # ends when the last holder of the pipe is gone


def test_it_has_a_batch_api_on_request() -> None:
    """With `batch_provider`, files are taken beside ordinary calls."""

    async def scenario() -> tuple[int, dict[str, Any]]:
        async with LocalProvider(Options(batch_provider="openai")) as provider, aiohttp.ClientSession() as session:
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", b'{"custom_id": "1"}\n', filename="one.jsonl")
            async with session.post(f"{provider.url}/v1/files", data=form) as response:
                return response.status, await response.json()

    status, body = asyncio.run(scenario())
    assert (status, body["purpose"]) == (200, "batch")
