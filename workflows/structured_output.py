"""Ask for JSON about every row of a CSV or JSONL file, check it, and give the rows back with its fields.

    python -m workflows.structured_output -c workflows/examples/structured_output.yaml

The config has the sections model, runtime and io of csv_questions, and a section task: prompt_file (a template with
{field} placeholders, {{ for a brace), schema (a file or the JSON schema itself), response_format (auto, json_schema,
json_object or prompt), ask_again (how often an invalid answer is asked again), correction_turn (show the model its
mistake then), logprobs (also give probabilities), probability_fields, label_column and label_field (print a confusion
table). A row comes back with its own fields, the answer's, and on failure `error` and `raw`. A field that takes one of
a set of labels gets FIELD_probability, of the whole label, and FIELD_first_token_probability; null without
log-probabilities. An answer's field of a name that the row has too is called FIELD_answer.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import LOGGER, Settings, UsageError, find_provider, loads
from workflows import _files, _run
from workflows._replies import Answer, as_dict, error_text, read_answers
from workflows._results import Result, Results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TASK_KEYS = {
    **dict.fromkeys(("prompt_file", "response_format", "label_column", "label_field"), str),
    "schema": (str, dict),
    "ask_again": int,
    **dict.fromkeys(("correction_turn", "logprobs", "excel"), bool),
    "probability_fields": list,
}
CONFIG_KEYS = {"model": _run.MODEL_KEYS, "runtime": _run.RUNTIME_KEYS, "io": _run.IO_KEYS, "task": TASK_KEYS}
NEEDED = ("model.model_name", "io.input_file", "io.output_file", "io.checkpoint_dir", "task.prompt_file")
FORMATS = ("auto", "json_schema", "json_object", "prompt")
SCHEMA_PROVIDERS = set("openai azure gemini vertex mistral openrouter together groq deepinfra local".split())
JSON_PROVIDERS = set("deepseek moonshot ark zhipu dashscope siliconflow infinigence jiekou".split())
LOGPROBS: dict[str, dict[str, Any]] = {  # what asks for log-probabilities
    "chat": {"logprobs": True},
    "dashscope": {"logprobs": True},
    "gemini": {"logprobs": True},
    "responses": {"include": ["message.output_text.logprobs"]},
    "completions": {"logprobs": 1},
}
SCHEMA_IN_PROMPT = "\n\nAnswer with one JSON object and nothing else. It must fit this JSON schema:\n"
CORRECTION = "That was not valid: {reason}. Answer again, with the corrected JSON object and nothing else."
NOT_STRICT = set("oneOf allOf not if then else dependentRequired dependentSchemas patternProperties".split())
MOST_STARTS = 1000  # braces of an answer at which an object is looked for
SPACE = re.compile(r"\s*")


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which are no JSON."""
    raise ValueError(name)


DECODER = json.JSONDecoder(strict=False, parse_constant=refuse_constant)  # not strict: line breaks within texts pass


# ---- the task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is asked about each row, and what an answer has to be."""

    model: _run.Model
    fill: Callable[[_files.Row], str]
    problem_of: Callable[[Any], str]  # why a value does not fit the schema; "" if it does
    parameters: dict[str, Any]  # that ask for JSON and log-probabilities
    in_prompt: str  # what the prompt has to say about the format
    fields: list[str]
    labelled: list[str]  # fields that take one of a set of labels
    correction_turn: bool

    def request(self, row: _files.Row, failed: list[Outcome]) -> tuple[_files.Row, Any]:
        """Build the request of a row, given the outcomes that were not valid."""
        turns = [("user", self.fill(row) + self.in_prompt)]
        if failed and self.correction_turn and failed[-1].raw:
            turns += [("assistant", failed[-1].raw), ("user", CORRECTION.format(reason=failed[-1].error))]
        return self.model.body(*turns, **self.parameters), {"round": len(failed) + 1}


@dataclass(frozen=True)
class Outcome:
    """What became of one answer."""

    fields: _files.Row = field(default_factory=dict)
    probabilities: _files.Row = field(default_factory=dict)
    error: str = ""
    raw: str = ""
    may_ask_again: bool = False


