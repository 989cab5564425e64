"""HTTP for Batch APIs: calls with patience, streamed uploads and downloads, lists page by page."""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import aiohttp

from api_request_parallel_processor import (
    LOGGER,
    Action,
    Endpoint,
    Reply,
    explain,
    judge,
    likely_mistake,
    loads,
    read_limits,
    retry_delay,
)
from workflows import _batch_providers as providers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from workflows._batch_providers import Target

    Payload = tuple[Mapping[str, str], Any]  # headers and data of a body

BLOCK = 1 << 20
CONNECT_SECONDS, SILENCE_SECONDS = 30.0, 300.0
PATIENCE_SECONDS, SHORT_PATIENCE_SECONDS = 1800.0, 20.0
PROGRESS_SECONDS = 5.0
PAGES = 1000  # of a list, at most
JSON_TYPE = {"Content-Type": "application/json"}
TEXT_KEPT = 2000


class Stopped(Exception):  # noqa: N818 - an end, not an error of this program
    """Going on is pointless: exit code 3; the text is the message."""


@dataclass
class Client:
    """Calls of one provider's API."""

    endpoint: Endpoint
    target: Target
    patience_seconds: float = PATIENCE_SECONDS  # with a provider that has never answered
    began: float = field(default_factory=time.monotonic)
    heard: bool = False  # whether the provider ever answered
    session: aiohttp.ClientSession = field(init=False)

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        self.session = aiohttp.ClientSession(
            timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=BLOCK, auto_decompress=True
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    # ---- calls

    async def once(self, method: str, url: str, payload: Payload | None = None) -> Reply:
        """Make one call; errors of the network are values of the reply."""
        reply = Reply()
        headers, data = payload or ({}, None)
        try:
            async with self.session.request(
                method,
                url,
                data=data,
                headers={**self.endpoint.headers, **headers},
                proxy=self.endpoint.proxy,
                allow_redirects=False,
            ) as response:
                reply.status, reply.headers = response.status, response.headers
                raw = await response.read()
            self.heard = True
            try:
                reply.body = loads(raw) if raw.strip() else {}
            except ValueError:
                reply.text = raw[:TEXT_KEPT].decode(errors="replace")
                reply.failure, reply.message = (
                    ("bad_reply", "the answer is no JSON") if reply.status < 300 else ("", "")
                )
        except TimeoutError as error:
            reply.failure, reply.message = "timeout", "no answer"
            reply.sent = not isinstance(error, aiohttp.ConnectionTimeoutError)
        except (aiohttp.ClientError, OSError) as error:
            explain(error, reply)
        reply.message = self.endpoint.secrets.redact(reply.message)
        return reply

    async def call(self, method: str, path: str, make: Callable[[], Payload] | None = None, job_id: str = "") -> Reply:
        """Call until there is an answer to the point: through lost networks, 5xx and rate limits, with growing waits.

        What no repetition helps (4xx) is given back; Stopped for a refused key or an empty account.
        """
        for attempt in count(1):
            reply = await self.once(method, self.target.url(path, job_id), make() if make else None)
            if reply.status // 100 == 2 and not reply.failure:
                return reply
            action = self.meaning(reply)
            if action is Action.FAIL:
                return reply
            seconds = self.told_wait(reply) or retry_delay(attempt, random.Random()) + 0.1
            LOGGER.warning("%s; trying again in %.0f s", self.words(reply), seconds)
            await asyncio.sleep(seconds)
        raise AssertionError

    def meaning(self, reply: Reply) -> Action:
        """Tell what an answer means; Stopped if going on is pointless."""
        verdict = judge(reply, self.endpoint.provider, self.endpoint.shape)
        late = not self.heard and time.monotonic() > self.began + self.patience_seconds
        if late or (reply.hopeless and not self.heard):
            reason = reply.hopeless or f"{self.target.root} does not answer ({verdict.message})."
            raise Stopped(f"{reason} Check --request_url and the network; then the same command continues.")
        if verdict.action is Action.STOP:
            advice = likely_mistake(self.endpoint, verdict, reply)
            raise Stopped(f"{verdict.message.rstrip('. ')}. {advice} The same command continues.")
        return verdict.action

    def words(self, reply: Reply) -> str:
        """Give what an answer says, for people."""
        text = judge(reply, self.endpoint.provider, self.endpoint.shape).message
        return self.endpoint.secrets.redact(f"{reply.status or reply.failure}: {text}")

    def told_wait(self, reply: Reply) -> float:
        """Seconds that an answer asks to wait, 0 if it does not say."""
        limits = read_limits(reply, self.endpoint.provider, time.time())
        return (limits.retry_after or 0.0) if limits else 0.0

    # ---- lists

    async def listed(self, path: str, since: float) -> AsyncIterator[Any]:
        """Give the items of a list, page by page, until a whole page is older than `since`.

        LookupError if the provider does not give the list: then nobody knows what it has.
        """
        paging = self.target.transport.paging
        query = f"{path}{'&' if '?' in path else '?'}" + {"page": "page_size=100", "pageToken": "pageSize=100"}.get(
            paging, "limit=100"
        )
        mark = ""
        for page in range(PAGES):
            mark = str(page) if paging == "page" and page else mark
            reply = await self.call("GET", query + (f"&{paging}={mark}" if mark else ""))
            if reply.status // 100 != 2:
                raise LookupError(self.words(reply))
            items, mark, more = providers.read_list(reply.body)
            for item in items:
                yield item
            old = items and all(0 < providers.read_job(item, self.target).created < since for item in items)
            if not paging or old or not items or not (more or paging == "page"):
                return

    # ---- files

    async def upload(self, path: Path, size: int, name: str) -> Reply:
        """Upload a file, streaming, with its progress in the log."""
        purpose = self.target.transport.purpose
        mark = f"----{os.urandom(16).hex()}"
        head = (
            f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}.jsonl"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        ).encode()
        tail = f"\r\n--{mark}--\r\n".encode()
        headers = {
            "Content-Type": f"multipart/form-data; boundary={mark}",
            "Content-Length": str(len(head) + size + len(tail)),
        }
        return await self.call(
            "POST", self.target.transport.upload, lambda: (headers, file_blocks(path, size, (head, b"\n", tail), name))
        )

    def inline(self, path: Path, size: int, name: str) -> Payload:
        """Make the body of a call that carries the lines of a file in a JSON array."""
        before, after = providers.around(self.target, name)
        headers = {**JSON_TYPE, "Content-Length": str(len(before) + size - 1 + len(after))}
        return headers, file_blocks(path, size, (before, b",", after), name)

    async def lines(self, path: str, file_id: str) -> AsyncIterator[list[bytes]]:
        """Give the lines of a result file as they arrive, several at a time. Raises the errors of aiohttp."""
        rest: list[bytes] = []
        async with self.session.get(
            self.target.url(path, file_id),
            headers=self.endpoint.headers,
            proxy=self.endpoint.proxy,
            allow_redirects=False,
        ) as response:
            response.raise_for_status()
            if response.status != 200:
                raise aiohttp.ClientPayloadError(f"status {response.status}")
            while chunk := await response.content.readany():
                if b"\n" not in chunk:
                    rest.append(chunk)
                    continue
                first, *lines = chunk.split(b"\n")
                lines.insert(0, b"".join([*rest, first]))
                rest = [lines.pop()]
                yield lines
        yield [b"".join(rest)]


async def file_blocks(path: Path, size: int, around: tuple[bytes, bytes, bytes], name: str) -> AsyncIterator[bytes]:
    """Give a file in blocks. around: what stands before it, between its lines and after it."""
    before, joint, after = around
    done, told = 0, time.monotonic()
    yield before
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            done += len(block)
            if joint != b"\n":
                block = (block.removesuffix(b"\n") if done == size else block).replace(b"\n", joint)
            yield block
            if (now := time.monotonic()) - told > PROGRESS_SECONDS:
                told = now
                LOGGER.info("%s: uploaded %.0f of %.0f MB", name, done / 1e6, size / 1e6)
    yield after
