#!/usr/bin/env bash
# Builds the memory core with AddressSanitizer and UBSan, all warnings as errors, and runs its tests on that build.
# usage: sanitize.sh PYTHON (one that has pytest, hypothesis and numpy)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=$1
cc=${CC:-cc}
tree=$PWD/build/sanitize
warnings=(-std=c11 -Wall -Wextra -Wshadow -Wconversion -Wsign-conversion -Werror)

api=(-DPy_LIMITED_API=0x030B0000 "-I$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')")

mkdir -p "$tree/swiftvideo/runtime"
# cache.c is ISO C without Python; the Python API itself is not pedantic (functions in void pointers). -O3, as users build
# it, warns of more. Python.h may bring any header of the system, so none of their names is ours: signal.h has raise().
"$cc" "${warnings[@]}" -Wpedantic -O3 -c runtime/csrc/cache.c -o "$tree/cache.o"
"$cc" "${warnings[@]}" "${api[@]}" -include signal.h -O3 -c runtime/csrc/module.c -o "$tree/module.o"
if [ "$(uname)" != Linux ]; then
    echo "The core compiles without a warning. Its tests run under the sanitizers on Linux alone, which preloads them."
    exit
fi
"$cc" "${warnings[@]}" "${api[@]}" -g -O1 -shared -fPIC -fvisibility=hidden -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=all \
    runtime/csrc/cache.c runtime/csrc/module.c -o "$tree/swiftvideo/runtime/_core.abi3.so"

# Only the core and its exceptions: the rest of the runtime would bring other libraries under the sanitizer. -S keeps the
# installed package's import hook out; the third-party packages come by path.
: > "$tree/swiftvideo/runtime/__init__.py"
ln -sfn "$PWD/runtime/errors.py" "$tree/swiftvideo/runtime/errors.py"
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The interpreter itself keeps memory to its end, so leaks are looked for by test_build.py instead.
LD_PRELOAD="$("$cc" -print-file-name=libasan.so) $("$cc" -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
    PYTHONPATH="$tree:$packages" SWIFTVIDEO_CORE="$tree" \
    "$python" -S -m pytest -q --noconftest --capture=sys -p no:cacheprovider tests/runtime/core
