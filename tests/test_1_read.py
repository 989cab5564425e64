"""Station 1, read: what becomes a request, and what a line that cannot become one leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

import api_request_parallel_processor as program
from tests.jobs import (
    CHAT,
    KEY,
    ProviderProcess,
    chat,
    chats,
    clean_environment,
    command,
    one_line_each,
    play,
    read_lines,
    succeeded,
    virtually,
)
from tests.local_provider import LocalProvider, Options

if TYPE_CHECKING:
    from pathlib import Path

GOOD = json.dumps(chat()).encode()
OPEN = GOOD[:-1]  # for more fields
IMAGE = "data:image/png;base64,"

# ---- lines that cannot be sent: each becomes a failed line that names the physical line and the reason ---------------

BAD: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"model": "m", "messages": [', ""),
    "single quotes": (b"{'model': 'm'}", ""),
    "two objects": (GOOD + GOOD, ""),
    "bad UTF-8": (GOOD.replace(b"hello", b"caf\xe9"), "UTF-8"),
    "UTF-16": (b"\xff\xfe{\0", "UTF-8"),
    "NaN": (GOOD.replace(b'"hello"', b"NaN"), "NaN"),
    "infinity": (GOOD.replace(b'"hello"', b"-Infinity"), "Infinity"),
    "beyond double": (GOOD[:-1] + b', "temperature": 1e999}', "1e999"),
    "bare string": (b'"hello"', "object"),
    "number": (b"42", "object"),
    "true": (b"true", "object"),
    "null": (b"null", "object"),
    "empty object": (b"{}", "messages"),
    "empty array": (b"[]", "object"),
    "array of strings": (b'["a", "b"]', "object"),
    "no messages": (b'{"model": "m"}', "messages"),
    "messages null": (b'{"model": "m", "messages": null}', "messages"),
    "messages a text": (b'{"model": "m", "messages": "hello"}', "messages"),
    "messages an object": (b'{"model": "m", "messages": {"role": "user"}}', "messages"),
    "messages empty": (b'{"model": "m", "messages": []}', "messages"),
    "messages of texts": (b'{"model": "m", "messages": ["hello"]}', "messages"),
    "an embedding": (b'{"model": "m", "input": "hello"}', "messages"),
    "nested too deep": (b'{"model": "m", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
    "nested too deep, objects": (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "deep"),
    "batch line for another endpoint": (
        b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": ' + GOOD + b"}",
        "/v1/embeddings",
    ),
    "batch line to get": (
        b'{"custom_id": "a", "method": "GET", "url": "/v1/chat/completions", "body": ' + GOOD + b"}",
        "GET",
    ),
    "batch line without a body": (b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}', ""),
    "control character": (GOOD.replace(b"hello", b"a\x01b"), "no JSON: "),
    "a comment": (b"# my requests", ""),
    "BOM in the middle": (b"\xef\xbb\xbf" + GOOD, ""),
    "null byte": (b"\0\0\0", ""),
}


@pytest.mark.parametrize(("line", "hint"), [
    ({"model": "m", "messages": []}, False), ({"model": "m", "messages": ["hello"]}, False),
    ({"model": "m", "input": "hello"}, True), ({"contents": [{"parts": []}]}, True), ({"model": "m"}, False),
    ({"input": []}, False), ({"contents": []}, False), ({"prompt": ""}, True),
])  # fmt: skip
def test_a_line_for_another_endpoint_is_told_where_it_belongs(line: dict[str, Any], hint: bool) -> None:
    """Other endpoints are named only where the line would be right."""
    problem = program.check_request(line, "chat", program.PROVIDERS["openai"])
    assert "missing or not a list of objects" in problem
    assert ("this looks like a request for" in problem) is hint


@pytest.fixture(scope="module")
def bad_lines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Run all bad lines in one file, each followed by a blank and a good line; give the failed lines by number."""
    lines: list[Any] = [line for raw, _ in BAD.values() for line in (raw + b"\n", b"\n", chat("fine"))]
    played = play(tmp_path_factory.mktemp("bad"), lines, save_details=True)
    assert played.tally.exit_code == 1
    assert played.tally.succeeded == played.stats.calls == len(BAD)
    assert played.tally.bad_lines == played.tally.failed == len(BAD)
    failed = [line for line in played.lines if not succeeded(line)]
    assert len(failed) == len(BAD)
    return {line[3]["line"]: line for line in failed}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_cannot_be_sent(bad_lines: dict[int, Any], name: str) -> None:
    """It becomes a failed result that names the physical line and the reason; the run goes on."""
    number = 1 + 3 * list(BAD).index(name)
    raw, reason = BAD[name]
    line = bad_lines[number]
    (error,) = line[1]
    assert error["kind"] == "bad_line"
    assert error["message"].startswith(f"line {number}: ")
    assert reason.lower() in error["message"].lower()
    assert len(error["message"]) < 500
    if "batch" not in name:
        assert line[0] in (raw.decode(errors="backslashreplace"), as_json(raw))


