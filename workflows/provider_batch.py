"""Send a request file through a provider's Batch API, at half the price, and leave the same result file as a live run.

    python -m workflows.provider_batch run --requests_filepath requests/mine.jsonl --completion_window 24h
    python -m workflows.provider_batch create --input-file prompts.txt --model qwen-plus --job-name my_batch --wait

commands:
    run       create, wait, collect; can be stopped and started again at any time, tomorrow, on another terminal
    create    split, upload, submit; with --wait the same as run
    status    ask how the jobs are (of the results file, or those named)
    list      what the provider has, and which of it is ours
    cancel    cancel the jobs (all open ones, or those named); what they have done is collected
    collect   record the results of jobs that have ended

Live and batch runs mix on the same files: what a batch could not do, a live run finishes, and the reverse. The ledger
<results>.batch.json knows what was submitted, so that nothing is paid for twice; while it lists open jobs, the
processor refuses to run on these results. What failed in a batch is sent again with --resubmit, or live with
--finish_live.

exit codes: 0 all succeeded or submitted; 1 finished, some failed; 2 wrong usage or files; 3 stopped early;
130 interrupted
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import (
    LOGGER,
    ResultsFile,
    ResultsLost,
    Secrets,
    Settings,
    UsageError,
    complain,
    find_provider,
    locked,
    make_endpoint,
    process_api_requests_from_file,
    refuse_unfinished,
    run_job,
)
from workflows import _batch_providers as providers
from workflows import _files, _run
from workflows._batch_client import PATIENCE_SECONDS, SHORT_PATIENCE_SECONDS, Client, Stopped
from workflows._batch_costs import cost_words
from workflows._batch_jobs import Jobs
from workflows._batch_ledger import (
    COLLECTING,
    DROPPED,
    SUBMITTED,
    SUBMITTING,
    UNCLEAR,
    UNSENT,
    Ledger,
    Part,
)
from workflows._batch_parts import Plan, Splitter, requests_of, split
from workflows._batch_providers import RUNNING
from workflows._requests import endpoint_of
from workflows._results import Results, read_requests

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Sequence


OPENAI, DASHSCOPE = "https://api.openai.com/v1", "https://dashscope.aliyuncs.com/compatible-mode/v1"
QWEN_KEY, QWEN_MODEL, QWEN_URL, BATCH_WINDOW = (
    "QIANWEN_API_KEY QIANWEN_MODEL QIANWEN_BASE_URL BATCH_COMPLETION_WINDOW".split()
)
DASHSCOPE_MODEL = "qwen-plus"
GARBAGE_AFTER = 100_000  # new objects: lines are many, and leave no cycles
POLL_GROWTH, LONGEST_POLL_SECONDS = 1.3, 300.0
HELD_OPEN_SECONDS = 3600.0  # that a provider may hold a call open at the batch price
FEW_REQUESTS = 100  # fewer are done live before a batch has begun
DEFAULTS: Any = {knob.name: knob.default for knob in fields(Settings)}
SAMPLING = ("temperature", "max_tokens", "top_p")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every knob of a batch run; the fields are flags."""

    requests_filepath: str = ""
    save_filepath: str = ""
    request_url: str = ""
    provider: str = "auto"
    api_key: str = field(default="", repr=False)
    api_key_env: str = ""
    allow_plain_http: bool = False
    job_name: str = ""
    completion_window: str = "24h"
    wait: bool = False
    poll_seconds: float = 15.0
    settle_seconds: float = 60.0
    resubmit: bool = False
    finish_live: bool = False
    live_after: str = ""
    max_requests_per_minute: float = DEFAULTS["max_requests_per_minute"]
    max_tokens_per_minute: float = DEFAULTS["max_tokens_per_minute"]
    limit: int = 0
    dry_run: bool = False

    def live(self, **more: Any) -> Settings:
        """The settings of a live run on the same files."""
        names = (
            "requests_filepath save_filepath request_url provider api_key api_key_env allow_plain_http limit".split()
        )
        names += ["max_requests_per_minute", "max_tokens_per_minute"]
        return Settings(**{name: getattr(self, name) for name in names} | more)


