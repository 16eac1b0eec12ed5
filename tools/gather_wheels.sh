#!/usr/bin/env bash
# Gathers what tools/gpu_check.sh takes to a machine without a network: tools/gather_wheels.sh [FOLDER]
#
# Wheels of packages that a machine with torch, Triton, numpy, scipy, matplotlib, tokenizers, safetensors and pytest
# still lacks, for Python 3.12 on x86-64 Linux: PY and PLATFORM name others, EXTRA more packages (each by its own name:
# dependencies are not followed, since those of several of them would bring another torch). At most 60 MB.
set -euo pipefail
folder=${1:-wheels}
version=${PY:-3.12}
python=${PYTHON:-python3}
read -r -a platforms <<< "${PLATFORM:-manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64}"
packages=(
    optuna alembic colorlog sqlalchemy greenlet mako # the search
    hydra-core omegaconf                             # the commands
    flash-linear-attention fla-core einops           # a peer in Triton alone
)
read -r -a extra <<< "${EXTRA:-}"

constraints=$(dirname "$0")/../constraints.txt # the tested versions: some packages take no newer one of another
mkdir -p "$folder"
"$python" -m pip download --quiet --constraint "$constraints" --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
    "${platforms[@]/#/--platform=}" --dest "$folder" "${packages[@]}" "${extra[@]}"
# its release for omegaconf is source alone, and pure Python
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" 'antlr4-python3-runtime==4.9.*'

size=$(du -sb "$folder" | cut -f1)
ls -l "$folder"
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $size bytes in $folder"
if [ "$size" -gt 60000000 ]; then
    echo "$folder has more than 60 MB; leave packages out that the machine has" >&2
    exit 1
fi
