"""Process a request file on a Ray cluster: for jobs that outgrow one machine.

    python -m workflows.ray_cluster --requests_filepath requests/example.jsonl --num_workers 8 --ray_address auto

The flags are those of api_request_parallel_processor.py, and two more. Most people never need this: one process holds
10,000 requests in flight. The budgets are those of the whole cluster, the results file is the same, and so are its
checkpoint, the exit codes and Ctrl-C. It needs Ray: pip install 'ray>=2.50'.

This program, the driver, reads the requests in order and hands them out in shards of some hundred lines. Every worker
runs the single file's own loop over its shards, and one actor leases the budgets to all of them. Results come back to
the driver, into one file for each shard in <results>.shards, which is joined into the results file when it is
complete: machines need no shared disk, and a machine that is lost takes nothing with it but what it had in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import logging
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import api_request_parallel_processor as processor
from api_request_parallel_processor import (
    LOGGER,
    Reporter,
    Run,
    Secrets,
    Settings,
    Tally,
    Tokenizer,
    UsageError,
    build_parser,
    complain,
    conclude,
    each_endpoint,
    hear_signals,
    make_endpoint,
    refuse_unfinished,
    run_job,
)
from workflows._ray_actors import Budgets, Worker, clock
from workflows._ray_driver import Driver, JoinedResults, ShardReader, ShownPacer
from workflows._ray_leases import MESSAGE_SECONDS
from workflows._run import main_program, optional

if TYPE_CHECKING:
    import argparse

    from api_request_parallel_processor import Endpoint

PATIENCE_SECONDS = 15.0  # with a worker that has not begun, before a word about it
MESSAGES_PER_SECOND = 150.0  # of all workers, on each matter: some take Ray almost a millisecond of processor time


class Cluster:
    """The Ray cluster that a run takes place on."""

    def __init__(self, address: str, workers: int) -> None:
        self.ray = optional("ray")
        self.errors: type[Exception] = self.ray.exceptions.RayError
        self._connect(address, workers)
        nodes = [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        self.workers = workers or max(1, len(nodes))

    def _connect(self, address: str, workers: int) -> None:
        """Connect to a cluster, or start one of this machine alone if no address is given and none runs here."""
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        code = [inspect.getfile(processor), str(Path(__file__).parent)]  # as paths: those of a submitted job are copied
        common["runtime_env"] = {"py_modules": code}
        try:
            with contextlib.suppress(*([ConnectionError] if not address else [])):
                if address != "local":
                    self.ray.init(address=address or "auto", **common)
                    return
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster of our own
            cores = max(workers, os.cpu_count() or 1)
            self.ray.init(address="local", num_cpus=cores, include_dashboard=False, **common)
        except (ConnectionError, RuntimeError, ValueError, OSError, ImportError) as error:
            hint = "see --ray_address, and `ray status` there; RAY_AUTH_MODE=token if it wants a token"
            raise UsageError(f"no connection to Ray ({error}); {hint}") from None

    async def open(self, settings: Settings, endpoints: list[Endpoint], stack: contextlib.AsyncExitStack) -> None:
        """Start the actor with the budgets, beside the driver, and let it notice at once when the driver is gone."""
        holder = self.ray.remote(num_cpus=0, scheduling_strategy=self.here())(Budgets)
        self.budgets = holder.remote(list(map(pacing, endpoints)), settings.max_cost, self.message_seconds)
        ends: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        line = await asyncio.start_server(lambda *end: ends.append(end), "127.0.0.1", 0)
        stack.callback(lambda: [line.close(), *(end[1].close() for end in ends)])  # type: ignore[func-returns-value]
        self.budgets.watch_driver.remote(line.sockets[0].getsockname()[1])
        rows = [replace(one.settings, request_url=one.url, api_key=one.key) for one in endpoints]
        self.rows = [replace(row, max_cost=0.0, give_up_minutes=0.0, endpoints_filepath="") for row in rows]  # ours

    @property
    def message_seconds(self) -> float:
        """Between two messages of a worker on the same matter; a lease must not grow old meanwhile."""
        return min(3 * MESSAGE_SECONDS, max(MESSAGE_SECONDS, self.workers / MESSAGES_PER_SECOND))

    def here(self) -> Any:
        """The node of the driver, as the place for an actor; a soft affinity would let Ray take any."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)

    def hire(self) -> Any:
        """Start the actor of a worker, on whatever node has a free core."""
        return self.ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Worker).remote()

    async def begin(self, actor: Any, name: str) -> None:
        """Wait until it runs, and tell it what the run is."""
        words = "Worker %s waits for a free core in the cluster (`ray status`); the others go on."
        patience = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, LOGGER.warning, words, name)
        try:
            place = await actor.begin.remote(name, self.rows, self.budgets, self.message_seconds)
        finally:
            patience.cancel()
        LOGGER.debug("Worker %s runs on %s", name, place)

    def fire(self, actor: Any, name: str) -> None:
        """End an actor, and free what it has leased."""
        self.ray.kill(actor)
        self.budgets.forget.remote(name)


def pacing(endpoint: Endpoint) -> dict[str, Any]:
    """What the Pacer of an endpoint is made with, for all workers together."""
    settings, provider = endpoint.settings, endpoint.provider
    return {
        "requests_per_minute": settings.max_requests_per_minute,
        "tokens_per_minute": settings.max_tokens_per_minute,
        "max_concurrent": settings.max_concurrent_requests,
        "min_gap_seconds": settings.seconds_to_sleep_each_loop,
        "per_second": provider.per_second,
        "concurrency_hint": provider.concurrency,
    }