HELP = {
    "requests_filepath": "JSONL file of requests, as the processor takes them",
    "save_filepath": "results; default: .jsonl of the request file replaced by _results.jsonl",
    "request_url": "the endpoint; a base URL gets it appended",
    "provider": "whose Batch API this is, where the host does not tell",
    "api_key": "the key; other users of this machine can see it here: better --api_key_env",
    "api_key_env": "environment variable with the key; default: the provider's usual one",
    "allow_plain_http": "send a key over http to a public address",
    "job_name": "begins the names of jobs and files at the provider; default: the request file's name",
    "completion_window": "how long the provider may take: 24h, or up to 336h or 14d where it allows that",
    "wait": "with create: wait for the results",
    "poll_seconds": "first interval between two looks at the jobs; it grows",
    "settle_seconds": "after an interruption: a job that the provider does not list after that long never arrived",
    "resubmit": "send again what failed in a batch, and what cannot be found at the provider",
    "finish_live": "in the end, send live what the batches could not do",
    "live_after": "such as 20h: cancel what is not done after that long, and send it live",
    "max_requests_per_minute": "of the live part",
    "max_tokens_per_minute": "of the live part",
    "limit": "only the first N requests of the file: a smoke run",
    "dry_run": "tell what would be sent; send nothing",
}


