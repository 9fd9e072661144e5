#!/usr/bin/env bash
# The campaign: bash tests/campaigns/run.sh [how many times as long as in the tests, 25]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/env.sh"
cd "$ROOT"
CAMPAIGN=${1:-25} python -m pytest -q tests/test_errors.py -k "faults_change or a_damaged_file"
