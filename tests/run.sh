#!/bin/sh
# Checks everything: ruff, mypy, pytest, in a virtual environment of its own. Arguments go to pytest: sh tests/run.sh -k pace
# It needs nothing but Python 3.11 or newer; TESTS_VENV_DIR in the environment keeps the packages elsewhere.
set -eu
[ -z "${ZSH_VERSION:-}" ] || emulate sh
CDPATH='' cd -- "$(dirname -- "$0")/.."
venv=${TESTS_VENV_DIR:-.venv-tests}

find_python() {
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
        "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && return
    done
    echo "tests/run.sh: needs Python 3.11 or newer with its module venv (Debian and Ubuntu: sudo apt install python3-venv)" >&2
    exit 2
}
set_python() { if [ -f "$venv/Scripts/python.exe" ]; then python=$venv/Scripts/python.exe; else python=$venv/bin/python; fi; }
stamp() { "$python" -V 2>&1 && cat pyproject.toml; }

set_python
if [ "$(stamp 2>&1)" != "$(cat "$venv/stamp" 2>&1)" ]; then
    echo "installing the packages of the tests into $venv"
    if ! [ -f "$venv/stamp" ] || ! "$python" -m pip -V >/dev/null 2>&1; then
        find_python
        "$candidate" -m venv --clear "$venv"
        set_python
    fi
    "$python" -c '
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text("utf-8"))["project"]
extras = project["optional-dependencies"]
packages = project["dependencies"] + extras["full"] + extras["workflows"] + extras["report"] + extras["ray"] + extras["dev"]
pathlib.Path(sys.argv[1]).write_bytes("".join(f"{package}\n" for package in packages).encode())
' "$venv/packages"
    PIP_USER=0 "$python" -m pip --disable-pip-version-check install --quiet --prefer-binary -r "$venv/packages"
    stamp >"$venv/stamp"
fi

[ -t 1 ] || export NO_COLOR=1 MYPY_FORCE_COLOR=0
typed=api_request_parallel_processor.py
[ ! -d workflows ] || typed="$typed workflows"
"$python" -c 'import platform; print("python", platform.python_version(), platform.platform())'
"$python" -m pip --disable-pip-version-check freeze | grep -iE '^(aiohttp|tiktoken|uvloop|orjson|rich|bpe-openai|ruff|mypy|pytest|hypothesis)=' | tr '\n' ' '
echo
set -x
"$python" -m ruff check .
"$python" -m ruff format --check .
# shellcheck disable=SC2086 # a list of paths
"$python" -m mypy --strict $typed
"$python" -m mypy --strict --no-strict-equality --no-warn-unreachable tests # pytest.approx equals what mypy thinks it cannot
"$python" -m pytest --numprocesses auto --maxprocesses 4 "$@"
