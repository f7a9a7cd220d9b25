#!/usr/bin/env bash
# Builds the C++ library with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the
# sources, and runs the microkernels' tests, every op and whole networks on it. The Python that is
# active needs what `pip install --no-build-isolation -e ".[test]"` needs. Usage: tests/sanitized.sh
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r setup.py pyproject.toml README.md LICENSE csrc tests "$work"
mkdir "$work/mnv4_kernels"
tar -c --exclude='*.so' --exclude=__pycache__ mnv4_kernels | tar -x -C "$work"
cd "$work"

MNV4_KERNELS_SANITIZE=address,undefined python setup.py -q build_ext --inplace

# Python itself isn't instrumented, so the runtime comes first by preload. It leaks by design at
# exit, as does torch; C++ exceptions that cross libraries need the runtime's own copy of them.
compiler=${CXX:-c++}
runtime=$($compiler -print-file-name=libasan.so):$($compiler -print-file-name=libubsan.so)
runtime+=:$($compiler -print-file-name=libstdc++.so.6)
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH=$work PYTHONMALLOC=malloc OMP_NUM_THREADS=2

# the slowest sizes of products in terms run without the sanitizers only: seven seconds each here
LD_PRELOAD=$runtime python -m pytest -q -n 0 -p no:cacheprovider tests/test_{microkernels,products,stem}.py \
  -k "not (finished_while and terms and (150 or 170))"
LD_PRELOAD=$runtime python tests/sanitized.py
