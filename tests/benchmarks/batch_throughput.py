"""Measure workflows.provider_batch: time to split, upload and collect, and memory.

    python tests/benchmarks/batch_throughput.py [--requests 50000] [--bytes 2000]

Beside each step stands what it takes to copy its bytes and parse each of its lines once: the request file for the
split, the output file for collecting; an upload is only copied. Seconds are processor time, so that what else the
does matters less. The stand-in provider runs in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def reference(path: Path, *, parse: bool) -> float:
    """Seconds to read a file, parse each line once, and write a copy."""
    from api_request_parallel_processor import loads

    began = time.process_time()
    with path.open("rb", 1 << 20) as source, (path.parent / "copy").open("wb", 1 << 20) as target:
        for line in source:
            if parse:
                loads(line)
            target.write(line)
    return time.process_time() - began


def child(requests: Path, url: str) -> None:
    """Run the program with a stopwatch at its steps; prints seconds and the peak of memory."""
    import resource

    from workflows import provider_batch
    from workflows._batch_jobs import Jobs

    seconds = dict.fromkeys(("prepare", "upload", "collect"), 0.0)

    def timed(owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def step(*args: Any, **more: Any) -> Any:
            began = time.process_time()
            try:
                return plain(*args, **more)
            finally:
                seconds[name] += time.process_time() - began

        async def slow_step(*args: Any, **more: Any) -> Any:
            began = time.process_time()
            try:
                return await plain(*args, **more)
            finally:
                seconds[name] += time.process_time() - began

        setattr(owner, name, slow_step if asyncio.iscoroutinefunction(plain) else step)

    timed(provider_batch.Batch, "prepare")
    timed(Jobs, "upload")
    timed(Jobs, "collect")
    code = provider_batch.main(
        f"run --requests_filepath {requests} --request_url {url}/v1/chat/completions --poll_seconds 0.2".split()
    )
    print(json.dumps({**seconds, "code": code, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--bytes", type=int, default=2000)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder, "requests.jsonl")
        words = "the quick brown fox jumps over the lazy dog "
        with requests.open("w") as file:
            for number in range(arguments.requests):
                text = f"{number} {words * (arguments.bytes // len(words))}"[: arguments.bytes - 120]
                body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], "max_tokens": 64}
                file.write(json.dumps({**body, "metadata": {"id": number}}) + "\n")
        command = [sys.executable, str(ROOT / "tests" / "local_batches.py"), "--provider", "openai"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                url = server.stdout.readline().split()[-1]
                program = [sys.executable, __file__, "--child", str(requests), url]
                done = subprocess.run(program, capture_output=True, text=True, check=False)
                found = json.loads(done.stdout.splitlines()[-1])
            finally:
                server.terminate()
        results = requests.with_name("requests_results.jsonl")
        output = requests.with_name("output.jsonl")  # what the provider gave: a reply in its frame per line
        with results.open("rb") as lines, output.open("wb") as file:
            for line in lines:
                row = json.loads(line)
                reply = {"status_code": 200, "request_id": "q", "body": row[1]}
                file.write(json.dumps({"id": "r", "custom_id": "x" * 40, "response": reply}).encode() + b"\n")
        steps = {
            "split": (found["prepare"], reference(requests, parse=True)),
            "upload": (found["upload"], reference(requests, parse=False)),
            "collect": (found["collect"], reference(requests, parse=False) + reference(output, parse=True)),
        }
        counted = sum(1 for _ in results.open("rb"))
    print(f"{arguments.requests:,} requests of {arguments.bytes:,} bytes, {counted:,} results, exit {found['code']}")
    for name, (ours, plain) in steps.items():
        print(f"{name:8} {ours:6.2f} s   copying and parsing {plain:5.2f} s   {plain / ours:4.0%}")
    ours, plain = (sum(column) for column in zip(*steps.values(), strict=True))
    print(f"{'all':8} {ours:6.2f} s   copying and parsing {plain:5.2f} s   {plain / ours:4.0%}")
    print(f"memory   {found['megabytes']:6.0f} MB at its peak")


if __name__ == "__main__":
    main()
