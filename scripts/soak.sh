#!/bin/bash
# The long runs: kills, power cuts, races and hostile images at full length, then
# every fuzz target. Each part ends with lines "soak: part=... findings=...";
# all of them are in build/soak.txt at the end. The first finding ends the run.
# usage: soak.sh [PART...]   (hours; the variables below set the lengths)
set -euo pipefail
cd "$(dirname "$0")/.."
export MSB_TEST_SEED=$PWD/build/home MSB_TEST_MSB=$PWD/bin/msb
export MSB_SOAK=${MSB_SOAK:-10m} MSB_SOAK_KILLS=${MSB_SOAK_KILLS:-10000} MSB_SOAK_IMAGES=${MSB_SOAK_IMAGES:-100000}
export MSB_SOAK_CUTS=${MSB_SOAK_CUTS:-10000} MSB_SOAK_GROW=${MSB_SOAK_GROW:-2000}
parts=" ${*:-kills containment images races guests shared cuts grow ledger fuzz} "
mkdir -p build
results=$PWD/build/soak.txt log=$(mktemp)
trap 'rm -f "$log"' EXIT
: >"$results"

# part NAME TIMES PACKAGE TESTS: runs tests so many times and keeps their figures.
part() {
	[[ $parts == *" $1 "* ]] || return 0
	local start=$SECONDS
	echo "== $1"
	if ! go test -v -count="$2" -timeout 12h -run "$4" "$3" >"$log" 2>&1; then
		grep -v '^ *=== ' "$log" | tail -100
		echo "soak: part=$1 failed"
		exit 1
	fi
	if ! grep -o 'soak: part=.*' "$log"; then
		echo "soak: part=$1 tests=$(grep -c '^--- PASS' "$log") findings=0 seconds=$((SECONDS - start))"
	fi | tee -a "$results"
}

part kills 1 ./internal/volstore '^TestKilledAnywhere$'
part containment 1 ./internal/volumefs '^TestSwapRace$'
part images 1 ./internal/diskimg '^TestMutatedImages$'
part races 20 ./internal/volstore '^(TestKilledAt|TestKilledBefore|TestProcesses|TestThousand|TestRenameAgainst|TestAttachAgainst)'
part guests 5 . '^(TestKillMatrix|TestRunKilledAnywhere)'
MSB_SHARED_ROUNDS=${MSB_SHARED_ROUNDS:-60} part shared 5 ./internal/conformance '^TestSharedVolume$'
part cuts 1 ./internal/powercut '^TestPowerCut$'
part grow 1 ./internal/vmm/qemu '^TestGrow'
MSB_TEST_MODEL_OPS=${MSB_SOAK_MODEL_OPS:-1000000} part ledger 1 ./internal/volumefs '^TestModel'
MSB_TEST_MODEL_OPS=${MSB_SOAK_MODEL_OPS:-1000000} part ledger 1 ./internal/fuseserver '^TestQuotaModel$'
part ledger 20 ./internal/ledger '^Test(Killed|Stopped|PowerCut|LimitHolds|OrphansChangeHands)'
if [[ $parts == *" fuzz "* ]]; then
	scripts/fuzz.sh "${FUZZ:-10m}" | tee -a "$results"
fi
echo "== figures"
cat "$results"
