"""README.md says what the program does: flags, providers, stations, examples, commands, codes and kinds.

`python -m tests.test_docs` writes the generated tables of README.md anew.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import signal
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import api_request_parallel_processor as program
from api_request_parallel_processor import Action, Reply, Settings, Tally
from tests.jobs import play
from tests.local_provider import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
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


def rows(text: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose head begins with a word."""
    lines = iter(text.splitlines())
    found = next((line for line in lines if line.startswith(f"| {first} |")), None)
    assert found, f"there is no table of {first}"
    next(lines)
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return table


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


def rewritten() -> str:
    """Return README with its generated tables as they should be."""
    text = README
    for name, table in GENERATED.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"\n<!-- /{name} -->")
        assert end, f"README has no place for the table {name}"
        text = f"{before}{begin}{table()}{end}{after}"
    return text


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_up_to_date(name: str) -> None:
    """Flags with defaults and texts stand in README as in --help, providers as in PROVIDERS."""
    assert GENERATED[name]() in README, "python -m tests.test_docs writes it anew"


def test_every_flag_is_in_the_help() -> None:
    """The table leaves out no setting, and every flag that README speaks of exists."""
    names = {name for _, name, _, _ in flags()}
    assert names == {f"--{name}" for name in Settings.__dataclass_fields__} | {"--help", "--version"}
    others = re.compile(r"^(?:pip |uv |python tests/|python -m ).*$", flags=re.MULTILINE)
    spoken = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", others.sub("", README)))
    assert {name.replace("-", "_").replace("__", "--", 1) for name in spoken} <= names


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
    fields = program.Provider.__dataclass_fields__.keys() | {"record"}
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
    requests = [line.encode() + b"\n" for line in first_in + lines]
    played = play(tmp_path, requests, Options(statuses=ANSWERS))
    wanted = [shown(line) for line in first_out + results]
    assert len(played.lines) == len(wanted)
    for one in wanted:
        assert sum(fits(one, real) for real in played.lines) == 1, one
    assert played.tally.exit_code == 1


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


def commands() -> list[list[str]]:
    """Return the words of each command of README."""
    return [shlex.split(line) for block in blocks("sh") for line in block if line]


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


def test_links_lead_somewhere() -> None:
    """Every link within README has its heading."""
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= anchors


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
    kinds = {
        value[1]
        for value in vars(program).values()
        if isinstance(value, tuple) and len(value) == 2 and value[0] in (Action.REFUSED, Action.RETRY, Action.FAIL)
    }
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
    assert set(program.BY_STATUS) <= seen


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
    (ROOT / "README.md").write_text(rewritten(), "utf-8")
    sys.exit(0)