def open_requests(path: str) -> IO[bytes]:
    """Open a local path, standard input, or an address such as s3://bucket/requests.jsonl, as Ray Data reads them."""
    try:
        if "://" not in path:
            return open(0 if path == "-" else path, "rb", buffering=1 << 20, closefd=path != "-")
        fs = optional("pyarrow.fs")
        system, place = fs.FileSystem.from_uri(path)
        source = system.open_input_stream(place)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); see --requests_filepath") from None
    reading, writing = os.pipe()

    def copy_all() -> None:
        with source, open(writing, "wb") as target, contextlib.suppress(BrokenPipeError):  # noqa: PTH123
            shutil.copyfileobj(source, target, 1 << 20)

    threading.Thread(target=copy_all, daemon=True).start()
    return open(reading, "rb", buffering=1 << 20)  # noqa: PTH123


async def run_cluster(settings: Settings, workers: int, address: str) -> Tally:
    """Check and open everything, let the cluster run, tidy up, tell the summary."""
    sys.set_int_max_str_digits(0)  # integers of any size come back as they were
    secrets, wake, loop, began = Secrets(), asyncio.Event(), asyncio.get_running_loop(), time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        LOGGER.addFilter(secrets)
        stack.callback(LOGGER.removeFilter, secrets)
        endpoints, path = [make_endpoint(row, secrets) for row in each_endpoint(settings)], settings.requests_filepath
        if len({endpoint.shape for endpoint in endpoints}) != 1:
            raise UsageError("the endpoints take requests of different shapes; give each shape its own request file")
        for endpoint in endpoints:
            endpoint.pacer = ShownPacer()
        file, tokens = open_requests(path), Tokenizer(settings.token_encoding_name)
        reader = ShardReader(file, endpoints[0], tokens, settings.limit, lambda: loop.call_soon_threadsafe(wake.set))
        stack.callback(file.close)
        refuse_unfinished(settings, shards=False)
        results = JoinedResults(settings.results_path, path, restart=settings.restart)
        stack.callback(results.close)
        for notice in results.notices:
            LOGGER.warning("%s", notice)
        run = Run(settings, reader, endpoints, results, Reporter(settings.progress), wake, clock)
        stack.callback(run.reporter.close)
        driver = Driver(run, results)
        if await driver.find_work():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # Ray's own messages, which tear a bar
            hear_signals(run, stack)
            cluster = await asyncio.to_thread(Cluster, address, workers)  # subtle: Ray leaves signals alone in a thread
            stack.callback(cluster.ray.shutdown)
            await cluster.open(settings, endpoints, stack)
            LOGGER.info("Ray runs %d workers; what follows is told of all together.", cluster.workers)
            await driver.drive(cluster)
        else:
            driver.look(clock())
        return conclude(run, began)


def new_parser() -> argparse.ArgumentParser:
    """The flags of the single file, and those of the cluster."""
    parser, (summary, _, rest) = build_parser(), (__doc__ or "").partition("\n\n")
    parser.description, parser.epilog = summary, rest
    group = parser.add_argument_group("cluster")
    words = "processes that send requests, one core each (default: one on every node)"
    group.add_argument("--num_workers", type=int, default=0, metavar="INT", help=words)
    words = "as ray.init takes it: auto, local, HOST:PORT; default: a cluster that runs here, else this machine alone"
    group.add_argument("--ray_address", default="", metavar="STR", help=words)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    words = sys.argv[1:] if argv is None else argv
    flags = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]
    given = vars(new_parser().parse_args(flags))
    workers, address = given.pop("num_workers"), given.pop("ray_address")
    settings = Settings.of(**given)
    settings.check()
    if workers < 0:
        raise UsageError("--num_workers: give a number from 0 up; 0 = one on every node")
    if "://" in settings.requests_filepath and not (settings.save_filepath or settings.dry_run):
        raise UsageError("requests come from elsewhere: say with --save_filepath where the results go on this machine")
    if "://" in settings.save_filepath:
        raise UsageError("--save_filepath: results come to a file on this machine; copy it when the run has finished")
    if address.startswith("ray://"):
        raise UsageError("--ray_address ray:// is no place to run from: start this on a node, or with `ray job submit`")
    if not settings.dry_run:
        optional("ray")  # before anything is touched
    level = settings.logging_level.upper()
    LOGGER.setLevel(max(1, int(level)) if level.isdecimal() else level)
    with asyncio.Runner(loop_factory=getattr(getattr(processor, "uvloop", None), "new_event_loop", None)) as runner:
        if settings.dry_run:
            if "://" in settings.requests_filepath:
                file = open_requests(settings.requests_filepath)  # subtle: closed again if nobody holds it
                os.dup2(file.fileno(), 0)
                settings = replace(settings, requests_filepath="-")
            tally = runner.run(run_job(settings))
        else:
            tally = runner.run(run_cluster(settings, workers, address))
    if tally.stop_reason:
        complain(f"Stopped early: {tally.stop_reason} The same command continues.")
    return tally.exit_code


if __name__ == "__main__":
    raise SystemExit(main_program(main))
