"""The life of a batch job: submitted once, found again after a crash, watched, its results collected."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from api_request_parallel_processor import (
    LOGGER,
    Action,
    Reply,
    ResultsFile,
    UsageError,
    dumps,
    judge,
    loads,
    locked,
)
from workflows import _batch_providers as providers
from workflows._batch_client import JSON_TYPE, Client, Stopped
from workflows._batch_ledger import (
    COLLECTED,
    COLLECTING,
    PREPARED,
    RETURNED,
    SUBMITTED,
    SUBMITTING,
    UNCLEAR,
    UPLOADED,
    UPLOADING,
    Ledger,
    Part,
    Requests,
)
from workflows._batch_parts import requests_of, room_for
from workflows._batch_providers import CANCELLED, DONE, EXPIRED, FAILED, QUEUE_FULL, RUNNING, Job
from workflows._replies import as_dict

if TYPE_CHECKING:
    from workflows._batch_providers import Target

CLOCK_SLACK = 600.0  # seconds that the provider's clock and ours may differ
UNSURE = (408, 409)  # the provider may have taken the job all the same
PROBLEMS_TOLD = 3  # of a job that failed as a whole
LOOKS_FOR_FILE = 5  # at a job that is done but does not name its results
KINDS = set("bad_request content_filter rate_limit server_error bad_reply connection timeout too_large".split())
ENDS = {
    DONE: ("bad_reply", "the provider gave no line for this request"),
    FAILED: ("bad_request", "the provider refused the whole batch"),
    EXPIRED: ("timeout", "the batch expired before this request was run"),
    CANCELLED: ("timeout", "the batch was cancelled before this request was run"),
}
NOT_RUN = ("expired", "cancel")  # in the code of an error: nobody looked at this request


@dataclass
class Jobs:
    """The jobs of one ledger at one provider."""

    ledger: Ledger
    client: Client
    target: Target
    results_path: Path
    requests_path: str
    settle_seconds: float
    resubmit: bool = False
    queue_full: bool = False  # until a job ends
    returned: bool = False  # requests of a job are to be split anew
    looks: Counter[str] = field(default_factory=Counter)  # at jobs without results, or that are not there

    def row(self, part: Part) -> Target:
        """The rules for a part."""
        return self.target.for_model(part.model)

    def note(self, part: Part) -> None:
        """Save the ledger, if the part is in it: users may name jobs that are not."""
        if part in self.ledger.parts:
            self.ledger.save()

    # ---- submit

    async def submit(self, part: Part) -> None:
        """Upload a part and make its job, unless somebody else is writing results, or did since it was split off."""
        if part.state in (PREPARED, UPLOADING):
            await self.upload(part)
        try:
            with locked(Path(f"{self.results_path}.lock")):
                self.ledger.look_for_others()
                if not part.overtaken:
                    await self.make(part)
        except UsageError as busy:
            LOGGER.warning("%s waits: %s", part.name, busy)

    async def make(self, part: Part) -> None:
        """Make the job of an uploaded part; each step stands in the ledger before and after it."""
        part.submitted = time.time()
        part.move(SUBMITTING)
        self.ledger.save()
        LOGGER.info("%s: submitting %s requests", part.name, f"{part.requests:,}")
        row = self.row(part).transport
        path = row.create or row.jobs
        if row.upload:
            fields = providers.job_fields(self.row(part), part.name, part.file, part.hours, part.model)
            payload: Any = (JSON_TYPE, dumps(fields))
        else:
            payload = self.client.inline(self.ledger.file(part, "upload"), part.bytes, part.name)
        reply = await self.client.once("POST", self.target.url(path), payload)
        if reply.status // 100 == 2 and not reply.failure:
            self.adopt(part, providers.read_job(reply.body, self.target))
        elif reply.status == 0 and not reply.sent:
            part.move(UPLOADED)
            self.client.meaning(reply)
            LOGGER.warning("%s: %s; trying again", part.name, self.client.words(reply))
        elif 300 <= reply.status < 500 and reply.status not in UNSURE:
            self.refused(part, reply)
        else:
            LOGGER.warning("%s: %s; looking whether the provider has it", part.name, self.client.words(reply))
        self.ledger.save()

    async def upload(self, part: Part) -> None:
        """Upload the file of a part, unless the provider has it from an earlier try."""
        row = self.row(part).transport
        if row.upload:
            again = part.state == UPLOADING
            part.submitted = part.submitted or time.time()
            part.move(UPLOADING)
            self.ledger.save()
            part.file = await self.find_file(part) if again else ""
            if not part.file:
                LOGGER.info("%s: uploading %.1f MB", part.name, part.bytes / 1e6)
                reply = await self.client.upload(self.ledger.file(part, "upload"), part.bytes, part.name)
                part.file = providers.file_id(reply.body)
                if not part.file:
                    raise Stopped(
                        f"the provider does not take the file {part.name} ({self.client.words(reply)}). "
                        "Check --request_url and --provider, and start again."
                    )
        part.move(UPLOADED)
        self.ledger.save()

    def adopt(self, part: Part, job: Job) -> None:
        """Note that a job is ours."""
        part.id, part.word = job.id, job.word
        part.move(SUBMITTED if part.id else SUBMITTING)
        self.ledger.save()
        if part.id:
            LOGGER.info("%s: the provider calls it %s", part.name, part.id)

    def refused(self, part: Part, reply: Reply) -> None:
        """Keep a part for later if there is no room for it now; Stopped if it never can be."""
        part.move(UPLOADED)
        self.ledger.save()
        words = self.client.words(reply)
        action = Action.REFUSED if QUEUE_FULL.search(words) else self.client.meaning(reply)
        if action is Action.FAIL:
            part.move(PREPARED)  # to be split anew
            self.ledger.save()
            raise Stopped(
                f"the provider does not take the batch {part.name} ({words}), nothing of it was run. Change what it "
                "complains about (--request_url, --provider, --completion_window, the file); then start again."
            )
        self.queue_full = True
        LOGGER.warning("%s waits, the provider's queue is full: %s", part.name, words)

    # ---- after a crash

    async def settle(self, part: Part) -> None:
        """Find out whether the provider got a job whose answer we did not see; only then submit it, or not."""
        named = self.row(part).transport.named
        try:
            job = await self.find_job(part)
        except LookupError as error:
            LOGGER.warning("%s does not list its jobs: %s", part.provider, error)
            job, named = None, False
        if job:
            LOGGER.info("%s: was submitted before the interruption", part.name)
            self.adopt(part, job)
            return
        wait = part.submitted + self.settle_seconds - time.time()
        if (named or self.resubmit) and wait > 0:
            LOGGER.info("%s: looking for it at the provider once more in %.0f s", part.name, wait)
            await asyncio.sleep(wait)
            await self.settle(part)
        elif named or self.resubmit:
            LOGGER.info("%s: the provider does not have it; submitting it again", part.name)
            part.past += [part.id] if part.id else []
            part.id = ""
            part.move(UPLOADED)
        elif part.state != UNCLEAR:
            part.move(UNCLEAR)
            LOGGER.warning(
                "%s: it may have been submitted, and %s lets nobody look by name. Look there for a batch of %s "
                "requests of %s; --resubmit sends it again.",
                part.name,
                part.provider,
                f"{part.requests:,}",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(part.submitted)),
            )
        self.ledger.save()

    async def find_job(self, part: Part) -> Job | None:
        """Look for the job of a part at the provider: by name, by file; without names, by size and time."""
        ours = {other.id for other in self.ledger.parts} | set(part.past)
        alike: list[Job] = []
        async for item in self.client.listed(self.target.transport.jobs, part.submitted - CLOCK_SLACK):
            job = providers.read_job(item, self.target)
            if job.id in ours:
                continue
            if job.name == part.name or (part.file and job.input_file == part.file):
                return job
            if job.total == part.requests and abs(job.created - part.submitted) < CLOCK_SLACK:
                alike.append(job)
        # what was taken for ours by its looks is checked by its custom ids before anything is collected
        return alike[0] if len(alike) == 1 and not self.target.transport.named else None

    async def find_file(self, part: Part) -> str:
        """Look for an uploaded file by its name and size; gives its id, or nothing."""
        with contextlib.suppress(LookupError):  # a second upload costs nothing
            async for item in self.client.listed(self.target.transport.upload, part.submitted - CLOCK_SLACK):
                raw = as_dict(item)
                if raw.get("filename") == f"{part.name}.jsonl" and raw.get("bytes") in (None, part.bytes):
                    return str(raw.get("id") or "")
        return ""

    # ---- watch

    async def look(self, part: Part) -> Job:
        """Ask how a job is; the ledger learns it."""
        reply = await self.client.call("GET", self.row(part).transport.job, job_id=part.id)
        if reply.status // 100 != 2:
            LOGGER.warning("%s: the provider does not find %s (%s).", part.name, part.id, self.client.words(reply))
            self.looks[part.id] += 1
            if self.looks[part.id] >= LOOKS_FOR_FILE:
                part.move(UNCLEAR)
                self.note(part)
            return Job("", part.word, RUNNING)
        job = providers.read_job(reply.body, self.target)
        news = (job.word, job.done, job.failed)
        if news != (part.word, part.done, part.failed):
            part.word, part.done, part.failed = news
            self.note(part)
            total = f"{job.total or part.requests:,}"
            LOGGER.info("%s: %s, %s of %s done, %s failed", part.name, job.word, f"{job.done:,}", total, job.failed)
        return job

    async def cancel(self, part: Part) -> bool:
        """Ask the provider to cancel a job; what it has done by then is collected. Tells whether it knows the job."""
        reply = await self.client.once(
            "POST", self.target.url(self.row(part).transport.cancel, part.id), (JSON_TYPE, b"{}")
        )
        part.cancelling = True
        self.note(part)
        taken = reply.status // 100 == 2
        LOGGER.info("%s: %s", part.name, "cancelling" if taken else f"cannot be cancelled, {self.client.words(reply)}")
        return reply.status not in (404, 410)

    # ---- collect

    async def collect(self, part: Part, job: Job) -> bool:
        """Record the results of a job that has ended; gives False if that has to wait."""
        if job.phase == FAILED and any(QUEUE_FULL.search(text) for _, text in job.problems):
            LOGGER.warning("%s waits, the provider's queue is full: %s", part.name, job.problems[0][1])
            part.past.append(part.id)
            part.id, self.queue_full = "", True
            part.move(UPLOADED)
            self.ledger.save()
            return False
        self.looks[part.id] += 1
        if job.phase == DONE and not (job.files or job.inline) and job.done and self.looks[part.id] < LOOKS_FOR_FILE:
            return False  # its files are still to come
        try:
            results = ResultsFile(str(self.results_path), self.requests_path)
        except UsageError as busy:
            LOGGER.warning("%s: its results are there, but %s", part.name, busy)
            return False
        try:
            collector = Collector(self, part, job, results, self.room_for(part, results))
            part.move(COLLECTING)
            self.ledger.save()
            whole = await collector.run()
            results.finish(whole=whole, limited=True)
        finally:
            results.close()
        self.ledger.leave_results()
        if not whole:
            part.move(UNCLEAR)
            self.ledger.save()
            LOGGER.warning("%s: %s holds the results of somebody else.", part.name, part.id)
            return True
        part.done, part.failed = collector.succeeded, collector.failed
        if job.problems:
            told = list(dict.fromkeys(text for _, text in job.problems))[:PROBLEMS_TOLD]
            LOGGER.warning("%s: %s", part.name, "; ".join(told))
        LOGGER.info("%s: collected, %s succeeded, %s failed", part.name, f"{part.done:,}", f"{part.failed:,}")
        self.ledger.close(part, RETURNED if collector.returned else COLLECTED)
        self.returned = self.returned or collector.returned > 0
        self.queue_full = False
        return True

    def room_for(self, part: Part, results: ResultsFile) -> Counter[bytes] | None:
        """What is still wanted of a part of which somebody else or an interrupted collection may have recorded some."""
        self.ledger.look_for_others()
        if not (part.overtaken or part.state == COLLECTING):
            return None
        path = Path(self.requests_path)
        requests = requests_of(path, self.client.endpoint) if path.is_file() else iter(())
        return room_for(part, self.ledger, results, requests)


@dataclass
class Collector:
    """Turns the output of one job into result lines, one for each of its requests, in whatever order it comes."""

    jobs: Jobs
    part: Part
    job: Job
    results: ResultsFile
    room: Counter[bytes] | None  # result lines that are still wanted, by request; None = all
    succeeded: int = 0
    failed: int = 0
    returned: int = 0  # left without a line: the provider never looked at them
    strangers: int = 0
    late: list[tuple[int, Any]] = field(default_factory=list)  # failures, while successes come first

    async def run(self) -> bool:
        """Record everything; False if nothing in the output is ours."""
        with Requests(self.jobs.ledger, self.part) as self.requests:
            self.seen = bytearray(len(self.requests))
            for number, line in enumerate(self.job.inline):
                self.take(line, number)
            for file in self.job.files:
                await self.download(file)
            if self.strangers and not any(self.seen):
                return False
            self.finish()
            for number, outcome in self.late:
                self.write(number, outcome, late=True)
        return True

    async def download(self, file: str) -> None:
        """Take the lines of a result file; after a lost connection from its beginning, what is there is skipped."""
        transport, client = self.jobs.target.transport, self.jobs.client
        for tries in range(1, 10_000):
            try:
                async for lines in client.lines(transport.content, file):
                    for raw in lines:
                        if raw.strip():
                            self.take_raw(raw, last=tries >= LOOKS_FOR_FILE)
                    self.results.flush()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                status = getattr(error, "status", 0)
                if status in (401, 403):
                    raise Stopped(
                        f"the key may not read the result file {file} (status {status}). Use the key that made the job."
                    ) from None
                if status in (404, 410) and tries >= LOOKS_FOR_FILE:
                    LOGGER.warning("%s: the result file %s is gone (%s)", self.part.name, file, status)
                    return
                wait = min(60.0, 0.2 * 2.0 ** min(tries, 10))
                words = client.endpoint.secrets.redact(f"{type(error).__name__}: {error}")
                LOGGER.warning("%s: download broke off (%s); again in %.0f s", self.part.name, words, wait)
                await asyncio.sleep(wait)
            else:
                return

    def take_raw(self, raw: bytes, *, last: bool) -> None:
        """Take a line as it came. One that is no JSON is torn, perhaps; at the last try it is left out."""
        try:
            line = loads(raw)
        except ValueError as error:
            if not last:
                raise aiohttp.ClientPayloadError(f"a torn line: {error}") from None
            LOGGER.warning("%s: a line of the results is no JSON: %.100r", self.part.name, raw)
        else:
            self.take(line, -1)

    def take(self, line: Any, place: int) -> None:
        """Take one line of the output; `place` is its number where that tells what it answers, else -1."""
        custom_id, reply, error = providers.read_output(line, self.jobs.target.transport.family)
        tag, _, digits = custom_id.partition("-")
        number = int(digits) if tag == self.part.tag and digits.isdecimal() else place if not custom_id else -1
        if not 0 <= number < len(self.seen):
            self.strangers += 1
        elif not self.seen[number]:
            self.seen[number] = 1
            self.record(number, reply, error)

    def record(self, number: int, reply: Reply, error: tuple[str, str, str] | None) -> None:
        """Record what one request got; what the processor would call a failure is one."""
        provider, shape = self.jobs.client.endpoint.provider, self.jobs.client.endpoint.shape
        if error is None:
            verdict = judge(reply, provider, shape)
            if verdict.action is Action.DONE:
                self.write(number, {"data": reply.body} if isinstance(reply.body, list) else reply.body)
                return
            kind, message = verdict.kind, verdict.message
        else:
            code, family, message = error
            not_run = any(word in f"{code} {family}".lower() for word in NOT_RUN)
            if not_run or (self.job.phase in (EXPIRED, CANCELLED) and not reply.status):
                kind = "timeout"
            else:
                status = int(code) if code.isdecimal() and len(code) == 3 else reply.status
                told = Reply(status=max(status, 400), body={"error": reply.body})
                kind = judge(told, provider, shape).kind if code or family else "server_error"
            message = " ".join(filter(None, (code or family, message)))
        self.fail(number, kind, message, reply)

    def fail(self, number: int, kind: str, message: str, reply: Reply | None = None) -> None:
        """Record a failure."""
        kind = kind if kind in KINDS else "bad_request"
        told = {"status": (reply.status or None) if reply else None, "message": message}
        response = reply.body if reply else None
        batch = self.part.id or self.part.name
        self.write(number, [{"attempt": 1, "kind": kind, **told, "response": response, "batch": batch}])

    def write(self, number: int, outcome: Any, *, late: bool = False) -> None:
        """Queue the result line of a request, unless it has one."""
        failed = isinstance(outcome, list)
        if failed and self.room is not None and not late:
            self.late.append((number, outcome))
            return
        if self.room is not None or self.results.failed:
            key = self.requests.identity(number)
            self.results.failed.discard(key)  # its failed lines of earlier are replaced
            if self.room is not None:
                if not self.room[key]:
                    return
                self.room[key] -= 1
        self.succeeded, self.failed = self.succeeded + (not failed), self.failed + failed
        body, metadata = self.requests.read(number)
        tail = (b",", metadata) if metadata != b"null" else ()
        # as `write` does, without parsing the body again
        self.results.queue += b"".join((b"[", body, b",", dumps(outcome), *tail, b"]\n"))

    def finish(self) -> None:
        """Give every request without a line its reason, or give it back if the batch was refused for other lines."""
        job, part = self.job, self.part
        named = {line - 1: text for line, text in job.problems if line}
        for number, text in named.items():
            if 0 <= number < len(self.seen) and not self.seen[number]:
                self.seen[number] = 1
                self.fail(number, "bad_request", text)
        kind, message = ENDS[job.phase]
        message = ": ".join([message, *(text for line, text in job.problems if not line)])
        for number, seen in enumerate(self.seen):
            if seen:
                continue
            if job.phase == FAILED and named:
                self.returned += 1
            else:
                self.fail(number, kind, message)
        if self.returned:
            LOGGER.info("%s: %s requests were not looked at; they go into another batch", part.name, self.returned)
