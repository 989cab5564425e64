"""workflows.provider_batch: the same request file through every provider's Batch API, and what goes wrong there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from api_request_parallel_processor import UsageError, locked
from tests.local_batches import Batches, BatchOptions, Response, answer, reply, serving
from workflows import _batch_providers as providers
from workflows import _run, provider_batch
from workflows._batch_client import Stopped
from workflows._batch_costs import Sample, cost_words
from workflows._batch_jobs import Jobs
from workflows._batch_ledger import Ledger, Part
from workflows._batch_providers import TRANSPORTS, check_window, find_target, held_open_url, window_hours
from workflows.provider_batch import Batch

if TYPE_CHECKING:
    from workflows._batch_providers import Transport

# the processor leaves its request file to the garbage collector
live = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = Path(__file__).resolve().parents[1]
PATHS = {
    "anthropic": "/v1/messages",
    "azure": "/openai/deployments/d1/chat/completions?api-version=2024-10-21",
    "dashscope": "/compatible-mode/v1/chat/completions",
    "gemini": "/v1beta/models/gemini-x:generateContent",
    "groq": "/openai/v1/chat/completions",
    "zhipu": "/api/paas/v4/chat/completions",
}
SHAPES = "anthropic azure dashscope deepinfra gemini groq mistral moonshot openai siliconflow together zhipu".split()


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, proxy or .env of the machine."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.endswith("_API_KEY") or "proxy" in name.lower() or name.startswith(("QIANWEN", "BATCH_")):
            monkeypatch.delenv(name)


class World:
    """A request file, a provider, and the program between them."""

    def __init__(self, folder: Path, provider: str = "openai", **options: Any) -> None:
        self.requests, self.results = folder / "r.jsonl", folder / "r_results.jsonl"
        self.provider, self.batches = provider, Batches(BatchOptions(provider=provider, **options))
        self.url = ""

    def write(self, count: int, **more: Any) -> None:
        """Write a request file; metadata are the numbers."""
        lines = [{**self.body(f"q{number}"), **more, "metadata": {"id": number}} for number in range(count)]
        self.write_lines(lines)

    def write_lines(self, lines: list[Any]) -> None:
        """Write a request file of these values."""
        self.requests.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def body(self, text: str) -> dict[str, Any]:
        """A request in the provider's shape."""
        if self.provider == "gemini":
            return {"contents": [{"role": "user", "parts": [{"text": text}]}]}
        more = {"max_tokens": 5} if self.provider == "anthropic" else {}
        return {"model": "claude-x" if more else "m", "messages": [{"role": "user", "content": text}], **more}

    def run(self, *words: str, command: str = "run") -> int:
        """Run the program in this process; gives its exit code."""
        return _run.main_program(provider_batch.main, self.words(command, *words))

    def words(self, command: str, *words: str) -> list[str]:
        """The words of a command line."""
        url = self.url + PATHS.get(self.provider, "/v1/chat/completions")
        named = [command, *words, "--requests_filepath", str(self.requests), "--request_url", url]
        return [*named, "--provider", self.provider, "--poll_seconds", "0.02", "--settle_seconds", "0.05"]

    def lines(self) -> list[Any]:
        """The result lines, by their metadata."""
        found = [json.loads(line) for line in self.results.read_text().splitlines()]
        return sorted(found, key=lambda line: json.dumps(line[2] if len(line) > 2 else None))

    def outcomes(self) -> list[str]:
        """Of each result line the kind of its last error, or "ok"."""
        return [line[1][-1]["kind"] if isinstance(line[1], list) else "ok" for line in self.lines()]

    def ledger(self) -> dict[str, Any]:
        """The ledger."""
        found: dict[str, Any] = json.loads(Path(f"{self.results}.batch.json").read_text())
        return found

    def serving(self, answers: Any = None) -> Any:
        """Serve, and note the URL."""
        world = self

        class Served:
            def __enter__(self) -> World:
                self.context = serving(world.batches, answers)
                world.url = self.context.__enter__()
                return world

            def __exit__(self, *what: object) -> None:
                self.context.__exit__(None, None, None)

        return Served()


def live_answers(body: bytes) -> Response:
    """Answer an ordinary chat call."""
    return reply(answer(json.loads(body), 0))


def small(monkeypatch: pytest.MonkeyPatch, name: str, **limits: Any) -> Transport:
    """Give a provider small limits."""
    monkeypatch.setitem(TRANSPORTS, name, replace(TRANSPORTS[name], **limits))
    return TRANSPORTS[name]


