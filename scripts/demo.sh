#!/bin/bash
# The main job, end to end, on real parts: a volume is made and seeded from the
# host; a microVM boots from a Debian image with the volume mounted; a Python
# program in it reads the seed and writes results; the results are read back from
# the host. Then the same data goes through a disk volume and two sandboxes.
# usage: MSB_HOME=... demo.sh path/to/msb
set -euo pipefail
msb=$1
begin=$(date +%s%N)
step=0
bold= plain=
if [ -t 1 ] && [ -z "${NO_COLOR-}" ] && [ "${TERM-dumb}" != dumb ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
step() {
	step=$((step + 1))
	printf '\n%s%d. %s%s  (%s s)\n' "$bold" $step "$1" "$plain" "$(awk "BEGIN{printf \"%.1f\", ($(date +%s%N)-$begin)/1e9}")"
}
run() {
	printf '   $ msb'
	printf ' %q' "$@"
	echo
	"$msb" "$@" | sed 's/^/   /'
}
fail() {
	echo "demo failed: $1" >&2
	exit 1
}
clean() {
	"$msb" rm -f -q demo-a demo-b 2>/dev/null || true
	"$msb" volume rm -q demo-data demo-disk 2>/dev/null || true
}
clean
trap clean EXIT

step 'What this machine offers'
run doctor

step 'A volume, made and seeded from the host; no VM runs'
run volume create demo-data --label purpose=demo
printf 'hello from the host\n' | "$msb" volume fs write demo-data /seed.txt
run volume fs ls demo-data /

step 'A Debian image with Python and git, and a sandbox with the volume mounted'
run image ls
run create --name demo-a -v demo-data:/data demo

step 'A program in the guest reads the seed and writes a result and a 64 MiB file'
read -r -d '' program <<'PY' || true
import hashlib, random
seed = open("/data/seed.txt").read().strip()
rng = random.Random(seed)
h = hashlib.sha256()
with open("/data/big.bin", "wb") as f:
    for _ in range(64):
        block = rng.randbytes(1 << 20)
        f.write(block)
        h.update(block)
with open("/data/result.txt", "w") as f:
    f.write(f"seed: {seed}\nsha256: {h.hexdigest()}\n")
print("guest computed", h.hexdigest())
PY
run exec demo-a -- python3 -c "$program"
run exec demo-a -- git --version
guest=$("$msb" exec demo-a -- sha256sum /data/big.bin | cut -d' ' -f1)

step 'Stop; the result read through VolumeFs and by plain cat'
run stop demo-a
run volume fs read demo-data /result.txt
echo "   \$ cat $MSB_HOME/volumes/demo-data/result.txt"
sed 's/^/   /' "$MSB_HOME/volumes/demo-data/result.txt"
host=$(sha256sum "$MSB_HOME/volumes/demo-data/big.bin" | cut -d' ' -f1)
volumefs=$("$msb" volume fs read demo-data /big.bin | sha256sum | cut -d' ' -f1)
[ "$guest" = "$host" ] && [ "$guest" = "$volumefs" ] || fail "checksums differ: guest $guest, host $host, VolumeFs $volumefs"
grep -q "sha256: $guest" "$MSB_HOME/volumes/demo-data/result.txt" || fail 'the result does not name the checksum'
echo "   checksums equal on both sides: $guest"

step 'The same through a disk volume: one sandbox writes, the next one reads'
run volume create demo-disk --kind disk --size 256M
run rm demo-a
run run -q --name demo-a --mount-named demo-disk:/disk:kind=disk,size=256M -v demo-data:/data:ro demo -- sh -c 'cp /data/big.bin /data/result.txt /disk/ && sync && ls -l /disk'
run run -q --name demo-b --mount-named demo-disk:/disk:kind=disk,size=256M demo -- sh -c 'cat /disk/result.txt && sha256sum /disk/big.bin'
disk=$("$msb" start -q demo-b && "$msb" exec demo-b -- sha256sum /disk/big.bin | cut -d' ' -f1)
run stop demo-b
[ "$disk" = "$guest" ] || fail "checksums differ: through the disk volume $disk, before $guest"
echo "   checksum equal after a disk volume and three boots: $disk"

step 'Volumes outlive sandboxes'
run rm demo-a demo-b
run volume ls
printf '\nmain job done in %s s\n' "$(awk "BEGIN{printf \"%.1f\", ($(date +%s%N)-$begin)/1e9}")"
