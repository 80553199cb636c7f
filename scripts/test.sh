#!/usr/bin/env bash
# test.sh: all tests, in two halves side by side: those that mostly wait for processes, links and
# leases, and those that mostly compute. In a row they would take half as long again.
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=(.venv/bin/pytest -p no:cacheprovider)  # two of them would write one cache
right=tests/e2e/test_e2e_right.py              # wants both cores
log=$(mktemp)
trap 'rm -f "$log"' EXIT

"${pytest[@]}" tests --ignore tests/e2e >"$log" 2>&1 &
computing=$!
trap 'kill -INT "$computing" 2>/dev/null; wait "$computing"; exit 130' INT TERM
failed=0
"${pytest[@]}" tests/e2e --ignore "$right" || failed=1
wait "$computing" || failed=1
cat "$log"
"${pytest[@]}" "$right" || failed=1
exit "$failed"
