"""Measure workflows.provider_batch: time to split, upload and collect, and memory.

    python tests/benchmarks/batch_throughput.py [--requests 50000] [--bytes 2000] [--rounds 5]

Beside each step stands what it takes to copy its bytes and parse each of its lines once, with json of the standard
library and with orjson:

    prepare   the request file into another file, each line parsed
    upload    the request file into a pipe, in blocks
    collect   the output file into another file, each line parsed, and the request file in blocks: a result has both

Seconds are processor time, of several rounds the least, so that what else the machine does matters less. All files are
new. A virtual machine writes memory that was just freed several times as fast as memory it had given back: more rounds
make it likelier that each step once met the fast kind, which is when ours look worst. The stand-in provider runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.benchmarks._common import table  # noqa: E402 - found by the path

BLOCK = 1 << 20
STEPS = ("prepare", "upload", "collect")


def parsed_copy(path: Path, parse: Callable[[bytes], Any]) -> float:
    """Seconds to read a file, parse each line once, and write a copy."""
    with path.open("rb", BLOCK) as source, new_file(path) as target:
        began = time.process_time()
        for line in source:
            parse(line)
            target.write(line)
        target.flush()
        return time.process_time() - began


def plain_copy(path: Path, target: IO[bytes]) -> float:
    """Seconds to copy a file in blocks."""
    with path.open("rb", buffering=0) as source, target:
        began = time.process_time()
        shutil.copyfileobj(source, target, BLOCK)
        return time.process_time() - began


def new_file(path: Path) -> IO[bytes]:
    """Open a file beside another."""
    return path.with_name(f"copy{len(list(path.parent.iterdir()))}").open("xb", BLOCK)


def plain(requests: Path, output: Path, parse: Callable[[bytes], Any]) -> dict[str, float]:
    """Seconds of copying and parsing, step by step."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0) as pipe:
        assert pipe.stdin
        upload = plain_copy(requests, pipe.stdin)
    collect = plain_copy(requests, new_file(requests)) + parsed_copy(output, parse)
    return {"prepare": parsed_copy(requests, parse), "upload": upload, "collect": collect}


def child(requests: Path, url: str) -> None:
    """Run the program with a stopwatch at its steps; prints seconds and the peak of memory."""
    import resource

    from workflows import provider_batch
    from workflows._batch_jobs import Jobs

    seconds = dict.fromkeys(STEPS, 0.0)

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


def write_requests(path: Path, count: int, size: int) -> None:
    """Write a request file with lines of about so many bytes."""
    words = "the quick brown fox jumps over the lazy dog "
    with path.open("w") as file:
        for number in range(count):
            text = f"{number} {words * (size // len(words))}"[: size - 120]
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], "max_tokens": 64}
            file.write(json.dumps({**body, "metadata": {"id": number}}) + "\n")


def measure(requests: Path) -> dict[str, Any]:
    """Run the program once against a provider of its own."""
    command = [sys.executable, str(ROOT / "tests" / "local_batches.py"), "--provider", "openai"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = server.stdout.readline().split()[-1]
            program = [sys.executable, __file__, "--child", str(requests), url]
            done = subprocess.run(program, capture_output=True, text=True, check=False)
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        finally:
            server.terminate()
    return found


def write_output(results: Path, output: Path) -> int:
    """Write what the provider gave, a reply in its frame per line; gives the number of lines."""
    count = 0
    with results.open("rb") as lines, output.open("wb") as file:
        for count, line in enumerate(lines, 1):  # noqa: B007 - counts
            reply = {"status_code": 200, "request_id": "q", "body": json.loads(line)[1]}
            file.write(json.dumps({"id": "r", "custom_id": "x" * 14, "response": reply}).encode() + b"\n")
    return count


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--bytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1])
        return
    rounds: list[dict[str, Any]] = []
    parsers: dict[str, list[dict[str, float]]] = {"json": [], "orjson": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            requests, output = (Path(folder, str(number), name) for name in ("requests.jsonl", "output.jsonl"))
            requests.parent.mkdir()
            write_requests(requests, arguments.requests, arguments.bytes)
            rounds.append(measure(requests))
            counted = write_output(requests.with_name("requests_results.jsonl"), output)
            for name, taken in parsers.items():
                taken.append(plain(requests, output, importlib.import_module(name).loads))
    if any(found["code"] for found in rounds) or counted != arguments.requests:
        raise RuntimeError(f"{counted:,} results, exit codes {[found['code'] for found in rounds]}")
    sides = {"ours": rounds, **parsers}
    least = [[min(taken[step] for taken in side) for side in sides.values()] for step in STEPS]
    totals = [sum(seconds) for seconds in zip(*least, strict=True)]
    head = (
        f"{counted:,} requests of {arguments.bytes:,} bytes | ours, s | with json, s (share) | with orjson, s (share)"
    )
    for line in table(head, [shares(*row) for row in zip((*STEPS, "all"), [*least, totals], strict=True)]):
        print(line)
    print(f"\npeak memory: {max(found['megabytes'] for found in rounds):.0f} MB")


def shares(step: str, seconds: Sequence[float]) -> list[str]:
    """A row: our seconds, then those of copying and parsing and what share of ours they are."""
    return [step, f"{seconds[0]:.2f}", *(f"{other:.2f} ({other / seconds[0]:.0%})" for other in seconds[1:])]


if __name__ == "__main__":
    main()
