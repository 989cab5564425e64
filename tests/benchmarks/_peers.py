"""The job of peers.py as users of other tools would write it: the requests of a JSONL file to answers in another.

    python tests/benchmarks/_peers.py TOOL JOB      JOB is a Job as JSON; a line of the results is [id, answer]
    python tests/benchmarks/_peers.py versions      what is installed beside this Python

Each function does what the documentation of its tool recommends for many requests under known limits. No package is
imported until its tool runs. What is a matter of taste is chosen in the tool's favour: uvloop runs the event loop where
it is installed, requests are read and answers are written one by one where the tool allows it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

MODEL = "gpt-4o-mini"
RETRIES = 10
COOLDOWN = 2  # seconds; the guide of async-batch-llm begins with 30, which did worse here


@dataclass(frozen=True)
class Job:
    """What a tool is told; limits are 0 where there are none."""

    requests: str
    results: str
    url: str  # up to /v1
    in_flight: int
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    output_tokens: int = 0  # of a typical answer
    burst_seconds: float | None = None  # how much of a minute's budget may be spent at once; None: all
    script: str = ""  # where the cookbook script lies

    def bodies(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Give the number and the body of each request."""
        with Path(self.requests).open(encoding="utf-8") as lines:
            for line in lines:
                body = json.loads(line)
                yield body.pop("metadata")["id"], body

    def answers(self) -> IO[str]:
        """Open the results, line by line."""
        return Path(self.results).open("w", encoding="utf-8", buffering=1)


def write(answers: IO[str], number: Any, answer: Any) -> None:
    answers.write(json.dumps([number, answer]) + "\n")


async def with_semaphore(job: Job, ask: Callable[..., Awaitable[Any]]) -> None:
    """Ask everything, at most `in_flight` at once; what fails in the end is printed."""
    gate = asyncio.Semaphore(job.in_flight)

    async def one(number: int, body: dict[str, Any]) -> None:
        try:
            reply = await ask(**body)
            write(answers, number, reply.choices[0].message.content)
        except Exception as error:  # noqa: BLE001 - whatever the package raises, the other requests go on
            print(f"{number}: {error!r:.300}")
        finally:
            gate.release()

    with job.answers() as answers:
        async with asyncio.TaskGroup() as group:
            for number, body in job.bodies():
                await gate.acquire()
                group.create_task(one(number, body))


# ---- tools


async def openai_sdk(job: Job) -> None:
    """AsyncOpenAI over aiohttp, which its README recommends for concurrency; it honours retry-after by itself."""
    openai = import_module("openai")
    async with openai.AsyncOpenAI(
        base_url=job.url, api_key="none", max_retries=RETRIES, http_client=openai.DefaultAioHttpClient()
    ) as client:
        await with_semaphore(job, client.chat.completions.create)


async def litellm_acompletion(job: Job) -> None:
    litellm = quiet_litellm()

    async def ask(**body: Any) -> Any:
        body["model"] = f"openai/{body['model']}"
        return await litellm.acompletion(**body, api_base=job.url, api_key="none", max_retries=RETRIES)

    await with_semaphore(job, ask)


async def litellm_router(job: Job) -> None:
    """The default strategy, recommended for production; rpm and tpm of the deployment are what it is told."""
    limits = {"rpm": job.requests_per_minute, "tpm": job.tokens_per_minute}
    where = {"model": f"openai/{MODEL}", "api_base": job.url, "api_key": "none"}
    router = quiet_litellm().Router(
        model_list=[{"model_name": MODEL, "litellm_params": where | {k: v for k, v in limits.items() if v}}],
        num_retries=RETRIES,
    )
    await with_semaphore(job, router.acompletion)


def litellm_batch_completion(job: Job) -> None:
    """Threads; the list of all answers comes in the end."""
    rows = list(job.bodies())
    more = {name: value for name, value in rows[0][1].items() if name not in ("model", "messages")}
    replies = quiet_litellm().batch_completion(
        model=f"openai/{MODEL}",
        messages=[body["messages"] for _, body in rows],
        max_workers=job.in_flight,
        api_base=job.url,
        api_key="none",
        max_retries=RETRIES,
        **more,
    )
    with job.answers() as answers:
        for (number, _), reply in zip(rows, replies, strict=True):
            if isinstance(reply, Exception):
                print(f"{number}: {reply!r:.300}")
            else:
                write(answers, number, reply.choices[0].message.content)