def as_json(raw: bytes) -> Any:
    """Return the value of a line that is JSON."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the limit is one failed line, not read into memory whole, and the next line is read."""
    monkeypatch.setattr(program, "MAX_LINE_BYTES", 5000)
    played = play(tmp_path, [chat("a"), chat("x" * 100_000), chat("b"), repr(chat("y" * 5000)).encode()])
    assert (played.tally.succeeded, played.tally.bad_lines) == (2, 2)
    assert all(len(json.dumps(line)) < 8000 for line in played.lines)
    assert [line[1][0]["message"][:8] for line in played.lines if not succeeded(line)] == ["line 2: ", "line 4: "]


def test_stream_in_a_family_that_has_none_here(tmp_path: Path) -> None:
    """Only OpenAI-shaped chat can be streamed; elsewhere it is a bad line that says so."""
    played = play(tmp_path, [{"model": "m", "input": "x", "stream": True}], path="/v1/responses")
    assert "stream" in played.lines[0][1][0]["message"]
    assert played.kinds == [["bad_line"]]


# ---- lines that are valid go through unharmed ------------------------------------------------------------------------

VALID: dict[str, bytes] = {
    "lone surrogate": rb'{"model": "m", "messages": [{"role": "user", "content": "a\ud800b"}], "\udfff": 1}',
    "integers beyond 64 bits": OPEN + b', "seed": -123456789012345678901234567890}',
    "integers of 2**63 and 2**64": OPEN + b', "a": [9223372036854775808, 18446744073709551616]}',
    "an integer of 5,000 digits": b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": '
    + b"7" * 5000
    + b"}",
    "1e2": b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 1e2, "b": 1E-7, "c": -0.0}',
    "special tokens": GOOD.replace(b"hello", b"<|endoftext|><|im_start|> <|fim_prefix|>"),
    "content null": b'{"model": "m", "messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "c", '
    b'"type": "function", "function": {"name": "f", "arguments": "{}"}}]}, '
    b'{"role": "tool", "tool_call_id": "c", "content": "1"}]}',
    "parts": b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, '
    b'{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}]}]}',
    "line separators within": GOOD.replace(b"hello", "a\u2028b\u0085c\x7f".encode()),
    "order of keys": b'{"zeta": 1, "messages": [{"content": "x", "role": "user"}], "model": "m", "alpha": 2}',
    "empty content": b'{"model": "m", "messages": [{"role": "user", "content": ""}]}',
    "odd but objects": GOOD.replace(b'"hello"', b'{"a": [1, null, true]}')[:-1]
    + b', "tools": [null], "n": "1", "max_tokens": -1}',
    "400 levels": b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "deep": '
    + b"[" * 400
    + b"]" * 400
    + b"}",
    "an emoji model": '{"model": "\U0001f600", "messages": [{"role": "用户", "content": "你好"}]}'.encode(),
    "escaped slash and unicode": rb'{"model": "m", "messages": [{"role": "user", "content": "a\/b\u00e9\u0000"}]}',
}


def numbers_told_apart(text: bytes | str) -> Any:
    """Read JSON so that 1 and 1.0 differ, and floats are compared as doubles."""
    import sys

    sys.set_int_max_str_digits(0)
    return json.loads(text, parse_float=lambda digits: ("float", float(digits)))


