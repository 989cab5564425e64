"""What each provider's Batch API looks like: a table with a row per provider; words that differ are read only here.

To add a provider, add a row to TRANSPORTS. Its name is the one that the processor knows the provider by.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from api_request_parallel_processor import Reply, UsageError, dumps, error_words, loads, one_line
from workflows._replies import as_dict, as_list

CHAT, EMBEDDINGS, RESPONSES = "/chat/completions", "/embeddings", "/responses"
OPENAI_ALIKE = f"{CHAT} {EMBEDDINGS} {RESPONSES} /completions /moderations"
FILE_SLACK = 4096  # bytes of a file or a call that are not lines


@dataclass(frozen=True, slots=True)
class Transport:
    """How one provider takes a batch, and what it allows.

    Paths begin below the root, which is the request URL without the endpoint, or with // at the host; {id} is a job's
    or a file's id.
    """

    name: str
    family: str = "openai"  # key of FAMILIES: what lines and calls look like
    jobs: str = "/batches"  # where jobs are listed
    create: str = ""  # where they are made, if not there
    job: str = "/batches/{id}"
    cancel: str = "/batches/{id}/cancel"
    upload: str = "/files"  # "" = the requests travel in the call that makes the job
    content: str = "/files/{id}/content"
    purpose: str = "batch"  # of an uploaded file
    endpoints: str = CHAT  # what can be batched
    endpoint: str = "/v1{op}"  # how lines and jobs name it
    name_key: str = "name"  # of a job's metadata; "" = it takes none
    extra: tuple[tuple[str, Any], ...] = ()  # fields of the call that makes a job
    paging: str = "after"  # the parameter that asks for the next page of a list; "" = there is one page
    lines: int = 50_000
    megabytes: float = 100.0
    line_megabytes: float = 0.0  # 0 = no limit of its own
    one_model: bool = True  # per file
    hours: tuple[int, int] = (24, 24)  # shortest and longest completion window; (0, 0) = none is sent
    saving: int = 50  # percent of the price
    named: bool = True  # a job can be found by a name or by its file


# fmt: off
TRANSPORTS = {row.name: row for row in (
    Transport("openai", endpoints=OPENAI_ALIKE, megabytes=200),
    Transport("azure", endpoints=OPENAI_ALIKE, lines=100_000, megabytes=200),
    Transport("azure/deployments", endpoints=OPENAI_ALIKE, endpoint="{op}", lines=100_000, megabytes=200),
    Transport("dashscope", endpoints=f"{CHAT} {EMBEDDINGS}", name_key="ds_name", megabytes=500, line_megabytes=6,
              hours=(24, 336)),
    # its free test: a fixed reply, the whole way
    Transport("dashscope/batch-test-model", name_key="ds_name", endpoint="/v1/chat/ds-test", lines=100, megabytes=1),
    Transport("deepinfra", endpoints=f"{CHAT} /completions"),
    Transport("groq", megabytes=200, hours=(24, 168)),
    Transport("moonshot", hours=(12, 168), saving=40),
    Transport("siliconflow", hours=(24, 336)),
    Transport("together", "together", purpose="batch-api", name_key="", hours=(0, 0), paging=""),
    # it would delete the input file, by which a job can be found
    Transport("zhipu", endpoint="/v4{op}", extra=(("auto_delete_input_file", False),)),
    Transport("mistral", "mistral", jobs="/batch/jobs", job="/batch/jobs/{id}", cancel="/batch/jobs/{id}/cancel",
              endpoints=f"{CHAT} {EMBEDDINGS} /moderations", paging="page", lines=1_000_000, megabytes=500,
              hours=(1, 168)),
    Transport("anthropic", "anthropic", jobs="/messages/batches", job="/messages/batches/{id}",
              cancel="/messages/batches/{id}/cancel", upload="", content="{id}", endpoints="/messages",
              paging="after_id", lines=100_000, megabytes=256, one_model=False, named=False),
    Transport("gemini", "gemini", create="/models/{model}:batchGenerateContent", job="/{id}", cancel="/{id}:cancel",
              upload="", content="//download/v1beta/{id}:download?alt=media", endpoints=":generateContent",
              paging="pageToken", lines=100_000, megabytes=20),
)}
# fmt: on
TRANSPORTS["local"] = TRANSPORTS["openai"]
HELD_OPEN = {"ark": ("/api/v3/", "/api/v3/batch/"), "dashscope": ("//batch.dashscope.", "//batch.dashscope.")}
ALL_ENDPOINTS = (CHAT, EMBEDDINGS, RESPONSES, "/completions", "/moderations", "/messages")

RUNNING, DONE, FAILED, EXPIRED, CANCELLED = "running", "done", "failed", "expired", "cancelled"
PHASES = {
    DONE: "completed success succeeded ended partially_succeeded",
    FAILED: "failed",
    EXPIRED: "expired timeout_exceeded",
    CANCELLED: "cancelled canceled",
}
PHASE_OF = {word: phase for phase, words in PHASES.items() for word in words.split()}
QUEUE_FULL = re.compile(
    r"enqueued|token_limit_exceeded|too many (?:\w+ )?(?:batch|job|task)|(?:batch|job|task)s? (?:limit|quota)|queue",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request file goes: the provider's row, the URLs below its root, what it calls the endpoint."""

    transport: Transport
    root: str
    query: str
    op: str
    model: str = ""  # in the URL

    def url(self, path: str, job_id: str = "") -> str:
        """Give the address of a call."""
        joint = "&" if "?" in path else "?"
        host = "/".join(self.root.split("/", 3)[:3])
        url = host + path[1:] if path.startswith("//") else self.root + path
        return url.format(id=job_id, model=self.model) + (joint + self.query if self.query else "")

    def for_model(self, model: str) -> Target:
        """Give the target of a file with this model; a few have rules of their own."""
        own = TRANSPORTS.get(f"{self.transport.name}/{model}")
        return replace(self, transport=own) if own else self

    @property
    def endpoint(self) -> str:
        """What lines and jobs call the endpoint."""
        return self.transport.endpoint.format(op=self.op)


