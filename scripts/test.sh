#!/usr/bin/env bash
# test.sh: all tests, in lanes side by side: one that mostly computes, and those that mostly wait for
# processes, links, leases and loads. In a row they would take twice as long.
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=(.venv/bin/pytest -p no:cacheprovider)  # two of them would write one cache
right=tests/e2e/test_e2e_right.py              # wants both cores
warmth=(tests/e2e/test_e2e_models.py tests/e2e/test_e2e_cold_start.py tests/e2e/test_e2e_site_loss.py)
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

"${pytest[@]}" tests --ignore tests/e2e --ignore tests/sim >"$logs/computing" 2>&1 &
lanes=($!)
"${pytest[@]}" "${warmth[@]}" tests/sim >"$logs/warmth" 2>&1 &
lanes+=($!)
trap 'kill -INT "${lanes[@]}" 2>/dev/null; wait "${lanes[@]}"; exit 130' INT TERM
failed=0
"${pytest[@]}" tests/e2e --ignore "$right" "${warmth[@]/#/--ignore=}" || failed=1
for lane in "${lanes[@]}"; do wait "$lane" || failed=1; done
cat "$logs/warmth" "$logs/computing"
"${pytest[@]}" "$right" || failed=1
exit "$failed"
