#!/bin/sh
# Makes sure that Debian packages are installed: installs missing ones as root,
# names them otherwise. Kernel packages are refused: their hooks would touch the
# boot of this machine.
# usage: packages.sh PACKAGE...
set -eu
missing=
for p in "$@"; do
	case $p in linux-image*) echo "packages.sh: refusing kernel package $p" >&2; exit 1 ;; esac
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
	echo "missing packages:$missing" >&2
	echo "install them as root: apt-get install --no-install-recommends$missing" >&2
	exit 1
fi
command -v apt-get >/dev/null || { echo "missing packages:$missing (no apt-get here)" >&2; exit 1; }
echo "installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update -q && apt-get install -y -q --no-install-recommends $missing; } >"$log" 2>&1 || {
	tail -20 "$log" >&2
	exit 1
}