@pytest.mark.parametrize("crlf", [False, True], ids=["LF", "CRLF"])
def test_valid_lines_come_back_as_they_were(tmp_path: Path, crlf: bool) -> None:
    """What was sent and what stands in the result is the JSON value of the line: order, strings, numbers."""
    end = b"\r\n" if crlf else b"\n"
    lines = [b"\xef\xbb\xbf" + b"".join(raw + end + b" \t" + end for raw in VALID.values())]
    played = play(
        tmp_path, lines, Options(statuses=[{"status": 200, "body": {"choices": [{"message": {"content": "y"}}]}}])
    )
    assert [line[1] for line in played.lines if not succeeded(line)] == []
    texts = played.results.read_bytes().splitlines()
    wanted = {name: list(numbers_told_apart(raw).items()) for name, raw in VALID.items()}
    found = [list(numbers_told_apart(text)[0].items()) for text in texts]
    assert [name for name, value in wanted.items() if value not in found] == []
    sent = [list(numbers_told_apart(call["body"]).items()) for call in played.stats.calls_seen]
    assert [name for name, value in wanted.items() if value not in sent] == []


METADATA: list[Any] = [0, False, "", [], {}, "text", 1.0, {"nested": [{"a": "\ud800"}]}, 2**70]


def test_metadata_is_any_json_and_is_not_sent(tmp_path: Path) -> None:
    """Falsy metadata is given back too; null is as if there were none."""
    requests = [*(chat(metadata=value) for value in METADATA), chat(metadata=None), chat()]
    played = play(tmp_path, requests)
    assert not any("metadata" in call["body"] for call in played.stats.calls_seen)
    found = [json.dumps(line[2]) for line in played.lines if len(line) > 2]
    assert sorted(found) == sorted(map(json.dumps, METADATA))
    assert play(tmp_path, requests).stats.calls == 0


def test_openai_batch_lines(tmp_path: Path) -> None:
    """The body is sent untouched, its own metadata included; the custom_id comes back as metadata."""
    body = chat("batch", metadata={"its": "own"}, store=True)
    line = {"custom_id": "a-1", "method": "POST", "url": CHAT, "body": body}
    played = play(tmp_path, [line, {**line, "custom_id": "a-2"}])
    assert {line[2]["custom_id"] for line in played.lines} == {"a-1", "a-2"}
    assert all(line[0] == body and json.loads(call["body"]) == body
               for line, call in zip(played.lines, played.stats.calls_seen, strict=True))  # fmt: skip
    again = play(tmp_path, [*played.lines, line])
    assert again.stats.calls == 1


def test_result_lines_are_requests(tmp_path: Path) -> None:
    """Successful and failed lines of an earlier run are asked again, with their metadata, of whatever width."""
    lines = [
        [chat("a"), {"id": 1}],
        [chat("b"), ["old error"], {"id": "b"}],
        [chat("c"), {"id": 1}, None, {"attempts": 1}],
        [chat("d", metadata={"own": 1}), {"id": 1}, {"custom_id": "d"}],
    ]
    played = play(tmp_path, lines)
    assert sorted(line[0]["messages"][0]["content"] for line in played.lines) == ["a", "b", "c", "d"]
    assert {json.dumps(line[2]) for line in played.lines if len(line) == 3} == {'{"id": "b"}', '{"custom_id": "d"}'}


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b"\n\n\n", b""])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n", b"\n   "])
def test_beginnings_and_ends_of_files(tmp_path: Path, start: bytes, end: bytes) -> None:
    """A BOM, blank lines around, and a last line without its line break are no trouble."""
    played = play(tmp_path, [start, GOOD, end])
    assert (played.tally.succeeded, played.tally.failed) == (1, 0)


def test_a_file_of_nothing_but_a_bom(tmp_path: Path) -> None:
    """Editors on Windows make such files; there is no request in it."""
    assert play(tmp_path, [b"\xef\xbb\xbf"]).tally.exit_code == 0


@pytest.mark.parametrize("text", [" " * 1_000_000, IMAGE + "A" * 50_000_000, "a" * 300_000, "中" * 200_000],
                         ids=["a million spaces", "50 MB", "one long word", "chinese"])  # fmt: skip
def test_long_lines(tmp_path: Path, text: str) -> None:
    """Very long lines are read, counted and sent, and others are sent meanwhile."""
    long = chat(text) if len(text) < 10**7 else chat()
    if len(text) >= 10**7:
        long["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": text}}]
    played = play(tmp_path, [chat("before"), long, chat("after")])
    assert (played.tally.succeeded, played.tally.failed) == (3, 0)
    assert any(line[0] == long for line in played.lines)


# ---- files that grow, standard input ---------------------------------------------------------------------------------