# ---- every provider --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", SHAPES)
def test_every_shape_end_to_end(tmp_path: Path, provider: str) -> None:
    """A file with a failing row goes through every provider's API and comes back as one result line per request."""
    with World(tmp_path, provider, fail={"q3": 400}, seconds=0.05).serving() as world:
        world.write(6)
        assert world.run() == 1
    lines = world.lines()
    assert [line[2]["id"] for line in lines] == list(range(6))
    assert [line[0] for line in lines] == [world.body(f"q{number}") for number in range(6)]
    assert world.outcomes() == ["ok", "ok", "ok", "bad_request", "ok", "ok"]
    assert all(f"You said: q{line[2]['id']}" in json.dumps(line[1]) for line in lines if line[2]["id"] != 3)
    assert [job["state"] for job in world.ledger()["jobs"]] == ["collected"]
    assert not Path(f"{world.results}.batch").exists()


def test_gemini_answers_in_order_where_it_drops_the_keys(tmp_path: Path) -> None:
    """Inline results without metadata are matched by their place."""
    with World(tmp_path, "gemini", no_keys=True).serving() as world:
        world.write(4)
        assert world.run() == 0
    assert all(f"q{line[2]['id']}" in json.dumps(line[1]) for line in world.lines())


def test_embeddings(tmp_path: Path) -> None:
    """Another endpoint than chat is named in every line and in the job."""
    with World(tmp_path).serving() as world:
        world.write_lines([{"model": "e", "input": "a"}, {"model": "e", "input": "b"}])
        words = [word.replace("/chat/completions", "/embeddings") for word in world.words("run")]
        assert _run.main_program(provider_batch.main, words) == 0
    assert {job.fields["endpoint"] for job in world.batches.jobs.values()} == {"/v1/embeddings"}


def test_free_test_model_of_dashscope(tmp_path: Path) -> None:
    """Its test model has an endpoint and limits of its own."""
    with World(tmp_path, "dashscope").serving() as world:
        world.write(120, model="batch-test-model")
        assert world.run() == 0
    jobs = world.batches.jobs.values()
    assert [len(job.lines) for job in jobs] == [100, 20]
    assert {job.fields["endpoint"] for job in jobs} == {"/v1/chat/ds-test"}


# ---- splitting -------------------------------------------------------------------------------------------------------


def test_splits_by_lines_bytes_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part is longer than the provider takes, and each has one model."""
    with World(tmp_path).serving() as world:
        row = small(monkeypatch, "local", lines=4, megabytes=0.0065)
        monkeypatch.setitem(TRANSPORTS, "openai", row)
        names = ["a", "b", "a", "a", "b", "a", "a", "a"] * 2
        world.write_lines([{**world.body("x" * 60 * n), "model": name, "metadata": n} for n, name in enumerate(names)])
        assert world.run() == 0
    parts = [(job.lines, world.batches.files[job.file].data) for job in world.batches.jobs.values()]
    assert all(len(lines) <= 4 and len(data) <= 6500 for lines, data in parts)
    assert all(len({line["body"]["model"] for line in lines}) == 1 for lines, _ in parts)
    assert sum(len(lines) for lines, _ in parts) == len(world.lines()) == 16
    assert len(parts) > 4


def test_what_a_batch_cannot_do_is_a_failed_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad lines, streams and lines above the limit are told once, and the rest runs; a second start adds nothing."""
    small(monkeypatch, "openai", line_megabytes=0.006)
    with World(tmp_path).serving() as world:
        world.write(2)
        more = [{**world.body("s"), "stream": True, "metadata": {"id": 2}}]
        more += [{**world.body("y" * 5000), "metadata": {"id": 3}}, {"nonsense": 1, "metadata": {"id": 4}}]
        world.requests.write_text(world.requests.read_text() + "".join(json.dumps(line) + "\n" for line in more))
        assert world.run() == 1
        assert world.outcomes() == ["ok", "ok", "bad_request", "bad_request", "bad_line"]
        assert world.run() == 1
    assert len(world.lines()) == 5
    assert sum(world.batches.submitted.values()) == 2


def test_custom_ids_of_the_user_may_repeat(tmp_path: Path) -> None:
    """The user's custom ids come back as metadata, whatever they are; equal requests get a result each."""
    with World(tmp_path).serving() as world:
        line = {"custom_id": "same id, 100 % odd", "method": "POST", "url": "/v1/chat/completions"}
        world.write_lines([{**line, "body": world.body("q")}] * 3 + [world.body("q")] * 2)
        assert world.run() == 0
        assert world.run() == 0
    lines = world.lines()
    assert [line[2:] for line in lines].count([{"custom_id": "same id, 100 % odd"}]) == 3
    assert len(lines) == 5
    assert sum(world.batches.submitted.values()) == 5


