"""What every workflow needs to run: its config, keys, the processor, the ends of a program."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import importlib
import io
import json
import logging
import os
import re
import signal
import sys
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import api_request_parallel_processor as processor
from api_request_parallel_processor import LOGGER, ConsoleHandler, Settings, Tally, UsageError, complain, run_job
from workflows._files import nearest, read_text
from workflows._requests import Turn, build_body, endpoint_of, shape_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Config = dict[str, Any]
JSON_STRING = r'"(?:\\.|[^"\\])*"'
COMMENT = re.compile(rf"({JSON_STRING})|//[^\n]*|/\*.*?\*/", re.DOTALL)
TRAILING_COMMA = re.compile(rf"({JSON_STRING})|,(?=\s*[}}\]])")
FLAG = re.compile(r"^--[A-Za-z][\w-]*")
PLACEHOLDER_KEY = re.compile(r"(?i)your\b|your_|<|\$\{|x{3}|\.\.\.")  # "YOUR_API_KEY", as in copied examples
DISTRIBUTIONS = {"yaml": "PyYAML", "dotenv": "python-dotenv", "jsonschema": "jsonschema", "pypdf": "pypdf"}
DISTRIBUTIONS |= dict.fromkeys(
    ("jsonschema_specifications", "referencing.exceptions", "referencing.jsonschema"), "jsonschema"
)
DISTRIBUTIONS |= {"plotly": "plotly", "genai_prices": "genai-prices", "ray": "ray", "pyarrow.fs": "pyarrow"}

OWN_RETRY_DELAY = processor.retry_delay

SAMPLING_KEYS = {"temperature": float, "top_p": float, "top_k": int, "max_tokens": int}
MODEL_KEYS = {
    **dict.fromkeys(("api_key", "api_key_env", "base_url", "provider", "model_name", "system_prompt"), str),
    **SAMPLING_KEYS,
    "parameters": dict,  # whatever else belongs into the body
}
# The processor's own settings have a place in `runtime` too, under their names, but for those that have another there.
ELSEWHERE = set(
    "requests_filepath save_filepath request_url api_key api_key_env provider max_concurrent_requests max_attempts "
    "logging_level dry_run restart limit progress".split()
)
PASSED_ON = {knob.name: type(knob.default) for knob in fields(Settings) if knob.name not in ELSEWHERE}
RUNTIME_KEYS = {
    "max_concurrent": int,
    "retry_times": int,
    "retry_delay": float,
    "save_interval": int,
    "log_level": str,
    **{name: list if kind is tuple else kind for name, kind in PASSED_ON.items()},
}
IO_KEYS = {"input_file": str, "output_file": str, "checkpoint_dir": str}


# ---- config ----------------------------------------------------------------------------------------------------------


def optional(name: str) -> Any:
    """Import a package that not everybody needs; UsageError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"this needs the package {DISTRIBUTIONS[name]}: pip install {DISTRIBUTIONS[name]}") from None


def load_config(path: Path, known: dict[str, Any]) -> Config:
    """Read a YAML or JSON config and refuse keys that are not known and values of another type.

    JSON may have // and /* */ comments and a comma after the last item. null is as good as absent.
    """
    text = read_text(path)
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            config = optional("yaml").safe_load(text)
        else:
            config = json.loads(TRAILING_COMMA.sub(r"\1", COMMENT.sub(r"\1", text)))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    except Exception as error:
        if (mark := getattr(error, "problem_mark", None)) is None:
            raise
        # subtle: the error's own text would quote the line, which may hold a key
        raise UsageError(f"{path}, line {mark.line + 1}: {getattr(error, 'problem', 'no YAML')}") from None
    return checked(config, known, str(path))


def checked(config: Any, known: dict[str, Any], where: str) -> Config:
    """The config without nulls; UsageError for an unknown key, which names the nearest one, and for a wrong type."""
    if not isinstance(config, dict):
        raise UsageError(f"{where}: names with values are expected here")
    clean: Config = {}
    for name, value in config.items():
        if name not in known:
            raise UsageError(f"{where}: unknown key {str(name)!r}{nearest(str(name), known)}")
        kind = known[name]
        if isinstance(kind, dict):
            clean[name] = checked(value or {}, kind, f"{where}, {name}")
        elif value is not None:
            clean[name] = converted(value, kind, f"{where}, {name}")
    return clean


