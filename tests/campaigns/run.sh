#!/usr/bin/env bash
# The campaigns: bash tests/campaigns/run.sh [share of the usual numbers, 1]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/env.sh"
export PYTHONPATH="$ROOT/tests:$PYTHONPATH" OMP_NUM_THREADS=1
export PYTHONWARNINGS=ignore:resource_tracker # of locks that killed processes leave
times() { python -c "print(max(10, round($1 * $share)))"; }
share=${1:-1} status=0
python -m campaigns.faults --count "$(times 150)" || status=1
python -m campaigns.faults --campaign long_run --epochs "$(times 200)" || status=1
python -m campaigns.mutations --cases "$(times 10000)" || status=1
exit $status
