"""Station 7, report: the tally, progress, the summary and what it advises."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from api_request_parallel_processor import Tally, duration
from tests.jobs import (
    CHAT,
    KEY,
    ProviderProcess,
    chat,
    chats,
    clean_environment,
    command,
    play,
    run_program,
    told,
    write_lines,
)
from tests.local_provider import Options

if TYPE_CHECKING:
    from pathlib import Path

LOG = "api_request_parallel_processor"


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def _informed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(20, LOG)


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (0.2, "1 s"), (59, "59 s"), (61, "1 min 1 s"),
                                                (3599.5, "1 h 0 min"), (7300, "2 h 1 min"), (-5, "0 s")])  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    """People read hours and minutes."""
    assert duration(seconds) == words


def test_the_tally_adds_up(tmp_path: Path) -> None:
    """Every request that was read is finished before, succeeded or failed; every call has an outcome."""
    play(tmp_path, chats(20))
    options = Options(faults={"error_500": 0.2, "reset": 0.1, "hang": 0.1, "error_429": 0.1}, told_wait=0.2)
    lines = [*chats(80), b"nonsense\n", b"\n", chat(5)]  # type: ignore[arg-type]
    played = play(tmp_path, lines, options, max_attempts=3, request_timeout=5, input_price=1.0, output_price=2.0)
    tally = played.tally
    assert tally.read == tally.finished_before + tally.succeeded + tally.failed == 82
    assert (tally.finished_before, tally.bad_lines) == (20, 1)
    assert tally.calls == played.stats.calls == tally.succeeded + sum(tally.kinds.values())
    assert tally.refused == tally.kinds["rate_limit"] == played.stats.faults["error_429"]
    assert tally.answer_lost == played.stats.faults["reset"] + played.stats.faults["hang"]
    usages = [line[1]["usage"] for line in played.lines[20:] if isinstance(line[1], dict)]
    assert tally.prompt_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert tally.output_tokens == sum(usage["completion_tokens"] for usage in usages)
    told = (tally.prompt_tokens + 2 * tally.output_tokens) / 1e6
    assert told < tally.spent < told + 600e-6 * tally.answer_lost  # of a lost answer what was expected


def test_a_tally_is_what_python_callers_get(tmp_path: Path) -> None:
    """It says how the run ended, in the fields that are promised."""
    played = play(tmp_path, chats(1))
    assert isinstance(played.tally, Tally)
    assert (played.tally.stop_reason, played.tally.exit_code) == ("", 0)


@pytest.mark.usefixtures("_informed")
def test_the_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Counts by outcome and by kind, tokens, time, budgets, where the results are, what to do about failures."""
    rules: list[dict[str, Any]] = [{"contains": "001.", "status": 400}, {"contains": "002.", "kind": "internal"}]
    played = play(tmp_path, chats(5), Options(statuses=rules), max_attempts=2, max_tokens_per_minute=50_000)
    text = log_of(caplog)
    assert "3 succeeded, 2 failed, 0 were finished before" in text
    assert "2 server_error" in text
    assert "1 bad_request" in text
    assert f"{played.tally.prompt_tokens} in" in text
    assert f"{played.tally.output_tokens} out" in text
    assert "50,000 tokens a minute" in text
    ratio = re.search(r"gpt-4o-mini: (\d\.\d\d) of the estimated input, (\d+) output tokens on average", text)
    assert ratio is not None
    assert 0.5 < float(ratio[1]) < 2
    assert round(played.tally.output_tokens / 3) == int(ratio[2])
    assert str(played.results) in text
    assert "tries them again" in text


@pytest.mark.usefixtures("_informed")
def test_the_summary_of_requests_that_name_no_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the URL or the server chooses the model, what was learned does not stand under an empty name."""
    play(tmp_path, [{"input": "hello"}], path="/v1/inference/org/m")
    assert "no model: " in log_of(caplog)


@pytest.mark.usefixtures("_informed")
def test_lost_answers_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was sent may have been billed; the summary says how many answers were lost on the way."""
    play(tmp_path, chats(1), Options(fault_script=["hang", "reset"]), request_timeout=5)
    assert re.search(r"lost.*: 2\b", log_of(caplog))