def test_an_unfinished_last_line_is_waited_for(tmp_path: Path) -> None:
    """A line that is just being written is read when it is whole; more that comes meanwhile is read too."""

    async def run() -> int:
        async with LocalProvider() as provider:
            path = tmp_path / "job.jsonl"
            path.write_bytes(GOOD + b"\n" + GOOD[:30])

            def go_on() -> None:
                with path.open("ab") as file:
                    file.write(GOOD[30:] + b"\n" + GOOD + b"\n")

            asyncio.get_running_loop().call_later(1.0, go_on)
            tally = await program.process_api_requests_from_file(
                str(path), request_url=provider.url + CHAT, api_key=KEY, progress="none"
            )
            return tally.succeeded * 10 + tally.failed

    assert virtually(run()) == 30


def test_an_unfinished_last_line_is_not_waited_for_long(tmp_path: Path) -> None:
    """A line that stays torn is a bad line, and the run ends."""
    played = play(tmp_path, [chat(), GOOD[:30]])
    assert (played.tally.succeeded, played.tally.bad_lines) == (1, 1)
    assert played.seconds < 10


@pytest.mark.slow
def test_standard_input_serves_endless_producers(provider: ProviderProcess, tmp_path: Path) -> None:
    """What is written is answered at once, while the producer thinks; at the end of input the run ends."""
    save = tmp_path / "out.jsonl"
    words = command("-", provider.url + CHAT, "--save_filepath", str(save))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()) as process:
        assert process.stdin
        for i, request in enumerate(chats(3)):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            arrived = threading.Event()
            while not arrived.wait(0.02) and (not save.exists() or save.read_bytes().count(b"\n") <= i):
                assert process.poll() is None
        process.stdin.write(b"torn")
        process.communicate(timeout=30)
    assert process.returncode == 1
    lines = read_lines(save)
    assert one_line_each(chats(3), [line for line in lines if succeeded(line)])
    assert "line 4: " in lines[-1][1][0]["message"]


@pytest.mark.skipif(os.name != "posix", reason="named pipes of POSIX")
def test_a_named_pipe_is_a_request_file(tmp_path: Path) -> None:
    """`<(generator)` of a shell works as a request file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    data = b"".join(json.dumps(request).encode() + b"\n" for request in chats(20))
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()

    async def run() -> int:
        async with LocalProvider() as provider:
            save = str(tmp_path / "out.jsonl")
            tally = await program.process_api_requests_from_file(
                str(pipe), save_filepath=save, request_url=provider.url + CHAT, progress="none"
            )
            return tally.exit_code

    assert virtually(run()) == 0
    writer.join()
    assert one_line_each(chats(20), read_lines(tmp_path / "out.jsonl"))


@pytest.mark.skipif(os.name != "posix", reason="named pipes of POSIX")
def test_an_idle_producer_is_no_trouble(tmp_path: Path) -> None:
    """--give_up_minutes counts while something is tried, not while the producer thinks after a failed request."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    rules = [{"contains": "question 000.", "status": 400}]
    lines = [json.dumps(request).encode() + b"\n" for request in chats(2)]

    async def run() -> program.Tally:
        async with LocalProvider(Options(statuses=rules)) as provider:
            descriptor = os.open(pipe, os.O_RDWR)
            os.write(descriptor, lines[0])
            loop = asyncio.get_running_loop()
            loop.call_later(100, os.write, descriptor, lines[1])
            loop.call_later(110, os.close, descriptor)
            save = str(tmp_path / "out.jsonl")
            return await program.process_api_requests_from_file(
                str(pipe), save_filepath=save, request_url=provider.url + CHAT, give_up_minutes=1, progress="none"
            )

    tally = virtually(run())
    assert (tally.exit_code, tally.failed, tally.succeeded) == (1, 1, 1), tally.stop_reason


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("ending", ["limit", "signal"])
def test_a_run_may_end_before_standard_input_does(provider: ProviderProcess, tmp_path: Path, ending: str) -> None:
    """With the producer still there, a run that is interrupted or has enough ends cleanly."""
    save = tmp_path / "out.jsonl"
    flags = ["--save_filepath", str(save), *(["--limit", "1"] if ending == "limit" else [])]
    words = command("-", provider.url + CHAT, *flags)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(GOOD + b"\n")
        process.stdin.flush()
        while ending == "signal" and (not save.exists() or not save.read_bytes()):
            assert process.poll() is None
            threading.Event().wait(0.02)
        if ending == "signal":
            process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
        assert process.wait(timeout=30) == (143 if ending == "signal" else 0), errors
        assert b"Fatal" not in errors
        assert b"Traceback" not in errors