def converted(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """A value as the type that is wanted: numbers are numbers for any other, texts may be written as numbers."""
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    number = kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool)
    if number and (kind is float or value == int(value)):
        return kind(value) if isinstance(kind, type) else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UsageError(f"{where}: {'this' if 'key' in where else repr(value)} is no {names}")
    return value


def required(config: Config, *places: str) -> None:
    """Raise UsageError for the first of the places, such as "io.input_file", that is absent or empty."""
    for place in places:
        section, _, name = place.rpartition(".")
        if not (config.get(section, {}) if section else config).get(name):
            raise UsageError(f"the config has no {place}")


def load_env(path: Path = Path(".env")) -> None:
    """Take keys from .env, where the environment does not have them already."""
    if path.is_file():
        optional("dotenv").load_dotenv(stream=io.StringIO(read_text(path)), interpolate=False)
    if key := os.environ.get("DOUBAO_API_KEY"):  # Ark's key has two usual names
        os.environ.setdefault("ARK_API_KEY", key)


# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Who is asked, and how."""

    name: str
    url: str
    api_key: str = field(default="", repr=False)
    api_key_env: str = ""
    provider: str = "auto"
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def shape(self) -> str:
        """The shape of its requests."""
        return shape_for(self.url, self.provider)

    def body(self, *turns: Turn, **more: Any) -> dict[str, Any]:
        """Build a request body."""
        return build_body(self.shape, self.name, list(turns), self.system, {**self.parameters, **more})

    @property
    def settings(self) -> dict[str, Any]:
        """The processor's settings that say where to send and with which key."""
        names = {"api_key": self.api_key, "api_key_env": self.api_key_env, "provider": self.provider}
        return {"request_url": self.url, **names}


def model_of(section: Config, default_base_url: str = "https://api.openai.com/v1") -> Model:
    """Make a model of a config's section `model`."""
    sampling = {name: section[name] for name in SAMPLING_KEYS if name in section}
    name = section.get("model_name", "")
    return Model(
        name,
        endpoint_of(section.get("base_url") or default_base_url, name),
        real_key(section.get("api_key")),
        section.get("api_key_env", ""),
        section.get("provider", "auto"),
        section.get("system_prompt", ""),
        {**sampling, **section.get("parameters", {})},
    )


def real_key(key: str | None) -> str:
    """A config's key; "" for the stand-in of an example, so that the environment is asked."""
    return "" if not key or not key.isascii() or PLACEHOLDER_KEY.match(key.strip()) else key.strip()


def settings_of(runtime: Config) -> dict[str, Any]:
    """The processor's settings of a config's section `runtime`; no budgets mean: find out."""
    for name in ("max_concurrent", "retry_times", "retry_delay"):
        if runtime.get(name, 0) < 0:
            raise UsageError(f"the config's {name} is {runtime[name]}: give a number from 0 up")
    if (delay := runtime.get("retry_delay")) is not None:  # the processor's own first backoff is a second at most
        processor.retry_delay = lambda attempt, rng: delay * OWN_RETRY_DELAY(attempt, rng)
    settings: dict[str, Any] = {"max_requests_per_minute": 0, "max_tokens_per_minute": 0}
    settings |= {name: value for name, value in runtime.items() if name in PASSED_ON}
    settings["request_header"] = tuple(runtime.get("request_header", ()))
    settings["max_concurrent_requests"] = runtime.get("max_concurrent", 0)
    if "retry_times" in runtime:
        settings["max_attempts"] = runtime["retry_times"] + 1
    return settings


def checkpoint(folder: Path, name: str) -> tuple[Path, Path]:
    """The request file and the results file of a run, side by side; the results are the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}_requests.jsonl", folder / f"{name}_results.jsonl"


def files_of(requests_path: Path, results_path: Path) -> dict[str, Any]:
    """The processor's settings that name its files."""
    return {"requests_filepath": str(requests_path), "save_filepath": str(results_path)}


