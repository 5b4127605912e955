#!/bin/bash
# Runs all tests, then the fuzz target over paths and trees for a minute, and
# looks for what they left behind: processes, mounts, loop devices, network
# namespaces, sockets, locks and files. All of them get temporary directories of
# their own, on disk and in memory, so that a leftover is known by its path.
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d /tmp/msb-test.XXXXXX)
chmod 755 "$tmp" # tests that drop root still have to reach their own directories
shm=$(mktemp -d /dev/shm/msb-test.XXXXXX 2>/dev/null || mktemp -d "$tmp/memory.XXXXXX")
chmod 755 "$shm"
trap 'rm -rf --one-file-system "$tmp" "$shm"' EXIT

state() {
	echo "mounts $(wc -l </proc/self/mounts)"
	echo "loops $(losetup -a 2>/dev/null | wc -l)"
	echo "netns $(ip netns list 2>/dev/null | wc -l)"
}
before=$(state)

export TMPDIR=$tmp MSB_TEST_MEMORY=$shm MSB_TEST_SEED=$PWD/build/home MSB_TEST_MSB=$PWD/bin/msb
unset MSB_HOME MSB_PATH MSB_KERNEL MSB_ACCEL
code=0
go test -count=1 -timeout 25m "$@" ./... || code=$?
if [ $code = 0 ]; then scripts/fuzz.sh "${MSB_FUZZ:-60s}" FuzzOperations || code=$?; fi

left=0
complain() {
	echo "left behind: $1" >&2
	left=1
}
[ "$before" = "$(state)" ] || complain "mounts, loop devices or namespaces: before $(echo $before), after $(echo $(state))"
for p in /proc/[0-9]*; do
	[ "${p#/proc/}" != $$ ] || continue
	# A file server knows no path: its open files, locks among them, tell.
	if { tr '\0' ' ' <"$p/cmdline"; tr '\0' '\n' <"$p/environ"; readlink "$p/cwd"; ls -l "$p/fd"; } 2>/dev/null | grep -qF "$tmp"; then
		case $(tr '\0' ' ' <"$p/cmdline" 2>/dev/null) in
		*scripts/test.sh*) ;;
		*) complain "process ${p#/proc/}: $(tr '\0' ' ' <"$p/cmdline" 2>/dev/null)" ;;
		esac
	fi
done
if grep -qF "$tmp" /proc/net/unix; then complain "sockets: $(grep -F "$tmp" /proc/net/unix)"; fi
files=$(find "$tmp" "$shm" -mindepth 1 -maxdepth 2 -not -path "$tmp/go-build*" -not -path "$tmp/memory.*" 2>/dev/null | head -5)
[ -z "$files" ] || complain "files: $files"
[ $left = 0 ] || exit 1
exit $code
