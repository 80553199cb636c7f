#!/usr/bin/env bash
# Usage: scripts/get_consul.sh [DESTINATION]      (default: .cache/consul/consul in this project)
#
# Fetches the Consul binary that the registry's contract tests run against. It comes from Debian's
# bullseye suite, through whatever archive this machine's apt is configured with; no host is named
# here and the system's own apt state is not touched. Trust: apt checks the suite's signature and the
# package's digest, and the amd64 package is pinned below as well.
set -euo pipefail

readonly SUITE=bullseye
readonly PINNED_AMD64=e4e888bba104daba1d9161f49bfc52649a7e4efd45b1a7ead5bc54f2cb9c89d9 # 1.8.7
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
destination=${1:-$project/.cache/consul/consul}

fail() {
    echo "get_consul: $1" >&2
    exit 1
}

if [ -x "$destination" ] && "$destination" version >/dev/null 2>&1; then
    echo "$("$destination" version | head -n 1) is already at $destination"
    exit 0
fi

for tool in apt-get apt-cache dpkg dpkg-deb sha256sum; do
    command -v "$tool" >/dev/null ||
        fail "$tool is missing; put a consul binary at $destination (or name it in POPMESH_CONSUL)"
done

arch=$(dpkg --print-architecture)
scratch=$(mktemp -d "${TMPDIR:-/tmp}/get-consul.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/{lists/partial,cache/archives/partial,sources,preferences,unpacked}

# apt in a world of its own: only our one source, no installed packages, lists in the scratch folder.
private_apt=(
    -qq
    -o Dir::State::lists="$scratch/lists"
    -o Dir::State::status=/dev/null
    -o Dir::Cache="$scratch/cache"
    -o Dir::Cache::archives="$scratch/cache/archives"
    -o Dir::Cache::pkgcache=
    -o Dir::Cache::srcpkgcache=
    -o Dir::Etc::sourcelist=/dev/null
    -o Dir::Etc::sourceparts="$scratch/sources"
    -o Dir::Etc::preferences=/dev/null
    -o Dir::Etc::preferencesparts="$scratch/preferences"
    -o Acquire::Languages=none
    -o Acquire::Retries=3
    -o Acquire::Check-Valid-Until=false # an old suite's Release file is past its date
    -o APT::Sandbox::User=root          # the scratch folder belongs to us alone
)

# Archive roots as apt itself would use them (one-line and deb822 sources alike). Security archives
# have another layout and do not carry Consul.
configured_archives() {
    apt-get -o Dir::State::lists="$scratch/lists" update --print-uris 2>/dev/null |
        sed -nE "s#^'(.+)/dists/[^']*/InRelease' .*#\\1#p" | grep -v security | awk '!seen[$0]++'
}

# fetch_from ARCHIVE: leaves the package in the scratch folder, verified; false if it is not there.
fetch_from() {
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' \
        "$1" "$SUITE" "$KEYRING" >"$scratch/sources/only.sources"
    apt-get "${private_apt[@]}" update >/dev/null 2>"$scratch/problem" || return 1
    local indexed
    indexed=$(apt-cache "${private_apt[@]}" show --no-all-versions consul 2>/dev/null |
        awk '/^SHA256:/ { print $2; exit }')
    [ -n "$indexed" ] || return 1
    (cd "$scratch" && apt-get "${private_apt[@]}" download consul) >/dev/null 2>"$scratch/problem" ||
        return 1
    local got
    got=$(sha256sum "$scratch"/consul_*_"$arch".deb | cut -d' ' -f1)
    [ "$got" = "$indexed" ] || fail "the package's SHA-256 is $got, the signed index says $indexed"
    if [ "$arch" = amd64 ] && [ "$got" != "$PINNED_AMD64" ]; then
        fail "the package's SHA-256 is $got, expected $PINNED_AMD64"
    fi
}

# Into place by rename, so that a test running meanwhile sees no half-written file.
install_binary() {
    dpkg-deb --fsys-tarfile "$scratch"/consul_*_"$arch".deb |
        tar -xf - -C "$scratch/unpacked" ./usr/bin/consul
    mkdir -p "$(dirname "$destination")"
    install -m 0755 "$scratch/unpacked/usr/bin/consul" "$destination.$$"
    mv -f "$destination.$$" "$destination"
}

mapfile -t archives < <(configured_archives)
[ "${#archives[@]}" -gt 0 ] || fail "apt has no Debian archive configured"
for archive in "${archives[@]}"; do
    if fetch_from "$archive"; then
        install_binary
        echo "$("$destination" version | head -n 1) is at $destination"
        exit 0
    fi
done
echo "get_consul: suite $SUITE has no consul in any of ${#archives[@]} configured archives" >&2
tail -n 3 "$scratch/problem" 2>/dev/null | sed -E 's#https?://[^/ ]+#<archive>#g' >&2
exit 1
