"""run.sh: whose key it uses, what it passes on, what it says when it cannot."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "api_request_parallel_processor.py"
STAND_IN_RESULTS = "results/answers_of_the_local_stand_in.jsonl"
OPENAI = "https://api.openai.com/v1/chat/completions"
SHELLS = [shell for shell in ("sh", "dash", "bash", "zsh") if shutil.which(shell)]
POSIX = sys.platform != "win32" and sys.prefix != sys.base_prefix
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not POSIX, reason="borrows the virtual environment it runs in")]
in_every_shell = pytest.mark.parametrize("shell", SHELLS)
needs_program = pytest.mark.skipif(not (ROOT / PROGRAM).exists(), reason="there is no program yet")

# Stands in for the program where only what reaches it matters.
PROBE = """
import json, os, sys, time
name = sys.argv[sys.argv.index("--api_key_env") + 1]
keys = [os.environ.get(part) for part in name.split()]
seen = {"argv": sys.argv[1:], "key": keys[0], "keys": keys, "folder": os.getcwd(), "pid": os.getpid()}
print(json.dumps(seen), flush=True)
time.sleep(float(os.environ.get("PROBE_SECONDS", "0")))
sys.exit(int(os.environ.get("PROBE_EXIT", "0")))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy what run.sh needs into a folder whose name has a space, with this virtual environment as its own."""
    folder = tmp_path / "my checkout"
    for name in ("run.sh", "pyproject.toml", PROGRAM, "tests/local_provider.py"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "requests", folder / "requests")
    (folder / "results").mkdir()
    venv = folder / ".venv"
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "stamp":
            (venv / entry.name).symlink_to(entry)
    (venv / "stamp").write_text(
        f"Python {platform.python_version()}\n" + (ROOT / "pyproject.toml").read_text("utf-8"), "utf-8"
    )
    return folder


@pytest.fixture
def probed(checkout: Path) -> Path:
    """Put the probe in the place of the program."""
    (checkout / PROGRAM).write_text(PROBE, "utf-8")
    return checkout


def bare(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment that knows nothing of this machine's keys and settings."""
    return {"HOME": str(folder.parent), "PATH": os.environ["PATH"], "LANG": "C.UTF-8", **more}


