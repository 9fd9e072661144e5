#!/usr/bin/env bash
# All tests, from nothing but Python: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
python -m pytest -q "$@"
