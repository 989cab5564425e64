"""Station 4, send, over real sockets: redirects, proxies, secrets, large and slow replies, TLS, plain http."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from api_request_parallel_processor import Reply, UsageError, explain, process_api_requests_from_file
from tests.jobs import (
    CHAT,
    KEY,
    chat,
    chats,
    clean_environment,
    command,
    play,
    read_lines,
    succeeded,
    virtually,
    write_lines,
)
from tests.local_provider import LocalProvider, Options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWORD = "a-proxy-password/with+signs"
SLASHED = "sk-key/with+slashes==and-more"
PRIVATE = "http://10.255.255.254:8000"  # nobody is asked there: the proxy answers
TLS_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQglmWiWKt6znra2w31
1/Hr6pzn/dsVdTjjjOhf8TLDNYehRANCAARm19f44BhihU0szNvwS6yJ1COQw9GU
sQawLMQ2wnuU8MsYUOVPjNm35hTq811Owxg7eR0mjW+A2blb9FDRrrdi
-----END PRIVATE KEY-----
"""
TLS_CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBkTCCATagAwIBAgIUC813OkLtt7eL2R6TIfPpnOf+xPMwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyMTA1MTY0M1oYDzIxMjYxMDI4
MDUxNjQzWjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARm19f44BhihU0szNvwS6yJ1COQw9GUsQawLMQ2wnuU8MsYUOVPjNm3
5hTq811Owxg7eR0mjW+A2blb9FDRrrdio2QwYjAdBgNVHQ4EFgQU9lamhMv5MwyE
4Oe1PzqUbB7D12owHwYDVR0jBBgwFoAU9lamhMv5MwyE4Oe1PzqUbB7D12owDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0kAMEYC
IQCqst68LnCEf1bROq6qLS2slYsuYMO2zw15wBb2m6nKmQIhAM3KbvWzRWO/eaJL
Xx6r1yt70OA/DK9bFSYvHtQulZU1
-----END CERTIFICATE-----
"""


def everything(folder: Path) -> bytes:
    """Return every byte that a run left in a folder, but the requests themselves."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "job.jsonl")


# ---- proxies ---------------------------------------------------------------------------------------------------------


def test_a_proxy_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to elsewhere go through the proxy that the environment names, with its password, which is a secret."""

    async def run() -> Any:
        async with LocalProvider(Options(record_calls=True, record_bodies=True, faults={"echo_key": 0.5})) as proxy:
            user = "user:" + PASSWORD.replace("/", "%2F").replace("+", "%2B")
            monkeypatch.setenv("HTTP_PROXY", f"http://{user}@127.0.0.1:{proxy.port}")
            monkeypatch.setenv("http_proxy", f"http://{user}@127.0.0.1:{proxy.port}")
            path = str(write_lines(tmp_path / "job.jsonl", chats(10)))
            settings: dict[str, Any] = {"max_attempts": 99, "progress": "none"}
            tally = await process_api_requests_from_file(path, request_url=PRIVATE + CHAT, **settings)
            return tally, proxy.stats

    tally, stats = virtually(run())
    assert tally.exit_code == 0
    assert all(call["proxied"] for call in stats.calls_seen)
    wanted = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    assert {call["headers"].get("proxy-authorization") for call in stats.calls_seen} == {f"Basic {wanted}"}
    assert {call["key"] for call in stats.calls_seen} == {f"authorization: Bearer {KEY}"}
    assert PASSWORD.encode() not in everything(tmp_path)


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_is_never_used_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A local model server is asked directly, whatever proxy the environment names."""
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert play(tmp_path, chats(2)).tally.exit_code == 0