def test_equal_requests_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five samples of one prompt stay five, in whatever parts and order they come."""
    small(monkeypatch, "openai", lines=2)
    with World(tmp_path).serving() as world:
        world.write_lines([{**world.body("again"), "metadata": 1}] * 5)
        assert world.run() == 0
        assert len(world.lines()) == 5
        assert world.run() == 0
    assert sum(world.batches.submitted.values()) == 5


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["openai", "anthropic", "gemini", "mistral"])
def test_expired_requests_are_failures_sent_again_on_request(tmp_path: Path, provider: str) -> None:
    """What was not run in time is a failure; a second start leaves it, --resubmit sends it again."""
    with World(tmp_path, provider, expire_after=3).serving() as world:
        world.write(5)
        assert world.run() == 1
        assert world.outcomes() == ["ok", "ok", "ok", "timeout", "timeout"]
        assert world.run() == 1
        assert sum(world.batches.submitted.values()) == 5
        world.batches.options.expire_after = -1
        assert world.run("--resubmit") == 0
    assert world.outcomes() == ["ok"] * 5
    assert sorted(world.batches.submitted.values()) == [1, 1, 1, 2, 2]


def test_kinds_of_failures(tmp_path: Path) -> None:
    """A row's status decides the kind as it does live, and the provider's words are kept."""
    with World(tmp_path, fail={"q1": 429, "q2": 500, "q4": 404}).serving() as world:
        world.write(5)
        assert world.run() == 1
    assert world.outcomes() == ["ok", "rate_limit", "server_error", "ok", "bad_request"]
    assert world.lines()[1][1][0]["status"] == 429
    assert "status 429" in world.lines()[1][1][0]["message"]
    assert world.lines()[1][1][0]["batch"].startswith("batch_")


def test_a_refused_file_fails_as_a_whole(tmp_path: Path) -> None:
    """When the provider refuses the whole file, every request says why."""
    with World(tmp_path, max_lines=3).serving() as world:
        world.write(4)
        assert world.run() == 1
    assert world.outcomes() == ["bad_request"] * 4
    assert "file_too_large" in world.lines()[0][1][0]["message"]


def test_a_named_bad_line_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    """Where the provider names the lines that it refuses the file for, the others go into another batch."""
    with World(tmp_path, bad_lines="q2").serving() as world:
        world.write(4)
        assert world.run() == 1
    assert world.outcomes() == ["ok", "ok", "bad_request", "ok"]
    assert [job["state"] for job in world.ledger()["jobs"]] == ["returned", "collected"]


def test_small_faults_on_the_way(tmp_path: Path) -> None:
    """Refused polls, a failed upload, files that come late, an empty error file and strangers' lines change nothing."""
    faults: dict[str, Any] = {
        "refuse_polls": 2,
        "refuse_uploads": 1,
        "missing_output": 2,
        "empty_error_file": True,
        "strangers": 2,
    }
    with World(tmp_path, **faults).serving() as world:
        world.write(5)
        assert world.run() == 0
    assert world.outcomes() == ["ok"] * 5
    assert world.batches.calls["upload"] == 2


def test_results_that_are_gone_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result file that the provider does not have any more leaves failures, not a program that waits for ever."""
    monkeypatch.setattr("workflows._batch_jobs.LOOKS_FOR_FILE", 1)
    with World(tmp_path).serving() as world:
        world.write(2)
        assert world.run(command="create") == 0
        world.batches.handle("GET", "/v1/batches", {}, b"", time.time())
        for file in [name for name, file in world.batches.files.items() if file.purpose == "batch_output"]:
            del world.batches.files[file]
        assert world.run() == 1
    assert world.outcomes() == ["bad_reply"] * 2


def test_torn_downloads_are_repeated(tmp_path: Path) -> None:
    """A result file that breaks off is read again from its beginning, and nothing is recorded twice."""
    with World(tmp_path, torn_lines=2).serving() as world:
        world.write(5)
        assert world.run() == 0
    assert len(world.lines()) == 5
    assert world.batches.calls["read_file"] == 3


@pytest.mark.parametrize("refuses", [False, True])
def test_waits_for_room_in_the_providers_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, refuses: bool
) -> None:
    """Parts wait while the provider's queue is full, whether it refuses the job or lets it fail."""
    small(monkeypatch, "openai", lines=2)
    with World(tmp_path, queue_lines=3, queue_refuses=refuses, seconds=0.1).serving() as world:
        world.write(7)
        assert world.run() == 0
    assert len(world.lines()) == 7
    assert set(world.batches.submitted.values()) == {1}


