"""The least that any client on aiohttp does: 64 workers, one session, standard json; no budgets, tokens or retries.

    python tests/benchmarks/bare_loop.py REQUESTS.jsonl RESULTS.jsonl URL

It is the yardstick of the throughput figure: what the program adds must not make it slower than this.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import IO

import aiohttp
import uvloop

WORKERS = 64


async def worker(session: aiohttp.ClientSession, url: str, lines: IO[str], results: IO[str]) -> None:
    """Send line after line of what all workers share."""
    for line in lines:
        request = json.loads(line)
        metadata = request.pop("metadata", None)
        async with session.post(url, json=request) as response:
            answer = await response.json()
        results.write(json.dumps([request, answer, metadata]) + "\n")


async def run(requests_path: str, results_path: str, url: str) -> None:
    """Run all workers over one file."""
    connector = aiohttp.TCPConnector(limit=WORKERS)
    headers = {"Authorization": "Bearer none"}
    with Path(requests_path).open(encoding="utf-8") as lines, Path(results_path).open("w", encoding="utf-8") as results:  # noqa: ASYNC230
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            await asyncio.gather(*(worker(session, url, lines, results) for _ in range(WORKERS)))


if __name__ == "__main__":
    uvloop.run(run(*sys.argv[1:4]))
