"""The real program in a process of its own: happy, resumed, killed, interrupted, out of space, robbed of its file."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

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
    run_program,
    succeeded,
    told,
    write_lines,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow
FAST = ("--max_requests_per_minute", "0", "--max_tokens_per_minute", "0")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
COOKBOOK = json.loads(r"""
{"success": "[{\"model\": \"text-embedding-3-small\", \"input\": \"0\\n\"}, {\"object\": \"list\", \"data\": []}]",
 "metadata": "[{\"model\": \"m\", \"input\": \"1\"}, {\"object\": \"list\", \"data\": []}, {\"row_id\": 1}]",
 "failure": "[{\"model\": \"m\", \"input\": \"2\"}, [\"No connection\", {\"error\": {\"message\": \"Rate limit\"}}]]",
 "failure with metadata": "[{\"model\": \"m\", \"input\": \"3\"}, [\"\"], {\"row_id\": 3}]"}
""")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tmp_path / "job.jsonl"


@pytest.fixture
def results(job: Path) -> Path:
    return job.with_name("job_results.jsonl")


def until(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for something outside this process."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, (
            f"ended too early: {process.stderr and process.stderr.read()!r}"
        )
        time.sleep(0.01)


def start(path: Path, url: str, *flags: str, **more: Any) -> subprocess.Popen[bytes]:
    """Start the real program."""
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": clean_environment(), **more}
    return subprocess.Popen(command(path, url, *flags), **more)


def until_lines(path: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    """Wait for so many lines, or for the end of the process."""
    until(lambda: count(path) >= number or process.poll() is not None)


def count(path: Path) -> int:
    """Count the whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ---- jobs as people have them ----------------------------------------------------------------------------------------


def test_happy_path(provider: ProviderProcess, job: Path, results: Path) -> None:
    """Every request has its line, nothing else is left, and a second start has nothing to do and says so."""
    write_lines(job, chats(50))
    done = run_program(job, provider.url + CHAT, *FAST)
    assert done.returncode == 0, told(done)
    assert done.stdout == b""
    assert one_line_each(chats(50), read_lines(results))
    assert "OPENAI_API_KEY" in told(done).splitlines()[0]
    assert "127.0.0.1" in told(done).splitlines()[0]
    assert str(results) in told(done)
    assert sorted(path.name for path in job.parent.iterdir()) == ["job.jsonl", "job_results.jsonl"]
    assert os.name != "posix" or results.stat().st_mode & 0o777 == 0o600
    before, calls = results.read_bytes(), provider.ask("/_stats")["calls"]
    again = run_program(job, provider.url + CHAT, *FAST)
    assert again.returncode == 0
    assert "--restart" in told(again)
    assert "--save_filepath" in told(again)
    assert results.read_bytes() == before
    assert provider.ask("/_stats")["calls"] == calls


