#!/usr/bin/env bash
# test.sh: all tests, in four lanes side by side: most of what waits for processes, links, leases and
# loads runs while other things compute. In a row they would take more than twice as long. CPU and
# wall seconds of each in three lanes on two cores are beside them; a folder that no lane names computes.
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=(.venv/bin/pytest -p no:cacheprovider)  # two of them would write one cache
right=tests/e2e/test_e2e_right.py              # wants both cores
warmth=(tests/e2e/test_e2e_models.py tests/e2e/test_e2e_cold_start.py tests/e2e/test_e2e_site_loss.py)
waiting=(tests/pains tests/popmesh tests/registry tests/router tests/topology tests/wire)
agents=(tests/pop_node/test_*.py)
disks=(tests/pop_node/store tests/pop_node/peers tests/pop_node/residency tests/pop_node/drills)
sim=tests/sim  # computes, in two processes: last, when other lanes come to their end
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

lanes=()
lane() {  # lane NAME ARGUMENTS…: beside the others, shown when it has ended
    (trap - INT; exec "${pytest[@]}" "${@:2}") >"$logs/$1" 2>&1 &  # else it would be deaf to Ctrl-C
    lanes+=($!)
}

# kernels 140 / 170, what agents and engines are made of 160 / 330
named=("${waiting[@]}" "${agents[@]}" "${disks[@]}" tests/e2e "$sim")
lane computing tests "${named[@]/#/--ignore=}"
# agents with engines 140 / 320
lane agents "${agents[@]}" "${disks[@]}"
# warmth 100 / 170, what waits 50 / 175, sim 120 / 180
lane waiting "${warmth[@]}" "${waiting[@]}" "$sim"
trap 'wait "${lanes[@]}"; exit 130' INT  # Ctrl-C has reached the lanes too
trap 'kill -INT "${lanes[@]}" 2>/dev/null; wait "${lanes[@]}"; exit 143' TERM
failed=0
# the rest of e2e 380 / 510
"${pytest[@]}" tests/e2e --ignore "$right" "${warmth[@]/#/--ignore=}" || failed=1
for lane in "${lanes[@]}"; do wait "$lane" || failed=1; done
cat "$logs"/*
"${pytest[@]}" "$right" || failed=1
exit "$failed"
