#!/bin/bash
# Runs every fuzz target of the tree for a while, one after the other.
# usage: fuzz.sh DURATION   (as go test -fuzztime takes it: 60s, 10m)
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-60s}
git ls-files '*_test.go' | xargs grep -l '^func Fuzz' | xargs -n1 dirname | sort -u | while read -r dir; do
	for target in $(grep -h -o '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | sed 's/func //' | sort -u); do
		echo "== $dir $target"
		go test "./$dir" -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 20x </dev/null
	done
done