class Batch:
    """A request file on its way through a Batch API."""

    def __init__(self, options: Options, client: Client, ledger: Ledger, results_path: Path) -> None:
        self.options, self.ledger, self.results_path = options, ledger, results_path
        self.endpoint, self.target = client.endpoint, client.target
        self.hours = providers.window_hours(options.completion_window)
        self.jobs = Jobs(ledger, client, client.target, results_path, options.requests_filepath, options.settle_seconds)
        self.jobs.resubmit = options.resubmit
        self.plan = Plan()
        self.settled: set[str] = set()  # tags of unclear parts that were looked for

    # ---- create

    def prepare(self) -> None:
        """Split what is neither finished nor open into parts; the results file is locked only for that long."""
        options, ledger = self.options, self.ledger
        providers.check_window(self.target.transport, self.hours)
        if not Path(options.requests_filepath).is_file():
            raise UsageError(
                f"--requests_filepath {options.requests_filepath!r}: there is no regular file of that name, and a "
                "batch needs one that can be read twice"
            )
        refuse_unfinished(options.live(ignore_batch=True))
        self.plan = Plan()
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", options.job_name or Path(options.requests_filepath).stem)[:40]
        common = {"request_url": options.request_url, "provider": self.endpoint.provider.name, "hours": self.hours}
        splitter = Splitter(ledger, self.target, name, common, self.plan)
        requests = requests_of(Path(options.requests_filepath), self.endpoint, options.limit or math.inf)
        results = ResultsFile(str(self.results_path), options.requests_filepath)
        try:
            for notice in results.notices:
                LOGGER.warning("%s", notice)
            ledger.look_for_others()
            ledger.drop_unsent()
            self.jobs.returned = False
            split(requests, results, splitter, self.endpoint, resubmit=options.resubmit)
            results.finish(whole=False)
        finally:
            results.close()
        ledger.leave_results()

    def tell(self) -> None:
        """Say what is about to be sent, what it saves, and when a batch does not pay."""
        plan, row = self.plan, self.target.transport
        held = [(plan.finished, "finished"), (plan.open, "in open jobs"), (plan.unfit, "unfit for a batch")]
        held.append((plan.failed_before, "failed in an earlier batch (--resubmit sends them again)"))
        told = ", ".join(f"{count:,} {what}" for count, what in held if count)
        LOGGER.info("%s requests read%s", f"{plan.read:,}", f"; {told}" if told else "")
        if not plan.new:
            return
        LOGGER.info(
            "%s requests, about %s input tokens, %.1f MB, in %d part%s, at %d %% off the price, within %dh",
            f"{plan.new:,}",
            f"{sum(sample.tokens for sample in plan.samples.values()):,}",
            plan.bytes / 1e6,
            len(plan.parts),
            "" if len(plan.parts) == 1 else "s",
            row.saving,
            self.hours,
        )
        if words := cost_words(plan.samples, self.target, self.options.request_url, self.endpoint.provider.name):
            LOGGER.info("%s", words)
        if plan.new < FEW_REQUESTS:
            LOGGER.info("So few requests are done live within minutes; a batch may take the whole %dh.", self.hours)

    async def submit_all(self) -> None:
        """Settle what an interruption left open, then submit what the provider has room for."""
        for part in self.ledger.open_parts(SUBMITTING, UNCLEAR):
            if part.state == SUBMITTING or part.tag not in self.settled:
                self.settled.add(part.tag)
                await self.jobs.settle(part)
        for part in self.ledger.open_parts(*UNSENT):
            if not self.jobs.queue_full:
                await self.jobs.submit(part)

    # ---- wait

    async def drive(self) -> None:
        """Submit, watch and collect until no job is open. Stopped if only unclear ones are left."""
        interval = self.options.poll_seconds
        while self.ledger.open_parts() or self.jobs.returned:
            before = [(part.state, part.word, part.done) for part in self.ledger.parts]
            if self.jobs.returned or any(part.overtaken for part in self.ledger.open_parts(*UNSENT)):
                self.split_again()
            await self.submit_all()
            moved = await self.collect()
            left = self.ledger.open_parts()
            if left and all(part.state == UNCLEAR for part in left):
                raise Stopped(
                    f"the provider does not show {', '.join(part.name for part in left)}. Look there: `cancel` "
                    "forgets them, --resubmit sends them again, which pays twice if they are there after all."
                )
            changed = before != [(part.state, part.word, part.done) for part in self.ledger.parts]
            interval = self.options.poll_seconds if changed else interval * POLL_GROWTH
            if not moved and (left or self.jobs.returned):
                await asyncio.sleep(min(interval, max(LONGEST_POLL_SECONDS, self.options.poll_seconds)))
                self.jobs.queue_full = False  # ask again, once in a while

    def split_again(self) -> None:
        """Split what has changed since: somebody else finished some of it, or the provider returned it."""
        try:
            self.prepare()
        except UsageError as busy:
            LOGGER.warning("What is left waits: %s", busy)
        else:
            self.tell()

    async def collect(self) -> bool:
        """Look at every submitted job, collect those that have ended; tells whether one was."""
        moved = False
        for part in self.ledger.open_parts(COLLECTING) + self.ledger.open_parts(SUBMITTED):
            job = await self.jobs.look(part)
            if job.phase != RUNNING and part.open:
                moved = await self.jobs.collect(part, job) or moved
            elif self.is_late(part):
                LOGGER.warning("%s: not done after --live_after %s", part.name, self.options.live_after)
                await self.jobs.cancel(part)
        return moved

    def is_late(self, part: Part) -> bool:
        """Tell whether the time for this job is over, and it is not cancelled yet."""
        hours = providers.window_hours(self.options.live_after) if self.options.live_after else 0
        return bool(hours and not part.cancelling and time.time() > part.submitted + hours * 3600)

    # ---- commands

    async def run(self, *, main_program: bool = False) -> int:
        """Create, wait, collect, and finish live if that is wanted."""
        before = {part.tag for part in self.ledger.parts if not part.open}
        self.prepare()
        self.tell()
        if self.options.dry_run:
            LOGGER.info("Nothing was sent.")
            return 0
        await self.drive()
        mine = [part for part in self.ledger.parts if part.tag not in before]
        failed = self.plan.failed_before + self.plan.unfit + sum(part.failed for part in mine)
        LOGGER.info("The results are in %s.", self.results_path)
        if (self.options.finish_live or self.options.live_after) and failed:
            LOGGER.info("Sending live what the batches could not do.")
            tally = await run_job(self.options.live(), main_program=main_program)
            if tally.stop_reason:
                complain(f"Stopped early: {tally.stop_reason} The same command continues.")
            return tally.exit_code
        if failed:
            LOGGER.info(
                "%s failed, with their reasons. --resubmit sends them in another batch, --finish_live live.", failed
            )
        return 1 if failed else 0

    async def create(self, *, main_program: bool = False) -> int:
        """Split, upload, submit; wait too if that is wanted."""
        if self.options.wait or self.options.dry_run:
            return await self.run(main_program=main_program)
        self.prepare()
        self.tell()
        await self.submit_all()
        if waiting := len(self.ledger.open_parts(*UNSENT)):
            LOGGER.info("Parts that wait: %d. `run` submits them as soon as that is possible.", waiting)
        if main_program:
            self.show()
        if self.ledger.open_parts(SUBMITTED):
            LOGGER.info(
                "`run` with the same flags waits for the results, `status` asks, `collect` takes what is there."
            )
        return 3 if self.ledger.open_parts(UNCLEAR) else 0

    async def cancel(self, ids: Sequence[str]) -> int:
        """Cancel jobs; what was never submitted, or is unknown to the provider, is dropped."""
        code = 0
        for part in self.ledger.open_parts():
            if ids and not {part.id, part.name, part.tag} & set(ids):
                continue
            if part.state == SUBMITTING:
                LOGGER.warning("%s: unknown whether it was submitted; `run` finds out", part.name)
            elif not part.id or (not await self.jobs.cancel(part) and part.state == UNCLEAR):
                self.ledger.close(part, DROPPED)
        for job_id in set(ids) - {name for part in self.ledger.parts for name in (part.id, part.name, part.tag)}:
            if not await self.jobs.cancel(Part("", job_id, id=job_id)):
                code = 2
        if not ids:
            self.show()
        return code

    async def status(self, ids: Sequence[str]) -> int:
        """Ask how the jobs are."""
        code = 0
        for job_id in ids:
            names = {name: part.id for part in self.ledger.parts for name in (part.name, part.tag)}
            job = await self.jobs.look(Part("", job_id, id=names.get(job_id) or job_id))
            if job.id:
                print(f"{job.id}  {job.word}  {job.done:,} of {job.total:,} done, {job.failed:,} failed")
            else:
                code = 2
        for part in [] if ids else self.ledger.open_parts(SUBMITTED, COLLECTING):
            await self.jobs.look(part)
        if not ids:
            self.show()
        return code

    async def collect_once(self) -> int:
        """Record the results of jobs that have ended."""
        await self.collect()
        self.show()
        return 0

    async def list(self) -> int:
        """Print what the provider has, the newest first as it tells them."""
        ours, count = {part.id: part for part in self.ledger.parts}, 0
        async for item in self.jobs.client.listed(self.target.transport.jobs, 0):
            job = providers.read_job(item, self.target)
            mark = ours[job.id].state if job.id in ours else ""
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created)) if job.created else ""
            count += 1
            print(f"{job.id}  {job.word}  {job.done:,}/{job.total:,}  {made}  {job.name}  {mark}".rstrip())
        if not count:
            LOGGER.info("The provider has no jobs.")
        return 0

    def show(self) -> None:
        """Print the jobs of the ledger."""
        if not self.ledger.parts:
            LOGGER.info("No jobs are known for %s: `run` or `create` makes some.", self.results_path)
        for part in self.ledger.parts:
            print(f"{part.id or '-'}  {part.name}  {part.state} {part.word}  {part.done:,}/{part.requests:,} done")


