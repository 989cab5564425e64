"""Measure workflows.report: processor time and memory over a million results, with its page.

    python tests/benchmarks/report.py                       1,000,000 results, a file of about 1 GB
    python tests/benchmarks/report.py --results 100000

Of the results 2 % failed, 1 % failed and succeeded later, the last line is torn. Beside the time stands that of
json.loads over each line, beside the memory that with a hundredth of the results.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks._common import ROOT, Ended, Process, say, short_chat, table, write_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

JSON_LOADS = "import json, sys\nfor line in open(sys.argv[1], encoding='utf-8'):\n    json.loads(line)"
TEXT = "An answer of some length, which says what a model may say and then a little more. " * 5
RUN_SECONDS = 36000


def result(number: int, total: int, rng: random.Random, *, succeeded: bool) -> list[Any]:
    """Make a result line with details."""
    prompt, output = 60 + int(rng.expovariate(1 / 80)), 1 + int(rng.expovariate(1 / 90))
    started = datetime.fromtimestamp(1.79e9 + number * RUN_SECONDS / total, UTC).isoformat(timespec="milliseconds")
    details: dict[str, Any] = {
        "line": number + 1,
        "attempts": 1 + (rng.random() < 0.02),
        "refusals": int(rng.random() < 0.01),
    }
    details |= {"started": started, "seconds": round(rng.lognormvariate(0, 1), 3)}
    details |= {"estimated_tokens": prompt + 90, "tokens": prompt + output}
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "prompt_tokens_details": {"cached_tokens": prompt // 3},
    }
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    reply: Any = {"id": f"chatcmpl-{number}", "model": "gpt-4o-mini", "choices": [choice], "usage": usage}
    if not succeeded:
        kind = rng.choice(["timeout", "server_error", "content_filter"])
        reply = [{"attempt": 1, "kind": kind, "status": 500, "message": "it failed", "response": None}]
    return [{**short_chat(number), "user": TEXT}, reply, {"id": number}, details]


def results(total: int) -> Iterator[list[Any]]:
    """Give the lines of an unfinished file."""
    rng = random.Random(7)
    for number in range(total):
        yield result(number, total, rng, succeeded=number % 100 > 2)
    for number in range(0, total, 100):
        yield result(number, total, rng, succeeded=True)


def measured(folder: Path, total: int, *, compare: bool) -> tuple[Ended, float]:
    """Write that many results, report on them, and read each line once."""
    path = write_lines(folder / "results.jsonl", results(total))
    with path.open("ab") as file:
        file.write(b'[{"model":"gpt-4o-mini","mes')
    say(f"{total:,} results, {path.stat().st_size / 1e6:,.0f} MB")
    words = [sys.executable, "-m", "workflows.report", path, "--html", folder / "page.html"]
    ended = Process.start(words, folder, env={"PYTHONPATH": str(ROOT)}).wait()
    say(ended.said)
    if ended.code or f"{total:,}" not in ended.said:
        raise RuntimeError(ended.said)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - len('[{"model":"gpt-4o-mini","mes'))
    bare = Process.start([sys.executable, "-c", JSON_LOADS, path], folder).wait().cpu if compare else 0.0
    return ended, bare


def main() -> None:
    """Take the measures and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=1_000_000, metavar="N")
    total = max(100, parser.parse_args().results)
    with tempfile.TemporaryDirectory() as name:
        few, _ = measured(Path(name), total // 100, compare=False)
        many, bare = measured(Path(name), total, compare=True)
        page = (Path(name) / "page.html").stat().st_size
    rows = [
        (
            "processor time",
            f"{many.cpu:.0f} s",
            f"{many.cpu / total * 1e6:.0f} µs a result, {many.cpu / bare:.1f} times json.loads",
        ),
        ("peak memory", f"{many.memory / 1e6:.0f} MB", f"{few.memory / 1e6:.0f} MB with {total // 100:,}"),
        ("page", f"{page / 1e6:.1f} MB", "with the script of plotly"),
    ]
    for line in table(f"{total:,} results | measured | how", rows):
        print(line)


if __name__ == "__main__":
    main()