def test_no_proxy_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NO_PROXY names is asked directly."""

    async def run() -> Any:
        async with LocalProvider(Options(record_calls=True)) as proxy:
            for name in ("HTTP_PROXY", "http_proxy"):
                monkeypatch.setenv(name, proxy.url)
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.setenv(name, "10.255.255.254,.internal")
            path = str(write_lines(tmp_path / "job.jsonl", chats(1)))
            settings: dict[str, Any] = {"request_timeout": 3, "max_attempts": 1, "progress": "none"}
            await process_api_requests_from_file(path, request_url=PRIVATE + CHAT, **settings)
            return proxy.stats.calls

    assert virtually(run()) == 0


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "ftp"])
def test_a_proxy_that_cannot_be_used_is_no_secret_leak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """An unusable proxy is wrong usage, told without its password."""
    monkeypatch.setenv("https_proxy", f"{scheme}://user:{PASSWORD}@127.0.0.1:1080")
    path = str(write_lines(tmp_path / "job.jsonl", chats(1)))
    with pytest.raises(UsageError) as told:
        virtually(process_api_requests_from_file(path, request_url="https://10.255.255.254/v1/chat/completions"))
    assert PASSWORD not in str(told.value)
    assert "proxy" in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["job.jsonl"]


def test_a_proxy_that_refuses_is_told_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tunnel that is not allowed is a failure of the connection; neither key nor password get into the results."""

    async def run() -> Any:
        async with LocalProvider(Options()) as proxy:
            monkeypatch.setenv("https_proxy", f"http://user:{PASSWORD.replace('/', '%2F')}@127.0.0.1:{proxy.port}")
            path = str(write_lines(tmp_path / "job.jsonl", chats(1)))
            settings: dict[str, Any] = {"max_attempts": 2, "progress": "none", "api_key": KEY}
            return await process_api_requests_from_file(path, request_url=f"https://10.255.255.254{CHAT}", **settings)

    tally = virtually(run())
    assert tally.exit_code in (1, 3)
    left = everything(tmp_path) + tally.stop_reason.encode() + tally.last_trouble.encode()
    assert PASSWORD.encode() not in left
    assert PASSWORD.replace("/", "%2F").encode() not in left
    assert KEY.encode() not in left


# ---- secrets ---------------------------------------------------------------------------------------------------------


def echo(text: str, status: int = 200) -> dict[str, Any]:
    """Make a rule that answers with this text as message, error or answer; it goes out as written here."""
    if status == 200:
        return {"status": 200, "body": '{"choices": [{"message": {"content": "' + text + '"}}]}'}
    return {"status": status, "body": '{"error": {"message": "' + text + '", "code": "x"}}'}


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize(
    "echoed",
    [
        SLASHED,
        SLASHED.replace("/", "\\/"),
        SLASHED.replace("+", "\\u002b").replace("=", "\\u003d"),
        SLASHED.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D"),
        "Bearer " + SLASHED,
    ],
    ids=["plain", "slashes escaped, as PHP does", "signs escaped, as Java and .NET do", "as in a URL", "with Bearer"],
)  # fmt: skip
def test_the_key_is_redacted_however_it_is_echoed(tmp_path: Path, status: int, echoed: str) -> None:
    """In answers and errors, whatever JSON escapes the server uses; the request stays as the user wrote it."""
    request = chat(f"my text says {SLASHED}")
    played = play(tmp_path, [request], Options(statuses=[echo(echoed, status)]), api_key=SLASHED, max_attempts=1)
    (line,) = played.lines
    assert line[0] == request
    assert SLASHED not in json.dumps(line[1])
    assert SLASHED not in json.loads(json.dumps(line[1]), object_hook=str)
    assert "%2Fwith" not in json.dumps(line[1])
    assert "[REDACTED]" in json.dumps(line[1])


def test_the_key_in_text_that_is_no_json(tmp_path: Path) -> None:
    """HTML and plain text errors are redacted before they are cut short."""
    page = "<html>" + "x" * 1990 + KEY + "</html>"
    played = play(tmp_path, chats(1), Options(statuses=[{"status": 500, "body": page}]), max_attempts=1)
    assert KEY[:12] not in played.results.read_text("utf-8")