# ---- running ---------------------------------------------------------------------------------------------------------


def complete(options: Options) -> Options:
    """Fill in what is not given: the URL, the variable with the key."""
    url = options.request_url or os.environ.get(QWEN_URL, "")
    if not url:
        qwen = any(map(os.environ.get, ("DASHSCOPE_API_KEY", QWEN_KEY))) and not os.environ.get("OPENAI_API_KEY")
        url = DASHSCOPE if qwen else OPENAI
    url = endpoint_of(url, "")
    provider = find_provider(url, options.provider)
    usual = any(map(os.environ.get, provider.key_env))
    qwen_key = provider.name == "dashscope" and not usual and bool(os.environ.get(QWEN_KEY))
    api_key_env = options.api_key_env or (QWEN_KEY if qwen_key and not options.api_key else "")
    return replace(options, request_url=url, api_key_env=api_key_env)


def results_of(options: Options) -> Path:
    """The results file, links followed."""
    return Path(options.live().results_path).resolve()


def copied(results_path: Path, folder: Path) -> Path:
    """Copy results and ledger, so that a dry run can do as it likes."""
    for path in results_path.parent.glob(f"{results_path.name}*"):
        if path == results_path or path.name.endswith(".batch.json"):
            shutil.copy2(path, folder)  # its time, too: the ledger knows it
        elif path.name.endswith(".batch"):
            shutil.copytree(path, folder / path.name)
    return folder / results_path.name


