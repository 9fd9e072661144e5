# Sourced by the other scripts: puts a Python with requirements.txt first on the PATH. That is the active environment
# when it has them, else .venv in the repository, made and filled when it does not fit. Paths stay the caller's.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

has_requirements() { # python
    "$1" - "$ROOT/requirements.txt" << 'PROGRAM' 2> /dev/null
import importlib.metadata, re, sys
def numbers(text): return [int(part) for part in re.findall(r"\d+", text)[:3]]
for line in open(sys.argv[1]):
    name, least = re.match(r"([\w-]+)(?:>=([\d.]+))?", line).groups()
    if numbers(importlib.metadata.version(name)) < numbers(least or "0"):
        sys.exit(1)
PROGRAM
}

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! has_requirements python; then
    if ! "$ROOT/.venv/bin/python" -m pip --version > /dev/null 2>&1; then
        python=${PYTHON:-python3}
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            echo "$python is no Python 3.10 or newer: install one and name it, as in PYTHON=python3.12 bash $0" >&2
            exit 1
        fi
        "$python" -m venv --clear "$ROOT/.venv" || {
            echo "$python could not make $ROOT/.venv: install its venv module (Debian: python3-venv)" >&2
            exit 1
        }
    fi
    if ! has_requirements "$ROOT/.venv/bin/python"; then
        echo "installing requirements.txt into $ROOT/.venv (several GB, a few minutes)"
        "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
    fi
    export PATH="$ROOT/.venv/bin:$PATH"
fi
# For python -m analysis.NAME from any folder; a folder of the caller's does not stand in for ours.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
