"""Make an instruction dataset of a folder of papers: a model reads each paper and writes samples about it.

    python -m workflows.instruction_dataset papers/ --output dataset.jsonl --model qwen-plus
    python -m workflows.instruction_dataset papers/ --output dataset.jsonl --batch --completion-window 24h

Papers are .txt, .md, and .pdf that hold text (with the package pypdf). A line of the dataset has instruction, input,
output and the paper that it came from. With --batch the requests go through the provider's Batch API, at about half the
price. Requests and results stand beside the output; starting again continues, and makes the dataset anew.

Settings may stand in the environment or .env too: MAX_SAMPLES_PER_PAPER, OUTPUT_FILE, USE_BATCH, PAPERS_DIR,
BATCH_COMPLETION_WINDOW, QIANWEN_MODEL, QIANWEN_BASE_URL, and DASHSCOPE_API_KEY or QIANWEN_API_KEY; flags come first.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import LOGGER, Tokenizer, UsageError, dumps, find_provider
from workflows import _files, _run, provider_batch
from workflows._replies import error_text, read_answer
from workflows._results import Results, read_requests
from workflows.structured_output import DECODER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT = """Below is a scientific paper. Write {samples} training samples for instruction tuning about its content.
Each sample has an "instruction" (a question or a task that can be understood without the paper), an "input" (material
that the task needs, or an empty string) and an "output" (a complete and correct answer that the paper supports). Make
them different from each other, in the language of the paper. Answer with a JSON array of {samples} objects
{{"instruction": "...", "input": "...", "output": "..."}} and nothing else.

{text}"""
PAPERS = (".txt", ".md", ".pdf")
FIELDS = ("instruction", "input", "output")
TRUE = ("1", "true", "yes", "on")
LONGEST_TOKEN = 16  # characters, more than a token has on the average in any text
ENVIRONMENT = {  # flag: variable, default
    "papers": ("PAPERS_DIR", "papers"),
    "output": ("OUTPUT_FILE", "instruction_dataset.jsonl"),
    "model": ("QIANWEN_MODEL", "qwen-plus"),
    "request_url": ("QIANWEN_BASE_URL", provider_batch.DASHSCOPE),
    "completion_window": ("BATCH_COMPLETION_WINDOW", "24h"),
    "max_samples_per_paper": ("MAX_SAMPLES_PER_PAPER", "4"),
    "context_tokens": ("MAX_CONTEXT_TOKENS", "30000"),
}


# ---- papers ----------------------------------------------------------------------------------------------------------


def read_paper(path: Path) -> str:
    """Read the text of a paper; "" if it has none, UsageError if the file cannot be read."""
    if path.suffix.lower() != ".pdf":
        return _files.read_text(path).strip()
    pypdf = _run.optional("pypdf")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it grumbles without naming the file
    try:
        return "\n".join(page.extract_text() or "" for page in pypdf.PdfReader(path).pages).strip()
    except Exception as error:  # noqa: BLE001 - pypdf raises whatever a broken file makes it raise
        raise UsageError(f"{path} is no readable PDF ({type(error).__name__}: {error})") from None


def cut(text: str, most: int, count: Callable[[str], int]) -> str:
    """Cut a text to so many tokens at most: the beginning stays."""
    text = text[: most * LONGEST_TOKEN]
    while (tokens := count(text)) > most:
        text = text[: min(len(text) - 1, int(len(text) * most / tokens))]
    return text


def requests(
    folder: Path, model: _run.Model, fill: Callable[[_files.Row], str], samples: int, most: int, counts: Counter[str]
) -> Iterator[tuple[_files.Row, Any]]:
    """Give a request for each paper of a folder, in the order of their names; what cannot be read is told."""
    count = Tokenizer().counter(model.name)
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PAPERS and path.is_file()):
        name = path.relative_to(folder).as_posix()
        try:
            text = read_paper(path)
            problem = "" if text else f"{path} holds no text (a scanned PDF?)"
        except UsageError as error:
            problem = str(error)
        if problem:
            counts["left out"] += 1
            LOGGER.warning("%s: left out", problem)
            continue
        kept = cut(text, most, count)
        if len(kept) < len(text):
            LOGGER.info("%s: the first %.0f %% of it fit", name, 100 * len(kept) / len(text))
        yield model.body(("user", fill({"text": kept, "samples": samples}))), {"paper": name, "samples": samples}


# ---- samples ---------------------------------------------------------------------------------------------------------


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """Give the samples of an answer, whatever stands around them, also of one that breaks off."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            nested = [item for items in value.values() if isinstance(items, list) for item in items]
            yield from [value] if "instruction" in value else [item for item in nested if isinstance(item, dict)]
        start = text.find("{", end)


