"""README.md says what the programs do: flags, providers, stations, examples, commands, codes, kinds, workflows.

README.zh-CN.md says the same. `python -m tests.test_docs` writes the generated tables of both anew.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import api_request_parallel_processor as program
from api_request_parallel_processor import Action, Reply, Settings, Tally
from tests.jobs import PROGRAM, ProviderProcess, chats, clean_environment, play, read_lines, succeeded, write_lines
from tests.local_provider import Options
from workflows import _batch_providers, _run, csv_questions, instruction_dataset, provider_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text("utf-8")
READMES = {"README.md": README, "README.zh-CN.md": CHINESE}
SOURCE = (ROOT / "api_request_parallel_processor.py").read_text("utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"# ==+ (.*\w\S*) ==+")
ANSWERS: list[dict[str, Any]] = [
    {"contains": "2+3", "answer": "5"},
    {"contains": "3+4", "answer": "7"},
    {"contains": "pick a lock", "kind": "filtered"},
    {"contains": "Say hello", "answer": "Hello!"},
]  # what the provider of the examples says
ANYTHING = "..."
WORDS = {"any": "通用", "required": "必填", "this machine, private addresses": "本机、内网地址"}  # of generated tables
LINES_OF_CODE = re.compile(r"^ *```.*?^ *```$", flags=re.MULTILINE | re.DOTALL)
HOSTS = re.compile(r"https://(?:api\.\w[\w.-]*|ark[\w.-]*)")  # of the example configs


# ==== what README is made of ==========================================================================================


def section(heading: str) -> str:
    """Return the text below a heading."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    assert found, f"README has no section {heading!r}"
    return found[1]


def blocks(language: str, text: str = README) -> list[list[str]]:
    """Return the lines of each block of code in a language."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    return [[line.strip() for line in block.splitlines()] for block in found]


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of each table, its head as the first row."""
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    split = [[[cell.strip() for cell in row[1:-1].split(" | ")] for row in table.splitlines()] for table in found]
    return [[head, *rest] for head, _, *rest in split]