def test_refused_keys_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong key is exit code 3, nothing is recorded, and the same command continues."""
    with World(tmp_path, api_key="right-key-123456").serving() as world:
        world.write(2)
        assert world.run("--api_key", "wrong-key-123456") == 3
        assert "wrong-key-123456" not in capsys.readouterr().err
        assert world.run("--api_key", "right-key-123456") == 0
    assert set(world.batches.submitted.values()) == {1}


def test_survives_a_lost_network(tmp_path: Path) -> None:
    """While the provider cannot be reached the program waits, and goes on when it can."""
    world = World(tmp_path, seconds=0.2)
    world.write(3)
    with serving(world.batches) as world.url:
        assert world.run(command="create") == 0
    port = int(world.url.rpartition(":")[2])
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(world.run()))
    thread.start()
    time.sleep(0.3)
    with serving(world.batches, port=port):
        thread.join(20)
    assert codes == [0]
    assert len(world.lines()) == 3


# ---- live and batch --------------------------------------------------------------------------------------------------


@live
def test_finish_live(tmp_path: Path) -> None:
    """What the batch could not do is sent live, and every request has one result."""
    with World(tmp_path, expire_after=2).serving(live_answers) as world:
        world.write(4)
        assert world.run("--finish_live") == 0
    assert world.outcomes() == ["ok"] * 4


@live
def test_live_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that takes too long is cancelled, what it has done is kept, the rest is sent live."""
    monkeypatch.setattr(providers, "window_hours", lambda text: 24 if text == "24h" else 0.05 / 3600)
    with World(tmp_path, seconds=2.0).serving(live_answers) as world:
        world.write(4)
        assert world.run("--live_after", "1h") == 0
    assert world.outcomes() == ["ok"] * 4
    assert world.batches.calls["cancel"] == 1


def test_results_of_a_live_run_are_not_asked_again(tmp_path: Path) -> None:
    """Finished requests of a live run are skipped; its failures are sent."""
    with World(tmp_path).serving() as world:
        world.write(3)
        failure = [{"attempt": 1, "kind": "server_error", "status": 500, "message": "x"}]
        done = [[world.body("q0"), {"choices": [1]}, {"id": 0}], [world.body("q1"), failure, {"id": 1}]]
        world.results.write_text("".join(json.dumps(line) + "\n" for line in done))
        assert world.run() == 0
    assert world.outcomes() == ["ok"] * 3
    assert sum(world.batches.submitted.values()) == 2


def test_results_that_came_meanwhile_are_not_recorded_twice(tmp_path: Path) -> None:
    """A success that a live run wrote beside the open job stays the only one."""
    with World(tmp_path).serving() as world:
        world.write(2)
        assert world.run(command="create") == 0
        line = json.dumps([world.body("q0"), {"choices": ["live"]}, {"id": 0}])
        world.results.write_text(world.results.read_text() + line + "\n")
        assert world.run() == 0
    assert len(world.lines()) == 2
    assert world.lines()[0][1] == {"choices": ["live"]}