def find_target(url: str, provider: str) -> Target:
    """Find the batch rules for a request URL; UsageError if there are none."""
    parts = urlsplit(url)
    path, model = parts.path.rstrip("/"), ""
    row = TRANSPORTS.get(provider)
    if row is None:
        known = ", ".join(name for name in TRANSPORTS if "/" not in name)
        raise UsageError(f"no Batch API of {provider} is known here, only of {known}: send the file live, with run.sh")
    if row.family == "gemini" and path.endswith(":generateContent"):
        root, _, model = path.removesuffix(":generateContent").rpartition("/models/")
        op = ":generateContent"
    else:
        op = next((end for end in ALL_ENDPOINTS if path.endswith(end)), "")
        root = path.removesuffix(op)
    if op not in row.endpoints.split():
        raise UsageError(f"{path} has no batches at {provider}; it has for {row.endpoints.replace(' ', ', ')}")
    if "/deployments/" in root:
        root, _, model = root.partition("/deployments/")
        row = TRANSPORTS[f"{provider}/deployments"]
    return Target(row, f"{parts.scheme}://{parts.netloc}{root}", parts.query, op, model)


def held_open_url(url: str, provider: str) -> str:
    """Give the URL at which a provider answers ordinary calls at the batch price, late; "" if it has none."""
    ordinary, batch = HELD_OPEN.get(provider, ("", ""))
    if not ordinary or ordinary not in url:
        return ""
    return url if batch in url else url.replace(ordinary, batch)


def window_hours(text: str) -> int:
    """Read a completion window: "24h" -> 24, "14d" -> 336."""
    match = re.fullmatch(r"(\d{1,4})\s*([hd])", text.strip().lower())
    if not match:
        raise UsageError(f"--completion_window {text!r}: write hours or days, such as 24h or 7d")
    return int(match[1]) * (24 if match[2] == "d" else 1)


def check_window(transport: Transport, hours: int) -> None:
    """Refuse a window that the provider does not have."""
    least, most = transport.hours
    if most and not least <= hours <= most:
        span = f"only {least}h" if least == most else f"{least}h to {most}h"
        raise UsageError(f"--completion_window {hours}h: {transport.name} has {span}")


# ---- what is sent ----------------------------------------------------------------------------------------------------


