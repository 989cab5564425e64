"""workflows.provider_batch and live runs on the same files, interleaved and interrupted in any order.

Whatever happens, no request is sent more often than it stands in the file, but for those that failed and those that the
user ordered twice; and in the end each has one result line. Stories are drawn by their number; TEST_BATCH_STORIES tells
more of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from api_request_parallel_processor import ResultsFile, process_api_requests_from_file
from tests.local_batches import ENDED, Response, answer, problem, reply, request_of
from tests.test_workflows_provider_batch import PATHS, World, small
from workflows import _batch_client, _batch_ledger, _run, provider_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STORIES, STEPS = int(os.environ.get("TEST_BATCH_STORIES", "30")), 8
MOMENTS = 30  # of a run, about
RUN_SECONDS, CALL_SECONDS = 4.0, 0.5  # of the provider's clock: a job; what each call moves it on
TEXTS = "abcdef"
AT_PROVIDER = ("submitting", "submitted", "collecting", "unclear")


class Killed(BaseException):
    """Stands for kill -9: no line of the program runs after it but `finally`, which leaves nothing behind."""


class Moments:
    """The moments at which the program can be killed: around calls, ledger writes and result writes."""

    def __init__(self) -> None:
        self.left = -1  # moments until the kill; negative: none comes

    def pass_one(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def passing(*args: Any, **more: Any) -> Any:
            self.pass_one()
            result = function(*args, **more)
            self.pass_one()
            return result

        async def passing_later(*args: Any, **more: Any) -> Any:
            self.pass_one()
            result = await function(*args, **more)
            self.pass_one()
            return result

        return passing_later if asyncio.iscoroutinefunction(function) else passing

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Let the program pass its moments."""
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                (_batch_client.Client, "once"),
                (_batch_ledger.Ledger, "save"),
                (ResultsFile, "flush"),
            ):
                patch.setattr(owner, name, self.around(getattr(owner, name)))
            patch.setattr(_batch_client, "retry_delay", lambda *_: 0.0)
            yield