def answered(world: World, *numbers: int) -> None:
    """Add results as a live run would have written them meanwhile."""
    lines = [json.dumps([world.body(f"q{number}"), {"choices": ["live"]}, {"id": number}]) for number in numbers]
    world.results.write_text(world.results.read_text() + "".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("done", [1, 3])
def test_what_a_live_run_finished_before_the_submission_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """A part that was uploaded but not submitted loses what has a success since; the rest is submitted."""
    with World(tmp_path).serving() as world:
        world.write(3)
        with monkeypatch.context() as patch:
            patch.setattr(Jobs, "make", stopped)
            assert world.run(command="create") == 3
        assert world.ledger()["jobs"][0]["state"] == "uploaded"
        answered(world, *range(done))
        assert world.run() == 0
    assert sum(world.batches.submitted.values()) == 3 - done
    assert world.outcomes() == ["ok"] * 3


async def stopped(*_: Any) -> None:
    """Stand for an interruption."""
    raise Stopped("interrupted")


def test_parts_wait_while_somebody_else_works_on_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is submitted while another process writes the results, and then without what that one finished."""
    small(monkeypatch, "openai", lines=2)
    tell, collect, locks = Batch.tell, Batch.collect, contextlib.ExitStack()
    told: list[Batch] = []
    turns: list[Batch] = []

    def tell_first(batch: Batch) -> None:
        tell(batch)
        if not told:
            locks.enter_context(locked(Path(f"{world.results}.lock")))
        told.append(batch)

    async def collect_later(batch: Batch) -> bool:
        turns.append(batch)
        if len(turns) == 2:
            answered(world, 0, 1, 4)
            locks.close()
        return await collect(batch)

    monkeypatch.setattr(Batch, "tell", tell_first)
    monkeypatch.setattr(Batch, "collect", collect_later)
    with World(tmp_path).serving() as world, locks:
        world.write(6)
        assert world.run() == 0
    assert list(world.batches.submitted.values()) == [1, 1, 1]
    assert world.outcomes() == ["ok"] * 6
    assert "is writing these results" in capsys.readouterr().err


def test_equal_requests_beside_a_live_run(tmp_path: Path) -> None:
    """Of five equal requests two were answered live while the job was open: three of its answers are still wanted."""
    with World(tmp_path).serving() as world:
        world.write_lines([{**world.body("q7"), "metadata": {"id": 7}}] * 5)
        assert world.run(command="create") == 0
        answered(world, 7, 7)
        assert world.run() == 0
    assert [line[1]["choices"] == ["live"] for line in world.lines()].count(True) == 2
    assert len(world.lines()) == 5


def test_asking_for_the_status_changes_nothing(tmp_path: Path) -> None:
    """Status and list leave the ledger alone: another process may be writing it."""
    with World(tmp_path).serving() as world:
        world.write(2)
        assert world.run(command="create") == 0
        before = world.ledger()
        assert world.run(command="status") == 0
        assert world.run(command="list") == 0
        assert world.ledger() == before


# ---- commands --------------------------------------------------------------------------------------------------------


def test_commands_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Create, status, list, cancel and collect do what they say, and say what they did."""
    with World(tmp_path, seconds=0.4).serving() as world:
        world.write(10)
        assert world.run("--job-name", "my batch", command="create") == 0
        job = world.ledger()["jobs"][0]
        assert (job["state"], job["open"], job["requests"]) == ("submitted", True, 10)
        assert job["name"].startswith("my_batch-")
        assert world.run(command="status") == 0
        assert world.run(job["id"], command="status") == 0
        assert world.run(command="list") == 0
        shown = capsys.readouterr().out
        assert shown.count(job["id"]) == 4
        assert world.run(command="collect") == 0
        assert world.ledger()["jobs"][0]["open"]
        assert world.run(command="cancel") == 0
        time.sleep(0.1)
        assert world.run(command="collect") == 0
    assert world.ledger()["jobs"][0]["state"] == "collected"
    assert set(world.outcomes()) <= {"ok", "timeout"}
    assert len(world.lines()) == 10


@pytest.mark.parametrize(
    ("provider", "models", "cap", "told"),
    [
        ("openai", ["gpt-4o"], 4000, "costs about $2.50 live, $1.25 as a batch; the output at most $40.00, or $20.00."),
        ("openai", ["gpt-4o"], None, "costs about $2.50 live, $1.25 as a batch."),
        ("moonshot", ["kimi-k2-0905-preview"], None, "costs about $0.60 live, $0.36 as a batch."),
        ("openai", ["gpt-4o", "gpt-4o-mini"], None, "costs about $2.65 live, $1.32 as a batch."),
        ("openai", ["gpt-4o", "nobody-knows-it"], None, ""),
        ("openai", [], None, ""),
    ],
)
def test_money_saved(provider: str, models: list[str], cap: int | None, told: str) -> None:
    """What a batch costs is told by the list prices of batches, else by the share that the provider takes off."""
    pytest.importorskip("genai_prices")
    url = "https://example.com/v1/chat/completions"
    samples = {model: Sample() for model in models}
    for sample in samples.values():
        for _ in range(1000):
            if sample.next():
                sample.count(1000, cap)
    words = cost_words(samples, find_target(url, provider), url, provider)
    assert told in words
    assert bool(words) == bool(told)


def test_missing_files_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the folder of its parts a job cannot be collected: that is told, and how to go on; nothing is lost."""
    with World(tmp_path).serving() as world:
        world.write(3)
        assert world.run(command="create") == 0
        folder = Path(f"{world.results}.batch")
        folder.rename(tmp_path / "aside")
        for command in ("run", "collect"):
            assert world.run(command=command) == 2
            assert f"restore {folder}" in capsys.readouterr().err
        (tmp_path / "aside").rename(folder)
        assert world.run() == 0
    assert len(world.lines()) == 3


def test_what_cannot_start_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A request file that is not there, or a job for a command that takes none, is told, and no file is made."""
    with World(tmp_path).serving() as world:
        assert world.run() == 2
        assert "'r.jsonl'" in capsys.readouterr().err.replace(f"{tmp_path}/", "")
        assert world.run("batch_1", command="collect") == 2
    assert "`status` and `cancel`" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_shards_of_a_cluster_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a cluster has left in shards would be paid again."""
    (tmp_path / "r_results.jsonl.shards").mkdir()
    with World(tmp_path).serving() as world:
        world.write(3)
        assert world.run() == 2
    assert "workflows.ray_cluster` goes on with it" in capsys.readouterr().err
    assert not world.batches.calls


def test_dry_run_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is told, and nothing is sent or kept."""
    with World(tmp_path).serving() as world:
        world.write(3)
        assert world.run("--dry_run") == 0
    assert not world.batches.calls
    assert "3 requests, about" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_prompts_and_the_names_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of prompts becomes requests; model, URL, key and window come from the environment."""
    with World(tmp_path, "dashscope", api_key="qwen-key-1234567").serving() as world:
        monkeypatch.setenv("QIANWEN_API_KEY", "qwen-key-1234567")
        monkeypatch.setenv("QIANWEN_MODEL", "qwen-plus")
        monkeypatch.setenv("QIANWEN_BASE_URL", f"{world.url}/compatible-mode/v1")
        monkeypatch.setenv("BATCH_COMPLETION_WINDOW", "14d")
        (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
        words = ["create", "--input-file", "prompts.txt", "--job-name", "my_batch", "--wait", "--temperature", "0.5"]
        words += ["--provider", "dashscope", "--poll_seconds", "0.02"]
        assert _run.main_program(provider_batch.main, words) == 0
    (job,) = world.batches.jobs.values()
    assert job.fields["completion_window"] == "336h"
    assert job.name.startswith("my_batch-")
    assert job.lines[0]["body"]["temperature"] == 0.5
    results = (tmp_path / "prompts_requests_results.jsonl").read_text()
    assert "You said: one" in results
    assert "You said: two" in results


def test_from_python(tmp_path: Path) -> None:
    """One function takes prompts and gives the job's id and the results in their order."""
    with World(tmp_path).serving() as world:
        options: dict[str, Any] = {"request_url": f"{world.url}/v1", "poll_seconds": 0.02, "job_name": "mine"}
        got = asyncio.run(provider_batch.run_batch(["one", "two", "three"], model="m", **options))
    assert got["job_id"] in world.batches.jobs
    assert [line[1]["choices"][0]["message"]["content"] for line in got["results"]] == [
        f"You said: {word}" for word in ("one", "two", "three")
    ]
    assert got["exit_code"] == 0


@pytest.mark.parametrize(("options", "told"), [({}, "give prompts"), ({"nonsense": 1}, "unknown option 'nonsense'")])
def test_from_python_with_wrong_arguments(options: dict[str, Any], told: str) -> None:
    """What cannot work is a UsageError."""
    with pytest.raises(UsageError, match=told):
        asyncio.run(provider_batch.run_batch(**options))


def test_jobs_named_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any job of the account can be asked for and cancelled, and nothing is left behind."""
    with World(tmp_path, seconds=60.0).serving() as world:
        world.write(1)
        assert world.run(command="create") == 0
        (job_id,) = world.batches.jobs
        for path in list(tmp_path.iterdir()):
            path.rename(path.with_suffix(".elsewhere"))
        url = ["--request_url", f"{world.url}/v1"]
        for words in (["status", job_id], ["cancel", job_id], ["list"]):
            assert _run.main_program(provider_batch.main, [*words, *url]) == 0
        assert world.batches.jobs[job_id].cancelled_at
    assert capsys.readouterr().out.count(job_id) == 3
    assert all(path.suffix == ".elsewhere" for path in tmp_path.iterdir())


def test_jobs_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown job is exit code 2 with the provider's words, an empty ledger and an empty list say that they are."""
    with World(tmp_path).serving() as world:
        world.write(1)
        for command in ("status", "cancel"):
            assert _run.main_program(provider_batch.main, [*world.words(command), "batch_9"]) == 2
            assert "404: No such batch batch_9" in capsys.readouterr().err
            assert world.run(command=command) == 0
            assert "No jobs are known" in capsys.readouterr().err
        assert world.run(command="list") == 0
    assert "The provider has no jobs" in capsys.readouterr().err


def test_a_provider_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was never heard of is given up after a while, with what to check."""
    monkeypatch.setattr(provider_batch, "SHORT_PATIENCE_SECONDS", 0.0)
    world = World(tmp_path)
    world.url = "http://127.0.0.1:9"
    world.write(1)
    assert _run.main_program(provider_batch.main, [*world.words("status"), "batch_9"]) == 3
    assert "does not answer" in (told := capsys.readouterr().err)
    assert "Check --request_url" in told


def test_a_batch_that_is_refused_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What no repetition helps is not said to continue with the same command."""
    with World(tmp_path, "together").serving() as world:
        world.write(1)
        words = [word.replace("together", "openai") for word in world.words("run")]
        assert _run.main_program(provider_batch.main, words) == 3
    told = capsys.readouterr().err
    assert "nothing of it was run" in told or "does not take the file" in told
    assert "same command" not in told


@live
def test_held_open_calls_go_through_the_processor(tmp_path: Path) -> None:
    """Ark's batch endpoint is an ordinary call that takes long: the processor itself runs."""
    with World(tmp_path, "ark").serving(live_answers) as world:
        world.write(2)
        words = [word.replace("/v1/chat", "/api/v3/chat") for word in world.words("run")]
        assert _run.main_program(provider_batch.main, words) == 0
        assert _run.main_program(provider_batch.main, ["status", *words[1:]]) == 2
    assert world.outcomes() == ["ok"] * 2
    assert held_open_url("https://ark.x/api/v3/chat/completions", "ark").endswith("/api/v3/batch/chat/completions")
    assert not held_open_url("https://dashscope.aliyuncs.com/compatible-mode/v1/chat/completions", "dashscope")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--completion_window", "48h"], "only 24h"),
        (["--completion_window", "soon"], "hours or days"),
        (["--requests_filepath", "nowhere.jsonl"], "no regular file"),
        (["--provider", "deepseek"], "no Batch API of deepseek"),
        (["--save_filepath", "no/such/folder.jsonl"], "does not exist"),
    ],
)
def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    """What cannot work is exit code 2 before anything is sent."""
    with World(tmp_path).serving() as world:
        world.write(1)
        assert _run.main_program(provider_batch.main, world.words("run") + words) == 2
    assert told in capsys.readouterr().err
    assert not world.batches.calls