def run(folder: Path, *arguments: str, shell: str = "sh", **environment: str) -> subprocess.CompletedProcess[str]:
    """Start run.sh and wait for its end, from the folder above, as people do who never cd."""
    return subprocess.run(
        [shell, "my checkout/run.sh", *arguments],
        cwd=folder.parent,
        env=bare(folder, **environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def probe(folder: Path, *arguments: str, shell: str = "sh", **environment: str) -> dict[str, object]:
    """Run with the probe and return what reached it."""
    done = run(folder, *arguments, shell=shell, **environment)
    assert done.returncode == 0, done.stderr
    seen: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return seen


def flag(seen: dict[str, object], name: str) -> str:
    argv = seen["argv"]
    assert isinstance(argv, list)
    return str(argv[argv.index(name) + 1])


def edit(folder: Path, **settings: str) -> None:
    """Give settings at the top of run.sh other values, as an editor would."""
    text = (folder / "run.sh").read_text("utf-8")
    for name, value in settings.items():
        old = re.search(rf"^{name}=\S*", text, flags=re.MULTILINE)
        assert old, name
        text = f"{text[: old.start()]}{name}={value}{text[old.end() :]}"
    (folder / "run.sh").write_text(text, "utf-8")


def provider_blocks() -> dict[str, list[str]]:
    """Return the commented settings of each provider in run.sh by its heading."""
    text = (ROOT / "run.sh").read_text("utf-8").partition("= providers =")[2].partition("= nothing to edit")[0]
    blocks = (block.splitlines() for block in text.split("\n\n")[1:])
    return {block[0]: block[1:] for block in blocks if block[0].startswith("# ") and len(block) > 1}


@pytest.fixture
def provider(checkout: Path) -> Iterator[str]:
    """Serve a provider that accepts one key only, and yield its address."""
    port_file = checkout.parent / "port"
    command = [
        sys.executable,
        "tests/local_provider.py",
        "--port",
        "0",
        "--port_file",
        str(port_file),
        "--api_key",
        "sk-right",
    ]
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.DEVNULL) as process:
        until(lambda: port_file.exists() and bool(port_file.read_text("ascii").strip()))
        yield f"http://127.0.0.1:{port_file.read_text('ascii').strip()}"
        process.terminate()


def until(condition: object, seconds: float = 20) -> None:
    """Wait for a condition outside this process."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def listens(url: str) -> bool:
    """Tell whether something accepts connections there."""
    host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
    with socket.socket() as attempt:
        return attempt.connect_ex((host, int(port))) == 0


# ---- untouched -------------------------------------------------------------------------------------------------------


@in_every_shell
def test_several_endpoints_have_their_keys_from_the_env_file(probed: Path, shell: str) -> None:
    """A name each; the key at the top of run.sh is that of the first, and the environment is not needed."""
    edit(probed, request_url="'https://a.test/v1 https://b.test/v1'", api_key_env="'KEY_A KEY_B'")
    (probed / ".env").write_text("KEY_B=sk-b  # the second\nexport KEY_A='sk-a'\nKEY_AB=sk-no\n", "utf-8")
    seen = probe(probed, shell=shell)
    assert seen["keys"] == ["sk-a", "sk-b"]
    assert flag(seen, "--request_url") == "https://a.test/v1 https://b.test/v1"
    assert flag(seen, "--api_key_env") == "KEY_A KEY_B"
    assert "sk-" not in str(seen["argv"])
    edit(probed, api_key="sk-top")
    assert probe(probed, shell=shell)["keys"] == ["sk-top", "sk-b"]


@needs_program
@in_every_shell
def test_untouched_it_answers_the_example_with_the_stand_in(checkout: Path, shell: str) -> None:
    """All 200 examples get a result, the user hears whose answers they are, and an exported key is left alone."""
    done = run(checkout, shell=shell, OPENAI_API_KEY="sk-exported")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (checkout / STAND_IN_RESULTS).read_text("utf-8").splitlines()]
    assert len(results) == 200
    assert {result[2]["id"] for result in results} == {
        json.loads(line)["metadata"]["id"]
        for line in (ROOT / "requests/example_200_chat.jsonl").read_text("utf-8").splitlines()
    }
    assert "local stand-in" in done.stdout
    assert "OPENAI_API_KEY=" in done.stdout
    assert "request_url" in done.stdout
    assert not list((checkout / ".venv").glob("port.*"))


@in_every_shell
def test_untouched_no_key_of_the_environment_is_used(probed: Path, shell: str) -> None:
    """The program is pointed at this machine and given a word in the place of the exported key."""
    seen = probe(probed, shell=shell, OPENAI_API_KEY="sk-exported")
    assert flag(seen, "--request_url").startswith("http://127.0.0.1:")
    assert seen["key"] == "local-stand-in"
    assert flag(seen, "--save_filepath") == STAND_IN_RESULTS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@in_every_shell
def test_a_signal_reaches_the_program_and_nothing_is_left(probed: Path, shell: str, number: signal.Signals) -> None:
    """run.sh has become the program, so that a signal to it is one to the program; the stand-in follows."""
    environment = bare(probed, PROBE_SECONDS="60")
    command = [shell, "run.sh"]
    with subprocess.Popen(
        command, cwd=probed, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        seen = json.loads(next(line for line in process.stdout if line.startswith("{")))
        assert seen["pid"] == process.pid
        url = flag(seen, "--request_url")
        process.send_signal(number)
        assert process.wait(20) == -number
    until(lambda: not listens(url))


@in_every_shell
def test_ctrl_c_reaches_the_program_while_the_stand_in_still_answers(probed: Path, shell: str) -> None:
    """A terminal signals the whole group: the program may finish what it sent, since the stand-in stays until then."""
    (probed / PROGRAM).write_text("import signal\nsignal.signal(signal.SIGINT, lambda *_: None)\n" + PROBE, "utf-8")
    environment = bare(probed, PROBE_SECONDS="2", PROBE_EXIT="130")
    with subprocess.Popen(
        [shell, "run.sh"],
        cwd=probed,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        url = flag(json.loads(next(line for line in process.stdout if line.startswith("{"))), "--request_url")
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.7)  # longer than a process needs to die of it
        assert process.poll() is None
        assert listens(url)
        assert process.wait(20) == 130
    until(lambda: not listens(url))


# ---- keys ------------------------------------------------------------------------------------------------------------


@needs_program
@in_every_shell
def test_a_key_in_env_file_goes_live(checkout: Path, provider: str, shell: str) -> None:
    """With a key in .env the program asks the provider of run.sh, which gets that key."""
    edit(checkout, request_url=f"'{provider}/v1/chat/completions'", requests_filepath="'requests/openai_chat.jsonl'")
    (checkout / ".env").write_text("OPENAI_API_KEY=sk-right\n", "utf-8")
    done = run(checkout, shell=shell, OPENAI_API_KEY="sk-exported")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((checkout / "results/openai_chat_results.jsonl").read_text("utf-8").splitlines()) == 3
    assert "stand-in" not in done.stdout


@needs_program
def test_a_key_that_is_refused_ends_with_the_exit_code_of_the_program(checkout: Path, provider: str) -> None:
    """A wrong key stops the run, and run.sh passes the exit code on."""
    edit(checkout, request_url=f"'{provider}/v1/chat/completions'", api_key="'sk-wrong'")
    assert run(checkout).returncode == 3


@in_every_shell
@pytest.mark.parametrize(
    "line",
    [
        "OPENAI_API_KEY=sk-1",
        'export OPENAI_API_KEY="sk-1"',
        "OPENAI_API_KEY='sk-1'   # of the institute",
        "  OPENAI_API_KEY = sk-1  ",
        "OPENAI_API_KEY=sk-1\r",
        "\ufeffOPENAI_API_KEY=sk-1",
        "OPENAI_API_KEY=old\n#OPENAI_API_KEY=off\nMY_OPENAI_API_KEY=other\nOPENAI_API_KEY=sk-1\nOPENAI_API_KEY_2=two",
    ],
)
def test_env_file_forms(probed: Path, shell: str, line: str) -> None:
    """A line of .env may be exported, quoted, commented, indented, written on Windows, or replaced by a later one."""
    (probed / ".env").write_bytes(
        f"# keys\nDEEPSEEK_API_KEY=sk-2\n{line}\n".encode() if line[0] != "\ufeff" else line.encode()
    )
    assert probe(probed, shell=shell)["key"] == "sk-1"


@in_every_shell
def test_env_file_is_never_executed(probed: Path, shell: str) -> None:
    """What would be a command in a shell is text in .env."""
    (probed / ".env").write_text(
        "touch pwned\nOPENAI_API_KEY=a$(touch${IFS}pwned)`touch${IFS}pwned`\nX=;touch pwned\n", "utf-8"
    )
    seen = probe(probed, shell=shell)
    assert seen["key"] == "a$(touch${IFS}pwned)`touch${IFS}pwned`"
    assert not (probed / "pwned").exists()


@in_every_shell
def test_the_key_of_run_sh_comes_first_and_stays_out_of_the_arguments(probed: Path, shell: str) -> None:
    """Pasted blanks and curly quotes go, .env and the environment give way, and no argument holds the key."""
    edit(probed, api_key="' “sk-mine”\t'")
    (probed / ".env").write_text("OPENAI_API_KEY=sk-file\n", "utf-8")
    seen = probe(probed, shell=shell, OPENAI_API_KEY="sk-exported")
    assert seen["key"] == "sk-mine"
    assert flag(seen, "--request_url") == OPENAI
    assert "sk-mine" not in str(seen["argv"])


def test_a_server_without_keys_needs_none(probed: Path) -> None:
    """Another URL is no untouched run.sh: it goes live, with the environment's key if there is one."""
    edit(probed, request_url="'http://127.0.0.1:9/v1/chat/completions'")
    seen = probe(probed)
    assert flag(seen, "--request_url") == "http://127.0.0.1:9/v1/chat/completions"
    assert seen["key"] is None


# ---- settings --------------------------------------------------------------------------------------------------------


@in_every_shell
def test_settings_and_arguments_arrive_whole(probed: Path, shell: str) -> None:
    """Spaces in file names and arguments survive, flags of run.sh are words, and arguments come last."""
    edit(
        probed,
        api_key="'k'",
        requests_filepath="'requests/my file.jsonl'",
        more_flags="'--max_attempts 3 --save_details'",
    )
    seen = probe(probed, "--limit", "5", "--request_header", "X-Note: two words", shell=shell)
    assert flag(seen, "--requests_filepath") == "requests/my file.jsonl"
    assert flag(seen, "--save_filepath") == "results/my file_results.jsonl"
    assert str(seen["argv"]).endswith(
        "'--max_attempts', '3', '--save_details', '--limit', '5', '--request_header', 'X-Note: two words']"
    )
    assert seen["folder"] == str(probed)


def test_the_exit_code_is_passed_on(probed: Path) -> None:
    """What the program ends with, run.sh ends with."""
    assert run(probed, PROBE_EXIT="3").returncode == 3


@in_every_shell
@pytest.mark.parametrize("value", ["= ' sk-1'", " = 'sk-1'"])
def test_a_space_around_the_equals_sign_is_explained(probed: Path, shell: str, value: str) -> None:
    """The commonest slip of beginners ends with a hint instead of a run without a key."""
    text = (probed / "run.sh").read_text("utf-8").replace("\napi_key=''", f"\napi_key{value}", 1)
    (probed / "run.sh").write_text(text, "utf-8")
    done = run(probed, shell=shell)
    assert done.returncode != 0
    assert "without spaces around the =" in done.stderr


def test_a_key_in_the_place_of_its_name_is_explained(probed: Path) -> None:
    """api_key_env with a key in it is refused without showing the key."""
    edit(probed, api_key_env="'sk-1'")
    done = run(probed)
    assert done.returncode == 2
    assert "api_key_env is a NAME" in done.stderr
    assert "sk-1" not in done.stderr


@pytest.mark.parametrize("heading", provider_blocks())
def test_every_provider_block_works_when_its_comments_go(probed: Path, heading: str) -> None:
    """Each block names an existing request file, and its settings replace those at the top."""
    block = provider_blocks()[heading]
    text = (probed / "run.sh").read_text("utf-8")
    commented = "\n".join(block)
    assert commented in text
    (probed / "run.sh").write_text(
        text.replace(commented, "\n".join(line.removeprefix("#") for line in block), 1), "utf-8"
    )
    settings = {name: value.strip("'") for name, _, value in (line.removeprefix("#").partition("=") for line in block)}
    (probed / ".env").write_text(f"{settings.get('api_key_env', 'OPENAI_API_KEY')}=sk-1\n", "utf-8")
    seen = probe(probed)
    assert seen["key"] == "sk-1"
    for name, value in settings.items():
        if name == "more_flags":
            assert value.split() == seen["argv"][-len(value.split()) :]  # type: ignore[index]
        else:
            assert flag(seen, f"--{name}") == value
    lines = (probed / flag(seen, "--requests_filepath")).read_text("utf-8").splitlines()
    assert all("metadata" in json.loads(line) for line in lines)


# ---- first use -------------------------------------------------------------------------------------------------------


def fake_pythons(folder: Path, script: str) -> str:
    """Return a PATH on which every python is a script."""
    folder.mkdir()
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(11, 15))):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", "ascii")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