def line_frame(target: Target) -> tuple[bytes, bytes]:
    """Give what stands before and after the custom id in a line; then come the request's body and a closing brace."""
    before, _, after = FAMILIES[target.transport.family].line.partition("ID")
    method = f'"method":"POST","url":{dumps(target.endpoint).decode()},' if target.transport.family == "openai" else ""
    return before.encode(), after.replace("METHOD", method).encode()


def wire_body(body: dict[str, Any], target: Target) -> dict[str, Any]:
    """The body as it stands in a line: the same, but for what the provider wants elsewhere or besides."""
    if target.transport.family == "mistral":
        return {name: value for name, value in body.items() if name != "model"}  # it stands in the job
    if target.transport.family == "openai" and target.model and not body.get("model"):
        return {**body, "model": target.model}  # Azure wants the deployment of the URL in every line
    return body


def job_fields(target: Target, name: str, file_id: str, hours: int, model: str) -> dict[str, Any]:
    """Body of the call that makes a job of an uploaded file."""
    row = target.transport
    metadata = {row.name_key: name} if row.name_key else None
    if row.family == "mistral":
        fields = {"input_files": [file_id], "endpoint": target.endpoint, "model": model, "timeout_hours": hours}
        return {**fields, "metadata": metadata}
    fields = {"input_file_id": file_id, "endpoint": target.endpoint}
    fields |= {"completion_window": f"{hours}h"} if row.hours[1] else {}
    return {**fields, **({"metadata": metadata} if metadata else {}), **dict(row.extra)}


@dataclass(frozen=True, slots=True)
class Family:
    """Lines of a family up to the body, and for calls that carry lines what stands around them."""

    line: str = '{"custom_id":"ID",METHOD"body":'
    before: str = ""
    after: str = ""


FAMILIES = {
    "openai": Family(),
    "together": Family(),
    "mistral": Family(),
    "anthropic": Family('{"custom_id":"ID","params":', '{"requests":[', "]}"),
    "gemini": Family(
        '{"metadata":{"key":"ID"},"request":',
        '{{"batch":{{"displayName":{name},"inputConfig":{{"requests":{{"requests":[',
        "]}}}}",
    ),
}


def around(target: Target, name: str) -> tuple[bytes, bytes]:
    """Give what stands before and after the lines in a call that carries them."""
    family = FAMILIES[target.transport.family]
    before = family.before.format(name=dumps(name).decode()) if "{name}" in family.before else family.before
    return before.encode(), family.after.encode()


# ---- what comes back -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    """A job as the provider describes it."""

    id: str
    word: str  # its own word for the state
    phase: str
    total: int = 0
    done: int = 0
    failed: int = 0
    files: tuple[str, ...] = ()  # with results and errors
    inline: tuple[Any, ...] = ()  # results that came with the job
    problems: tuple[tuple[int, str], ...] = ()  # line (0 = all of it) and what is wrong
    name: str = ""
    input_file: str = ""
    created: float = 0.0  # seconds since the epoch, 0 = not told


def read_job(body: Any, target: Target) -> Job:
    """Read a job: bare, in an envelope, as an operation."""
    raw = as_dict(body)
    raw = as_dict(raw.get("job")) or (as_dict(raw.get("data")) if "id" not in raw else {}) or raw
    metadata = as_dict(raw.get("metadata"))
    if target.transport.family == "gemini":
        raw = {**raw, **metadata}
        for part in (raw.get("output"), raw.get("response")):
            raw |= as_dict(part)
    word = str(
        next((raw[key] for key in ("processing_status", "status", "state") if isinstance(raw.get(key), str)), "")
    )
    counts = as_dict(raw.get("request_counts")) or as_dict(raw.get("batchStats")) or raw
    tell = {name: number(counts.get(name)) for name in COUNTS}
    files = [raw.get(key) for key in ("output_file_id", "output_file", "responsesFile", "error_file_id", "error_file")]
    if target.transport.family == "anthropic" and raw.get("results_url"):
        files = [f"{target.transport.job.format(id=raw.get('id'))}/results"]  # subtle: never another host, with our key
    inline = raw.get("inlinedResponses")
    return Job(
        id=str(raw.get("id") or raw.get("name") or ""),
        word=word,
        phase=PHASE_OF.get(re.sub("^(batch|job)_state_", "", word.lower()), RUNNING),
        total=tell["total"] or tell["total_requests"] or tell["requestCount"] or sum(tell[n] for n in ANTHROPIC_COUNTS),
        done=sum(tell[n] for n in ("completed", "succeeded", "succeeded_requests", "successfulRequestCount")),
        failed=sum(tell[n] for n in ("failed", "errored", "failed_requests", "failedRequestCount")),
        files=tuple(file for file in files if isinstance(file, str) and file),
        inline=tuple(as_list(as_dict(inline).get("inlinedResponses") or inline)),
        problems=tuple(read_problems(raw)),
        name=str(metadata.get(target.transport.name_key or "name") or raw.get("displayName") or ""),
        input_file=str(raw.get("input_file_id") or next(iter(as_list(raw.get("input_files"))), "") or ""),
        created=seconds_since_epoch(raw.get("created_at") or raw.get("createTime")),
    )