def test_windows_and_endpoints() -> None:
    """Windows are hours or days within the provider's span; endpoints that it cannot batch are refused."""
    assert window_hours("24h") == 24
    assert window_hours("14d") == 336
    check_window(TRANSPORTS["dashscope"], 336)
    with pytest.raises(UsageError, match="24h to 336h"):
        check_window(TRANSPORTS["dashscope"], 337)
    with pytest.raises(UsageError, match="has no batches"):
        find_target("https://api.groq.com/openai/v1/embeddings", "groq")
    url = "https://x.openai.azure.com/openai/deployments/d1/chat/completions?api-version=1"
    target = find_target(url, "azure")
    assert target.url("/batches") == "https://x.openai.azure.com/openai/batches?api-version=1"
    assert (target.endpoint, target.model) == ("/chat/completions", "d1")


def test_replies_that_come_as_a_text() -> None:
    """Llama Stack writes the JSON of a reply as a text within the line."""
    line = {"custom_id": "a", "response": {"status_code": 200, "body": '{"choices": []}'}, "error": None}
    custom_id, got, error = providers.read_output(line, "openai")
    assert (custom_id, got.status, got.body, error) == ("a", 200, {"choices": []}, None)


def test_a_broken_ledger_is_not_ignored(tmp_path: Path) -> None:
    """A ledger that cannot be read says what was paid for: it is never overwritten."""
    world = World(tmp_path)
    world.write(1)
    Path(f"{world.results}.batch.json").write_text("{")
    world.url = "http://127.0.0.1:9"
    assert world.run() == 2
    assert Path(f"{world.results}.batch.json").read_text() == "{"