UNFIT_PYTHONS = {  # what a machine's python does, and the words that lead on
    "an old one": (
        'case $1 in -V) echo "Python 3.8.1" ;; *) exit 1 ;; esac',
        "needs Python 3.11 or newer, found Python 3.8.1",
    ),
    "none, without what the shell says": (
        "echo 'python3: not found' >&2; exit 127",
        "needs Python 3.11 or newer, found none",
    ),
    "Debian's, without ensurepip": (
        "case $2 in *ensurepip*) exit 1 ;; *) exit 0 ;; esac",
        "sudo apt install python3-venv",
    ),
}


@pytest.mark.parametrize("name", UNFIT_PYTHONS)
def test_an_unfit_python_is_named(probed: Path, name: str) -> None:
    """Where no environment can be made, the message tells which Python was found and what to do."""
    script, words = UNFIT_PYTHONS[name]
    shutil.rmtree(probed / ".venv")
    done = run(probed, PATH=fake_pythons(probed / "bin", script))
    assert done.returncode == 2
    assert words in done.stderr


def test_a_place_without_room_for_packages_names_the_way_out(probed: Path) -> None:
    """In a checkout that cannot be written to, the message names the variable that puts the packages elsewhere."""
    shutil.rmtree(probed / ".venv")
    (probed / ".venv").write_text("in the way", "ascii")
    done = run(probed)
    assert done.returncode == 2
    assert "VENV_DIR=" in done.stderr


def test_an_installation_that_fails_names_a_mirror_and_is_tried_again(probed: Path) -> None:
    """Without a package index the reason is kept, a mirror is named, and the next start installs again."""
    shutil.rmtree(probed / ".venv")
    for _ in range(2):
        done = run(probed, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
        assert done.returncode == 2
        assert done.stdout.startswith("installing ")
        assert "PIP_INDEX_URL=" in done.stderr
        assert "No matching distribution" in (probed / ".venv/install.log").read_text("utf-8")


def test_a_later_start_installs_nothing(probed: Path) -> None:
    """With the stamp in place pip is never asked, even when it could not answer."""
    edit(probed, api_key="'k'")
    done = run(probed, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 0
    assert "installing" not in done.stdout