def samples_of(response: Any, most: int) -> tuple[list[dict[str, str]], str]:
    """Give the samples of a reply, those that say something, and "" or what is wrong with it."""
    answer = read_answer(response)
    if answer.refusal:
        return [], f"refused: {answer.refusal}"
    found = [{name: _files.cell(item.get(name)).strip() for name in FIELDS} for item in objects_in(answer.text)]
    good = [sample for sample in found if sample["instruction"] and sample["output"]]
    if good:
        return good[:most], ""
    return [], "empty samples" if found else f"no samples in the answer {answer.text[:80]!r}"


def refuse_other_requests(path: Path) -> None:
    """Raise UsageError if the request file beside the output is not about papers: somebody made it for another use."""
    _, metadata = next(read_requests(path), (None, {"paper": ""})) if path.exists() else (None, {"paper": ""})
    if not isinstance(metadata, dict) or "paper" not in metadata:
        raise UsageError(f"{path} is a request file of other use and would be replaced: name another --output")


def dataset(requests_path: Path, results_path: Path, counts: Counter[str]) -> Iterator[_files.Row]:
    """Give the lines of the dataset in the order of the papers; duplicates are left out, what failed is told."""
    results, seen = Results(results_path), set()
    for body, metadata in read_requests(requests_path):
        counts["papers"] += 1
        result = results.take(body, metadata)
        if result is None or not result.succeeded:
            counts["failed"] += 1
            LOGGER.warning("%s: %s", metadata["paper"], error_text(result.response) if result else "not asked yet")
            continue
        samples, problem = samples_of(result.response, metadata["samples"])
        counts["invalid"] += bool(problem)
        if problem:
            LOGGER.warning("%s: %s", metadata["paper"], problem)
        for sample in samples:
            mark = hashlib.blake2b(dumps([sample["instruction"].lower(), sample["input"]]), digest_size=12).digest()
            counts["duplicates" if mark in seen else "samples"] += 1
            if mark not in seen:
                seen.add(mark)
                yield {**sample, "paper": metadata["paper"]}
    results.close()


# ---- running ---------------------------------------------------------------------------------------------------------