async def with_batch(options: Options, act: Callable[[Batch], Awaitable[int]], *, alone: bool = True) -> int:
    """Open everything, act, tidy up. alone: nobody else may work on these jobs at the same time."""
    secrets = Secrets()
    with contextlib.ExitStack() as stack:
        LOGGER.addFilter(secrets)
        stack.callback(LOGGER.removeFilter, secrets)
        endpoint = make_endpoint(options.live(), secrets)
        target = providers.find_target(options.request_url, endpoint.provider.name)
        results_path = results_of(options)
        if not results_path.parent.is_dir():
            raise UsageError(f"the folder of {results_path} does not exist")
        if options.dry_run:
            results_path = copied(results_path, Path(stack.enter_context(TemporaryDirectory())))
        elif alone and (options.requests_filepath or options.save_filepath):
            stack.enter_context(locked(Path(f"{results_path}.batch.json.lock")))
        ledger = Ledger(results_path, read_only=not alone)
        urls = {part.request_url for part in ledger.open_parts()} - {options.request_url}
        if urls:
            raise UsageError(
                f"the open jobs of {ledger.path} are at {urls.pop()}: use that --request_url, or cancel them"
            )
        patience = PATIENCE_SECONDS if alone else SHORT_PATIENCE_SECONDS
        async with Client(endpoint, target, patience) as client:
            return await act(Batch(options, client, ledger, results_path))