def test_open_jobs_of_another_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs that are open elsewhere are named, not asked for at the wrong place."""
    with World(tmp_path, seconds=60.0).serving() as world:
        world.write(1)
        assert world.run(command="create") == 0
        words = [word.replace(world.url, "http://127.0.0.1:9") for word in world.words("run")]
        assert _run.main_program(provider_batch.main, words) == 2
    assert "are at" in capsys.readouterr().err


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["openai", "together", "mistral", "gemini", "anthropic"])
def test_a_lost_answer_is_no_second_job(tmp_path: Path, provider: str) -> None:
    """When the answer to a submission is lost, the job is found at the provider by name, file or looks."""
    with World(tmp_path, provider, lose_answers=1).serving() as world:
        world.write(3)
        assert world.run() == 0
    assert set(world.batches.submitted.values()) == {1}
    assert len(world.lines()) == 3


def submitting(world: World) -> None:
    """Make the ledger look as after a crash in the middle of a submission that never arrived."""
    ledger = Ledger(world.results)
    part: Part = ledger.parts[0]
    part.id, part.submitted = "", time.time()
    part.move("submitting")
    ledger.save()


def test_a_submission_that_never_arrived_is_repeated(tmp_path: Path) -> None:
    """Where jobs have names, one that is not there was not submitted."""
    with World(tmp_path).serving() as world:
        world.write(2)
        world.run(command="create")
        world.batches.jobs.clear()
        world.batches.submitted.clear()
        submitting(world)
        assert world.run() == 0
    assert set(world.batches.submitted.values()) == {1}
    assert len(world.lines()) == 2


def test_without_names_only_the_user_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody can look by name, an unanswered submission is reported and repeated only with --resubmit."""
    with World(tmp_path, "anthropic").serving() as world:
        world.write(2)
        world.run(command="create")
        world.batches.jobs.clear()
        world.batches.submitted.clear()
        submitting(world)
        assert world.run() == 3
        assert "--resubmit" in capsys.readouterr().err
        assert not world.batches.jobs
        assert world.run("--resubmit") == 0
    assert len(world.lines()) == 2


def test_a_provider_that_gives_no_list_is_not_asked_twice(tmp_path: Path) -> None:
    """Where the jobs cannot be listed, nothing is submitted again unasked."""
    with World(tmp_path, no_lists=True, lose_answers=1).serving() as world:
        world.write(2)
        assert world.run() == 3
        assert world.run() == 3
    assert len(world.batches.jobs) == 1


