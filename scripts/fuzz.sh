#!/bin/bash
# Runs fuzz targets for a while, one after the other: all of the tree, or those
# named. They run in a directory of their own and leave nothing in the tree; an
# input that fails is printed as the file that makes it a test.
# usage: fuzz.sh DURATION [TARGET...]   (as go test -fuzztime takes it: 60s, 10m)
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-60s}
shift || true
tmp=$(mktemp -d "${TMPDIR:-/tmp}/msb-fuzz.XXXXXX")
shm=$(mktemp -d /dev/shm/msb-fuzz.XXXXXX 2>/dev/null || mktemp -d "$tmp/XXXXXX")
trap 'rm -rf "$tmp" "$shm"' EXIT
# Workers are killed when the time is up and cannot clean up themselves.
export TMPDIR=$tmp MSB_TEST_MEMORY=$shm

# fuzz DIR TARGET: one target. The seeds of its package are found by testdata/fuzz.
fuzz() {
	local dir=$1 target=$2 work=$tmp/$2 start=$SECONDS code=0
	mkdir -p "$work/testdata/fuzz"
	go test -c -o "$work/fuzz.test" -fuzz "^$target\$" "./$dir" >/dev/null
	[ ! -d "$dir/testdata/fuzz/$target" ] || cp -r "$dir/testdata/fuzz/$target" "$work/testdata/fuzz/"
	find "$work/testdata" -type f | sort >"$work/seeds"
	(cd "$work" && ./fuzz.test -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "$time" \
		-test.fuzzminimizetime 20x -test.fuzzcachedir "$work/cache" </dev/null >log 2>&1) || code=$?
	local execs found
	execs=$(grep -o 'execs: [0-9]*' "$work/log" | tail -1 | tr -dc 0-9 || true)
	found=$(find "$work/testdata" -type f | sort | comm -13 "$work/seeds" - | wc -l)
	[ $code = 0 ] || tail -60 "$work/log"
	find "$work/testdata" -type f | sort | comm -13 "$work/seeds" - | while read -r input; do
		echo "input that fails: $dir/${input#"$work/"}"
		cat "$input"
	done
	echo "soak: part=fuzz target=$dir.$target execs=${execs:-0} findings=$found seconds=$((SECONDS - start))"
	return $code
}

git ls-files '*_test.go' | xargs grep -l '^func Fuzz' | xargs -n1 dirname | sort -u | while read -r dir; do
	for target in $(grep -h -o '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | sed 's/func //' | sort -u); do
		[ $# = 0 ] || [[ " $* " == *" $target "* ]] || continue
		fuzz "$dir" "$target"
	done
done