def test_the_key_in_a_compressed_reply(tmp_path: Path) -> None:
    """Compression hides nothing."""
    played = play(tmp_path, chats(3), Options(gzip=True, faults={"echo_key_200": 1.0}))
    assert all("[REDACTED]" in json.dumps(line[1]) for line in played.lines)
    assert KEY not in played.results.read_text("utf-8")


def test_the_key_in_a_redirect(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The message that names a redirect's target does not repeat a key that stands in it."""
    options = Options(faults={"redirect": 1.0}, redirect_to=f"http://127.0.0.1:1/login?key={KEY}")
    played = play(tmp_path, chats(2), options)
    assert KEY not in played.tally.stop_reason + str(played.lines) + played.tally.last_trouble
    assert "127.0.0.1:1/login" in played.tally.stop_reason + str(played.lines)


def test_the_key_in_a_header_of_ones_own(tmp_path: Path) -> None:
    """A key that travels in another header is a secret too, and header names know no case."""
    own = "another-secret-0123456789"
    options = Options(faults={"echo_key": 0.5})
    played = play(tmp_path, chats(6), options, request_header=(f"authorization: Bearer {own}", "X-Team: blue"))
    assert {call["headers"]["authorization"] for call in played.stats.calls_seen} == {f"Bearer {own}"}
    assert {call["headers"]["x-team"] for call in played.stats.calls_seen} == {"blue"}
    assert own not in played.results.read_text("utf-8")


USER = "lab_user"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ({"detail": f"{USER} has no credits", "username": USER}, "bad_reply"),
        ({"raw": json.dumps({"error": {"message": f"no credits:\n{USER}"}})}, "server_error"),
        (f"<p>{USER}</p>", "bad_reply"),
    ],
)
def test_the_user_name_of_a_gateway_is_redacted_however_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reply: Any, kind: str
) -> None:
    """It is no secret that looks like one, but it is in nothing that is saved or said."""
    rules = [{"status": 200, "body": reply}]
    settings = {"path": "/gpt", "api_key": USER, "max_attempts": 1, "save_details": True, "logging_level": "10"}
    played = play(tmp_path, chats(1), Options(statuses=rules), **settings)
    assert played.kinds == [[kind]]
    assert "[REDACTED]" in json.dumps(played.lines)
    assert USER not in json.dumps(played.lines) + caplog.text + played.tally.last_trouble


def test_words_that_hold_a_short_user_name_stay(tmp_path: Path) -> None:
    """A short name is looked for as a whole word."""
    rules = [{"contains": "question", "answer": "bobsled, Bob, Rebob, bob!"}]
    (line,) = play(tmp_path, chats(1), Options(statuses=rules), path="/gpt", api_key="bob").lines
    assert line[1]["choices"][0]["message"]["content"] == "bobsled, Bob, Rebob, [REDACTED]!"