def read_task(config: _run.Config) -> Task:
    """Make the task of a config."""
    task, model = config["task"], _run.model_of(config["model"])
    schema = read_schema(task.get("schema"))
    problem_of = validator(schema)
    properties = schema.get("properties", {}) if schema else {}
    labelled = [name for name, kind in properties.items() if is_labelled(kind, schema)]
    wanted = task.get("response_format", "auto")
    if wanted not in FORMATS:
        raise UsageError(f"task, response_format: {wanted!r} is none of {', '.join(FORMATS)}")
    parameters, told = format_parameters(model, schema, wanted)
    if task.get("logprobs"):
        if model.shape not in LOGPROBS:
            raise UsageError(f"task, logprobs: {model.url} gives no log-probabilities")
        parameters = {**parameters, **LOGPROBS[model.shape]}
    prompt_path = Path(task["prompt_file"])
    return Task(
        model,
        _files.compile_template(_files.read_text(prompt_path), str(prompt_path)),
        problem_of,
        parameters,
        "" if told or not schema else SCHEMA_IN_PROMPT + json.dumps(schema, ensure_ascii=False),
        list(properties),
        task.get("probability_fields", labelled),
        task.get("correction_turn", True),
    )


def read_schema(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema of a config, which may stand in a file."""
    if not isinstance(given, str):
        return given
    try:
        schema = loads(_files.read_text(Path(given)))
    except ValueError as error:
        raise UsageError(f"{given}: {error}") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{given}: a JSON schema is an object")
    return schema


def is_labelled(kind: Any, schema: Any, depth: int = 8) -> bool:
    """Whether a property of a schema takes one of a set of labels, also one defined elsewhere, or null besides."""
    if not isinstance(kind, dict) or not depth:
        return False
    if "enum" in kind or "const" in kind or kind.get("type") in ("boolean", "null"):
        return True
    wholes, parts = list(kind.get("allOf", ())), kind.get("anyOf") or kind.get("oneOf") or ()
    if (ref := str(kind.get("$ref", ""))).startswith("#/"):
        names = [name.replace("~1", "/").replace("~0", "~") for name in ref[2:].split("/")]
        wholes.append(reduce(lambda place, name: as_dict(place).get(name), names, schema))
    return any(is_labelled(whole, schema, depth - 1) for whole in wholes) or (
        bool(parts) and all(is_labelled(part, schema, depth - 1) for part in parts)
    )


def references(schema: Any) -> Iterator[str]:
    """Give what a schema refers to."""
    for name, value in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if name == "$ref" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from references(value)


def is_strict(schema: Any) -> bool:
    """Whether a schema is one of OpenAI's strict mode: objects name all their fields as required, few keywords."""
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    whole, names = schema.get("additionalProperties") is False, set(schema.get("properties", ()))
    if "properties" in schema or "object" in schema.get("type", ()):
        whole = whole and names == set(schema.get("required", ()))
    else:
        whole = True
    return whole and not NOT_STRICT & schema.keys() and all(map(is_strict, schema.values()))


def labels_of(config: _run.Config, task: Task) -> tuple[str, str]:
    """The column of the right answers and the field that is compared with it; "" for no confusion table."""
    column, given = config["task"].get("label_column", ""), config["task"].get("label_field", "")
    for name in filter(None, (given, *task.labelled)):
        if task.fields and name not in task.fields:
            raise UsageError(f"task: the schema has no field {name!r}{_files.nearest(name, task.fields)}")
    if column and not (given or task.labelled):
        raise UsageError(
            "task, label_column: no field of the schema takes labels; name the one to compare: label_field"
        )
    return column, given or next(iter(task.labelled), "")


def format_parameters(model: _run.Model, schema: dict[str, Any] | None, wanted: str) -> tuple[dict[str, Any], bool]:
    """The parameters that ask for JSON as well as the provider can, and whether they tell the schema."""
    shape, provider = model.shape, find_provider(model.url, model.provider).name
    if wanted == "auto":
        able = (
            "json_schema" if provider in SCHEMA_PROVIDERS else "json_object" if provider in JSON_PROVIDERS else "prompt"
        )
        wanted = "json_object" if shape == "dashscope" and able != "prompt" else able
    if wanted == "json_schema" and schema is None:
        wanted = "json_object"
    if wanted == "prompt" or shape not in ("chat", "responses", "gemini", "dashscope"):
        return {}, False
    if shape == "gemini":
        told = {"responseJsonSchema": schema} if wanted == "json_schema" else {}
        return {"responseMimeType": "application/json", **told}, bool(told)
    strict = schema is not None and is_strict(schema) and "properties" in schema and "anyOf" not in schema
    named: dict[str, Any] = {"name": "answer", "schema": schema, "strict": strict}
    form: dict[str, Any] = {"type": wanted}
    if wanted == "json_schema":
        form |= named if shape == "responses" else {"json_schema": named}
    return ({"text": {"format": form}} if shape == "responses" else {"response_format": form}), wanted == "json_schema"


def refuse_dead_references(schema: dict[str, Any], dialect: str, registry: Any) -> None:
    """Raise UsageError for a $ref that leads nowhere, or out of the schema to what would have to be downloaded."""
    referencing = _run.optional("referencing.jsonschema")
    resolver = registry.resolver_with_root(referencing.specification_with(dialect).create_resource(schema))
    for reference in references(schema):
        try:
            resolver.lookup(reference)
        except _run.optional("referencing.exceptions").Unresolvable:
            problem = f"task, schema: $ref {reference!r} leads nowhere; put what it means into $defs of the schema"
            raise UsageError(problem) from None


def validator(schema: dict[str, Any] | None) -> Callable[[Any], str]:
    """A function that says why a value does not fit a schema."""
    if schema is None:
        return lambda _: ""
    jsonschema = _run.optional("jsonschema")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UsageError(f"task, schema: {error.message}") from None
    if "object" not in schema.get("type", "object"):  # a text or a list of texts
        raise UsageError(f"task, schema: an answer is an object; put your {schema['type']} into a field of one")
    registry = _run.optional("jsonschema_specifications").REGISTRY  # subtle: this one loads nothing from a network
    refuse_dead_references(schema, kind.META_SCHEMA["$schema"], registry)
    checker = kind(schema, registry=registry)

    def problem_of(value: Any) -> str:
        error = jsonschema.exceptions.best_match(checker.iter_errors(value))
        return f"{'.'.join(map(str, error.absolute_path)) or 'the object'}: {error.message}" if error else ""

    return problem_of


# ---- answers ---------------------------------------------------------------------------------------------------------


def judge_result(task: Task, result: Result) -> Outcome:
    """Read, check and weigh the answer of one result."""
    if not result.succeeded:
        return Outcome(error=error_text(result.response))
    answer = (read_answers(result.response) or [Answer()])[0]
    if answer.refusal:
        return Outcome(error=f"refused: {answer.refusal}", raw=answer.refusal)
    value, start, problem = find_object(answer.text, task.problem_of)
    if value is None or problem:
        cut = "" if answer.whole else f"ended by {answer.finish}, "
        return Outcome(error=cut + (problem or "there is no JSON object"), raw=answer.raw, may_ask_again=True)
    return Outcome(value, weigh(answer, start, task.labelled))


def breaks_off(error: json.JSONDecodeError) -> bool:
    """Whether JSON is wrong because its text ends too early."""
    rest = error.doc[error.pos :].strip()
    return error.msg.startswith("Unterminated") or any(word.startswith(rest) for word in ("true", "false", "null", "-"))


def find_object(text: str, problem_of: Callable[[Any], str]) -> tuple[Any, int, str]:
    """Find the JSON object of an answer, whatever stands around it: the first that is valid, else the last.

    Gives the object (None if there is none), where it starts, and what is wrong with it. A part of an object that
    breaks off does not count.
    """
    found: tuple[Any, int, str] = (None, 0, "")
    start = text.find("{")
    for _ in range(MOST_STARTS):
        if start < 0:
            break
        end = start + 1
        try:
            value, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and breaks_off(error):
                break  # subtle: what follows are parts of an object that was to become larger
        else:
            found = (value, start, problem_of(value))
            if not found[2]:
                break
        start = text.find("{", end)
    return found


def member_spans(text: str, start: int) -> dict[str, tuple[int, int]]:
    """Where the values of a JSON object's members stand: '{"a": "x"}' -> {"a": (6, 9)}."""
    spans: dict[str, tuple[int, int]] = {}
    at = skip_space(text, start + 1)
    while text[at] != "}":
        name, at = DECODER.raw_decode(text, at)
        at = skip_space(text, skip_space(text, at) + 1)  # the colon
        _, end = DECODER.raw_decode(text, at)
        spans[name] = (at, end)
        at = skip_space(text, end)
        at = skip_space(text, at + 1) if text[at] == "," else at
    return spans


def skip_space(text: str, at: int) -> int:
    """The place of the next character that is no white space."""
    found = SPACE.match(text, at)
    return found.end() if found else at


def weigh(answer: Answer, start: int, names: list[str]) -> _files.Row:
    """The probability of each label: of all its tokens, and of the first; None without log-probabilities."""
    spans = member_spans(answer.text, start)
    told = b"".join(token for token, _ in answer.logprobs)
    base = told.rfind(answer.raw.encode(errors="surrogatepass"))
    shift = answer.raw.rfind(answer.text)  # thinking stands before the answer
    weights: _files.Row = {}
    for name in names:
        probabilities: list[float] = []
        if name in spans and base >= 0 and shift >= 0:
            left, right = spans[name]
            quotes = answer.text[left] == '"'
            place = slice(shift + left + quotes, shift + right - quotes)
            first = base + len(answer.raw[: place.start].encode(errors="surrogatepass"))
            size = len(answer.raw[place].encode(errors="surrogatepass"))
            probabilities = tokens_within(answer.logprobs, first, first + size)
        weights[f"{name}_probability"] = math.exp(min(0.0, sum(probabilities))) if probabilities else None
        weights[f"{name}_first_token_probability"] = math.exp(min(0.0, probabilities[0])) if probabilities else None
    return weights


def tokens_within(tokens: tuple[tuple[bytes, float], ...], first: int, last: int) -> list[float]:
    """The log-probabilities of the tokens that share a byte with a range."""
    found, at = [], 0
    for token, logprob in tokens:
        if at < last and at + len(token) > first and first < last:
            found.append(logprob)
        at += len(token)
    return found


# ---- the run ---------------------------------------------------------------------------------------------------------


def follow(task: Task, row: _files.Row, rounds: list[Results]) -> list[Outcome]:
    """The outcomes of one row, round by round, up to the first that is final."""
    outcomes: list[Outcome] = []
    for results in rounds:
        if outcomes and not outcomes[-1].may_ask_again:
            break
        if (result := results.take(*task.request(row, outcomes))) is None:
            break
        outcomes.append(judge_result(task, result))
    return outcomes


def requests_of_round(
    task: Task, source: Path, needed: list[str], rounds: list[Results]
) -> Iterator[tuple[_files.Row, Any]]:
    """The requests of the next round: all rows at first, then those whose answers were not valid."""
    for row in _files.read_rows(source, needed):
        outcomes = follow(task, row, rounds)
        if len(outcomes) == len(rounds) and (not outcomes or outcomes[-1].may_ask_again):
            yield task.request(row, outcomes)


def output_row(task: Task, row: _files.Row, outcome: Outcome) -> _files.Row:
    """The row with the answer's fields, the probabilities, and on failure error and raw."""
    names = dict.fromkeys([*task.fields, *outcome.fields])
    fields = {f"{name}_answer" if name in row else name: outcome.fields.get(name) for name in names}
    kinds = ("probability", "first_token_probability")
    weights = dict.fromkeys(f"{name}_{kind}" for name in task.labelled for kind in kinds)
    failure = {"error": outcome.error, "raw": outcome.raw} if outcome.error else {}
    return {**row, **fields, **weights, **outcome.probabilities, **failure}


def show_confusion(counts: Counter[tuple[str, str]], name: str) -> None:
    """Print how often each label was answered by what."""
    truths, answers = (sorted({pair[side] for pair in counts}) for side in (0, 1))
    width = max(map(_files.columns_of, [*truths, *answers, name])) + 2
    for words in (
        [name, *answers],
        *([truth, *(str(counts[truth, answer]) for answer in answers)] for truth in truths),
    ):
        print("".join(" " * (width - _files.columns_of(word)) + word for word in words))
    right = sum(count for (truth, answer), count in counts.items() if truth == answer)
    print(f"{right} of {counts.total()} right ({right / max(1, counts.total()):.1%})")


def main(argv: list[str] | None = None) -> int:
    """Run the workflow."""
    parser = _run.new_parser(__doc__)
    parser.add_argument("-c", "--config", type=Path, required=True, help="YAML or JSON")
    _run.add_run_flags(parser)
    arguments = parser.parse_args(argv)
    config = _run.load_config(arguments.config, CONFIG_KEYS)
    _run.required(config, *NEEDED)
    _run.load_env()
    LOGGER.setLevel(_run.log_level(config.get("runtime", {}).get("log_level", "INFO")))
    source, output, folder = (Path(config["io"][name]) for name in _run.IO_KEYS)
    if output.exists() and output.samefile(source):
        raise UsageError("io.output_file is the input: name another one")
    _files.check_table(output)
    task = read_task(config)
    settings = task.model.settings | _run.settings_of(config.get("runtime", {})) | _run.run_flags(arguments)
    label_column, label_field = labels_of(config, task)
    needed = [label_column] if label_column else []
    rounds: list[Path] = []
    code = 0
    for number in range(config["task"].get("ask_again", 2) + 1):
        requests_path, results_path = _run.checkpoint(folder, output.stem + (f"_round{number + 1}" if number else ""))
        if requests_path.exists() and requests_path.samefile(source):
            raise UsageError(f"io.input_file is {requests_path}, which this program would write: rename one")
        if not number and output.exists() and not results_path.exists():
            raise UsageError(f"{output} exists, but not {results_path} of it: move it away, or name another output")
        with opened_results(rounds) as before:
            asked = _files.write_requests(requests_path, requests_of_round(task, source, needed, before))
        if not asked and number:
            break
        if number:
            LOGGER.info("%d answers were not valid: asking again.", asked)
        files = _run.files_of(requests_path, results_path)
        tally = _run.run_processor(Settings(**settings | files), "" if number else arguments.cache_filepath)
        code = max(code, tally.exit_code)
        rounds.append(results_path)
        if arguments.dry_run or (not number and _run.came_to_nothing(tally, output)):
            return code
        if code >= 2:
            break
    return max(code, write_output(task, config, source, output, rounds, (label_column, label_field)))


@contextlib.contextmanager
def opened_results(paths: list[Path]) -> Iterator[list[Results]]:
    """Open the results of the rounds so far."""
    opened = [Results(path) for path in paths]
    try:
        yield opened
    finally:
        for results in opened:
            results.close()


def write_output(
    task: Task, config: _run.Config, source: Path, output: Path, rounds: list[Path], labels: tuple[str, str]
) -> int:
    """Write the rows; 1 if some have no valid answer."""
    label_column, label_field = labels
    confusion: Counter[tuple[str, str]] = Counter()
    counts: Counter[str] = Counter()

    def rows() -> Iterator[_files.Row]:
        with opened_results(rounds) as opened:
            for row in _files.read_rows(source):
                outcomes = follow(task, row, opened)
                if not outcomes:
                    counts["missing"] += 1
                    continue
                outcome = outcomes[-1]
                counts["failed" if outcome.error else "valid"] += 1
                if label_column:
                    answer = "(none)" if outcome.error else _files.cell(outcome.fields.get(label_field))
                    confusion[_files.cell(row[label_column]), answer] += 1
                yield output_row(task, row, outcome)

    _files.write_table(output, rows(), last=("error", "raw"), excel=config["task"].get("excel", False))
    if label_column:
        show_confusion(confusion, label_column)
    if counts["missing"]:
        LOGGER.warning("%d rows have no result yet and are left out; the same command continues.", counts["missing"])
    print(f"{counts['valid']:,} valid, {counts['failed']:,} failed; the rows are in {output}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
