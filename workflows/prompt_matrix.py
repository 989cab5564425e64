"""Ask several models every prompt about every record: one JSON file per model and person.

    python -m workflows.prompt_matrix -c workflows/examples/batch_config_kimi.json
    python -m workflows.prompt_matrix -c batch_config_kimi.json -c batch_config_doubao.json

Prompts: a JSON list of texts or of objects, or an object of name to prompt. Records: one file per person in
records_dir, .txt, .md or .json (question and answer pairs, or chat messages). The model reads the prompt, a blank line,
the record.
Several configs run side by side, each under its own limits. Result lines are kept in the folder checkpoint of
output_dir: the same command continues. Keys come from the config, the environment or .env.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import api_request_parallel_processor as processor
from api_request_parallel_processor import LOGGER, Settings, UsageError, find_provider, loads
from workflows import _files, _run
from workflows._replies import error_text, flat_text, read_answer
from workflows._requests import BASE_URLS
from workflows._results import Result, Results

if TYPE_CHECKING:
    import argparse
    import random
    from collections.abc import Iterator

API_KEYS = {**dict.fromkeys(("api_key", "api_key_env", "base_url", "provider"), str), "endpoint_id": (str, dict)}
CONFIG_KEYS: dict[str, Any] = {
    **dict.fromkeys(("prompts_file", "records_dir", "output_dir", "system_prompt", "log_file", "log_level"), str),
    "api_config": API_KEYS,
    "models": list,
    "max_retries": int,
    **{
        name: kind
        for name, kind in _run.RUNTIME_KEYS.items()
        if name not in ("retry_times", "save_interval", "log_level")
    },
    **_run.SAMPLING_KEYS,
    "parameters": dict,
}
NEEDED = ("prompts_file", "records_dir", "output_dir", "models")
TITLES = {"moonshot": "Kimi (月之暗面)", "ark": "豆包 (火山引擎)", "baichuan": "百川智能", "jiekou": "JieKou"}
RECORD_ENDINGS = (".txt", ".md", ".json")
PROMPT_FIELDS = ("prompt", "Prompt", "content", "text", "提示词", "内容")
UNSAFE = re.compile(r'[\x00-\x1f/\\:*?"<>|]')
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)")  # names of devices on Windows
RETRIES = 5  # where the config does not say
LONGEST_NAME = 200  # bytes, so that most file systems take it with its ending
RULE = "=" * 80


@dataclass(frozen=True)
class Matrix:
    """One config: its models, prompts and people, and where things go."""

    models: dict[str, _run.Model]  # by the name that the output shows
    prompts: list[str]
    people: dict[str, Path]
    folder: Path
    config: _run.Config

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Model and person of every output file, in order."""
        return [(model, person) for model in self.models for person in self.people]

    def output(self, model: str, person: str) -> Path:
        """The file of one model and person."""
        return self.folder / f"{safe_name(f'{model}-{person}')}.json"


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_matrix(path: Path, provider: str) -> Matrix:
    """Read a config and what it names."""
    config = _run.load_config(path, CONFIG_KEYS)
    _run.required(config, *NEEDED)
    folder = Path(config["records_dir"])
    if not folder.is_dir():
        raise UsageError(f"records_dir {folder} is no folder")
    people = read_people(folder, Path(config["output_dir"]))
    if not people:
        raise UsageError(f"records_dir {folder} holds no records ({', '.join(RECORD_ENDINGS)})")
    prompts = read_prompts(Path(config["prompts_file"]))
    return Matrix(read_models(config, provider), prompts, people, Path(config["output_dir"]), config)


def read_people(folder: Path, output: Path) -> dict[str, Path]:
    """The records of a folder by their names; what is no record is told, but for the output that lies there."""
    people: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.resolve() == output.resolve():
            continue
        if file.is_dir():
            LOGGER.warning("%s is left out: records lie in records_dir itself, not in folders of it", file)
        elif file.suffix.lower() not in RECORD_ENDINGS:
            LOGGER.warning("%s is left out: records end in %s", file, ", ".join(RECORD_ENDINGS))
        elif file.stem in people:
            raise UsageError(f"{file} and {people[file.stem].name} are the same person by their names: rename one")
        elif not read_record(file).strip():
            LOGGER.warning("%s is left out: it is empty", file)
        else:
            people[file.stem] = file
    return people


