#!/usr/bin/env bash
# All tests, from nothing but Python: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "$0")/env.sh"
python -m pytest -q "$@"
