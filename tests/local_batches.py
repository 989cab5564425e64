"""A local stand-in for the providers' Batch APIs: files, jobs, results, limits and faults, as a state machine.

`Batches(BatchOptions(...)).handle(method, path, headers, body, now)` gives status, headers and body; nothing else
happens, and no time passes but what `now` (seconds since the epoch) tells. Any URL prefix may stand before the paths.

It speaks OpenAI's files and batches (with the peculiarities of Azure, DashScope, Groq, Moonshot, SiliconFlow, Together
and ZhipuAI), Mistral's jobs, Anthropic's message batches and Gemini's batches. Nothing is generated: the answer
repeats the question. As a program it serves this on loopback and prints `listening on http://127.0.0.1:PORT`:

    python tests/local_batches.py --port 8001 --provider moonshot --seconds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Response = tuple[int, dict[str, str], bytes]
FAMILIES = {"mistral": "mistral", "anthropic": "anthropic", "gemini": "gemini"}  # else OpenAI's
WINDOWS = {  # hours, shortest and longest; None = the field is not known
    "openai": (24, 24),
    "azure": (24, 24),
    "dashscope": (24, 336),
    "groq": (24, 168),
    "moonshot": (12, 168),
    "siliconflow": (24, 336),
    "together": None,
    "zhipu": (1, 10_000),
}
WORDS = {  # for queued, running, done, failed, expired, cancelling, cancelled
    "openai": "validating in_progress completed failed expired cancelling cancelled",
    "siliconflow": "in_queue in_progress completed failed expired cancelling cancelled",
    "together": "VALIDATING IN_PROGRESS COMPLETED FAILED EXPIRED CANCELLING CANCELLED",
    "mistral": "QUEUED RUNNING SUCCESS FAILED TIMEOUT_EXCEEDED CANCELLATION_REQUESTED CANCELLED",
    "anthropic": "in_progress in_progress ended ended ended canceling ended",
    "gemini": "PENDING RUNNING SUCCEEDED FAILED EXPIRED RUNNING CANCELLED",
}
QUEUED, RUNNING, DONE, FAILED, EXPIRED, CANCELLING, CANCELLED = range(7)
ENDED = (DONE, FAILED, EXPIRED, CANCELLED)
PAGE = 2  # items of a list's page if nobody says how many


@dataclass
class BatchOptions:
    """What can be asked of it; 0 or empty means off."""

    provider: str = "openai"
    seconds: float = 0.0  # from a job's creation to its end
    api_key: str = ""  # any other key is refused
    fail: dict[str, int] = field(default_factory=dict)  # text in a request: status of its failure
    expire_after: int = -1  # requests of a job that are run before it expires; -1: all
    max_lines: int = 0  # a longer file fails as a whole
    max_bytes: int = 0
    bad_lines: str = ""  # a request with this text makes the whole job fail, naming the line
    queue_lines: int = 0  # a job fails if more lines than this are in jobs that have not ended
    queue_refuses: bool = False  # ... or is refused when it is made, with 429
    refuse_polls: int = 0  # the first polls of each job are answered 429
    refuse_uploads: int = 0  # the first uploads are answered 500
    lose_answers: int = 0  # the first jobs are made, and the answer is 503
    empty_error_file: bool = False  # there is one, without lines
    missing_output: int = 0  # that many polls of a done job name no files
    strangers: int = 0  # lines in the output that nobody asked for
    no_lists: bool = False  # lists are answered 404
    torn_lines: int = 0  # that many downloads end within a line
    no_keys: bool = False  # Gemini: results come in order and without metadata
    shuffle: bool = True  # outputs come in any order
    seed: int = 0


@dataclass
class File:
    """An uploaded or a result file."""

    id: str
    name: str
    data: bytes
    purpose: str
    created: float


@dataclass
class Job:
    """A batch."""

    id: str
    file: str
    lines: list[Any]
    fields: dict[str, Any]
    name: str
    created: float
    problems: list[dict[str, Any]] = field(default_factory=list)
    state: int = QUEUED
    polls: int = 0
    results: list[Any] = field(default_factory=list)
    output: str = ""
    errors: str = ""
    succeeded: int = 0
    failed: int = 0
    cancelled_at: float = 0.0


class Batches:
    """All files and jobs of one account."""

    def __init__(self, options: BatchOptions | None = None) -> None:
        self.options = options or BatchOptions()
        self.files: dict[str, File] = {}
        self.jobs: dict[str, Job] = {}
        self.submitted: Counter[str] = Counter()  # requests by their JSON, over all jobs that were accepted
        self.calls: Counter[str] = Counter()
        self.count = 0

    @property
    def family(self) -> str:
        return FAMILIES.get(self.options.provider, "openai")

    # ---- routing

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes, now: float) -> Response:
        """Answer one call."""
        path, _, query = path.partition("?")
        arguments = {name: values[0] for name, values in parse_qs(query).items()}
        lower = {name.lower(): value for name, value in headers.items()}
        if self.options.api_key and self.options.api_key not in "".join(lower.values()):
            return problem(401, "Incorrect API key provided", "invalid_api_key")
        for wanted, pattern, name in ROUTES[self.family]:
            if wanted == method and (match := re.search(pattern + "$", path)):
                self.calls[name] += 1
                act: Callable[..., Response] = getattr(self, name)
                return act(*match.groups(), body=body, headers=lower, arguments=arguments, now=now)
        return problem(404, f"nothing at {method} {path}")

    # ---- files

    def add_file(self, name: str, data: bytes, purpose: str, now: float) -> File:
        self.count += 1
        file = File(f"file-{self.count:06d}", name, data, purpose, now)
        self.files[file.id] = file
        return file

    def upload(self, *, body: bytes, headers: Mapping[str, str], now: float, **_: Any) -> Response:
        if self.calls["upload"] <= self.options.refuse_uploads:
            return problem(500, "try again")
        mark = b"--" + headers["content-type"].partition("boundary=")[2].strip('"').encode()
        form: dict[str, tuple[str, bytes]] = {}
        at = body.find(mark)
        while (end := body.find(b"\r\n" + mark, at + 1)) > 0:
            start = body.find(b"\r\n\r\n", at)
            named = dict(re.findall(r'(\w+)="([^"]*)"', body[at:start].decode()))
            form[named["name"]] = (named.get("filename", ""), body[start + 4 : end])
            at = end + 2
        purpose = "batch-api" if self.options.provider == "together" else "batch"
        if form["purpose"][1].decode() != purpose:
            return problem(400, "unknown purpose")
        name, content = form["file"]
        file = self.add_file(name, content, purpose, now)
        shown = self.show_file(file)
        envelope = {"code": 20000, "message": "Ok", "status": True, "data": shown}
        return reply(envelope if self.options.provider == "siliconflow" else shown)

    def show_file(self, file: File) -> dict[str, Any]:
        told: dict[str, Any] = {"id": file.id, "object": "file", "bytes": len(file.data)}
        told["created_at"] = int(file.created)
        return {**told, "filename": file.name, "purpose": file.purpose, "status": "processed"}

    def list_files(self, *, arguments: Mapping[str, str], **_: Any) -> Response:
        return self.page([self.show_file(file) for file in self.files.values()], arguments)

    def read_file(self, file_id: str, **_: Any) -> Response:
        if file_id not in self.files:
            return problem(404, f"No such file {file_id}")
        data = self.files[file_id].data
        data = data[: len(data) // 2] if self.calls["read_file"] <= self.options.torn_lines else data
        return 200, {"Content-Type": "application/octet-stream"}, data

    # ---- jobs

    def create(self, *groups: str, body: bytes, now: float, **_: Any) -> Response:
        """Make a job, in the words of any family."""
        options = self.options
        fields: dict[str, Any] = json.loads(body)
        raw, name, file_id = self.input_of(fields)
        if raw is None:
            return problem(400, f"input file {file_id} not found", "invalid_request")
        if why := self.objection(fields):
            return problem(400, why, "invalid_request")
        self.count += 1
        prefix = {"anthropic": "msgbatch_", "gemini": "batches/"}.get(self.family, "batch_")
        job = Job(f"{prefix}{self.count:06d}", file_id, raw, {**fields, "model_in_path": "".join(groups)}, name, now)
        job.problems = list(self.check(job))
        waiting = sum(len(other.lines) for other in self.jobs.values() if self.move(other, now).state not in ENDED)
        if options.queue_lines and waiting + len(job.lines) > options.queue_lines and waiting:
            if options.queue_refuses:
                return problem(429, "Enqueued token limit reached", "token_limit_exceeded")
            job.problems = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached for this model"}]
        self.jobs[job.id] = job
        if not job.problems:
            self.submitted.update(json.dumps(request_of(line), sort_keys=True) for line in job.lines)
        if self.calls["create"] <= options.lose_answers:
            return problem(503, "overloaded")
        shown = self.show(job, now)
        return reply({"job": shown} if options.provider == "together" else shown)

    def input_of(self, fields: dict[str, Any]) -> tuple[list[Any] | None, str, str]:
        """The lines of a job, its name, the id of its file."""
        if self.family == "anthropic":
            return fields["requests"], "", ""
        if self.family == "gemini":
            batch = fields["batch"]
            return batch["inputConfig"]["requests"]["requests"], batch["displayName"], ""
        file_id = fields["input_files"][0] if self.family == "mistral" else fields["input_file_id"]
        metadata = fields.get("metadata") or {}
        if file_id not in self.files:
            return None, "", file_id
        return list(read_lines(self.files[file_id].data)), metadata.get("name") or metadata.get("ds_name", ""), file_id

    def objection(self, fields: dict[str, Any]) -> str:
        """Why a job cannot be made."""
        provider = self.options.provider
        if provider in WINDOWS:
            span, window = WINDOWS[provider], fields.get("completion_window")
            if span is None and (window or "metadata" in fields):
                return "unknown fields"
            if span and not (window and window.endswith("h") and span[0] <= int(window[:-1]) <= span[1]):
                return f"completion_window {window} is not possible"
            if provider == "dashscope" and "name" in (fields.get("metadata") or {}):
                return "metadata name is unknown, ds_name was expected"
        return "model is missing" if provider == "mistral" and not fields.get("model") else ""

    def check(self, job: Job) -> Iterator[dict[str, Any]]:
        """What is wrong with the lines."""
        options, seen, models = self.options, set(), set()
        data = self.files[job.file].data if job.file else b""
        if (options.max_lines and len(job.lines) > options.max_lines) or (
            options.max_bytes and len(data) > options.max_bytes
        ):
            yield {"code": "file_too_large", "message": f"{len(job.lines)} lines, {len(data)} bytes"}
        if data.startswith(b"\xef\xbb\xbf"):
            yield {"code": "invalid_json_line", "message": "byte order mark", "line": 1}
        for number, line in enumerate(job.lines, 1):
            key = custom_id_of(line)
            if not re.fullmatch("[a-zA-Z0-9_-]{1,64}", str(key)) or key in seen:
                yield {"code": "duplicate_custom_id", "message": str(key), "line": number}
            seen.add(key)
            models.add(request_of(line).get("model"))
            if self.family == "openai" and options.provider != "together":
                wanted = job.fields["endpoint"]
                if line.get("url") != wanted or line.get("method") != "POST":
                    yield {"code": "url_mismatch", "message": f"{line.get('url')} is not {wanted}", "line": number}
            elif set(line) - {"custom_id", "body", "params", "request", "metadata"}:
                yield {"code": "unknown_field", "message": str(sorted(line)), "line": number}
            if options.bad_lines and options.bad_lines in json.dumps(line):
                yield {"code": "invalid_json_line", "message": "this line is bad", "line": number}
        if len(models) > 1 and self.family != "anthropic":
            yield {"code": "model_mismatch", "message": f"{len(models)} models in a file"}

    def move(self, job: Job, now: float) -> Job:
        """Bring a job to the state that it has by now."""
        if job.state in ENDED:
            return job
        if job.problems and job.state == QUEUED:
            job.state = FAILED
        elif job.cancelled_at:
            job.state = CANCELLED if now >= job.cancelled_at + self.options.seconds / 10 else CANCELLING
        elif now >= job.created + self.options.seconds:
            job.state = DONE if self.options.expire_after < 0 else EXPIRED
        elif now >= job.created + self.options.seconds / 10:
            job.state = RUNNING
        if job.state in ENDED and job.state != FAILED:
            self.finish(job, now)
        return job

    def finish(self, job: Job, now: float) -> None:
        """Make the results."""
        share = min(1.0, (job.cancelled_at - job.created) / self.options.seconds) if job.cancelled_at else 1.0
        runs = int(len(job.lines) * share) if job.state == CANCELLED else len(job.lines)
        runs = self.options.expire_after if job.state == EXPIRED else runs
        good: list[Any] = []
        bad: list[Any] = []
        for number, line in enumerate(job.lines):
            text = json.dumps(line)
            status = next((status for part, status in self.options.fail.items() if part in text), 200)
            status = status if number < runs else 0
            (good if status == 200 else bad).append(self.result(job, number, line, status))
        job.succeeded, job.failed = len(good), len(bad)
        good += [
            {"custom_id": f"nobody-{n}", "response": {"status_code": 200, "body": {}}}
            for n in range(self.options.strangers)
        ]
        if self.family in ("anthropic", "gemini"):
            job.results = good + bad
            if self.options.no_keys:
                job.results = [self.result(job, n, line, 200) for n, line in enumerate(job.lines)]
            elif self.options.shuffle:
                Random(self.options.seed).shuffle(job.results)
            return
        for lines, kind in ((good, "output"), (bad, "errors")):
            if self.options.shuffle:
                Random(self.options.seed).shuffle(lines)
            if lines or (kind == "errors" and self.options.empty_error_file):
                data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
                setattr(job, kind, self.add_file(f"{job.id}_{kind}.jsonl", data, "batch_output", now).id)

    def result(self, job: Job, number: int, line: Any, status: int) -> dict[str, Any]:
        """One line of the results. status: 0 = was not run."""
        request, key = request_of(line), custom_id_of(line)
        ended = "expired" if job.state == EXPIRED else "cancelled"
        error = {"message": f"status {status}", "type": "invalid_request_error", "code": "bad"}
        if self.family == "anthropic":
            kind = {200: "succeeded", 0: ended.replace("ll", "l")}.get(status, "errored")
            told: dict[str, Any] = {"message": answer(request, number)} if status == 200 else {}
            told |= {"error": {"type": "error", "error": error}} if kind == "errored" else {}
            return {"custom_id": key, "result": {"type": kind, **told}}
        if self.family == "gemini":
            metadata = {} if self.options.no_keys else {"metadata": {"key": key}}
            if status == 200:
                return {"response": answer(request, number), **metadata}
            return {"error": {"code": status or 4, "message": f"status {status}" if status else ended}, **metadata}
        shown: dict[str, Any] = {"id": f"r{number}", "custom_id": key, "response": None, "error": None}
        if not status:
            return {**shown, "error": {"code": f"batch_{ended}", "message": f"This request was {ended}."}}
        if status != 200 and self.options.provider == "dashscope":
            return {**shown, "response": {"status_code": status, "body": None}, "error": error}
        body = answer(request, number) if status == 200 else {"error": error}
        return {**shown, "response": {"status_code": status, "request_id": f"q{number}", "body": body}}

    def poll(self, job_id: str, *, now: float, **_: Any) -> Response:
        job = self.jobs.get(job_id)
        if job is None:
            return problem(404, f"No such batch {job_id}")
        job.polls += 1
        if job.polls <= self.options.refuse_polls:
            return problem(429, "slow down", "rate_limit_exceeded", {"Retry-After": "0.01"})
        return reply(self.show(job, now, polled=True))

    def cancel(self, job_id: str, *, now: float, **_: Any) -> Response:
        if job_id not in self.jobs:
            return problem(404, f"No such batch {job_id}")
        job = self.move(self.jobs[job_id], now)
        if job.state in ENDED:
            return problem(409, f"{job_id} has ended")
        job.cancelled_at = now
        return reply(self.show(job, now))

    def results(self, job_id: str, **_: Any) -> Response:
        lines = b"".join(json.dumps(line).encode() + b"\n" for line in self.jobs[job_id].results)
        return 200, {"Content-Type": "application/x-jsonl"}, lines

    def list_jobs(self, *, arguments: Mapping[str, str], now: float, **_: Any) -> Response:
        return self.page([self.show(job, now) for job in self.jobs.values()], arguments)

    # ---- in the provider's words

    def show(self, job: Job, now: float, *, polled: bool = False) -> dict[str, Any]:
        self.move(job, now)
        words = WORDS.get(self.options.provider) or WORDS[self.family]
        word = words.split()[job.state]
        hidden = polled and job.state == DONE and job.polls <= self.options.missing_output
        total, good, bad = len(job.lines), job.succeeded, job.failed
        if self.family == "anthropic":
            counts = {"processing": 0 if job.state in ENDED else total, "succeeded": good, "errored": bad}
            url = f"http://elsewhere.invalid/v1/messages/batches/{job.id}/results" if job.state in ENDED else None
            told = {"id": job.id, "type": "message_batch", "processing_status": word, "results_url": url}
            return {
                **told,
                "request_counts": {**counts, "canceled": 0, "expired": 0},
                "created_at": rfc3339(job.created),
            }
        if self.family == "gemini":
            stats = {"requestCount": str(total), "successfulRequestCount": str(good), "failedRequestCount": str(bad)}
            metadata = {"displayName": job.name, "state": f"BATCH_STATE_{word}", "createTime": rfc3339(job.created)}
            shown: dict[str, Any] = {"name": job.id, "metadata": {**metadata, "batchStats": stats}}
            if job.state in ENDED and polled:
                shown |= {"done": True, "response": {"inlinedResponses": {"inlinedResponses": job.results}}}
            return shown
        files = [(job.output, job.errors), (None, None)][hidden]
        common = {"id": job.id, "status": word, "endpoint": job.fields["endpoint"], "created_at": int(job.created)}
        common["metadata"] = job.fields.get("metadata")
        if self.family == "mistral":
            counts = {"total_requests": total, "succeeded_requests": good, "failed_requests": bad}
            named = {"input_files": [job.file], "output_file": files[0] or None, "error_file": files[1] or None}
            return {**common, **counts, **named, "errors": job.problems, "model": job.fields["model"]}
        errors = {"object": "list", "data": job.problems} if job.problems else None
        counts = {"total": total, "completed": good, "failed": bad}
        named = {"input_file_id": job.file, "output_file_id": files[0] or None, "error_file_id": files[1] or None}
        window = job.fields.get("completion_window", "24h")
        return {
            **common,
            **named,
            "object": "batch",
            "completion_window": window,
            "request_counts": counts,
            "errors": errors,
        }

    def page(self, oldest_first: list[Any], arguments: Mapping[str, str]) -> Response:
        """One page of a list, newest first, in the words of the family."""
        items = oldest_first[::-1]
        if self.options.no_lists:
            return problem(404, "no lists here")
        size = min(PAGE, int(arguments.get("limit") or arguments.get("page_size") or arguments.get("pageSize") or PAGE))
        if self.options.provider == "together":
            return reply(items)
        if self.family == "mistral":
            at = int(arguments.get("page", 0)) * size
            return reply({"data": items[at : at + size], "total": len(items)})
        if self.family == "gemini":
            at = int(arguments.get("pageToken", 0))
            more = {"nextPageToken": str(at + size)} if at + size < len(items) else {}
            return reply({"operations": items[at : at + size], **more})
        mark = arguments.get("after") or arguments.get("after_id")
        at = next((n + 1 for n, item in enumerate(items) if item["id"] == mark), 0)
        page = items[at : at + size]
        return reply({"data": page, "has_more": at + size < len(items), "last_id": page[-1]["id"] if page else None})


OPENAI_ROUTES = [
    ("POST", "/files", "upload"),
    ("GET", "/files", "list_files"),
    ("GET", "/files/([^/]+)/content", "read_file"),
    ("POST", "/batches", "create"),
    ("GET", "/batches", "list_jobs"),
    ("GET", "/batches/([^/]+)", "poll"),
    ("POST", "/batches/([^/]+)/cancel", "cancel"),
]
ROUTES = {
    "openai": OPENAI_ROUTES,
    "mistral": [(method, path.replace("/batches", "/batch/jobs"), name) for method, path, name in OPENAI_ROUTES],
    "anthropic": [
        *((method, path.replace("/batches", "/messages/batches"), name) for method, path, name in OPENAI_ROUTES[3:]),
        ("GET", "/messages/batches/([^/]+)/results", "results"),
    ],
    "gemini": [
        ("POST", "/models/([^/]+):batchGenerateContent", "create"),
        ("GET", "/batches", "list_jobs"),
        ("GET", "/(batches/[^/:]+)", "poll"),
        ("POST", "/(batches/[^/:]+):cancel", "cancel"),
    ],
}


def read_lines(data: bytes) -> Iterator[Any]:
    """The lines of a file; what is no JSON is an object without anything."""
    for line in data.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            yield {}


def request_of(line: Any) -> dict[str, Any]:
    """The request in a line of any family."""
    found: dict[str, Any] = line.get("body") or line.get("params") or line.get("request") or {}
    return found


def custom_id_of(line: Any) -> Any:
    """The custom id of a line of any family."""
    return line.get("custom_id") or line.get("key") or line.get("metadata", {}).get("key")


def answer(request: dict[str, Any], number: int) -> dict[str, Any]:
    """Repeat the question, in the words of the shape that the request has."""
    usage = {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
    if "contents" in request:
        text = f"You said: {request['contents'][-1]['parts'][0]['text']}"
        content = {"role": "model", "parts": [{"text": text}]}
        return {"candidates": [{"content": content, "finishReason": "STOP", "index": 0}]}
    if "input" in request:
        return {"object": "list", "data": [{"index": 0, "embedding": [0.5, number]}], "usage": usage}
    text = f"You said: {request['messages'][-1]['content']}"
    if "max_tokens" in request and "model" in request and str(request["model"]).startswith("claude"):
        content_blocks = [{"type": "text", "text": text}]
        told = {"type": "message", "role": "assistant", "stop_reason": "end_turn"}
        return {**told, "content": content_blocks, "usage": {"input_tokens": 8, "output_tokens": 4}}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": f"c{number}", "object": "chat.completion", "choices": [choice], "usage": usage}


def reply(value: Any) -> Response:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def problem(status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "code": code or None}}
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(body).encode()


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


# ---- served ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(batches: Batches, live: Callable[[bytes], Response] | None = None, port: int = 0) -> Iterator[str]:
    """Serve in threads; gives the URL. live: answers ordinary chat calls."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one go

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                if live and self.path.endswith("/chat/completions"):
                    status, headers, content = live(body)
                else:
                    status, headers, content = batches.handle(
                        self.command, self.path, dict(self.headers), body, time.time()
                    )
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer  # noqa: N815 - names of the library

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *_: Any) -> None:
            """A client that was killed is no error."""

    with Server(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--port", type=int, default=0)
    for item in fields(BatchOptions):
        if isinstance(item.default, bool):
            parser.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, default=item.default)
        elif isinstance(item.default, str | int | float):
            parser.add_argument(f"--{item.name}", type=type(item.default), default=item.default)
    given = vars(parser.parse_args())
    with serving(Batches(BatchOptions(**{k: v for k, v in given.items() if k != "port"})), port=given["port"]) as url:
        print(f"listening on {url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