def read_models(config: _run.Config, provider: str) -> dict[str, _run.Model]:
    """Make a model of each name; Ark's endpoint id stands for the model in requests, the name stays in the output."""
    api = config.get("api_config", {})
    provider = provider or api.get("provider", "auto")
    base_url = api.get("base_url") or BASE_URLS.get(provider)
    if not base_url:
        raise UsageError(f"api_config has no base_url, and --provider {provider} has no usual one")
    endpoint_id = api.get("endpoint_id") or {}
    if isinstance(endpoint_id, str) and len(config["models"]) > 1:
        LOGGER.warning("All %d models are asked at the one endpoint_id %s.", len(config["models"]), endpoint_id)
    models = {}
    for name in config["models"]:
        if not isinstance(name, str) or name in models:
            raise UsageError(f"models: {name!r} is no name, or stands there twice")
        sent = endpoint_id if isinstance(endpoint_id, str) else endpoint_id.get(name, name)
        section = {key: config[key] for key in ("system_prompt", "parameters", *_run.SAMPLING_KEYS) if key in config}
        section |= {**api, "model_name": sent, "base_url": base_url, "provider": provider}
        models[name] = _run.model_of(section)
    return models


def read_prompts(path: Path) -> list[str]:
    """Read the prompts: a list of texts, a list of objects, an object of name to prompt."""
    try:
        value = loads(_files.read_text(path))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    prompts = [item if isinstance(item, str) else prompt_of(item) for item in items]
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UsageError(f"{path}: prompts are a list of texts, a list of objects with a prompt, or name: prompt")
    return [str(prompt) for prompt in prompts]


def prompt_of(item: Any) -> str | None:
    """The prompt of an object: one of the usual fields, or its only text."""
    fields = item if isinstance(item, dict) else {}
    texts = [value for value in fields.values() if isinstance(value, str)]
    return next((fields[name] for name in PROMPT_FIELDS if name in fields), texts[0] if len(texts) == 1 else None)


def read_record(path: Path) -> str:
    """The text of a record; of JSON a readable one: "question: ...", "answer: ..." or "user: ...", "assistant: ..."."""
    text = _files.read_text(path)
    if path.suffix.lower() != ".json":
        return text.strip()
    try:
        return render(loads(text))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def render(value: Any) -> str:
    """Lay out JSON as text: chat messages by their roles, fields by their names, items apart by a blank line."""
    if isinstance(value, list):
        lines = [render(item) for item in value]
        return ("\n" if all(isinstance(item, dict) and "role" in item for item in value) else "\n\n").join(lines)
    if not isinstance(value, dict):
        return _files.cell(value)
    content = value.get("content")
    if "role" in value and (isinstance(content, str) or flat_text(content)):
        return f"{value['role']}: {flat_text(content)}"
    if len(value) == 1 and isinstance(inner := next(iter(value.values())), list):
        return render(inner)  # {"messages": [...]}
    nested = {name: isinstance(item, dict | list) for name, item in value.items()}
    return "\n".join(f"{name}:{chr(10) if nested[name] else ' '}{render(item)}" for name, item in value.items())


def safe_name(name: str) -> str:
    """A name that every file system takes: "org/model-a?b" -> "org_model-a_b"."""
    name = UNSAFE.sub("_", name).rstrip(". ")
    name = f"_{name}" if RESERVED.match(name) else name
    return name.encode()[:LONGEST_NAME].decode(errors="ignore") or "_"


def refuse_collisions(matrices: list[Matrix]) -> None:
    """Raise UsageError if two outputs would share a file, or two configs a checkpoint, or a file is not ours."""
    owners: dict[str, str] = {}
    folders = [matrix.folder.resolve() for matrix in matrices]
    for matrix, folder in zip(matrices, folders, strict=True):
        if folders.count(folder) > 1:
            raise UsageError(f"output_dir {matrix.folder} stands in two configs: side by side each needs its own")
        for model, person in matrix.pairs:
            path = matrix.output(model, person)
            place = unicodedata.normalize("NFC", str(path.resolve())).casefold()
            if place in owners:
                raise UsageError(f"{path} would hold both {owners[place]} and {model} with {person}: rename one")
            owners[place] = f"{model} with {person}"
            _files.refuse_foreign(path, '{\n  "model": ')


