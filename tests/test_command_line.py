"""The command line: flags and Settings, refusals that touch nothing, keys, dry runs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import api_request_parallel_processor as program
from api_request_parallel_processor import Settings, UsageError, process_api_requests_from_file
from tests.jobs import (
    CHAT,
    KEY,
    ProviderProcess,
    chats,
    clean_environment,
    command,
    read_lines,
    virtually,
    write_lines,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DESIGN = """
    requests_filepath save_filepath request_url api_key max_requests_per_minute max_tokens_per_minute
    seconds_to_sleep_each_loop token_encoding_name max_attempts logging_level max_concurrent_requests request_timeout
    provider request_header save_details restart limit dry_run progress give_up_minutes max_reply_megabytes
    allow_plain_http input_price output_price max_cost ignore_batch version api_key_env help endpoints_filepath
    cached_input_price
"""
NOWHERE = "http://127.0.0.1:9/v1/chat/completions"


def main(*words: str) -> tuple[int, str, str]:
    """Call the program in this process; give exit code, standard output and standard error."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = program.main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), errors.getvalue()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    """Make a request file, and afterwards see that nothing was touched."""
    path = write_lines(tmp_path / "job.jsonl", chats(3))
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before


def untouched(job: Path) -> bool:
    return [path.name for path in job.parent.iterdir()] == ["job.jsonl"]


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_flags_are_the_promised_ones_and_the_fields_of_settings() -> None:
    """One flag per setting, under the promised names, and no other."""
    flags = set(re.findall(r"^  (?:-h, )?--(\w+)", main("--help")[1], flags=re.MULTILINE))
    assert flags == set(DESIGN.split())
    assert flags - {"version", "help"} == {item.name for item in dataclasses.fields(Settings)}


def test_defaults_are_the_promised_ones() -> None:
    """The defaults of the command line are those of Settings."""
    settings = Settings(requests_filepath="x.jsonl")
    assert settings.request_url == "https://api.openai.com/v1/chat/completions"
    assert (settings.max_requests_per_minute, settings.max_tokens_per_minute) == (1500, 125000)
    assert (settings.max_attempts, settings.request_timeout, settings.give_up_minutes) == (5, 600, 30)
    assert (settings.token_encoding_name, settings.progress, settings.provider) == ("auto", "auto", "auto")
    assert (settings.max_reply_megabytes, settings.seconds_to_sleep_each_loop) == (256, 0)
    assert settings.results_path == "x_results.jsonl"
    assert Settings(requests_filepath="a.jsonl/requests.txt").results_path == "a.jsonl/requests.txt_results.jsonl"


def test_every_flag_is_in_the_help_with_its_default() -> None:
    """Each flag has a text, and numbers their default."""
    text = " ".join(main("--help")[1].split())
    for item in dataclasses.fields(Settings):
        assert f"--{item.name}" in text
        if type(item.default) in (int, float) and item.default:
            assert f"(default: {item.default:g})" in text or f"(default: {item.default})" in text, item.name


def test_the_version_is_told() -> None:
    """--version prints the version and nothing else."""
    assert main("--version")[:2] == (0, f"{program.__version__}\n")


@pytest.mark.parametrize("words", [
    ["--requests-filepath", "{}", "--request-url", NOWHERE, "--max-attempts=3", "--dry-run"],
    ["--requests_filepath={}", "--request_url", NOWHERE, "--max_attempts", "3", "--dry_run"],
    ["--requests-filepath={}", "--request_url=" + NOWHERE, "--request-header", "X-A: b-c=d", "--dry-run"],
])  # fmt: skip
def test_dashes_are_accepted(job: Path, words: list[str]) -> None:
    """Flags may be written with dashes, and with an equals sign; values stay as they are."""
    code, out, errors = main(*(word.replace("{}", str(job)) for word in words))
    assert (code, "3 requests" in out) == (0, True), errors
    assert untouched(job)


# ---- wrong usage -----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], str]] = {
    "no request file": (["--requests_filepath", "{}/none.jsonl"], "none.jsonl"),
    "a folder as request file": (["--requests_filepath", "{}"], "request"),
    "folder of results missing": (["--save_filepath", "{}/no/where.jsonl"], "mkdir"),
    "results are the requests": (["--save_filepath", "{}/job.jsonl"], "request file"),
    "results are a folder": (["--save_filepath", "{}"], "regular file"),
    "no key": (
        ["--api_key_env", "NO_SUCH_KEY", "--request_url", "https://api.openai.com/v1/embeddings"],
        "NO_SUCH_KEY",
    ),
    "unknown encoding": (["--token_encoding_name", "o300k"], "o200k_base"),
    "unknown provider": (["--provider", "nobody"], "dashscope"),
    "unknown progress": (["--progress", "dots"], "bar"),
    "unknown level": (["--logging_level", "loud"], "DEBUG"),
    "unknown flag": (["--max_retries", "3"], "--max_retries"),
    "abbreviated flag": (["--max_att", "3"], "--max_att"),
    "no number": (["--max_attempts", "many"], "--max_attempts"),
    "no whole number": (["--max_attempts", "1.5"], "--max_attempts"),
    "no attempts": (["--max_attempts", "0"], "max_attempts"),
    "negative": (["--max_requests_per_minute", "-5"], "max_requests_per_minute"),
    "not a number": (["--max_tokens_per_minute", "nan"], "max_tokens_per_minute"),
    "infinite": (["--request_timeout", "inf"], "request_timeout"),
    "no time": (["--request_timeout", "0"], "request_timeout"),
    "no such address": (["--request_url", "api.openai.com"], "--request_url"),
    "unknown endpoint": (["--request_url", "http://127.0.0.1:9/v1/audio/speech"], "/v1/audio/speech"),
    "plain http": (["--request_url", "http://8.8.8.8/v1/embeddings"], "--allow_plain_http"),
    "header": (["--request_header", "no colon"], "request_header"),
    "cost without prices": (["--max_cost", "5"], "--input_price"),
    "standard input without a place": (["--requests_filepath", "-"], "--save_filepath"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage(job: Path, name: str) -> None:
    """One clear sentence that says what to do, exit code 2, nothing touched, whatever the logging level."""
    words, reason = WRONG[name]
    flags = {"--requests_filepath": str(job), "--request_url": NOWHERE, "--logging_level": "50"}
    flags |= dict(zip(words[::2], (word.replace("{}", str(job.parent)) for word in words[1::2]), strict=True))
    code, out, errors = main(*(word for flag in flags.items() for word in flag))
    assert code == 2
    assert reason in errors
    assert out == ""
    assert "Traceback" not in errors
    assert len(errors.splitlines()[-1]) < 400
    assert untouched(job)


def test_no_flags_at_all() -> None:
    """What is missing is named."""
    code, _, errors = main()
    assert code == 2
    assert "--requests_filepath" in errors


@pytest.mark.parametrize("content", [b"id,question\n1,hello\n", b'{"model": "m", "messages": []}\n', b"[1, 2]\n"])
def test_results_that_are_something_else(job: Path, content: bytes) -> None:
    """A file whose first line is no result line is never appended to."""
    other = job.with_name("other.csv")
    other.write_bytes(content)
    code, _, errors = main("--requests_filepath", str(job), "--save_filepath", str(other), "--request_url", NOWHERE)
    assert code == 2
    assert "--save_filepath" in errors
    assert other.read_bytes() == content
    assert len(list(job.parent.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a closed descriptor")
def test_standard_input_that_is_closed(tmp_path: Path) -> None:
    """Started without standard input, there is nothing to read: a sentence, or a run of no requests; no traceback."""
    words = command("-", NOWHERE, "--save_filepath", str(tmp_path / "out.jsonl"))
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" <&-', "sh", *words],
        env=clean_environment(),
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert done.returncode in (0, 2)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("settings", [
    {"max_attempts": 0}, {"logging_level": 20, "no_such": 1}, {"provider": "nobody"}, {"request_timeout": float("nan")},
    {"token_encoding_name": "x"}, {"save_filepath": "/no/such/folder/x.jsonl"}, {"request_url": "nowhere"},
    {"progress": "dots"}, {"logging_level": "loud"}, {"max_attempts": "5"}, {"request_header": ("x",)},
    {"api_key": 5}, {"request_url": 5}, {"provider": 5}, {"save_filepath": 5}, {"no_such_setting": 1},
    {"request_url": [5]}, {"request_header": [5]}, {"request_header": "Name: value"}, {"logging_level": [None]},
])  # fmt: skip
def test_wrong_usage_from_python(job: Path, settings: dict[str, Any]) -> None:
    """From Python, wrong settings raise a usage error instead of exiting."""
    with pytest.raises(UsageError):
        virtually(process_api_requests_from_file(str(job), **({"request_url": NOWHERE} | settings)))
    assert untouched(job)


def test_a_number_is_no_request_file() -> None:
    """It would be read as the number of an open file, perhaps of somebody else's."""
    with pytest.raises(UsageError, match="--requests_filepath takes a text, not int"):
        virtually(process_api_requests_from_file(0, save_filepath="x.jsonl", dry_run=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("ledger", ["{", "[]", '{"jobs": 5}', '{"jobs": [5]}', "\\udcff"])
def test_a_ledger_of_batch_jobs_that_cannot_be_read(job: Path, ledger: str) -> None:
    """It may list jobs that are open and paid for: the run is refused until somebody has looked."""
    path = job.with_name("job_results.jsonl.batch.json")
    path.write_text(ledger, errors="surrogateescape")
    with pytest.raises(UsageError, match=r"batch\.json cannot be read .*--ignore_batch"):
        virtually(process_api_requests_from_file(str(job), request_url=NOWHERE, api_key=KEY))
    path.write_text('{"jobs": [{"id": "batch_1", "open": false}]}')
    tally = virtually(
        process_api_requests_from_file(str(job), request_url=NOWHERE, api_key=KEY, limit=1, max_attempts=1)
    )
    assert tally.calls == 1


def test_python_takes_what_the_cookbooks_function_took(job: Path) -> None:
    """The keyword arguments of the cookbook's function are settings here, numbers as numbers."""
    tally = virtually(
        process_api_requests_from_file(
            requests_filepath=str(job),
            save_filepath=str(job.with_name("out.jsonl")),
            request_url=NOWHERE,
            api_key=KEY,
            max_requests_per_minute=float(3_000 * 0.5),
            max_tokens_per_minute=float(250_000 * 0.5),
            token_encoding_name="cl100k_base",
            max_attempts=5,
            logging_level=20,
            dry_run=True,
        )
    )
    assert (tally.exit_code, tally.read) == (0, 3)
    assert untouched(job)


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_the_key_of_the_environment(job: Path, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider's usual variable, another one by name, the flag first of all, and none for this machine."""
    provider.ask("/_control", {"record_calls": True})
    for flags, environment, expected in [
        ([], {"OPENAI_API_KEY": "sk-usual-0123456789"}, "authorization: Bearer sk-usual-0123456789"),
        (["--api_key_env", "MINE"], {"MINE": " sk-mine-0123456789\n"}, "authorization: Bearer sk-mine-0123456789"),
        (["--api_key", "sk-flag-0123456789"], {}, "authorization: Bearer sk-flag-0123456789"),
        (["--provider", "azure"], {"AZURE_OPENAI_API_KEY": "azure-0123456789"}, "api-key: azure-0123456789"),
        ([], {"OPENAI_API_KEY": ""}, ""),
    ]:
        for name in ("OPENAI_API_KEY", "MINE", "AZURE_OPENAI_API_KEY"):
            monkeypatch.setenv(name, environment.get(name, ""))
        words = ["--requests_filepath", str(job), "--request_url", provider.url + CHAT, "--limit", "1", "--restart"]
        code, _, errors = main(*words, *flags)
        assert code == 0, errors
        assert provider.ask("/_stats")["calls_seen"][-1]["key"] == expected
        assert "0123456789" not in errors


# ---- dry runs, limits, notices ---------------------------------------------------------------------------------------


def test_a_dry_run_needs_and_touches_nothing(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no network, no lock, no results: requests, tokens, how long the budgets take, bad lines."""
    monkeypatch.delenv("OPENAI_API_KEY")
    code, out, errors = main("--requests_filepath", str(job), "--dry_run", "--max_requests_per_minute", "1")
    assert (code, errors.count("Traceback")) == (0, 0)
    assert "3 requests" in out
    assert "tokens" in out
    assert "3 min" in out
    assert untouched(job)
    write_lines(job, [*chats(2), b"nonsense\n"])
    code, out, _ = main("--requests_filepath", str(job), "--dry_run")
    assert code == 1
    assert "line 3: " in out
    assert untouched(job)
    write_lines(job, chats(3))  # as it was


def test_a_dry_run_leaves_results_alone(job: Path) -> None:
    """Not even a torn line is repaired, and a running job's lock is no hindrance."""
    results = job.with_name("job_results.jsonl")
    results.write_bytes(b'[{"model": "m"}, {"id"')
    lock = job.with_name("job_results.jsonl.lock")
    lock.write_bytes(b"1\n")
    assert main("--requests_filepath", str(job), "--dry_run", "--restart")[0] == 0
    assert results.read_bytes() == b'[{"model": "m"}, {"id"'
    assert lock.read_bytes() == b"1\n"
    assert len(list(job.parent.iterdir())) == 3


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_an_address_without_an_endpoint(job: Path, provider: ProviderProcess, path: str) -> None:
    """It gets /chat/completions, with a notice."""
    code, _, errors = main("--requests_filepath", str(job), "--request_url", provider.url + path, "--limit", "1")
    assert code == 0, errors
    assert "/chat/completions" in errors
    assert list(provider.ask("/_stats")["paths"]) == [f"{path.rstrip('/')}/chat/completions"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupted_while_it_starts(job: Path, provider: ProviderProcess) -> None:
    """Whenever Ctrl-C comes, the program ends as one that was interrupted, or has finished."""
    process = subprocess.Popen(command(job, provider.url + CHAT), env=clean_environment(), stderr=subprocess.PIPE)
    time.sleep(0.25)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (0, 130, -signal.SIGINT)


def test_the_reason_of_a_stop_is_always_printed(job: Path, provider: ProviderProcess) -> None:
    """Whatever the logging level, exit code 3 has its reason on standard error, and what to do."""
    provider.ask("/_control", {"api_key": "another"})
    words = ["--requests_filepath", str(job), "--request_url", provider.url + CHAT, "--logging_level", "50"]
    code, _, errors = main(*words)
    assert code == 3
    assert "Incorrect API key" in errors
    assert "Check that the key" in errors
    assert read_lines(job.with_name("job_results.jsonl")) == []


def test_importing_it_does_nothing() -> None:
    """Importing the module starts no loop, prints nothing, and shows only what __all__ promises."""
    names = json.dumps(sorted(program.__all__))
    code = "import json, api_request_parallel_processor as p; print(json.dumps(sorted(p.__all__)))"
    root = Path(program.__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == (names, "")


def test_shells_complete_flags_and_providers(tmp_path: Path) -> None:
    """The completion that shtab makes from the parser works in bash."""
    shtab = pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(shtab.complete(program.build_parser(), "bash"))
    [name] = set(re.findall(r"complete .*-F (\S+)", script.read_text()))

    def complete(*words: str) -> list[str]:
        given = " ".join(("COMP_WORDS=(x", *words, f"); COMP_CWORD={len(words)}; {name}; echo ${{COMPREPLY[@]}}"))
        done = subprocess.run(["bash", "-c", f"source {script}; {given}"], capture_output=True, check=True, text=True)
        return done.stdout.split()

    assert "--max_requests_per_minute" in complete("--max")
    assert complete("--provider", "deep") == ["deepinfra", "deepseek"]
    assert complete("--requests_filepath", str(script)[:-2]) == [str(script)]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--input_price", "1", "--output_price", "2"], r"Expected cost: 0\.00\d+\."),
        ([], r"Expected cost: 0\.00\d+ dollars, by the list prices of genai-prices"),
        (["--request_url", NOWHERE], r"No list price for gpt-4o-mini at \S+: --input_price and --output_price"),
    ],
)
def test_a_dry_run_tells_what_it_would_cost(job: Path, flags: list[str], told: str) -> None:
    """By the prices given, else by list prices if the package is there; never by a guess."""
    if "--input_price" not in flags:
        pytest.importorskip("genai_prices")
    code, out, _ = main("--requests_filepath", str(job), "--dry_run", *flags)
    assert code == 0
    assert re.search(told, out)