def rows(text: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose head begins with a word."""
    found = [table[1:] for table in tables(text) if table[0][0] == first]
    assert found, f"there is no table of {first}"
    return found[0]


def flags_in(text: str) -> set[str]:
    """Return the flags that a text names, with underscores."""
    spoken = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    return {"--" + name[2:].replace("-", "_") for name in spoken}


def code(cell: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


# ==== the tables that are generated ===================================================================================


def help_text() -> str:
    """Return --help, without line breaks in its words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")
        patch.setenv("NO_COLOR", "1")
        return program.build_parser().format_help().partition("\n    export ")[0]


def flags() -> Iterator[tuple[str, str, str, str]]:
    """Yield station, name, default and meaning of each flag, as --help tells them."""
    entry = re.compile(r"^  (?:-h, )?(--\w+)(?: (?:[A-Z]+|\{.*?\}))?\s+(.*)$", flags=re.MULTILINE)
    for group in re.split(r"\n\n(?=\w+:\n)", help_text())[1:]:
        title, _, text = group.partition(":\n")
        for name, words in entry.findall(text):
            meaning, _, default = words.partition(" (default: ")
            default = f"`{default.removesuffix(')')}`" if default else ""
            if not default and name == "--requests_filepath":
                default = "required"
            yield ("any" if title == "options" else title), name, default, meaning


def flags_table() -> str:
    """Write the table of flags; a station is named at its first flag only."""
    table, before = ["| station | flag | default | meaning |", "|---|---|---|---|"], ""
    numbers = {name: f"{number} {name}" for number, name in enumerate(program.STATIONS, start=1)}
    for station, name, default, meaning in flags():
        shown = "" if station == before else numbers.get(station, station)
        table.append(f"| {shown} | `{name}` | {default} | {meaning} |")
        before = station
    return "\n".join(table)


def providers_table() -> str:
    """Write the table of providers."""
    table = ["| provider | hosts and paths | key in | its limits |", "|---|---|---|---|"]
    for row in program.PROVIDERS.values():
        urls = " ".join(f"`{url}`" for url in row.urls.split()) or "this machine, private addresses"
        keys = " ".join(f"`{name}`" for name in row.key_env)
        table.append(f"| `{row.name}` | {urls} | {keys} | {row.limits} |")
    return "\n".join(table)


GENERATED: dict[str, Callable[[], str]] = {"flags": flags_table, "providers": providers_table}


def parts_around(text: str, name: str) -> tuple[str, str, str]:
    """Return what stands before a generated table, the table, and what stands after it."""
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    table, end, after = rest.partition(f"\n<!-- /{name} -->")
    assert end, f"README has no place for the table {name}"
    return before + begin, table, end + after


def in_chinese(name: str) -> str:
    """Write a generated table for the Chinese README, whose head and last column stay as they are."""
    old = parts_around(CHINESE, name)[1]
    said = {code(line)[0]: line.strip("| ").rpartition(" | ")[2] for line in old.splitlines()[2:]}
    table = old.splitlines()[:2]
    for row in tables(f"{GENERATED[name]()}\n")[0][1:]:
        cells = [WORDS.get(cell, cell) for cell in row]
        cells[-1] = said.get(code(" ".join(cells))[0], cells[-1])
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def rewritten(text: str, table_of: Callable[[str], str]) -> str:
    """Return a README with its generated tables as they should be."""
    for name in GENERATED:
        before, _, after = parts_around(text, name)
        text = before + table_of(name) + after
    return text


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_up_to_date(name: str) -> None:
    """Flags with defaults and texts stand in README as in --help, providers as in PROVIDERS; in Chinese too."""
    assert GENERATED[name]() in README, "python -m tests.test_docs writes it anew"
    assert in_chinese(name) in CHINESE, "python -m tests.test_docs writes it anew"
    unsaid = [row for row in parts_around(CHINESE, name)[1].splitlines()[2:] if not re.search(r"[\u4e00-\u9fff]", row)]
    assert not unsaid, "these are not translated"


def test_every_flag_is_in_the_help() -> None:
    """The table leaves out no setting, and every flag that README speaks of exists."""
    names = {name for _, name, _, _ in flags()}
    assert names == {f"--{name}" for name in Settings.__dataclass_fields__} | {"--help", "--version"}
    others = re.compile(r"^(?:pip |uv |python tests/|python -m ).*$", flags=re.MULTILINE)
    assert flags_in(others.sub("", README.replace(section("Workflows"), ""))) <= names


def test_extras_are_those_of_the_project() -> None:
    """The table of extras names all of them with all of their packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {
        extra: [re.split("[<>=; ]", package)[0] for package in packages]
        for extra, packages in project["optional-dependencies"].items()
    }
    assert {code(name)[0]: code(packages) for name, packages, _ in rows(README, "extra")} == wanted
    needed = [re.split("[<>=; ]", package)[0] for package in project["dependencies"]]
    assert f"pip install {' '.join(needed)}" in [line for block in blocks("sh") for line in block]


# ==== stations and the edit map =======================================================================================


def sections_of_the_program() -> dict[str, tuple[int, int]]:
    """Return first and last line of each section by its title; what comes before the first banner is the top."""
    lines = SOURCE.splitlines()
    starts = [(0, "top"), *((at, banner[1]) for at, line in enumerate(lines, 1) if (banner := BANNER.fullmatch(line)))]
    ends = [*(at - 1 for at, _ in starts[1:]), len(lines)]
    return {title: (at, end) for (at, title), end in zip(starts, ends, strict=True)}


def test_stations_are_the_same_everywhere() -> None:
    """README and docstring list the same sections in the same words, which the banners begin."""
    listed = re.findall(r"^ {4}(\w+ ?\w+) {2,}(\w.*)$", ast.get_docstring(TREE) or "", flags=re.MULTILINE)
    assert [tuple(row) for row in rows(README, "section")] == listed
    titles = [title.partition(": ") for title in sections_of_the_program() if title != "top"]
    assert [name for name, _ in listed] == [name for name, _, _ in titles]
    for (name, words), (_, _, title) in zip(listed, titles, strict=True):
        assert words.startswith(title) or name == "tables", name
    assert [name for name, _ in listed if name[0].isdigit()] == [
        f"{number} {name}" for number, name in enumerate(program.STATIONS, start=1)
    ]


def test_the_edit_map_leads_to_the_right_place() -> None:
    """What the edit map tells to edit is defined in the section that it names."""
    places = {title.partition(":")[0]: lines for title, lines in sections_of_the_program().items()}
    defined: dict[str, int] = {}
    for node in TREE.body:
        goals = node.targets if isinstance(node, ast.Assign) else [node]
        names_here = (getattr(goal, "id", getattr(goal, "name", "")) for goal in goals)
        defined |= {name: node.lineno for name in names_here if name and name not in defined}
    fields = set(program.Provider._fields) | {"record"}
    for what, names, place in rows(README, "to"):
        first, last = places[place]
        wanted = [name for name in code(names) if name not in fields]
        assert wanted, what
        assert all(first <= defined.get(name, 0) <= last for name in wanted), (what, place)
    assert hasattr(program.Run, "record")


# ==== examples ========================================================================================================


def shown(line: str) -> Any:
    """Read a line of JSON in which ... stands for what is left out."""
    line = re.sub(r", \.\.\.\}", f', "{ANYTHING}": null}}', line)
    return json.loads(line.replace("[...]", f'["{ANYTHING}"]').replace("{...}", f'{{"{ANYTHING}": null}}'))


def fits(wanted: Any, real: Any) -> bool:
    """Tell whether a value is what was shown, order of keys included."""
    if isinstance(wanted, dict) and isinstance(real, dict):
        names = [name for name in wanted if name != ANYTHING]
        same = names == [name for name in real if name in wanted]
        return same and (ANYTHING in wanted or len(names) == len(real)) and all(fits(wanted[n], real[n]) for n in names)
    if isinstance(wanted, list) and isinstance(real, list):
        pairs = zip(wanted, real, strict=False)
        return wanted == [ANYTHING] or (len(wanted) == len(real) and all(fits(*pair) for pair in pairs))
    real = re.sub(r"^chatcmpl-\w+$", "chatcmpl-1", real) if isinstance(real, str) else real
    return type(wanted) is type(real) and bool(wanted == real)


def test_examples_are_what_the_program_makes(tmp_path: Path) -> None:
    """The request lines of README give exactly its result lines, but for ids and what is left out."""
    first_in, first_out = blocks("json")[:2]
    [lines] = blocks("json", section("Request lines"))
    [results] = blocks("json", section("Result lines"))
    for requests, wanted, code in ((first_in, first_out, 0), (lines, results, 1)):
        (folder := tmp_path / str(code)).mkdir()
        played = play(folder, [line.encode() + b"\n" for line in requests], Options(statuses=ANSWERS))
        assert len(played.lines) == len(wanted)
        for one in map(shown, wanted):
            assert sum(fits(one, real) for real in played.lines) == 1, one
        assert played.tally.exit_code == code


def test_the_comparison_of_examples_can_fail() -> None:
    """Another value, a missing key, another order of keys and another length are noticed."""
    assert fits(shown('{"a": [...], "id": "chatcmpl-1", ...}'), {"a": [1, 2], "id": "chatcmpl-9f", "b": 1})
    for wanted, real in (
        ('{"a": 1}', {"a": 2}),
        ('{"a": 1, ...}', {"b": 2}),
        ('{"a": 1, "b": 2}', {"b": 2, "a": 1}),
        ('{"a": 1}', {"a": 1, "b": 2}),
        ("[1, 2]", [1]),
        ('{"a": null}', {"a": False}),
    ):
        assert not fits(shown(wanted), real), wanted


def test_details_are_those_that_are_saved(tmp_path: Path) -> None:
    """The table of details has the fields of a result line with --save_details, in their order."""
    played = play(tmp_path, [b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'], save_details=True)
    assert {code(name)[0] for name, _ in rows(README, "detail")} == set(played.lines[0][3])
    assert played.lines[0][2] is None


def test_the_python_example_uses_what_there_is() -> None:
    """The example for Python compiles, imports public names and passes keyword arguments that exist."""
    [lines] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for node in ast.walk(ast.parse(lines)):
        if isinstance(node, ast.ImportFrom):
            assert {alias.name for alias in node.names} <= set(program.__all__)
        elif isinstance(node, ast.Call):
            assert {word.arg for word in node.keywords} <= Settings.__dataclass_fields__.keys()
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "tally":
            assert node.attr in Tally.__dataclass_fields__


# ==== commands and files ==============================================================================================


def commands(text: str = README) -> list[list[str]]:
    """Return the words of each command of README."""
    return [shlex.split(line) for block in blocks("sh", text) for line in block if line]


def test_commands_name_files_that_exist() -> None:
    """What a command or the text calls a file of the checkout is one."""
    folders = ("requests/", "tests/", "workflows/", ".ci/")
    words = {word for command in commands() for word in command}
    named = {word for word in words if word.startswith(folders) or word.endswith((".py", ".sh"))}
    named |= set(re.findall(r"`((?:requests|tests|workflows)/[\w./-]+\w)`", README))
    assert {"run.sh", "tests/run.sh", "requests/openai_chat.jsonl"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_modules_that_commands_start_exist() -> None:
    """Each python -m of README starts a module of the checkout."""
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert not [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").exists()]


def test_all_request_files_are_named() -> None:
    """README names every example request file."""
    assert not [path.name for path in (ROOT / "requests").glob("*.jsonl") if f"`requests/{path.name}`" not in README]


def test_commands_are_understood() -> None:
    """The program takes the flags of every command that starts it, the local provider those of its own."""
    local = {f"--{name}" for name in Options.__dataclass_fields__}
    started = 0
    for words in commands():
        if "api_request_parallel_processor.py" in words and "--help" not in words:
            program.build_parser().parse_args(words[words.index("api_request_parallel_processor.py") + 1 :])
            started += 1
        elif "tests/local_provider.py" in words:
            assert {word for word in words if word.startswith("--")} <= local
    assert started >= 2


def test_benchmarks_are_named_with_measures_that_exist() -> None:
    """Each row of the benchmark table is a program in tests/benchmarks and a measure of it."""
    for _, command, _ in rows(README, "what"):
        name, *measures = code(command)[0].split()
        text = (ROOT / "tests" / "benchmarks" / name).read_text("utf-8")
        assert all(re.search(rf"^{measure} ", text, flags=re.MULTILINE) for measure in measures), command


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    """Every link within a README has its heading, the contents name every chapter, and every file is there."""
    text = READMES[name]
    anchors = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-"): level
        for level, heading in re.findall(r"^(#+) (.*)$", LINES_OF_CODE.sub("", text), flags=re.MULTILINE)
    }
    linked = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert linked <= anchors.keys()
    assert {anchor for anchor, level in anchors.items() if level == "##"} <= linked
    assert all((ROOT / file).is_file() for file in re.findall(r"\]\(([\w.-]+\.md)\)", text))


# ==== both languages ==================================================================================================


def chapters(text: str) -> list[tuple[str, str]]:
    """Return level and text of each chapter."""
    found = re.split(r"^(#{1,3}) .*\n", text, flags=re.MULTILINE)
    return list(zip(found[1::2], found[2::2], strict=True))


def names_in(text: str) -> set[str]:
    """Return what stands in backticks, whatever the words in angle brackets."""
    return {re.sub(r"<[^<>]+>", "<>", name) for name in code(LINES_OF_CODE.sub("", text).replace("\n", " "))}


def test_both_readmes_say_the_same() -> None:
    """Chapter by chapter: blocks of code, tables row by row, lists, links, and everything in backticks."""
    english, chinese = chapters(README), chapters(CHINESE)
    assert [level for level, _ in english] == [level for level, _ in chinese]
    for (_, one), (_, other) in zip(english, chinese, strict=True):
        where = one.strip()[:60]
        assert LINES_OF_CODE.findall(one) == LINES_OF_CODE.findall(other), where
        assert names_in(one) == names_in(other), where
        rows_of_both = zip(tables(one), tables(other), strict=True)
        for table, same in rows_of_both:
            assert [list(map(names_in, row)) for row in table] == [list(map(names_in, row)) for row in same], where
            numbers = [[re.findall(r"\d+", " ".join(row)) for row in each] for each in (table, same)]
            assert list(map(sorted, numbers[0])) == list(map(sorted, numbers[1])), where
        for what in (r"^ *(?:- |\d\. )", r"\]\((?!#|README)[^)]*\)", r"<!-- .*? -->"):
            assert len(re.findall(what, one, re.MULTILINE)) == len(re.findall(what, other, re.MULTILINE)), where


def test_chinese_is_set_as_chinese() -> None:
    """Punctuation after Chinese words is Chinese; paragraphs are not wrapped, since a line break shows as a space."""
    text = LINES_OF_CODE.sub("", CHINESE)
    assert not re.findall(r"[\u4e00-\u9fff][,;:?!]", re.sub(r"`[^`\n]*`", "", text))
    assert not re.findall(r"^(?![|#<]).+\n(?! *- | *\d\. |[|#<]).+", text, flags=re.MULTILINE)


# ==== workflows =======================================================================================================


def programs() -> list[str]:
    """Return the names of the programs in the table of workflows."""
    return [code(name)[0].removeprefix("workflows.") for name, _, _ in rows(section("Workflows"), "program")]


def chapters_of_workflows() -> Iterator[tuple[list[str], str]]:
    """Yield names of programs and what is said about them; of none what is said about all."""
    found = re.split(r"^### (.*)\n", section("Workflows"), flags=re.MULTILINE)
    for heading, text in zip(["", *found[1::2]], found[::2], strict=True):
        yield [name for name in programs() if name in heading.split()], text


def flags_of(name: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the flags that --help of a workflow shows."""
    with pytest.raises(SystemExit):
        importlib.import_module(f"workflows.{name}").main(["--help"])
    return flags_in(capsys.readouterr().out)


def test_all_workflows_are_told() -> None:
    """Every program in workflows/ has its row, and its chapter."""
    there = {path.stem for path in (ROOT / "workflows").glob("[!_]*.py")} - {program.__name__}
    assert set(programs()) == there
    assert sorted(name for names, _ in chapters_of_workflows() for name in names) == sorted(there)


def test_flags_of_workflows_are_in_their_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What README says about a workflow names only flags that it has; response_cache has the processor's too."""
    monkeypatch.chdir(tmp_path)
    known = {name: flags_of(name, capsys) for name in programs()}
    known["response_cache"] |= {f"--{name}" for name in Settings.__dataclass_fields__}
    shared = argparse.ArgumentParser()
    _run.add_run_flags(shared)
    everywhere = flags_in(shared.format_help()) - {"--help"}
    for names, text in chapters_of_workflows():
        said = flags_in(re.sub(r"^(?:python (?:api|tests/)|ray ).*$", "", text, flags=re.MULTILINE))
        if names:
            assert said <= set.union(*(known[name] for name in names)), names
        else:
            assert everywhere <= said <= everywhere | {"--help"}
    for name in set(programs()) - {"prompts", "answers", "report", "response_cache", "provider_batch", "ray_cluster"}:
        assert everywhere <= known[name]


def test_what_is_said_about_batches() -> None:
    """Commands, providers, savings, and the number of requests that is too few."""
    text = section("Workflows").partition("### provider_batch")[2].partition("\n### ")[0]
    [choices] = [action.choices for action in provider_batch.build_parser()._actions if action.dest == "command"]
    assert [code(name)[0] for name, _ in rows(text, "command")] == list(choices or ())
    rows_of_it = {name: row for name, row in _batch_providers.TRANSPORTS.items() if "/" not in name and name != "local"}
    knows = re.search(r"It knows the Batch APIs of (.*?)\. ", text, flags=re.DOTALL)
    assert knows
    assert set(code(knows[1])) == rows_of_it.keys()
    assert (
        set(code(text[knows.end() :].partition(" at its host ")[0].rpartition(". ")[2]))
        == _batch_providers.HELD_OPEN.keys()
    )
    usual, special = map(int, re.findall(r"(\d+) %", text))
    assert {name for name, row in rows_of_it.items() if row.saving != usual} == {"moonshot"}
    assert rows_of_it["moonshot"].saving == special
    assert f"about {provider_batch.FEW_REQUESTS} requests" in text
    assert [name for name, row in rows_of_it.items() if not row.named] == ["anthropic"]


def test_settings_of_the_environment() -> None:
    """The variables that README names for instruction_dataset are those that it reads."""
    text = section("Workflows").partition("### instruction_dataset")[2].partition("###")[0]
    named = {name for name in names_in(text) if name.isupper() and "_" in name}
    read = {name for name, _ in instruction_dataset.ENVIRONMENT.values()} | {"USE_BATCH", "DASHSCOPE_API_KEY"}
    assert named == read | {provider_batch.QWEN_KEY}


def test_columns_are_told() -> None:
    """The columns of csv_questions stand in README as they are written."""
    assert f"`{','.join(csv_questions.COLUMNS)}`" in section("Workflows")


@pytest.mark.slow
def test_commands_of_the_processor_run(tmp_path: Path, provider: ProviderProcess) -> None:
    """Each command that starts the processor does so, but for its URL."""
    shutil.copytree(ROOT / "requests", tmp_path / "requests")
    write_lines(tmp_path / "mine.jsonl", chats(3))
    ran = 0
    for words in commands():
        if words[:2] != ["python", PROGRAM.name] or "--help" in words:
            continue
        command = [sys.executable, str(PROGRAM), *words[2:], "--request_url", f"{provider.url}/v1"]
        done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, check=False)
        results = (tmp_path / words[words.index("--requests_filepath") + 1]).with_suffix("")
        lines = read_lines(results.with_name(f"{results.name}_results.jsonl"))
        assert done.returncode == 0, done.stderr
        assert lines
        assert all(map(succeeded, lines))
        ran += 1
    assert ran == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_commands_of_workflows_run(tmp_path: Path, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of a workflow ends well, one after the other as they stand there, but for hosts."""
    url = f"{provider.url}/v1"
    sample = '[{"instruction": "What is a qubit?", "input": "", "output": "A two-level system."}]'
    answers = {"scientific paper": sample, "Classify": '{"reasoning_steps": [], "category": "neutral"}'}
    statuses = [{"contains": text, "answer": said} for text, said in answers.items()]
    provider.ask("/_control", {"statuses": statuses, "batch_provider": "openai"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(csv_questions, "ZHIPU_URL", url)
    monkeypatch.setattr(program, "retry_delay", program.retry_delay)
    shutil.copytree(ROOT / "workflows" / "examples", "workflows/examples")
    for path in Path("workflows/examples").glob("*.*"):
        path.write_text(HOSTS.sub(provider.url, path.read_text("utf-8")), "utf-8")
    Path("papers").mkdir()
    Path("papers/qubits.md").write_text("A qubit is a two-level system.", "utf-8")

    ran = set()
    for words in commands(section("Workflows")):
        if words[1] == PROGRAM.name:
            command = [sys.executable, str(PROGRAM), *words[2:], "--request_url", url]
            subprocess.run(command, env=clean_environment(), capture_output=True, check=True)
        if words[:2] != ["python", "-m"]:
            continue
        workflow, argv = words[2].removeprefix("workflows."), words[3:]
        if workflow == "provider_batch" and argv[0] in ("run", "create"):
            Path("mine_results.jsonl").unlink(missing_ok=True)
        if workflow in ("provider_batch", "instruction_dataset") or argv[0] in ("run", "store"):
            argv += ["--request_url", url]
        if workflow == "ray_cluster":  # whose own tests start clusters
            argv += ["--request_url", url, "--dry_run"]
        module = importlib.import_module(words[2])
        assert _run.main_program(module.main, argv) == 0, words
        ran.add(workflow)
    assert ran == set(programs())
    assert len(read_lines(Path("mine_results.jsonl"))) == 3
    assert len(read_lines(Path("dataset.jsonl"))) == 1
    assert "answer,reasoning,status,tokens,error" in Path("mine.csv").read_text("utf-8")
    assert len(list(Path("results").glob("raw_*/*.json"))) == 4 + 2 + 4
    assert Path("results/reviews_classified.jsonl").exists()


# ==== codes and kinds =================================================================================================


def test_exit_codes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """README and docstring list the exit codes that runs end with."""
    listed = {int(number): meaning for number, meaning in rows(README, "code")}
    words = re.search(r"Exit codes: (.*?)\. ", (ast.get_docstring(TREE) or "").replace("\n", " "))
    assert words
    assert sorted(listed) == sorted(map(int, re.findall(r"\b\d+\b", words[1])))
    for number, meaning in listed.items():
        if found := re.search(r"SIG\w+", meaning):
            assert number == 128 + signal.Signals[found[0]]
            assert f'"{found[0]}"' in SOURCE
    line = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    for number, requests, options in (
        (0, [line], Options()),
        (1, [line, b"nonsense\n"], Options()),
        (3, [line], Options(api_key="another-key-for-tests")),
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert play(folder, requests, options).tally.exit_code == number
    assert program.main(["--requests_filepath", str(tmp_path / "missing.jsonl")]) == 2
    assert "cannot be read" in capfd.readouterr().err


def kinds_in_the_program() -> set[str]:
    """Return every kind of error that a result line can have: constants with a meaning, failures, bad lines."""
    kinds = {kind for kind, action in program.ACTIONS.items() if action is not Action.STOP}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Assign):
            goals = [goal for target in node.targets for goal in ast.walk(target)]
            if any(isinstance(goal, ast.Attribute) and goal.attr == "failure" for goal in goals):
                texts = [part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
                kinds |= {text for text in texts if isinstance(text, str) and re.fullmatch("[a-z_]+", text)}
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            kinds |= {
                value.value
                for key, value in pairs
                if isinstance(key, ast.Constant) and key.value == "kind"
                if isinstance(value, ast.Constant) and isinstance(value.value, str)
            }
    return kinds


def test_kinds_of_errors() -> None:
    """README explains exactly the kinds of errors that the program writes."""
    assert {code(kind)[0] for kind, _ in rows(README, "kind")} == kinds_in_the_program()


def test_statuses_are_judged_as_told() -> None:
    """What README says about a status is what an empty reply with it means."""
    actions = {"refused": Action.REFUSED, "passing": Action.RETRY, "hopeless request": Action.FAIL}
    actions["hopeless run"] = Action.STOP
    seen = set()
    for reply, _ in rows(README, "reply"):
        meaning, _, statuses = reply.partition(": ")
        for status in map(int, code(statuses)):
            verdict = program.judge(Reply(status=status, body={}), program.PROVIDERS["openai"], "chat")
            assert verdict.action is actions[meaning], status
            seen.add(status)
    assert seen >= {401, 402, 403, 429, 500, 503}


def test_numbers_in_the_text_are_those_of_the_program() -> None:
    """The few numbers that README repeats are those of the program."""
    for text in (
        f"the first {program.SAME_FAILURES} replies",
        f"keys under {program.SHORTEST_SECRET} characters",
        f"lines over {program.MAX_LINE_BYTES >> 20} MB",
    ):
        assert text in README.replace("\n", " ").replace("  ", " "), text


def test_readme_begins_with_what_a_reader_needs() -> None:
    """Both commands and both example lines stand on the first screen."""
    screen = "\n".join(README.splitlines()[:45])
    assert ["sh run.sh"] in blocks("sh", screen)
    assert "python api_request_parallel_processor.py --requests_filepath" in screen
    assert len(blocks("json", screen)) == 2


if __name__ == "__main__":
    (ROOT / "README.md").write_text(rewritten(README, lambda name: GENERATED[name]()), "utf-8")
    (ROOT / "README.zh-CN.md").write_text(rewritten(CHINESE, in_chinese), "utf-8")
    sys.exit(0)
