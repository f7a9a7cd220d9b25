#!/usr/bin/env bash
# Cross-compiles the C++ library for 64-bit Arm and runs tests on it in an emulator, with Arm's own Python, torch and
# timm: what no Arm machine at hand could show. It tells that NEON's kernels are right, nothing about their speed. For
# Debian (as root, where the cross compiler and qemu-user-static are still missing); the Python that is active needs
# pip, ninja and pybind11, and is of Debian's minor version. Downloads 3 GB, as PyPI's torch for Arm brings CUDA.
# Usage: tests/emulated.sh [FOLDER [pytest's arguments]]; FOLDER keeps the emulated machine for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TESTS=(tests/test_microkernels.py tests/test_engine_models.py::test_every_tier_is_as_exact
  -k 'not scalar-dtype')
readonly CORES=2

keep=${1:-}
shift $(($# > 0))
work=${keep:-$(mktemp -d)}
[[ -n $keep ]] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work"
work=$(cd "$work" && pwd)
root=$work/root site=$work/site

{ command -v qemu-aarch64-static && command -v aarch64-linux-gnu-g++; } >/dev/null || {
  apt-get -qq update
  apt-get -qq install --yes --no-install-recommends qemu-user-static g++-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null
}

# Debian's packages for Arm, by an apt that knows nothing of this machine, unpacked rather than installed
debian() {
  local apt=$work/apt
  mkdir -p "$apt"/{state/lists/partial,cache/archives/partial}
  : >"$apt/status"
  local options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State=$apt/state"
    -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1)
  apt-get "${options[@]}" update
  apt-get "${options[@]}" install --yes --no-install-recommends --download-only python3 libstdc++6 libgomp1
  for package in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  # the emulator shows Arm's processor, but this machine's files about it
  mkdir -p "$root/proc"
  for ((core = 0; core < CORES; ++core)); do
    mkdir -p "$root/sys/devices/system/cpu/cpu$core/regs/identification"
    echo 0x00000000413fd0c1 >"$root/sys/devices/system/cpu/cpu$core/regs/identification/midr_el1"
    printf '%s\t: %s\n' processor $core Features 'fp asimd atomics fphp asimdhp asimdrdm asimddp' \
      'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x3 'CPU part' 0xd0c 'CPU revision' 1
    echo
  done >"$root/proc/cpuinfo"
}

python_of_arm() {
  qemu-aarch64-static -cpu neoverse-n1 -L "$root" -E PYTHONPATH="$work/project:$site" -E OMP_NUM_THREADS=$CORES \
    "$root/usr/bin/python3" "$@"
}

[[ -d $root ]] || debian
version=$(python_of_arm -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ours=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $version == "$ours" ]] || { echo "Debian's Python is $version, this one $ours: their headers differ" >&2; exit 1; }

if [[ ! -d $site ]]; then
  platforms=()
  for glibc in {17..36}; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  mapfile -t tools < <(python .ci/project.py extra test | grep -E '^(pytest|hypothesis|setuptools)')
  pip install --quiet --target "$site" --only-binary=:all: --platform manylinux2014_aarch64 "${platforms[@]}" \
    --python-version "$version" torch timm "${tools[@]}"
fi

rm -rf "$work/project"
mkdir "$work/project"
cp -r setup.py pyproject.toml README.md LICENSE csrc tests "$work/project"
tar -c --exclude='*.so' --exclude=__pycache__ mnv4_kernels | tar -x -C "$work/project"
cd "$work/project"
PYTHONPATH=$site _PYTHON_HOST_PLATFORM=linux-aarch64 CXX=aarch64-linux-gnu-g++ \
  SETUPTOOLS_EXT_SUFFIX=.cpython-${version/./}-aarch64-linux-gnu.so \
  python setup.py -q build_ext --inplace --build-temp "$work/build"

python_of_arm -m mnv4_kernels info | sed -n 1,12p
(($# > 0)) || set -- "${TESTS[@]}"
python_of_arm -m pytest -q -n 0 -p no:cacheprovider "$@"