def test_results_of_somebody_else_are_not_ours(tmp_path: Path) -> None:
    """A job that was taken for ours by its looks is given up when its custom ids are not ours."""
    with World(tmp_path, "anthropic").serving() as world:
        world.write(1)
        world.run(command="create")
        (job,) = world.batches.jobs.values()
        job.lines[0]["custom_id"] = "somebody-else"
        job.results = []
        world.batches.finish(job, time.time())
        submitting(world)
        assert world.run() == 3
    assert world.lines() == []


def test_a_collection_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    """What was recorded before the crash is not recorded again, equal requests included."""
    with World(tmp_path).serving() as world:
        world.write_lines([{**world.body("same"), "metadata": 1}] * 3 + [{**world.body("x"), "metadata": 2}])
        assert world.run(command="create") == 0
        ledger = Ledger(world.results)
        ledger.parts[0].move("collecting")
        ledger.save()
        world.results.write_text(json.dumps([world.body("same"), {"choices": ["first"]}, 1]) + "\n[torn")
        assert world.run() == 0
    lines = world.lines()
    assert [line[2] for line in lines] == [1, 1, 1, 2]
    assert [line[1] for line in lines].count({"choices": ["first"]}) == 1


class Killer:
    """Kills the program with kill -9 at one of its calls: before the provider sees it, before it answers, or after."""

    def __init__(self, world: World, draw: random.Random) -> None:
        self.world, self.draw, self.handle = world, draw, world.batches.handle
        self.calls, self.at, self.how = 0, 0, ""
        self.process: subprocess.Popen[str] | None = None
        world.batches.handle = self.handled  # type: ignore[method-assign, assignment]

    def handled(self, *call: Any) -> Response:
        """Answer a call, or kill."""
        self.calls += 1
        assert self.process
        how = self.how if self.calls == self.at else ""
        if how == "before":
            self.process.kill()
        response = self.handle(*call)
        if how == "after":
            self.process.kill()
        if how == "later":
            threading.Timer(self.draw.random() * 0.03, self.process.kill).start()
        return response

    def run(self, last_call: int) -> int:
        """Run the program, killed at one of the first calls (0: not at all); gives its exit code."""
        self.calls, self.at = 0, self.draw.randint(1, last_call) if last_call else 0
        self.how = self.draw.choice(["before", "after", "later", "later"])
        command = [sys.executable, "-m", "workflows.provider_batch", *self.world.words("run")]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        _, told = self.process.communicate(timeout=60)
        assert self.process.returncode in (0, -signal.SIGKILL), told
        return self.process.returncode


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_at_any_moment(tmp_path: Path) -> None:
    """After kill -9 at ten moments (TEST_BATCH_KILLS) each request was submitted once and has one result line."""
    draw, wanted, kills = random.Random(7), int(os.environ.get("TEST_BATCH_KILLS", "10")), 0
    for turn in range(100):
        folder = tmp_path / str(turn)
        folder.mkdir()
        world = World(folder, "dashscope", seconds=0.1)
        world.write(330, model="batch-test-model")
        with world.serving():
            killer = Killer(world, draw)
            while code := killer.run(10 if kills < wanted else 0):
                kills += code == -signal.SIGKILL
        counted = Counter(line[2]["id"] for line in world.lines())
        assert (len(counted), set(counted.values())) == (330, {1})
        assert (len(world.batches.submitted), set(world.batches.submitted.values())) == (330, {1})
        assert not [job for job in world.ledger()["jobs"] if job["open"]]
        if kills >= wanted:
            break
    assert kills == wanted


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
def test_ctrl_c_leaves_the_jobs_running(tmp_path: Path) -> None:
    """An interrupted run says that the jobs go on, and the same command continues."""
    with World(tmp_path, seconds=1.0).serving() as world:
        world.write(3)
        command = [sys.executable, "-m", "workflows.provider_batch", *world.words("run")]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not world.batches.calls["poll"]:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "go on at the provider" in told
        assert world.run() == 0
    assert set(world.batches.submitted.values()) == {1}


@pytest.fixture
def sdk() -> Any:
    """The official SDK, if it is installed."""
    return pytest.importorskip("openai")


def test_the_official_sdk_understands_the_stand_in(tmp_path: Path, sdk: Any) -> None:
    """The stand-in speaks what OpenAI's own client reads: files and batches."""
    path = tmp_path / "in.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    path.write_text(
        json.dumps({**line, "body": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}) + "\n"
    )
    with serving(Batches()) as url, sdk.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        with path.open("rb") as file:
            uploaded = client.files.create(file=file, purpose="batch")
        made = client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"name": "n"}
        )
        batch = client.batches.retrieve(made.id)
        content = client.files.content(batch.output_file_id).text
        listed = list(client.batches.list(limit=1))
    assert batch.status == "completed"
    assert batch.request_counts.completed == 1
    assert json.loads(content)["response"]["body"]["choices"][0]["message"]["content"] == "You said: hi"
    assert [item.id for item in listed] == [made.id]
