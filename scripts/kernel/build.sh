#!/bin/sh
# Builds the guest kernel from Debian's linux-source-6.1 with msb.config, and
# prints the path of the stripped vmlinux as its last line.
#
#   scripts/kernel/build.sh [BUILD-DIR]
#
# BUILD-DIR (default: ${TMPDIR:-/tmp}/msb-kernel-UID) keeps the source and the
# objects, so a second run builds only what changed. JOBS sets the number of
# compilers. About 16 CPU minutes; 3 GiB of disk.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
dir=${1:-${TMPDIR:-/tmp}/msb-kernel-$(id -u)}
jobs=${JOBS:-$(nproc)}
series=6.1

say() { echo "kernel: $*" >&2; }
die() { say "$*"; exit 1; }

missing=
for tool in gcc make bc flex bison xz strip dpkg-deb; do
	command -v "$tool" >/dev/null || missing="$missing $tool"
done
[ -e /usr/include/gelf.h ] || missing="$missing libelf"
[ -z "$missing" ] || die "missing:$missing; on Debian: apt-get install gcc make bc flex bison libelf-dev xz-utils binutils"

mkdir -p "$dir"
cd "$dir"

# The source package is downloaded and unpacked, never installed: no root needed.
tarball=/usr/src/linux-source-$series.tar.xz
if [ ! -e "$tarball" ]; then
	tarball=$dir/pkg/usr/src/linux-source-$series.tar.xz
	if [ ! -e "$tarball" ]; then
		set -- linux-source-${series}_*.deb
		[ -e "$1" ] || apt-get download linux-source-$series >&2 ||
			die "cannot download linux-source-$series; run apt-get update as root, or put linux-source-$series.tar.xz into /usr/src"
		set -- linux-source-${series}_*.deb
		dpkg-deb -x "$1" pkg
	fi
fi
src=$dir/linux-source-$series
if [ ! -e "$src/.unpacked" ]; then
	say "unpacking $tarball"
	rm -rf "$src"
	tar -xJf "$tarball" -C "$dir"
	sed -i 's,^\(#define LAPIC_CAL_LOOPS[[:space:]]*\)(HZ/10),\1(HZ/50),' "$src/arch/x86/kernel/apic/apic.c"
	grep -q 'LAPIC_CAL_LOOPS[[:space:]]*(HZ/50)' "$src/arch/x86/kernel/apic/apic.c" ||
		say "warning: the LAPIC calibration change does not apply; the guest boots 80 ms slower"
	touch "$src/.unpacked"
fi

out=$dir/build
mkdir -p "$out"
export KBUILD_BUILD_USER=msb KBUILD_BUILD_HOST=msb KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC'
kmake() { make -s -C "$src" O="$out" "$@" >&2; }
if ! cmp -s "$here/msb.config" "$out/msb.config"; then
	kmake tinyconfig
	(cd "$src" && scripts/kconfig/merge_config.sh -m -O "$out" "$out/.config" "$here/msb.config") >"$out/merge.log" 2>&1 ||
		die "merging the configuration fails; see $out/merge.log"
	kmake olddefconfig
	# What the fragment asks for and the configuration does not have.
	grep '=y$' "$here/msb.config" | while read -r option; do
		grep -qx "$option" "$out/.config" || say "warning: $option did not stick"
	done
	cp "$here/msb.config" "$out/msb.config"
fi
say "compiling with $jobs jobs in $out"
kmake -j"$jobs" vmlinux
strip -s -o "$out/vmlinux.stripped" "$out/vmlinux"
say "done: $(wc -c <"$out/vmlinux.stripped") bytes"
echo "$out/vmlinux.stripped"