def quiet_litellm() -> Any:
    """Import it without a look for newer prices on the network."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    litellm: Any = import_module("litellm")
    litellm.suppress_debug_info = True
    return litellm


def curator(job: Job) -> None:
    """Run a subclass of LLM over a dataset; no telemetry, no viewer, its own folder for the cache."""
    os.environ |= {"OPENAI_API_KEY": "none", "TELEMETRY_ENABLED": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    package = import_module("bespokelabs.curator")
    rows = [{"id": number, **body} for number, body in job.bodies()]

    class Asker(package.LLM):  # type: ignore[misc, name-defined]
        def prompt(self, row: dict[str, Any]) -> Any:
            return row["messages"]

        def parse(self, row: dict[str, Any], response: str) -> dict[str, Any]:
            return {"id": row["id"], "answer": response}

    limits = {
        "max_requests_per_minute": job.requests_per_minute or 10**7,
        "max_tokens_per_minute": job.tokens_per_minute or 10**10,
    }
    if not job.requests_per_minute:
        limits["max_concurrent_requests"] = job.in_flight
    asker = Asker(
        model_name=MODEL,
        backend="openai",
        generation_params={"max_tokens": rows[0]["max_tokens"]},
        backend_params={"base_url": job.url, "require_all_responses": False, "max_retries": RETRIES, **limits},
    )
    dataset = asker(rows, working_dir=f"{job.results}.curator").dataset
    with job.answers() as answers:
        for row in dataset:
            write(answers, row["id"], row["answer"])


async def async_batch_llm(job: Job) -> None:
    """process_stream with queues of bounded size, its way for large runs; budgets and estimator as in its guide."""
    package = import_module("async_batch_llm")
    more = next(job.bodies())[1]["max_tokens"]
    strategy = package.llm(
        f"openai:{MODEL}",
        api_surface="chat_completions",
        api_key="none",
        base_url=job.url,
        generation_config={"max_tokens": more},
    )
    limits: dict[str, Any] = {}
    if job.requests_per_minute:
        margin = 0.9 if job.burst_seconds else 1.0  # the guide's example leaves a tenth, too
        limits = {"max_requests_per_minute": margin * job.requests_per_minute, "quota_burst_seconds": job.burst_seconds}
    if job.tokens_per_minute:
        estimator = package.CharacterTokenEstimator(expected_output_tokens=job.output_tokens)
        limits |= {"max_tokens_per_minute": job.tokens_per_minute, "token_estimator": estimator}
    config = package.ProcessorConfig(
        concurrency=job.in_flight,
        max_queue_size=2 * job.in_flight,
        max_result_queue_size=2 * job.in_flight,
        rate_limit=package.RateLimitConfig(cooldown_seconds=COOLDOWN),
        **limits,
    )

    async def prompts() -> AsyncIterator[tuple[str, str]]:
        for number, body in job.bodies():
            yield str(number), body["messages"][0]["content"]

    with job.answers() as answers:
        async for result in package.process_stream(strategy, prompts(), config=config):
            if result.success:
                write(answers, int(result.item_id), result.output)
            else:
                print(f"{result.item_id}: {result.error!r:.300}")


async def cookbook(job: Job) -> None:
    """The script as it is, but for the pattern that finds the endpoint: it knows https only."""
    spec = util.spec_from_file_location("cookbook", job.script)
    assert spec
    assert spec.loader
    script: Any = util.module_from_spec(spec)
    sys.modules["cookbook"] = script
    spec.loader.exec_module(script)
    script.api_endpoint_from_url = lambda _: "chat/completions"
    await script.process_api_requests_from_file(
        requests_filepath=job.requests,
        save_filepath=job.results,
        request_url=f"{job.url}/chat/completions",
        api_key="none",
        max_requests_per_minute=job.requests_per_minute or 1e7,
        max_tokens_per_minute=job.tokens_per_minute or 1e10,
        token_encoding_name="o200k_base",
        max_attempts=RETRIES,
        logging_level=40,
    )


class Tool(NamedTuple):
    """A tool by the name of its package; `limits` tells whether it has any means against rate limits."""

    run: Callable[[Job], Coroutine[Any, Any, None] | None]
    package: str
    install: str
    limits: bool = True
    paces: bool = True  # it knows budgets; the others rely on a well-chosen number at once


TOOLS = {
    "async-batch-llm": Tool(async_batch_llm, "async-batch-llm", "pip install 'async-batch-llm[openai]' uvloop"),
    "curator": Tool(curator, "bespokelabs-curator", "pip install bespokelabs-curator"),
    "openai SDK": Tool(openai_sdk, "openai", "pip install 'openai[aiohttp]' uvloop", paces=False),
    "litellm acompletion": Tool(litellm_acompletion, "litellm", "pip install litellm uvloop", limits=False),
    "litellm Router": Tool(litellm_router, "litellm", "pip install litellm uvloop", paces=False),
    "litellm batch_completion": Tool(litellm_batch_completion, "litellm", "pip install litellm", limits=False),
    "cookbook script": Tool(cookbook, "aiohttp", "--cookbook PATH, a copy of the script"),
}


def versions() -> dict[str, str]:
    """Versions of the packages that are installed here."""
    found = {}
    for package in {tool.package for tool in TOOLS.values()}:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(name: str, job: str = "") -> None:
    """Run one tool."""
    if name == "versions":
        print(json.dumps(versions()))
    elif running := TOOLS[name].run(Job(**json.loads(job))):
        run = import_module("uvloop").run if util.find_spec("uvloop") else asyncio.run
        run(running)


if __name__ == "__main__":
    main(*sys.argv[1:])