def test_the_cookbooks_example_job(provider: ProviderProcess, tmp_path: Path) -> None:
    """Ten thousand embeddings with the cookbook's own command line, only more requests a minute."""
    job, results = tmp_path / "example_requests_to_parallel_process.jsonl", tmp_path / "example_results.jsonl"
    requests = [{"model": "text-embedding-3-small", "input": f"{n}\n"} for n in range(10_000)]
    write_lines(job, requests)
    words = f"""--requests_filepath {job} --save_filepath {results} --request_url {provider.url}/v1/embeddings
        --max_requests_per_minute 1000000 --max_tokens_per_minute 6250000 --token_encoding_name cl100k_base
        --max_attempts 5 --logging_level 20"""
    program = command(job)[1]
    done = subprocess.run(
        [sys.executable, program, *words.split()], env=clean_environment(), capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, told(done)
    lines = read_lines(results)
    assert one_line_each(requests, lines)
    assert all(len(line) == 2 and line[1]["data"][0]["embedding"] for line in lines)
    assert provider.ask("/_stats")["calls"] == 10_000


def test_a_results_file_of_the_cookbook_script_as_checkpoint(tmp_path: Path, results: Path) -> None:
    """What the cookbook script finished is kept as it is, what failed there is tried again."""
    requests = [
        {"model": "text-embedding-3-small", "input": "0\n"},
        {"model": "m", "input": "1", "metadata": {"row_id": 1}},
        {"model": "m", "input": "2"},
        {"model": "m", "input": "3", "metadata": {"row_id": 3}},
        {"model": "m", "input": "4"},
    ]
    write_lines(results, [line.encode() + b"\n" for line in COOKBOOK.values()])
    played = play(tmp_path, requests, path="/v1/embeddings")
    assert (played.tally.exit_code, played.stats.calls) == (0, 3)
    assert one_line_each(requests, played.lines)
    assert results.read_text("utf-8").splitlines()[:2] == [COOKBOOK["success"], COOKBOOK["metadata"]]


def test_a_results_file_of_the_cookbook_script_as_request_file(tmp_path: Path) -> None:
    """Each of its lines is asked again, with its metadata."""
    played = play(tmp_path, [line.encode() + b"\n" for line in COOKBOOK.values()], path="/v1/embeddings")
    assert played.tally.exit_code == 0
    assert sorted(line[0]["input"] for line in played.lines) == ["0\n", "1", "2", "3"]
    assert sorted(line[2]["row_id"] for line in played.lines if len(line) > 2) == [1, 3]


def test_the_seeds_own_line(tmp_path: Path) -> None:
    """Qwen's native text generation: the request comes back as written, metadata apart."""
    request = {
        "model": "qwen-turbo",
        "input": {"messages": [{"role": "user", "content": "What is apple in French?"}]},
        "parameters": {"seed": 42, "max_tokens": 10},
        "metadata": {"request_id": "2333.txt"},
    }
    path = "/api/v1/services/aigc/text-generation/generation"
    (line,) = play(tmp_path, [request], path=path, provider="dashscope").lines
    assert line[0] == {key: value for key, value in request.items() if key != "metadata"}
    assert "apple in French" in line[1]["output"]["text"]
    assert line[2] == {"request_id": "2333.txt"}


def test_the_single_file_alone(provider: ProviderProcess, tmp_path: Path) -> None:
    """Copied into an empty folder, with nothing but aiohttp and tiktoken, it runs."""
    program = tmp_path / "program.py"
    program.write_bytes(Path(command("x")[1]).read_bytes())
    write_lines(tmp_path / "job.jsonl", chats(3))
    hide = "import sys; sys.modules |= dict.fromkeys(('uvloop', 'orjson', 'rich', 'bpe_openai')); import runpy; "
    hide += "sys.argv[0] = 'program.py'; runpy.run_path('program.py', run_name='__main__')"
    words = ["--requests_filepath", "job.jsonl", "--request_url", provider.url + CHAT, "--progress", "bar"]
    done = subprocess.run(
        [sys.executable, "-c", hide, *words],
        cwd=tmp_path,
        env=clean_environment(HTTPS_PROXY="http://127.0.0.1:9", TIKTOKEN_CACHE_DIR=str(tmp_path / "none")),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, told(done)
    assert one_line_each(chats(3), read_lines(tmp_path / "job_results.jsonl"))


# ---- killed ----------------------------------------------------------------------------------------------------------


def changed(requests: list[dict[str, Any]], rng: random.Random, extra: int) -> list[dict[str, Any]]:
    """Reorder the lines, delete two, insert one, and let keys change places."""
    lines = [dict(rng.sample(list(request.items()), len(request))) for request in requests]
    rng.shuffle(lines)
    return [*lines[2:], chat(f"inserted {extra}", metadata={"id": [extra]})]


@posix
@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_at_random_moments_then_resume(provider: ProviderProcess, job: Path, results: Path, seed: int) -> None:
    """Five kills while lines move, come and go: one line per request, repeated calls at most those in flight."""
    rng = random.Random(seed)
    twins = [chat(f"twin {i % 3}", **({"metadata": {"twin": i % 2}} if i % 2 else {})) for i in range(12)]
    requests = [*chats(150), *twins, chat("bad one"), chat("bad one")]
    rules = [{"contains": "bad one", "status": 400, "body": {"error": {"message": "bad"}}, "latency": 0.05}]
    provider.ask("/_control", {"latency": 0.08, "latency_spread": 0.5, "statuses": rules})
    repeats, known, flags = 0, set(map(json.dumps, requests)), (*FAST, "--max_concurrent_requests", "20")
    write_lines(results, [[chat("question 000."), [{"attempt": 1, "kind": "timeout"}], {"id": 0}]])
    for kill in range(5):
        write_lines(job, requests)
        process = start(job, provider.url + CHAT, *flags)
        until_lines(results, count(results) + rng.randrange(40), process)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        repeats += 20
        requests = changed(requests, rng, kill)
        known |= set(map(json.dumps, requests))
    write_lines(job, requests)
    calls_before = provider.ask("/_stats")["calls"]
    done = run_program(job, provider.url + CHAT, *flags)
    wanted = [
        json.dumps([{k: v for k, v in r.items() if k != "metadata"}, r.get("metadata")], sort_keys=True)
        for r in requests
    ]
    lines = read_lines(results)
    found = [json.dumps([line[0], line[2] if len(line) > 2 else None], sort_keys=True) for line in lines]
    foreign = len(found) - len(wanted)
    assert done.returncode == any("bad one" in text for text in wanted), told(done)
    assert 0 <= foreign <= 2 * 5
    for text in set(wanted):
        assert found.count(text) - wanted.count(text) in range(3), text
    assert sum(not succeeded(line) for line in lines) == sum("bad one" in text for text in wanted)
    successes = sum(map(succeeded, lines))
    assert provider.ask("/_stats")["accepted"] <= successes + repeats
    assert calls_before
    assert sorted(path.name for path in job.parent.iterdir()) == ["job.jsonl", "job_results.jsonl"]


# ---- interrupted -----------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_drains(provider: ProviderProcess, job: Path, results: Path, name: str, code: int) -> None:
    """Nothing new is sent, what is in flight is finished and recorded, and a restart completes the file."""
    provider.ask("/_control", {"latency": 0.4})
    write_lines(job, chats(60))
    flags = (*FAST, "--max_concurrent_requests", "8", "--progress", "lines")
    process = start(job, provider.url + CHAT, *flags)
    until(lambda: count(results) >= 8, process)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    stats = provider.ask("/_stats")
    assert len(read_lines(results)) == stats["calls"] < 60
    assert name.encode() in errors
    if name != "SIGINT":
        return  # once is enough
    provider.ask("/_control", {"latency": 0.0})
    assert run_program(job, provider.url + CHAT, *FAST).returncode == 0
    assert one_line_each(chats(60), read_lines(results))
    assert provider.ask("/_stats")["calls"] == 60


@posix
def test_an_interrupt_before_the_run_has_begun(job: Path) -> None:
    """Ctrl-C while modules are still imported ends the program without a traceback; nothing was touched."""
    (job.parent / "aiohttp.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    write_lines(job, chats(1))
    done = subprocess.run(
        command(job, "http://127.0.0.1:9" + CHAT),
        env=clean_environment(PYTHONPATH=str(job.parent)),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
    assert sorted(path.name for path in job.parent.glob("*.*")) == ["aiohttp.py", "job.jsonl"]


@posix
def test_a_second_signal_stops_at_once(provider: ProviderProcess, job: Path, results: Path) -> None:
    """What hangs is not waited for, but counted as sent and paid for, and no line is torn."""
    rules = [{"contains": f"question {i:03}.", "fault": "hang"} for i in range(10, 60)]
    provider.ask("/_control", {"statuses": rules})
    write_lines(job, chats(60))
    flags = (*FAST, "--max_concurrent_requests", "20", "--input_price", "1000", "--logging_level", "20")
    process = start(job, provider.url + CHAT, *flags)
    until(lambda: count(results) >= 10 and provider.ask("/_stats")["calls"] > 10, process)
    process.send_signal(signal.SIGINT)
    line = b""
    while b"SIGINT" not in line:
        assert process.stderr
        line = process.stderr.readline()
        assert line, "it ended"
    assert b"The same command continues" in line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    patterns = rb"Calls: (\d+)", rb"answer lost .perhaps billed.: (\d+)", rb"Tokens: (\d+) in", rb"Spent: ([\d.]+)"
    calls, lost, tokens, spent = (float(found[1]) for pattern in patterns if (found := re.search(pattern, errors)))
    assert lost == calls - 10
    assert spent > tokens * 1000 / 1e6
    assert len(read_lines(results)) == 10
    assert not results.with_name(results.name + ".lock").exists()


@posix
def test_a_vanished_terminal_does_not_end_a_run(provider: ProviderProcess, job: Path, results: Path) -> None:
    """Under nohup the run goes on when the terminal is closed, whatever it shows there."""
    provider.ask("/_control", {"latency": 0.2})
    write_lines(job, chats(60))
    ours, theirs = os.openpty()
    flags = (*FAST, "--max_concurrent_requests", "10", "--progress", "bar", "--logging_level", "10")
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = start(job, provider.url + CHAT, *flags, **streams, start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # fmt: skip
    os.close(theirs)
    until(lambda: count(results) >= 10, process)
    os.close(ours)
    assert process.wait(timeout=30) == 0
    assert one_line_each(chats(60), read_lines(results))


# ---- files that fail -------------------------------------------------------------------------------------------------


@posix
def test_disk_full(provider: ProviderProcess, job: Path, results: Path) -> None:
    """A file that cannot grow stops the run with a clear message, stays valid, and a restart completes it."""
    import resource

    write_lines(job, chats(80))
    size = 20_000
    done = run_program(
        job,
        provider.url + CHAT,
        *FAST,
        "--logging_level",
        "50",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert done.returncode == 3, told(done)
    assert "cannot be written" in told(done)
    assert "start" in told(done)
    lines = read_lines(results)
    assert 20 < len(lines) < 80
    assert all(map(succeeded, lines))
    assert run_program(job, provider.url + CHAT, *FAST).returncode == 0
    assert one_line_each(chats(80), read_lines(results))


def replace(results: Path) -> None:
    other = results.with_name("other")
    other.write_bytes(b"")
    other.replace(results)


@posix
@pytest.mark.parametrize("robbery", [Path.unlink, replace, lambda path: os.truncate(path, 700)],
                         ids=["deleted", "replaced", "truncated"])  # fmt: skip
def test_the_results_file_is_taken_away(
    provider: ProviderProcess, job: Path, results: Path, robbery: Callable[[Path], None]
) -> None:
    """It is noticed, what is still held is kept under a second name, and the advice given completes the job."""
    provider.ask("/_control", {"latency": 0.15})
    write_lines(job, chats(80))
    process = start(job, provider.url + CHAT, *FAST, "--max_concurrent_requests", "10", "--logging_level", "50")
    until(lambda: count(results) >= 20, process)
    robbery(results)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3, errors
    (rescue,) = results.parent.glob("*rescued*")
    assert str(rescue).encode() in errors
    kept = results.read_bytes().splitlines(keepends=True) if results.exists() else []
    kept = [line for line in kept if line.endswith(b"\n")]
    saved = [line for line in rescue.read_bytes().splitlines(keepends=True) if line.strip()]
    whole = [json.loads(line) for line in [*kept, *saved]]
    results.write_bytes(b"".join([*kept, *saved]))
    rescue.unlink()
    provider.ask("/_control", {"latency": 0.0})
    assert len(whole) >= 2
    assert run_program(job, provider.url + CHAT, *FAST).returncode == 0
    assert one_line_each(chats(80), read_lines(results))


def test_two_processes_on_one_results_file(provider: ProviderProcess, job: Path, results: Path) -> None:
    """The second one is told who writes the file, and touches nothing; a dead holder does not block."""
    provider.ask("/_control", {"latency": 0.5})
    write_lines(job, chats(30))
    first = start(job, provider.url + CHAT, *FAST, "--max_concurrent_requests", "5")
    until(lambda: count(results) >= 5, first)
    provider.ask("/_control", {"latency": 600})  # it will not end before the others, however slow they start
    second = run_program(job, provider.url + CHAT, *FAST)
    restart = run_program(job, provider.url + CHAT, *FAST, "--restart")
    assert (second.returncode, restart.returncode) == (2, 2)
    assert str(first.pid) in told(second)
    first.kill()
    first.communicate()
    provider.ask("/_control", {"latency": 0.0})
    assert run_program(job, provider.url + CHAT, *FAST).returncode == 0
    assert one_line_each(chats(30), read_lines(results))


# ---- secrets ---------------------------------------------------------------------------------------------------------


@posix
def test_the_key_is_in_no_byte_left_behind(provider: ProviderProcess, job: Path, results: Path) -> None:
    """A failing run whose provider echoes the key leaves it in no file, no log and no message."""
    faults = {"echo_key": 0.3, "echo_key_200": 0.3, "reset": 0.1}
    provider.ask("/_control", {"faults": faults})
    write_lines(job, [*chats(60), b"nonsense\n"])
    flags = (*FAST, "--max_attempts", "2", "--save_details", "--logging_level", "1", "--progress", "lines")
    done = run_program(job, provider.url + CHAT, *flags)
    assert done.returncode == 1, told(done)
    assert b"[REDACTED]" in results.read_bytes()
    provider.ask("/_control", {"faults": {}, "api_key": "another one"})
    refused = run_program(job, provider.url + CHAT, *flags, "--restart")
    assert refused.returncode == 3
    everything = [done.stdout, done.stderr, refused.stdout, refused.stderr]
    everything += [path.read_bytes() for path in job.parent.rglob("*") if path.is_file()]
    assert not [data for data in everything if KEY.encode() in data]
    assert all(path.stat().st_mode & 0o077 == 0 for path in job.parent.glob("job_results*"))
