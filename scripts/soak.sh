#!/bin/bash
# The long runs: races and hostile images at full length, then every fuzz target.
# usage: soak.sh   (hours; MSB_SOAK and FUZZ set the lengths)
set -euo pipefail
cd "$(dirname "$0")/.."
export MSB_SOAK=${MSB_SOAK:-10m} MSB_SOAK_IMAGES=${MSB_SOAK_IMAGES:-100000}
export MSB_TEST_SEED=$PWD/build/home MSB_TEST_MSB=$PWD/bin/msb
go test -count=1 -timeout 6h -run 'TestSwapRace' ./internal/volumefs
go test -count=1 -timeout 6h -run 'TestMutatedImages' ./internal/diskimg
go test -count=20 -timeout 6h -run 'TestKilled|TestProcesses|TestThousand|TestRename|TestAttachAgainst' ./internal/volstore
go test -count=5 -timeout 6h -run 'TestKillMatrix|TestRunKilledAnywhere' .
MSB_SOAK_CUTS=${MSB_SOAK_CUTS:-10000} go test -count=1 -timeout 6h -run 'TestPowerCut$' ./internal/powercut
MSB_SOAK_GROW=${MSB_SOAK_GROW:-2000} go test -count=1 -timeout 6h -run 'TestGrow' ./internal/vmm/qemu
exec scripts/fuzz.sh "${FUZZ:-10m}"