def log_level(name: str) -> int:
    """The number of a logging level: INFO or 20."""
    level = int(name) if name.isdecimal() else logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise UsageError(f"log_level {name!r} is none of {', '.join(logging.getLevelNamesMapping())}")
    return level


@contextlib.contextmanager
def logged_to(path: Path | None, level: int) -> Iterator[None]:
    """Write the log to a file too; filters of the logger see everything, so that they may raise a level."""
    handlers = list(LOGGER.handlers)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s", "%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(handlers[-1])
    LOGGER.setLevel(logging.DEBUG)
    for handler in handlers:
        handler.setLevel(level)
    try:
        yield
    finally:
        if path:
            LOGGER.removeHandler(handlers[-1])
            handlers[-1].close()


# ---- running ---------------------------------------------------------------------------------------------------------


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add what can be said about a run of any workflow."""
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N requests: a smoke run")
    parser.add_argument("--dry_run", action="store_true", help="count requests and tokens, send nothing")
    parser.add_argument("--restart", action="store_true", help="ask all again; the old results are kept, renamed")
    parser.add_argument("--progress", default="auto", choices=["auto", "bar", "lines", "none"])
    parser.add_argument("--cache_filepath", default="", metavar="FILE", help="SQLite file with answers known already")


def run_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of add_run_flags that are settings of the processor."""
    return {name: getattr(arguments, name) for name in ("limit", "dry_run", "restart", "progress")}


def run_processor(settings: Settings, cache_filepath: str = "", **limits: float) -> Tally:
    """Run the processor as if it were the main program: a first Ctrl-C finishes what is in flight."""

    def run(settings: Settings) -> Tally:
        with asyncio.Runner(loop_factory=getattr(getattr(processor, "uvloop", None), "new_event_loop", None)) as runner:
            return runner.run(run_job(settings, main_program=True))

    if cache_filepath:
        from workflows.response_cache import with_cache

        tally = with_cache(settings, Path(cache_filepath), run, **limits)
    else:
        tally = run(settings)
    if tally.stop_reason:
        complain(f"Stopped early: {tally.stop_reason} The same command continues.")
    return tally


def came_to_nothing(tally: Tally, output: Path) -> bool:
    """Whether a run ended before it had any answer, so that an output of earlier ones stays as it is; says so."""
    nothing = tally.exit_code >= 2 and not (tally.finished_before or tally.succeeded or tally.failed)
    if nothing:
        LOGGER.warning("There is no answer yet: %s was not written.", output)
    return nothing


def main_program(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run a workflow as a program: its log on standard error, its failures as messages and exit codes."""
    handler: logging.Handler = ConsoleHandler()
    LOGGER.addHandler(handler)
    LOGGER.setLevel("INFO")
    sys.set_int_max_str_digits(0)  # integers of any size are read, as the processor does
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no Chinese is no reason to fail
    try:
        code = main(argv)
        sys.stdout.flush()
    except UsageError as error:
        complain(f"Cannot start: {error}")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush goes nowhere
        return 128 + getattr(signal, "SIGPIPE", 13)
    except OSError as error:
        complain(f"Stopped: {error}. Put that right; the same command continues.")
        return 3 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    else:
        return code
    finally:
        LOGGER.removeHandler(handler)


class Parser(argparse.ArgumentParser):
    """A parser that takes --max-tokens for --max_tokens."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse flags, in either spelling."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([FLAG.sub(with_underscores, word) for word in words], namespace)


def with_underscores(flag: re.Match[str]) -> str:
    """A flag as it is named here."""
    return f"--{flag[0][2:].replace('-', '_')}"


def new_parser(doc: str | None) -> Parser:
    """A parser whose help is the module's docstring."""
    summary, _, rest = (doc or "").partition("\n\n")
    layout, place = argparse.RawDescriptionHelpFormatter, Path(sys.argv[0])
    program = f"python -m workflows.{place.stem}" if place.parent.name == "workflows" else None
    return Parser(program, description=summary, epilog=rest, formatter_class=layout, allow_abbrev=False)
