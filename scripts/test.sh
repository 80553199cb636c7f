#!/usr/bin/env bash
# test.sh: all tests, in three lanes side by side: most of what waits for processes, links, leases and
# loads runs while other things compute. In a row they would take more than twice as long. CPU and
# wall seconds of each on two busy cores are beside the lanes; a folder that no lane names computes.
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=(.venv/bin/pytest -p no:cacheprovider)  # two of them would write one cache
right=tests/e2e/test_e2e_right.py              # wants both cores
warmth=(tests/e2e/test_e2e_models.py tests/e2e/test_e2e_cold_start.py tests/e2e/test_e2e_site_loss.py)
waiting=(tests/pains tests/popmesh tests/registry tests/router tests/topology tests/wire)
kernels=tests/kernels
sim=tests/sim  # computes, in two processes: last, when other lanes come to their end
beside=("${warmth[@]}" "${waiting[@]}" "$sim")
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# pop_node 300 / 650
"${pytest[@]}" tests --ignore tests/e2e --ignore "$kernels" "${beside[@]/#/--ignore=}" \
    >"$logs/computing" 2>&1 &
lanes=($!)
# warmth 100 / 170, what waits 50 / 175, sim 120 / 180
"${pytest[@]}" "${beside[@]}" >"$logs/beside" 2>&1 &
lanes+=($!)
trap 'kill -INT "${lanes[@]}" 2>/dev/null; wait "${lanes[@]}"; exit 130' INT TERM
failed=0
# the rest of e2e 380 / 510, kernels 120 / 170
"${pytest[@]}" tests/e2e --ignore "$right" "${warmth[@]/#/--ignore=}" || failed=1
"${pytest[@]}" "$kernels" || failed=1
for lane in "${lanes[@]}"; do wait "$lane" || failed=1; done
cat "$logs/beside" "$logs/computing"
"${pytest[@]}" "$right" || failed=1
exit "$failed"
