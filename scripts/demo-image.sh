#!/usr/bin/env bash
# Builds the image of the demo and of the in-guest tests, as an OCI layout in
# build/demo-image, from Debian packages and nothing else.
#
#   scripts/demo-image.sh [--force]
#
# It does nothing when its inputs are unchanged: this script, the program that
# packs the layout, and the apt sources; --force builds again, for newer
# packages. Nothing outside build/ is written, but for the Debian package
# mmdebstrap, which is installed when it is missing and this runs as root, and
# for a temporary directory in /tmp where build/ is out of reach of the user
# namespace (in a home that only its owner may enter).
# As an ordinary user it needs user namespaces and the packages mmdebstrap and
# uidmap (with a range in /etc/subuid), or mmdebstrap, fakechroot and fakeroot.
set -euo pipefail

cd "$(dirname "$0")/.."
out=build/demo-image
stamp=$out/.inputs
suite=bookworm
# python3 has the sqlite3 module; attr and procps are for the tests in the guest.
packages=ca-certificates,git,python3,attr,procps
tags=(demo:latest "demo:$suite")
# Times in the image are clamped to the first day of the release, so that the
# same packages give the same image.
export SOURCE_DATE_EPOCH=1686355200
go=${GO:-go}

say() { echo "demo-image: $*" >&2; }
die() { say "$*"; exit 1; }

# The first of the running system's source files that has the suite: it may
# name a mirror. None: mmdebstrap's own default.
sources() {
  local f
  for f in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
    if [ -r "$f" ] && grep -q "^[^#]*\b$suite\b" "$f"; then echo "$f"; return; fi
  done
}

inputs() {
  local src
  src=$(sources)
  cat scripts/demo-image.sh scripts/ocilayout/main.go ${src:+"$src"} | sha256sum | cut -d' ' -f1
}

install_tools() {
  command -v mmdebstrap >/dev/null && return
  [ "$(id -u)" = 0 ] || die "missing: mmdebstrap; as root: apt-get install mmdebstrap uidmap"
  say "installing mmdebstrap"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q >&2
  apt-get install -y -q --no-install-recommends mmdebstrap >&2
}

# How mmdebstrap gets files of other owners: as root, in a user namespace, or pretended.
mode() {
  if [ "$(id -u)" = 0 ]; then echo root; return; fi
  if command -v newuidmap >/dev/null && unshare --user --map-root-user true 2>/dev/null &&
    grep -q "^\($(id -un)\|$(id -u)\):" /etc/subuid 2>/dev/null; then echo unshare; return; fi
  if command -v fakechroot >/dev/null && command -v fakeroot >/dev/null; then echo fakechroot; return; fi
  die "an ordinary user needs the packages fakechroot and fakeroot, or uidmap with a range for $(id -un) in /etc/subuid and user namespaces"
}

# Removes what it can of a temporary directory. Files made in a user namespace
# have owners that only that namespace may speak for.
remove() {
  [ -e "$1" ] || return 0
  rm -rf --one-file-system "$1" 2>/dev/null ||
    unshare --user --map-root-user --map-auto rm -rf --one-file-system "$1" 2>/dev/null || true
}

# Whether everybody may enter a directory and all above it: in a user namespace
# mmdebstrap is somebody else, even for its own caller.
entered_by_all() {
  local d=$1
  while :; do
    case $(stat -c %A "$d") in *[xt]) ;; *) return 1 ;; esac
    [ "$d" != / ] || return 0
    d=$(dirname "$d")
  done
}

# The directory that the file tree is made in.
workdir() {
  remove build/tmp # what a killed run left
  mkdir -p build/tmp
  if [ "$1" = unshare ] && ! entered_by_all "$PWD/build/tmp"; then
    local d
    d=$(mktemp -d /tmp/msb-demo-image.XXXXXX)
    chmod 755 "$d"
    echo "$d"
    return
  fi
  echo "$PWD/build/tmp"
}

# What the running system needs to reach its mirror: proxies and relaxed dates.
apt_options() {
  apt-config dump 2>/dev/null | grep -iE '^Acquire::(https?::|Check-)' | grep -v '""' | sed 's/^/--aptopt=/'
}

build() {
  local tmp=$out.tmp src opts m
  src=$(sources)
  m=$(mode)
  mapfile -t opts < <(apt_options)
  rm -rf "$tmp"
  say "building from Debian $suite packages ($packages), mode $m, sources ${src:-default}"
  work=$(workdir "$m")
  trap 'remove "$work"' EXIT
  TMPDIR=$work mmdebstrap --mode="$m" --variant=minbase --include="$packages" "${opts[@]}" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/lintian/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook='rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$1"/etc/resolv.conf "$1"/etc/hostname' \
    --customize-hook='rm -rf "$1"/etc/apt/sources.list.d/* "$1"/var/cache/ldconfig/aux-cache "$1"/var/log/*' \
    --customize-hook='printf "deb http://deb.debian.org/debian '"$suite"' main\ndeb http://deb.debian.org/debian-security '"$suite"'-security main\n" >"$1"/etc/apt/sources.list' \
    "$suite" - ${src:+"$src"} |
    "$go" run ./scripts/ocilayout -out "$tmp" "${tags[@]/#/-tag=}" -title "microsandbox demo" -epoch "$SOURCE_DATE_EPOCH" \
      -env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin -env LANG=C.UTF-8 -cmd python3
  inputs >"$tmp/.inputs"
  rm -rf "$out"
  mv "$tmp" "$out"
}

mkdir -p build
exec 9>build/.demo-image.lock
flock 9 # a second make waits, and then finds it done
[ "${1-}" = --force ] && rm -f "$stamp"
if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$(inputs)" ]; then
  say "$out is up to date"
  exit 0
fi
install_tools
build
say "$out: $(du -sh --apparent-size "$out" | cut -f1), $SECONDS s"