async def run_batch(
    prompts: Sequence[str] = (), *, model: str = "", parameters: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Send prompts, or the file `requests_filepath`, as a batch, and wait for the results unless wait=False.

    Gives job_id, job_ids, exit_code, and results: the result lines in the order of the requests. Prompts are written to
    `requests_filepath` first (default: <job_name>.jsonl). The other arguments are the flags; raises UsageError and, if
    going on is pointless, Stopped.
    """
    for unknown in options.keys() - Options.__dataclass_fields__.keys():
        raise UsageError(f"unknown option {unknown!r}; the fields of Options are what there is")
    chosen = complete(Options(**{"wait": True, **options}))
    if not (prompts or chosen.requests_filepath):
        raise UsageError("give prompts, or requests_filepath")
    if prompts:
        name = chosen.requests_filepath or f"{chosen.job_name or 'batch'}.jsonl"
        chosen = replace(chosen, requests_filepath=name)
        rows = [{"prompt": prompt, "id": number} for number, prompt in enumerate(prompts)]
        write_prompts(Path(name), rows, chosen, model, parameters or {})
    outcome: dict[str, Any] = {}

    async def act(batch: Batch) -> int:
        code = await (batch.run() if chosen.wait else batch.create())
        outcome["job_ids"] = [part.id for part in batch.ledger.parts if part.id]
        return code

    if held := providers.held_open_url(chosen.request_url, find_provider(chosen.request_url, chosen.provider).name):
        settings = vars(replace(chosen, request_url=held).live(request_timeout=HELD_OPEN_SECONDS))
        code = (await process_api_requests_from_file(**settings)).exit_code
    else:
        code = await with_batch(chosen, act)
    job_ids = outcome.get("job_ids", [])
    results = results_in_order(Path(chosen.requests_filepath), results_of(chosen))
    return {"job_id": job_ids[-1] if job_ids else "", "job_ids": job_ids, "exit_code": code, "results": results}


def results_in_order(requests_path: Path, results_path: Path) -> list[Any]:
    """Give the result lines in the order of the request file; None for a request that has none."""
    found = Results(results_path)
    lines = [found.take(body, metadata) for body, metadata in read_requests(requests_path)]
    found.close()
    return [
        line and [line.request, line.response, *([line.metadata] if line.metadata is not None else [])]
        for line in lines
    ]


def write_prompts(path: Path, rows: Any, options: Options, model: str, parameters: dict[str, Any]) -> None:
    """Write the request file of prompts; $QIANWEN_MODEL is the model if none is given, at DashScope else qwen-plus."""
    at_dashscope = find_provider(options.request_url, options.provider).name == "dashscope"
    model = model or os.environ.get(QWEN_MODEL, "") or (DASHSCOPE_MODEL if at_dashscope else "")
    if not model:
        raise UsageError("prompts need a --model")
    section = {"model_name": model, "base_url": options.request_url, "provider": options.provider}
    asked = _run.model_of({**section, "parameters": parameters})
    _files.write_requests(path, ((asked.body(("user", row["prompt"])), row) for row in rows))


def build_parser() -> argparse.ArgumentParser:
    """Flags as fields of Options, and what makes a request file of prompts."""
    parser = _run.new_parser(__doc__)
    parser.add_argument("command", choices=["run", "create", "status", "list", "cancel", "collect"])
    parser.add_argument(
        "ids", nargs="*", default=[], metavar="JOB", help="with status and cancel: ids of jobs; default: all open"
    )
    for name, text in HELP.items():
        default = getattr(Options, name, "")
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            shown = f"{text} (default: {default})" if default not in ("", 0) else text
            parser.add_argument(f"--{name}", type=type(default), default=None, metavar="VALUE", help=shown)
    parser.add_argument("--input_file", type=Path, metavar="FILE", help="prompts instead: text, CSV or JSONL")
    parser.add_argument("--model", default="", help=f"with --input_file; default: ${QWEN_MODEL}")
    for name in SAMPLING:
        parser.add_argument(f"--{name}", type=_run.SAMPLING_KEYS[name], help="with --input_file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command."""
    arguments = build_parser().parse_intermixed_args(argv)  # jobs may stand before and after flags
    _run.load_env()
    given = {name: getattr(arguments, name) for name in HELP if getattr(arguments, name) is not None}
    if BATCH_WINDOW in os.environ:
        given.setdefault("completion_window", os.environ[BATCH_WINDOW])
    options = complete(Options(**given))
    if arguments.input_file:
        path = Path(
            options.requests_filepath or arguments.input_file.with_name(f"{arguments.input_file.stem}_requests.jsonl")
        )
        parameters = {name: getattr(arguments, name) for name in SAMPLING}
        write_prompts(path, _files.read_rows(arguments.input_file), options, arguments.model, parameters)
        options = replace(options, requests_filepath=str(path))
    if arguments.ids and arguments.command not in ("status", "cancel"):
        raise UsageError(f"`{arguments.command}` takes no jobs: `status` and `cancel` do")
    if not options.requests_filepath and not (options.save_filepath or arguments.command == "list" or arguments.ids):
        raise UsageError("say which requests: --requests_filepath, or --input_file with prompts")
    return run_command(arguments.command, arguments.ids, options)


def run_command(command: str, ids: Sequence[str], options: Options) -> int:
    """Run one command to its end; gives the exit code."""
    providers.window_hours(options.live_after or "1h")
    gc.set_threshold(GARBAGE_AFTER)
    try:
        with asyncio.Runner() as runner:
            return runner.run(execute(command, ids, options))
    except (Stopped, ResultsLost) as stopped:
        complain(f"Stopped early: {stopped}")
        return 3
    except LookupError as error:
        complain(f"Stopped early: the provider does not list its jobs ({error}).")
        return 3
    except KeyboardInterrupt:
        complain("Interrupted. Submitted jobs go on at the provider; the same command continues.")
        raise


async def execute(command: str, ids: Sequence[str], options: Options) -> int:
    """Run one command; where a provider holds calls open at the batch price, the processor itself runs."""
    provider = find_provider(options.request_url, options.provider).name
    held = providers.held_open_url(options.request_url, provider)
    if held and command not in ("run", "create"):
        raise UsageError(
            f"{provider} makes no jobs here: it answers ordinary calls at the batch price; `run` sends them"
        )
    if held:
        LOGGER.info("%s answers ordinary calls at the batch price, late: sending them to %s", provider, held)
        settings = replace(options, request_url=held).live(
            request_timeout=HELD_OPEN_SECONDS,
            max_requests_per_minute=0,
            max_tokens_per_minute=0,
            dry_run=options.dry_run,
        )
        tally = await run_job(settings, main_program=True)
        if tally.stop_reason:
            complain(f"Stopped early: {tally.stop_reason} The same command continues.")
        return tally.exit_code
    acts: dict[str, Callable[[Batch], Awaitable[int]]] = {
        "run": lambda batch: batch.run(main_program=True),
        "create": lambda batch: batch.create(main_program=True),
        "status": lambda batch: batch.status(ids),
        "list": lambda batch: batch.list(),
        "cancel": lambda batch: batch.cancel(ids),
        "collect": lambda batch: batch.collect_once(),
    }
    return await with_batch(options, acts[command], alone=command not in ("status", "list"))


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