class Story:
    """One request file, one results file, one provider."""

    def __init__(self, provider: str, number: int, folder: Path) -> None:
        self.provider, self.draw, self.told = provider, random.Random(f"{provider} {number}"), [f"story {number}"]
        self.stack = contextlib.ExitStack()
        self.world = World(folder, self.provider, seconds=RUN_SECONDS)
        self.batches, self.now, self.moments = self.world.batches, 1_800_000_000.0, Moments()
        self.live: Counter[str] = Counter()
        self.failed_live: Counter[str] = Counter()
        self.ordered: Counter[str] = Counter()  # what the user may have ordered twice
        self.failing_live = ""
        self.handle = self.batches.handle
        self.batches.handle = self.handled  # type: ignore[method-assign, assignment]
        self.stack.enter_context(self.world.serving(self.answer_live))
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("time.time", lambda: self.now)
        small(patch, provider, lines=3)
        self.texts: list[str] = []
        self.most: Counter[str] = Counter()

    def handled(self, method: str, path: str, headers: Any, body: bytes, _: float) -> Response:
        self.now += CALL_SECONDS
        if path.endswith(("/chat/completions", "/v1/messages")):
            return self.answer_live(body)
        return self.handle(method, path, headers, body, self.now)

    def answer_live(self, body: bytes) -> Response:
        request = json.loads(body)
        text = request["messages"][0]["content"]
        self.live[text] += 1
        if text in self.failing_live:
            self.failed_live[text] += 1
            return problem(400, "no")
        return reply(answer(request, 0))

    # ---- what the user does

    def write(self) -> None:
        self.most |= Counter(self.texts)
        self.world.write_lines([{**self.world.body(text), "metadata": {"id": text}} for text in self.texts])

    def run_program(self, command: str, *words: str, kill: int = 0) -> int | None:
        if "--resubmit" in words and self.provider == "anthropic":
            self.ordered += self.held("submitting", "unclear")
        self.moments.left, code = kill or -1, None
        patient = ["--settle_seconds", "0", "--poll_seconds", "0.001"]
        with contextlib.suppress(Killed), self.moments.watched():
            code = _run.main_program(provider_batch.main, [*self.world.words(command, *words), *patient])
        self.told.append(f"{command} {' '.join(words)} -> {'killed' if code is None else code}")
        return code

    def held(self, *states: str) -> Counter[str]:
        """The texts of open parts in these states."""
        ledger, found = _batch_ledger.Ledger(self.world.results), Counter[str]()
        for part in ledger.open_parts(*states):
            for line in ledger.file(part, "upload").read_text().splitlines():
                found[request_of(json.loads(line))["messages"][0]["content"]] += 1
        return found

    def submit(self) -> None:
        words = ["--resubmit"] if self.draw.random() < 0.2 else []
        self.run_program(self.draw.choice(["create", "create", "run"]), *words, kill=self.kill())

    def look(self) -> None:
        self.run_program(self.draw.choice(["collect", "collect", "status", "cancel"]), kill=self.kill())

    def kill(self) -> int:
        return self.draw.randint(1, MOMENTS) if self.draw.random() < 0.7 else 0

    def run_live(self) -> None:
        """A live run beside the batch; what is with the provider is sent twice by the user's own order."""
        self.failing_live = self.draw.choice(["", "", "a", "bc"])
        self.ordered += self.held(*AT_PROVIDER)
        files = {"requests_filepath": str(self.world.requests), "save_filepath": str(self.world.results)}
        url, limit = self.world.url + PATHS.get(self.provider, "/v1/chat/completions"), self.draw.randint(0, 4)
        self.told.append(f"live, {limit=}, {self.failing_live} fail")
        run = process_api_requests_from_file(
            **files, request_url=url, provider=self.provider, ignore_batch=True, limit=limit, progress="none"
        )
        asyncio.run(run)

    def edit(self) -> None:
        kept = self.texts[: self.draw.randint(0, 6)]
        self.texts = self.draw.choices(TEXTS, k=self.draw.randint(not kept, 3)) + kept
        self.write()

    def wait(self) -> None:
        self.now += self.draw.choice([1.0, 10.0])

    # ---- what the provider does

    def spoil(self) -> None:
        """Let requests fail, jobs expire, the queue be full, an answer get lost; or nothing of all that."""
        options = self.batches.options
        fails = self.draw.choice(["", "", "a", "d"])
        options.fail = {f'"content": "{text}"': 500 for text in fails}
        options.expire_after = self.draw.choice([-1, -1, 1])
        options.queue_lines, options.queue_refuses = self.draw.choice([0, 2]), self.draw.random() < 0.5
        options.lose_answers = self.draw.choice([0, self.batches.calls["create"] + 1])
        self.told.append(f"{options.fail=} {options.expire_after=} {options.queue_lines=} {options.lose_answers=}")

    # ---- what holds

    def tell(self) -> None:
        """Tell the story to its end."""
        steps = [self.submit, self.submit, self.look, self.run_live, self.edit, self.wait, self.spoil]
        with self.stack:
            self.texts = self.draw.choices(TEXTS, k=self.draw.randint(1, 6))
            self.write()
            for _ in range(STEPS):
                self.draw.choice(steps)()
            self.check()
            self.end()

    def sent(self) -> Counter[str]:
        found = Counter(self.live)
        for request, count in self.batches.submitted.items():
            found[json.loads(request)["messages"][0]["content"]] += count
        return found

    def failed(self) -> Counter[str]:
        """Attempts that gave no answer."""
        found = Counter(self.failed_live)
        for job in self.batches.jobs.values():
            if job.problems or self.batches.move(job, self.now).state not in ENDED:
                continue
            rows = list(job.results)
            for name in filter(None, (job.output, job.errors)):
                rows += map(json.loads, self.batches.files[name].data.splitlines())
            good = {row["custom_id"] for row in rows if (row.get("response") or {}).get("status_code") == 200}
            good |= {row["custom_id"] for row in rows if (row.get("result") or {}).get("type") == "succeeded"}
            found.update(
                request_of(line)["messages"][0]["content"] for line in job.lines if line["custom_id"] not in good
            )
        return found

    def check(self) -> None:
        """Nothing is sent more often than it may be."""
        assert self.sent() <= self.most + self.failed() + self.ordered, self.told

    def end(self) -> None:
        """In the end, with nothing in the way, everything has its one result."""
        self.batches.options.fail, self.batches.options.expire_after = {}, -1
        self.batches.options.queue_lines = self.batches.options.lose_answers = 0
        self.texts = list(self.most.elements())
        self.write()
        codes = [self.run_program("run", "--resubmit") for _ in range(3)]
        assert codes[-1] == 0, self.told
        self.check()
        lines = self.world.lines()
        assert Counter(line[2]["id"] for line in lines) == self.most, self.told
        assert all(isinstance(line[1], dict) for line in lines), self.told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_nothing_is_paid_for_twice(tmp_path: Path, provider: str) -> None:
    """Create, run, collect, cancel, live runs, kills and the provider's faults, in any order."""
    for number in range(STORIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        Story(provider, number, folder).tell()
