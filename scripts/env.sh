# Sourced by the other scripts: goes to the repository's root, makes .venv when there is none, installs
# requirements.txt when it has changed since, and puts .venv first on the PATH.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv || {
        echo "could not make .venv: install Python 3.10 or newer with its venv module (Debian: python3-venv)" >&2
        exit 1
    }
fi
if ! cmp -s requirements.txt .venv/requirements.txt; then
    echo "installing requirements.txt into .venv (several GB, a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt
fi
export PATH="$PWD/.venv/bin:$PATH"