@pytest.mark.usefixtures("_informed")
def test_lines_of_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line every few seconds: done, failed, in flight, waiting, rates against budgets, time left."""
    played = play(tmp_path, chats(200), Options(latency=2), max_requests_per_minute=120, progress="lines")
    lines = [line for line in log_of(caplog).splitlines() if "in flight" in line]
    assert played.seconds / 10 <= len(lines) <= played.seconds
    assert all(word in lines[3] for word in ("done", "failed", "to retry", "of 120 requests", "tokens"))
    assert any("left" in line for line in lines)


@pytest.mark.usefixtures("_informed")
def test_the_rate_shown_is_that_of_the_last_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shown rates follow what is sent, and never exceed the budget."""
    play(tmp_path, chats(300), Options(latency=1), max_requests_per_minute=100, progress="lines")
    rates = [int(found[1].replace(",", "")) for found in re.finditer(r"([\d,]+) of 100 requests", log_of(caplog))]
    assert max(rates) <= 100
    assert sum(rate >= 90 for rate in rates) > 10


@pytest.mark.parametrize("progress", ["none", "lines"])
def test_a_waiting_run_is_silent_or_not(tmp_path: Path, caplog: pytest.LogCaptureFixture, progress: str) -> None:
    """`none` shows nothing on the way, however long it takes."""
    caplog.set_level(20, LOG)
    play(tmp_path, chats(3), Options(latency=40), progress=progress)
    assert ("in flight" in log_of(caplog)) == (progress == "lines")


def test_odd_names_of_models_are_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Surrogates, percent signs and braces in a model's name or an error break no message."""
    caplog.set_level(1, LOG)
    model = "m %s %d {0} {x} [bold] \ud800 [/bold]"
    rules: list[dict[str, Any]] = [{"contains": "1.", "status": 400, "body": {"error": {"message": "%s %(x)d {} [/]"}}}]
    played = play(tmp_path, [chat(f"{i}.") | {"model": model} for i in range(3)], Options(statuses=rules))
    assert (played.tally.succeeded, played.tally.failed) == (2, 1)
    assert log_of(caplog)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
@pytest.mark.parametrize("columns", [120, 20])
def test_a_bar_on_a_terminal(provider: ProviderProcess, tmp_path: Path, columns: int) -> None:
    """On a terminal a bar is drawn, wide or narrow, and odd texts of errors do not break it."""
    import fcntl
    import struct
    import termios

    rules = [{"contains": "001.", "status": 400, "body": {"error": {"message": "[/red] [bold] \\ud83d %s"}}}]
    provider.ask("/_control", {"latency": 0.1, "statuses": rules})
    job = write_lines(tmp_path / "job.jsonl", [*chats(20), b"[/bold] nonsense\n"])
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    words = [word if word != "none" else "auto" for word in command(job, provider.url + CHAT, "--logging_level", "10")]
    environment = clean_environment(TERM="xterm-256color")
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 1
    assert "━".encode() in shown
    assert b"20 succeeded" in shown or b"19 succeeded" in shown
    assert KEY.encode() not in shown


@pytest.mark.slow
def test_a_reader_that_goes_away(provider: ProviderProcess, tmp_path: Path) -> None:
    """`2>&1 | head -1` does not end the run, nor change how it ends."""
    job = write_lines(tmp_path / "job.jsonl", chats(10))
    provider.ask("/_control", {"latency": 0.3})
    words = command(job, provider.url + CHAT, "--logging_level", "10")
    process = subprocess.Popen(words, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "job_results.jsonl").read_bytes().count(b"\n") == 10


@pytest.mark.slow
def test_output_in_a_narrow_encoding(provider: ProviderProcess, tmp_path: Path) -> None:
    """Under LANG=C and an ASCII console, foreign letters in messages do no harm."""
    rules = [{"status": 400, "body": {"error": {"message": "余额不足 \U0001f600"}}}]
    provider.ask("/_control", {"statuses": rules})
    job = write_lines(tmp_path / "job.jsonl", chats(25))
    environment = clean_environment(LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = run_program(job, provider.url + CHAT, "--logging_level", "50", environment=environment)
    assert done.returncode == 3, told(done)
    assert "The first 20 replies" in told(done)
