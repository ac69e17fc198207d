#!/usr/bin/env bash
# Run a command with Python 3.14 where the machine has none, on Debian or the like and as root:
#
#     tests/packaging/python314.sh make test PYTHON=python3 ARGS='tests/unit tests/contract'
#
# Debian 14 (forky) has that Python. A minimal one is unpacked by debootstrap, once per machine, under
# ${XDG_CACHE_HOME:-~/.cache}/sharednorm; about 450 MB. The command runs in a chroot in it, in this checkout, which is
# mounted there; so what `make` makes (.venv-3.14.x) stays. The mounts are in a namespace of their own, which ends with
# the command: nothing has to be unmounted, however it ends. Packages come from the mirror in this machine's apt sources,
# and pip has this machine's PIP_ variables and certificates.
set -euo pipefail

suite=forky
checkout=$(cd "$(dirname "$0")/../.." && pwd)
base=${XDG_CACHE_HOME:-$HOME/.cache}/sharednorm/debian-$suite

fail() {
    echo "python314.sh: $*" >&2
    exit 1
}

[ $# -gt 0 ] || fail 'which command? For example: make test PYTHON=python3'
[ "$(id -u)" = 0 ] || fail 'debootstrap and chroot need root'
for program in debootstrap unshare chroot; do
    command -v $program >/dev/null || fail "$program is not installed: apt-get install debootstrap util-linux"
done

if [ ! -e "$base" ]; then
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
        sed -n '/security/d; s/^Debian //p' | head -n 1)
    [ -n "$mirror" ] || fail 'apt knows no mirror of Debian: apt-get update'
    echo "unpacking Debian $suite into $base" >&2
    mkdir -p "$(dirname "$base")"
    new=$(mktemp -d "$base.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    # debootstrap is older than the suite, which is made like every new one.
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,make,git,redis-server \
        "$suite" "$new" "$mirror" /usr/share/debootstrap/scripts/sid >"$new.log" 2>&1 ||
        { tail -n 20 "$new.log" >&2; fail "debootstrap has failed; $new.log has all that it said"; }
    rm -rf "$new.log" "$new"/var/cache/apt/archives/*.deb
    chmod 755 "$new"
    mv -T "$new" "$base"
    trap - EXIT
fi
chroot "$base" python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 14))' ||
    fail "the Python of $base is not 3.14"
cp -L "${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}" "$base/etc/ssl/certs/ca-certificates.crt"
cp -L /etc/resolv.conf "$base/etc/resolv.conf"
mkdir -p "$base/checkout"

# The tests' temporary files are the machine's, and go with this script.
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
chmod 1777 "$temporary"
unset TMPDIR XDG_CACHE_HOME VIRTUAL_ENV
# shellcheck disable=SC2016 - the inner shell's variables
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    unshare --mount --propagation private sh -euc '
    base=$1 checkout=$2 temporary=$3
    shift 3
    mount -t proc proc "$base/proc"
    mount --rbind /sys "$base/sys"
    mount --rbind /dev "$base/dev"
    mount --bind "$temporary" "$base/tmp"
    mount --bind "$checkout" "$base/checkout"
    exec chroot "$base" sh -c '\''cd /checkout && exec "$@"'\'' sh "$@"
' sh "$base" "$checkout" "$temporary" "$@"
