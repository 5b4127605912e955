#!/bin/sh
# Puts Debian's stock cloud kernel into the home: its package is downloaded and
# unpacked, never installed, because its hooks would touch this machine's boot.
# No root needed.
# usage: stock.sh MSB CACHE-DIR
set -eu
msb=$1 cache=$2
mkdir -p "$cache"
if ! ls "$cache"/linux-image-*.deb >/dev/null 2>&1; then
	pkg=$(apt-cache depends --no-suggests --no-recommends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image-/{print $2; exit}')
	if [ -z "$pkg" ] && [ "$(id -u)" = 0 ]; then
		apt-get update -q >/dev/null 2>&1 || true
		pkg=$(apt-cache depends --no-suggests --no-recommends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image-/{print $2; exit}')
	fi
	if [ -z "$pkg" ]; then
		echo "kernel-stock: apt knows no linux-image-cloud-amd64; run apt-get update as root, or msb kernel add FILE" >&2
		exit 1
	fi
	echo "downloading $pkg (not installing it)" >&2
	(cd "$cache" && apt-get download -q "$pkg" >download.log 2>&1) || {
		tail -5 "$cache/download.log" >&2
		exit 1
	}
fi
"$msb" kernel add -q "$(ls "$cache"/linux-image-*.deb | tail -1)"