# ---- running ---------------------------------------------------------------------------------------------------------


def conversations(matrix: Matrix, pair: tuple[str, str]) -> Iterator[tuple[_files.Row, _files.Row, _files.Row]]:
    """Give body, metadata and the output so far of every conversation of one model and person."""
    model, person = pair
    chat = read_record(matrix.people[person])
    for number, prompt in enumerate(matrix.prompts, 1):
        text = f"{prompt}\n\n{chat}"
        talk = {"model": model, "prompt": prompt, "people": person, "chat": chat, "Input": text}
        metadata = {"model": model, "people": person, "conversation": str(number)}
        yield matrix.models[model].body(("user", text)), metadata, talk


class RetryLog(logging.Filter):
    """Tells failed attempts by model, person and conversation instead of by line, and which of them worked out."""

    def __init__(self, pairs: list[tuple[str, str]], prompts: int) -> None:
        super().__init__()
        self.pairs, self.prompts, self.tries = pairs, prompts, Counter[int]()
        self.latest = 1  # the line whose failure was told last
        self.delay = processor.retry_delay

    def __enter__(self) -> Self:
        """Listen to a run."""
        LOGGER.addFilter(self)
        processor.retry_delay = self.tell_retry
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        LOGGER.removeFilter(self)
        processor.retry_delay = self.delay

    def place(self, line: int) -> tuple[str, str]:
        """The model and person of a line of the request file, and its conversation."""
        pair, prompt = divmod(line - 1, self.prompts)
        model, person = self.pairs[pair]
        return f"[{model}][{person}]", f"对话 {prompt + 1}"

    def filter(self, record: logging.LogRecord) -> bool:
        """Word a failed attempt; everything else passes as it is."""
        if not (failed := getattr(record, "failed_attempt", None)):
            return True
        line, kind, message = failed
        self.latest = line
        who, what = self.place(line)
        if kind == "rate_limit":
            text, level = f"{who} {what} 被限流: {message}", "DEBUG"
        else:
            self.tries[line] += 1
            text, level = f"{who} {what} 失败 (第{self.tries[line]}次尝试): {message}", "WARNING"
        record.levelno, record.levelname = getattr(logging, level), level
        record.msg, record.args = text, ()
        return True

    def tell_retry(self, attempt: int, rng: random.Random) -> float:
        """Say how long the request waits that failed last; gives that, in seconds."""
        delay = self.delay(attempt, rng)
        LOGGER.info("%s 将在 %.1f 秒后重试...", self.place(self.latest)[0], delay)
        return delay

    def tell_success(self, line: int, result: Result) -> None:
        """Say that a retry worked out."""
        if self.tries.get(line) and result.succeeded and isinstance(result.details, dict):
            who, what = self.place(line)
            tries, seconds = self.tries[line] + 1, result.details.get("seconds")
            LOGGER.info("%s %s 重试成功 (第%d次尝试，耗时: %s秒)", who, what, tries, seconds)


def run_matrix(matrix: Matrix, arguments: argparse.Namespace) -> int:
    """Run one config, after everything was checked; gives the exit code."""
    config, code, written = matrix.config, 0, 0
    by_url: dict[str, list[tuple[str, str]]] = {}
    for pair in matrix.pairs:  # where the URL names the model, each has a run of its own
        by_url.setdefault(matrix.models[pair[0]].url, []).append(pair)
    show_banner(matrix)
    for pairs in by_url.values():
        stem = "conversations" if len(by_url) == 1 else safe_name(pairs[0][0])
        requests_path, results_path = _run.checkpoint(matrix.folder / "checkpoint", stem)
        if not arguments.dry_run:
            for pair in pairs:
                _files.keep_older(matrix.output(*pair), results_path)
        talks = (talk[:2] for pair in pairs for talk in conversations(matrix, pair))
        _files.write_requests(requests_path, talks)
        settings = _run.files_of(requests_path, results_path) | {"save_details": True}
        settings |= _run.settings_of({**config, "retry_times": config.get("max_retries", RETRIES)})
        settings |= matrix.models[pairs[0][0]].settings | _run.run_flags(arguments)
        with RetryLog(pairs, len(matrix.prompts)) as log:
            tally = _run.run_processor(Settings(**settings), arguments.cache_filepath)
        code = max(code, tally.exit_code)
        if not arguments.dry_run:
            results = Results(results_path)
            written += sum(write_output(matrix, results, place, log) for place in range(len(pairs)))
            results.close()
        if code >= 2:
            break
    if not arguments.dry_run:
        print("处理完成！" if code < 2 else "提前结束，重新运行同一命令可继续。")
        print(f"共生成 {written} 个JSON文件")
    return code


