#!/usr/bin/env bash
# sanitize.sh [pytest arguments]: the tests of the native operations and decoders on a library that is
# built with the address and undefined-behaviour sanitizers; the first finding ends the process.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
export POPMESH_CACHE=$PWD/build/sanitize  # never where a node would find the library
tests=(tests/kernels/test_native_{linear,attention,rowwise}.py
	tests/kernels/test_{decoder,resident_form,resident_products,sampling,sampling_limits}.py
	tests/kernels/test_codec_{round_trip,damage}.py)

# Under the name by which the tests look for the library of these sources.
{ read -r compiler; read -r library; read -ra flags; read -ra linked; } < <("$python" -c '
from kernels.native import build
compiler = build.find_compiler()
print(compiler, build.cache_folder() / f"{build.library_digest(compiler)}.so", sep="\n")
print(*build.FLAGS)
print(*build.LINKED)')
if [ ! -e "$library" ]; then
	flags+=(-O1 -g1 -fno-var-tracking-assignments -fsanitize=address,undefined -fno-sanitize-recover=all)
	objects=$(mktemp -d)
	trap 'rm -rf "$objects"' EXIT
	find kernels/native -name '*.c' -print0 | xargs -0 -P "$(nproc)" -I{} bash -c \
		'"${@:3}" -c "$1" -o "$2/$(basename "$1").o"' compile {} "$objects" \
		"$compiler" "${flags[@]}"
	mkdir -p "$(dirname "$library")"
	"$compiler" "${flags[@]}" "$objects"/*.o -o "$objects/library" "${linked[@]}"
	mv "$objects/library" "$library"
fi

# The interpreter is not built with the sanitizers: their runtime must come first, and with it what
# throws. What the interpreter never frees is none of our leaks. Reports go past pytest's capture,
# which would be lost with the process.
export LD_PRELOAD
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
[ $# -gt 0 ] || set -- "${tests[@]}"
"$python" -m pytest -p no:cacheprovider --capture=sys "$@"