ANTHROPIC_COUNTS = ("processing", "succeeded", "errored", "canceled", "expired")
COUNTS = {"total", "completed", "failed", *ANTHROPIC_COUNTS, "total_requests", "succeeded_requests", "failed_requests"}
COUNTS |= {"requestCount", "successfulRequestCount", "failedRequestCount"}


def read_problems(raw: dict[str, Any]) -> list[tuple[int, str]]:
    """Read what a job says is wrong with it: errors in a list, in a list of the OpenAI kind, or one error."""
    errors = raw.get("errors")
    found = as_list(errors) or as_list(as_dict(errors).get("data")) or [raw[k] for k in ("error",) if raw.get(k)]
    return [
        (number(as_dict(error).get("line")), " ".join(filter(None, (code, message))) or one_line(str(error)))
        for error in found
        for code, _, message in [error_words(error if isinstance(error, dict) else {"message": error})]
    ]


def read_list(body: Any) -> tuple[list[Any], str, bool]:
    """Read one page of a list: its items, the id that asks for the next page, whether there is more."""
    raw = as_dict(body)
    items: list[Any] = as_list(body) or next(
        (raw[key] for key in ("data", "operations", "batches", "files") if isinstance(raw.get(key), list)), []
    )
    last = raw.get("last_id") or (as_dict(items[-1]).get("id") if items else "")
    token = raw.get("nextPageToken")
    return items, str(token or last or ""), bool(token or raw.get("has_more"))


def file_id(body: Any) -> str:
    """Read the id of an uploaded file: bare, or in SiliconFlow's envelope."""
    raw = as_dict(body)
    return str(raw.get("id") or as_dict(raw.get("data")).get("id") or "")


def read_output(line: Any, family: str) -> tuple[str, Reply, tuple[str, str, str] | None]:
    """Read one line of an output or error file: the custom id, the reply, and an error that is no reply's.

    The error is its code, its type and its message.
    """
    line = as_dict(line)
    custom_id = str(line.get("custom_id") or line.get("key") or as_dict(line.get("metadata")).get("key") or "")
    if family == "anthropic":
        result = as_dict(line.get("result"))
        kind = str(result.get("type"))
        if kind == "succeeded":
            return custom_id, Reply(status=200, body=result.get("message")), None
        error = as_dict(as_dict(result.get("error")).get("error")) or as_dict(result.get("error"))
        return custom_id, Reply(body=error or None), (kind if kind != "errored" else "", *error_words(error)[1:])
    response, error = line.get("response"), line.get("error")
    if family == "gemini":
        return (
            custom_id,
            Reply(status=0 if error else 200, body=error or response),
            error_words(error) if error else None,
        )
    outer = as_dict(response)
    body = outer.get("body", outer if outer and "status_code" not in outer else None)
    if isinstance(body, str):  # Llama Stack writes the JSON of the reply as a text
        with contextlib.suppress(ValueError):
            body = loads(body)
    status = number(outer.get("status_code")) or (200 if body is not None else 0)
    if body is not None and not (error and status < 300):
        return custom_id, Reply(status=status, body=body), None
    return custom_id, Reply(status=status, body=error), error_words(error) if error else ("", "", "no response")


def number(value: Any) -> int:
    """A count, also as a text; 0 if it is none."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError):
        return 0


def seconds_since_epoch(value: Any) -> float:
    """Read a time: seconds since the epoch or RFC 3339; 0 if it is neither."""
    try:
        return float(value) if isinstance(value, int | float) else datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError):
        return 0.0