def write_output(matrix: Matrix, results: Results, place: int, log: RetryLog) -> bool:
    """Write the file of one model and person; False if an answer is still to come."""
    model, person = pair = log.pairs[place]
    talks: dict[str, Any] = {}
    for number, (body, metadata, talk) in enumerate(conversations(matrix, pair), 1):
        if (result := results.take(body, metadata)) is None:
            return False
        log.tell_success(place * log.prompts + number, result)
        output = read_answer(result.response).text if result.succeeded else f"ERROR: {error_text(result.response)}"
        talks[str(number)] = {**talk, "Output": output}
    joined = "\n".join(talk["Output"] for talk in talks.values())
    whole = {"model": model, "people": person, "conversations": talks, "result": joined}
    with _files.whole_file(matrix.output(model, person)) as file:
        json.dump(whole, file, ensure_ascii=False, indent=2)
        file.write("\n")
    return True


def show_banner(matrix: Matrix) -> None:
    """Say what will happen, before anything is sent."""
    first = next(iter(matrix.models.values()))
    provider = find_provider(first.url, first.provider).name
    models, people = len(matrix.models), len(matrix.people)
    api = matrix.config.get("api_config", {})
    print(f"{RULE}\n批量处理系统 - {TITLES.get(provider, provider)} 基座\n{RULE}\n")
    print(f"配置信息:\n  API地址: {api.get('base_url') or BASE_URLS[first.provider]}")
    print(f"  使用模型: {', '.join(matrix.models)}")
    print(f"  最大重试次数: {matrix.config.get('max_retries', RETRIES)}")
    print(f"  最大Token数: {matrix.config.get('max_tokens', '-')}\n")
    print(f"开始批量处理: {models} 个模型 × {people} 个患者 = {models * people} 个文件")
    print(f"{models} models x {people} people = {models * people} files", flush=True)


def run_side_by_side(paths: list[Path], flags: list[str]) -> int:
    """Run each config in a process of its own; signals are passed on, the worst exit code is given."""
    command = [sys.executable, "-m", "workflows.prompt_matrix", "--progress", "lines", *flags]
    alone = os.name == "posix"  # out of the terminal's reach, so that a signal comes once
    children = [subprocess.Popen([*command, "-c", str(path)], start_new_session=alone) for path in paths]  # noqa: S603

    def pass_on(number: int, _frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), pass_on)
    codes = [child.wait() for child in children]
    return max(code if code >= 0 else 128 - code for code in codes)


def main(argv: list[str] | None = None) -> int:
    """Run the workflow."""
    parser = _run.new_parser(__doc__)
    parser.add_argument("-c", "--config", type=Path, action="append", required=True, help="JSON or YAML; repeatable")
    parser.add_argument("--provider", default="", help="whose rules apply, if base_url does not tell")
    _run.add_run_flags(parser)
    arguments = parser.parse_args(argv)
    _run.load_env()
    matrices = [read_matrix(path, arguments.provider) for path in arguments.config]
    refuse_collisions(matrices)
    if len(matrices) > 1:
        flags = [f"--{name}" for name in ("dry_run", "restart") if getattr(arguments, name)]
        for name in ("provider", "limit", "cache_filepath"):
            flags += [f"--{name}", str(value)] if (value := getattr(arguments, name)) else []
        return run_side_by_side(arguments.config, flags)
    config = matrices[0].config
    level = _run.log_level(config.get("log_level", "INFO"))
    with _run.logged_to(Path(config["log_file"]) if config.get("log_file") else None, level):
        return run_matrix(matrices[0], arguments)


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