class RawHeads(BaseHTTPRequestHandler):
    """Remembers the names of the headers as they came, and answers a chat."""

    seen: list[list[str]]

    def do_POST(self) -> None:
        self.seen.append([name.lower() for name in self.headers])
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"choices": [{"message": {"content": "x"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def raw_heads() -> Iterator[tuple[str, list[list[str]]]]:
    handler = type("Handler", (RawHeads,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{CHAT}", handler.seen  # type: ignore[attr-defined]
        server.shutdown()


@pytest.mark.slow
def test_every_header_is_sent_once(tmp_path: Path, raw_heads: tuple[str, list[list[str]]]) -> None:
    """A header given by the user replaces ours, in whatever case it is written; servers refuse two of a kind."""
    url, seen = raw_heads
    job = write_lines(tmp_path / "job.jsonl", chats(1))
    flags = [
        "--request_header",
        "authorization: Bearer mine-mine-mine",
        "--request_header",
        "content-type: application/json",
    ]
    done = subprocess.run(
        command(job, url, *flags), env=clean_environment(), capture_output=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert sorted(set(seen[0])) == sorted(seen[0])


def test_short_keys_are_not_searched_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key that could be an ordinary word is left alone in answers, with a warning."""
    played = play(tmp_path, [chat("the word")], api_key="word")
    assert "word" in played.lines[0][1]["choices"][0]["message"]["content"]
    assert "shorter" in caplog.text


# ---- replies of all sizes and kinds ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="os.wait4")
def test_a_gzip_bomb_takes_little_memory(tmp_path: Path) -> None:
    """A reply of a gigabyte when unpacked is given up early, and others go on."""
    job = write_lines(tmp_path / "job.jsonl", chats(6))

    def watch(url: str) -> tuple[int, int]:
        # subtle: what a process counts as its largest set begins with that of its parent, so a small one stands between
        ask = "import resource as r, subprocess as s, sys; print(s.call(sys.argv[1:]), r.getrusage(-1).ru_maxrss)"
        words = [sys.executable, "-c", ask, *command(job, url, "--max_reply_megabytes", "5")]
        said = subprocess.run(
            words, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        code, largest = map(int, said.stdout.split())
        return code, largest // (1024 if sys.platform == "darwin" else 1)

    async def run() -> tuple[int, int]:
        rules = [{"contains": "001.", "fault": "gzip_bomb"}]
        async with LocalProvider(Options(statuses=rules, huge_megabytes=1000)) as provider:
            return await asyncio.to_thread(watch, provider.url + CHAT)

    code, kilobytes = asyncio.run(run())
    assert code == 1
    assert kilobytes < 400_000
    lines = read_lines(tmp_path / "job_results.jsonl")
    assert sum(map(succeeded, lines)) == 5
    assert [line[1][0]["kind"] for line in lines if not succeeded(line)] == ["too_large"]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "text/html; charset=gbk", "application/octet-stream", "nonsense", ""]
)
def test_json_counts_whatever_its_content_type_claims(tmp_path: Path, content_type: str) -> None:
    """Gateways mislabel; the body decides."""
    rule = {"status": 200, "body": {"choices": [{"message": {"content": "ok 中文"}}]}, "headers": {"X": "y"}}
    options = Options(statuses=[rule], keep_alive_lines=0)
    options.statuses[0]["headers"] = {"Content-Type": content_type} if content_type else {}
    played = play(tmp_path, chats(1), options)
    assert played.tally.exit_code == 0
    assert "中文" in played.results.read_text("utf-8")


def test_a_gzipped_error_is_read(tmp_path: Path) -> None:
    """A reply with Content-Encoding is unpacked, one that only claims it is a failed attempt."""
    rules = [{"contains": "000.", "status": 200, "body": "not gzip at all", "headers": {"Content-Encoding": "gzip"}}]
    played = play(tmp_path, chats(2), Options(statuses=rules, gzip=True), max_attempts=2)
    assert succeeded(played.by_id[1])
    assert [error["kind"] for error in played.by_id[0][1]] in (["connection"] * 2, ["bad_reply"] * 2)


WHOLE = {"choices": [{"index": 0, "message": {"content": "@"}, "finish_reason": "stop"}]}
EVENT = {"choices": [{"index": 0, "delta": {"content": "pong"}, "finish_reason": "stop"}]}


def answered(folder: Path, body: bytes, *headers: str, **request: Any) -> Any:
    """Give what the result line of one request holds when a server answers with these very bytes."""
    head = "".join(f"{header}\r\n" for header in ("HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, ""))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(asked.lower().partition(b"content-length:")[2].split()[0]))
        writer.write(head.encode() + body)
        writer.close()

    async def one_call() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{CHAT}"
            await process_api_requests_from_file(str(folder / "job.jsonl"), request_url=url, max_attempts=1)

    write_lines(folder / "job.jsonl", [chat("ping", **request)])
    virtually(one_call())
    [line] = read_lines(folder / "job_results.jsonl")
    return line[1]


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (json.dumps(WHOLE).replace('"@"', "NaN").encode(), None),
        (json.dumps(WHOLE).replace('"@"', "-Infinity").encode(), None),
        (json.dumps(WHOLE).encode().replace(b"@", b"\xe4\xbd"), "\ufffd"),
        (json.dumps(WHOLE).encode().replace(b"@", b"caf\xe9"), "caf\ufffd"),
        (json.dumps(WHOLE).encode().replace(b"@", b"one\ntwo"), "one\ntwo"),
        (b"\xef\xbb\xbf" + json.dumps(WHOLE).encode(), "@"),
        (json.dumps(WHOLE).encode("utf-16"), "@"),
    ],
    ids=["nan", "infinity", "cut character", "latin-1", "line break", "byte order mark", "utf-16"],
)
def test_a_reply_that_is_almost_json_is_kept(tmp_path: Path, body: bytes, content: str | None) -> None:
    """It was paid for, and asking again would give the same: what is wrong in it becomes null or U+FFFD."""
    assert answered(tmp_path, body)["choices"][0]["message"]["content"] == content


@pytest.mark.parametrize(
    "body", [json.dumps(WHOLE).replace('"@"', "1e999"), json.dumps(WHOLE)[:-1], "[" * 600 + "]" * 600]
)
def test_a_reply_that_is_no_json_is_a_failed_attempt(tmp_path: Path, body: str) -> None:
    """What cannot be mended, or written to the results again, is no answer."""
    assert [error["kind"] for error in answered(tmp_path, body.encode())] == ["bad_reply"]


@pytest.mark.parametrize("encoding", ["utf-8", "none", "identity", ""])
def test_a_content_encoding_that_packs_nothing(tmp_path: Path, encoding: str) -> None:
    """Some servers mistake it for the charset."""
    assert answered(tmp_path, json.dumps(WHOLE).encode(), f"Content-Encoding: {encoding}") == WHOLE


def test_errors_of_the_network_are_one_line() -> None:
    """Parsers of HTTP point at what they do not understand over several lines, which would tear the log."""
    explain(ValueError("Expected HTTP/:\n\n  b'SSH-2.0'\n    ^"), reply := Reply())
    assert reply.message == "ValueError: Expected HTTP/: b'SSH-2.0' ^"


def test_long_headers(tmp_path: Path) -> None:
    """A gateway may add more to a header than aiohttp would read."""
    assert answered(tmp_path, json.dumps(WHOLE).encode(), "X-Trace: " + "a" * 30_000) == WHOLE


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_event_of_several_lines(tmp_path: Path, end: str) -> None:
    """The lines of one event are put together, as the specification of event streams wants it."""
    lines = [
        "\ufeff: hello",
        "",
        "event: message",
        *(f"data: {line}" for line in json.dumps(EVENT, indent=1).split("\n")),
    ]
    found = answered(tmp_path, end.join([*lines, "", "data: [DONE]", "", ""]).encode(), stream=True)
    assert found["choices"][0]["message"]["content"] == "pong"


def test_an_event_that_is_almost_json(tmp_path: Path) -> None:
    """Events are mended as whole replies are."""
    stream = b"data: " + json.dumps({**EVENT, "x": math.nan}).encode().replace(b"pong", b"p\xffng")
    found = answered(tmp_path, stream, stream=True)
    assert found["choices"][0]["message"]["content"] == "p\ufffdng"


def test_streams_are_put_together(tmp_path: Path) -> None:
    """A streamed chat gives the reply that it would have been without, and the request stays as written."""
    plain = play(tmp_path, [chat("tell me")]).lines[0][1]
    options = Options(stream_only=True, stream_comments=True, stream_piece_bytes=7)
    request = chat("tell me", stream=True)
    streamed = play(tmp_path, [request], options).lines[-1]
    assert streamed[0] == request
    assert streamed[1]["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
    assert streamed[1]["usage"] == plain["usage"]
    assert streamed[1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("content_type", ["text/plain", "text/event-stream"])
@pytest.mark.parametrize("start", ["data: ", "data:", "event: message\ndata: ", ": keep-alive\n\ndata: "])
def test_a_stream_is_known_by_its_body_too(tmp_path: Path, content_type: str, start: str) -> None:
    """Gateways mislabel streams as well."""
    event = {"choices": [{"index": 0, "delta": {"content": "pong"}, "finish_reason": "stop"}]}
    rule = {"status": 200, "body": f"{start}{json.dumps(event)}\n\n", "headers": {"Content-Type": content_type}}
    (line,) = play(tmp_path, [chat("x", stream=True)], Options(statuses=[rule])).lines
    assert line[1]["choices"][0]["message"]["content"] == "pong"


def test_json_that_is_called_a_stream(tmp_path: Path) -> None:
    """A whole reply or an error, where a stream was asked for and claimed, is what it is."""
    stream = {"Content-Type": "text/event-stream"}
    whole = {"choices": [{"index": 0, "message": {"content": "pong"}, "finish_reason": "stop"}]}
    rules = [{"contains": "000.", "status": 200, "body": whole, "headers": stream}]
    rules += [{"status": 200, "body": {"error": {"code": 400, "message": "no such model"}}, "headers": stream}]
    played = play(tmp_path, chats(2, stream=True), Options(statuses=rules))
    assert played.by_id[0][1] == whole
    assert [error["message"] for error in played.by_id[1][1]] == ["no such model"]


def test_options_of_a_stream_are_kept(tmp_path: Path) -> None:
    """What the user wants of a stream is sent together with what we want."""
    request = chat("x", stream=True, stream_options={"include_obfuscation": False})
    played = play(tmp_path, [request])
    sent = json.loads(played.stats.calls_seen[0]["body"])
    assert sent["stream_options"] == {"include_usage": True, "include_obfuscation": False}
    assert played.lines[0][0] == request


@pytest.mark.parametrize("fault", ["stream_cut", "truncated", "reset"])
def test_streams_that_break_off_are_failed_attempts(tmp_path: Path, fault: str) -> None:
    """Half an answer is none."""
    played = play(tmp_path, [chat("x", stream=True)], Options(faults={fault: 1.0}), max_attempts=2)
    assert played.kinds == [["connection"] * 2]


def test_blank_lines_before_the_json(tmp_path: Path) -> None:
    """What a busy server sends to keep the connection alive is not part of the answer."""
    assert play(tmp_path, chats(2), Options(keep_alive_lines=50, latency=30)).tally.exit_code == 0


# ---- where a key may travel ------------------------------------------------------------------------------------------


async def only_check(folder: Path, url: str, **settings: Any) -> Any:
    """Start a job that would fail at the first connection, to see whether it starts at all."""
    path = str(write_lines(folder / "job.jsonl", chats(1)))
    values: dict[str, Any] = {"api_key": KEY, "max_attempts": 1, "request_timeout": 2, "progress": "none"}
    return await process_api_requests_from_file(path, request_url=url, **(values | settings))


@pytest.mark.parametrize("url", ["http://api.openai.com/v1/chat/completions", "http://8.8.8.8/v1/chat/completions",
                                 "http://[2001:4860:4860::8888]/v1/chat/completions"])  # fmt: skip
def test_plain_http_with_a_key_to_a_public_address(tmp_path: Path, url: str) -> None:
    """It would show the key to everybody on the way: wrong usage, unless it is allowed."""
    with pytest.raises(UsageError, match="allow_plain_http"):
        virtually(only_check(tmp_path, url))
    assert [path.name for path in tmp_path.iterdir()] == ["job.jsonl"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "no address",
        "ftp://host/v1/chat/completions",
        "http://",
        "https:///v1/chat/completions",
        "api.openai.com/v1/chat/completions",
        "http://127.0.0.1:99999/v1/chat/completions",
        "http://[::1/v1/chat/completions",
        "http://127.0.0.1:abc/v1/chat/completions",
        "http://127.0.0.1/v1/unheard/of",
        "https://my-resource..openai.azure.com/openai/v1/chat/completions",
        "http://user:password@127.0.0.1:9/v1/chat/completions",
        "http://:password@127.0.0.1:9/v1/chat/completions",
    ],
)
def test_addresses_that_are_none(tmp_path: Path, url: str) -> None:
    """An address that cannot be used is wrong usage, before anything is sent or written, and shows no password."""
    with pytest.raises(UsageError) as refused:
        virtually(only_check(tmp_path, url))
    assert ":password" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["job.jsonl"]


@pytest.mark.parametrize("header", ["no colon", ": value", "Name: a\r\nOther: b", "Bad Name: x", "Naïve: x"])
def test_headers_that_are_none(tmp_path: Path, header: str) -> None:
    """A header that cannot be sent is wrong usage, not a thousand failed attempts."""
    with pytest.raises(UsageError):
        virtually(only_check(tmp_path, "http://127.0.0.1:9/v1/chat/completions", request_header=(header,)))


@pytest.mark.parametrize("key", ["sk-two\nlines-of-a-key", "sk-naïve-key-0123456", "sk-\x07bell-0123456789"])
def test_keys_that_are_none(tmp_path: Path, key: str) -> None:
    """A key with a line break or a letter that no header can carry is told, and not shown."""
    with pytest.raises(UsageError) as told:
        virtually(only_check(tmp_path, "http://127.0.0.1:9/v1/chat/completions", api_key=key))
    assert key not in str(told.value)


# ---- TLS -------------------------------------------------------------------------------------------------------------


def test_tls_against_a_server_without(tmp_path: Path) -> None:
    """Https to a port that speaks http ends the run at once, and says what to look at."""

    async def run() -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1000)
            writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await only_check(tmp_path, f"https://127.0.0.1:{port}{CHAT}", max_attempts=5)

    tally = virtually(run())
    assert tally.exit_code == 3
    assert "https or http" in tally.stop_reason
    assert read_lines(tmp_path / "job_results.jsonl") == []


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    """TLS is verified: the run ends before a request is sent."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    key.write_text(TLS_KEY, "ascii")
    certificate.write_text(TLS_CERTIFICATE, "ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    seen: list[bytes] = []

    async def run() -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await reader.read(1000))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await only_check(tmp_path, f"https://127.0.0.1:{port}{CHAT}", max_attempts=5)

    tally = virtually(run())
    assert tally.exit_code == 3
    assert seen in ([], [b""])
    assert read_lines(tmp_path / "job_results.jsonl") == []


def test_a_host_that_does_not_exist(tmp_path: Path) -> None:
    """An unresolvable host at the start ends the run within seconds and names the host."""
    tally = virtually(only_check(tmp_path, "https://no-such-host.invalid/v1/chat/completions", max_attempts=5))
    assert tally.exit_code == 3
    assert "no-such-host.invalid" in tally.stop_reason
    assert read_lines(tmp_path / "job_results.jsonl") == []


def test_what_was_never_sent_is_told_apart(tmp_path: Path) -> None:
    """A refused connection cost nothing; an answer that did not come may have been billed."""
    played = play(tmp_path, chats(1), Options(outage_schedule=[[0, 10**6, "refuse"]]), max_attempts=2)
    assert (played.tally.never_sent, played.tally.answer_lost) == (2, 0)
    played = play(tmp_path, chats(1), Options(outage="hang"), max_attempts=2, request_timeout=20)
    assert (played.tally.never_sent, played.tally.answer_lost) == (0, 2)