def at_least_one(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Flags; their defaults are those of the environment."""
    parser = _run.new_parser(__doc__)
    given = {flag: os.environ.get(name) or default for flag, (name, default) in ENVIRONMENT.items()}
    parser.add_argument("papers", nargs="?", type=Path, default=Path(given["papers"]), help="folder of papers")
    parser.add_argument("--output", type=Path, default=Path(given["output"]), help="the dataset, JSONL")
    parser.add_argument("--model", default=given["model"])
    parser.add_argument("--request_url", default=given["request_url"], help="the endpoint or its base URL")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--api_key_env", default="", help="environment variable with the key")
    # subtle: argparse converts a default that is a text, and words what is wrong with it
    parser.add_argument("--max_samples_per_paper", type=at_least_one, default=given["max_samples_per_paper"])
    context = "most tokens of a paper that are sent"
    parser.add_argument("--context_tokens", type=at_least_one, default=given["context_tokens"], help=context)
    parser.add_argument("--prompt_filepath", type=Path, help="another prompt, with {text} and {samples}")
    parser.add_argument("--system_prompt", default="")
    for name, default in (("temperature", 0.7), ("max_tokens", 2000), ("top_p", 0.9)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    use_batch = os.environ.get("USE_BATCH", "").lower() in TRUE
    parser.add_argument("--batch", action="store_true", default=use_batch, help="through the Batch API")
    live = "not through the Batch API, whatever USE_BATCH says"
    parser.add_argument("--live", dest="batch", action="store_false", default=use_batch, help=live)
    parser.add_argument("--completion_window", default=given["completion_window"], help="with --batch: 24h to 336h")
    for name in ("finish_live", "resubmit"):
        parser.add_argument(f"--{name}", action="store_true", help=f"with --batch: {provider_batch.HELP[name]}")
    parser.add_argument("--poll_seconds", type=float, default=provider_batch.Options.poll_seconds)
    for name in ("max_requests_per_minute", "max_tokens_per_minute"):
        parser.add_argument(f"--{name}", type=float, default=0.0, help="0 = find out")
    _run.add_run_flags(parser)
    return parser


def show_configuration(arguments: argparse.Namespace, options: provider_batch.Options) -> None:
    """Print what is in effect, the key masked."""
    provider = find_provider(options.request_url, options.provider)
    names = [options.api_key_env] if options.api_key_env else provider.key_env
    name = next((name for name in names if os.environ.get(name)), "")
    key = os.environ.get(name, "").strip()
    shown = f"{'*' * 8}{key[-4:] if len(key) > 12 else ''} ({name})" if key else f"none ({' or '.join(names)})"
    values = {**vars(arguments), "request_url": options.request_url, "provider": provider.name, "api_key": shown}
    LOGGER.info("%s", ", ".join(f"{name}={value}" for name, value in values.items() if value not in ("", None, False)))


def main(argv: list[str] | None = None) -> int:
    """Make the dataset."""
    _run.load_env()
    arguments = build_parser().parse_args(argv)
    if not arguments.papers.is_dir():
        raise UsageError(f"{arguments.papers} is no folder; give the folder of papers, or set PAPERS_DIR")
    if arguments.batch and (arguments.restart or arguments.cache_filepath):
        raise UsageError("--restart and --cache_filepath are for live runs; with --batch name another --output")
    requests_path, results_path = _run.checkpoint(arguments.output.parent, arguments.output.stem)
    _files.check_table(arguments.output)
    start = ",".join(FIELDS) if arguments.output.suffix.lower() == ".csv" else f'{{"{FIELDS[0]}":'
    _files.refuse_foreign(arguments.output, start)
    refuse_other_requests(requests_path)
    same = "request_url provider api_key_env completion_window finish_live resubmit poll_seconds limit dry_run".split()
    same += ["max_requests_per_minute", "max_tokens_per_minute"]
    options = provider_batch.complete(
        provider_batch.Options(
            requests_filepath=str(requests_path),
            save_filepath=str(results_path),
            job_name=arguments.output.stem,
            **{name: getattr(arguments, name) for name in same},
        )
    )
    show_configuration(arguments, options)
    template = _files.read_text(arguments.prompt_filepath) if arguments.prompt_filepath else PROMPT
    if "{text}" not in template:
        raise UsageError(f"{arguments.prompt_filepath} has no {{text}}: the model would not see the paper")
    fill = _files.compile_template(template, str(arguments.prompt_filepath or "the prompt"))
    section = {name: getattr(arguments, name) for name in ("provider", "system_prompt", *provider_batch.SAMPLING)}
    model = _run.model_of({**section, "model_name": arguments.model, "base_url": options.request_url})
    limits, counts = (arguments.max_samples_per_paper, arguments.context_tokens), Counter[str]()
    count = _files.write_requests(requests_path, requests(arguments.papers, model, fill, *limits, counts))
    if not count:
        raise UsageError(f"{arguments.papers} holds no paper with text ({', '.join(PAPERS)})")
    if not arguments.dry_run:
        _files.keep_older(arguments.output, results_path)
    if arguments.batch:
        code = provider_batch.run_command("run", [], options)
    else:
        settings = options.live(**_run.run_flags(arguments))
        code = _run.run_processor(settings, arguments.cache_filepath).exit_code
    if arguments.dry_run or not results_path.exists():
        return code
    _files.write_table(arguments.output, dataset(requests_path, results_path, counts))
    told = ", ".join(
        f"{counts[name]:,} {name}" for name in ("duplicates", "failed", "invalid", "left out") if counts[name]
    )
    told = f" ({told})" if told else ""
    print(f"{counts['samples']:,} samples of {counts['papers']:,} papers are in {arguments.output}{told}")
    return code or (1 if counts["invalid"] else 0)


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
