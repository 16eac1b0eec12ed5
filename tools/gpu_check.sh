#!/usr/bin/env bash
# Checks and measures hybridnas on a machine with a GPU and no network: tools/gpu_check.sh [OUT] [WHEELS]
#
# It needs Python, torch with CUDA and Triton, and takes what else is missing from WHEELS (tools/gather_wheels.sh). In
# this order, within MINUTES (8): every kernel against float64, the benchmark, blocks and whole models, then a training
# until the time is over. Everything is written to OUT as it goes: steps.jsonl (a line for each step), tests.jsonl (a
# line for each test), gpu-partial.json and gpu.json (the benchmark), NAME.txt (the output of each step).
#
# HYBRIDNAS_REHEARSE=1 TRITON_INTERPRET=1 tools/gpu_check.sh rehearses it on a processor, at shapes of no size.
set -uo pipefail
out=$(realpath -m "${1:-gpu-check}")
wheels=$(realpath -m "${2:-wheels}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
end=$(($(date +%s) + 60 * ${MINUTES:-8}))
rehearse=${HYBRIDNAS_REHEARSE:-0}
mkdir -p "$out/site"
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HYBRIDNAS_CACHE=$out/cache HYBRIDNAS_GATE_LOG=$out/tests.jsonl TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/triton}

# step NAME SECONDS COMMAND...: run for at most so long and no longer than there is time; its end is one line of JSON
step() {
    local name=$1 most=$2 began left code
    shift 2
    began=$(date +%s)
    left=$((end - began))
    if [ "$left" -lt 5 ]; then
        echo "{\"step\": \"$name\", \"code\": null, \"seconds\": 0, \"note\": \"no time left\"}" | tee -a "$out/steps.jsonl"
        return
    fi
    timeout --signal=INT --kill-after=10 $((left < most ? left : most)) "$@" > "$out/$name.txt" 2>&1
    code=$?
    tail -n 3 "$out/$name.txt"
    echo "{\"step\": \"$name\", \"code\": $code, \"seconds\": $(($(date +%s) - began))}" | tee -a "$out/steps.jsonl"
}

gate() { # NAME SECONDS FILE: warnings of other versions are no failures here
    step "$1" "$2" "$python" -m pytest -m gpu -p no:cacheprovider -o filterwarnings=ignore --tb=short "tests/gpu/$3"
}

step machine 60 "$python" -c 'import sys, torch, triton
from hybridnas.hardware import describe_machine
print(sys.version, "torch", torch.__version__, "CUDA", torch.version.cuda, "Triton", triton.__version__)
print(describe_machine())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))'
shopt -s nullglob
found=("$wheels"/*.whl)
if [ "${#found[@]}" -gt 0 ]; then # in one call, since two of them may share a folder
    step packages 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$out/site" "${found[@]}"
fi
gate kernels 150 test_gpu_kernels.py
small=()
[ "$rehearse" = 1 ] && small=(tiny=true)
step bench 200 "$python" -m hybridnas.bench gpu quick=true "${small[@]}" out="$out/gpu.json"
gate blocks 60 test_gpu_blocks.py
gate models 60 test_gpu_models.py
small=()
[ "$rehearse" = 1 ] && small=(preset.d_model=32 preset.n_blocks=1 train.tokens=4096 train.seq_len=64 train.batch_size=4)
step train 480 "$python" -m hybridnas.train preset=moe_mamba data=stdlib train.tokens=1_000_000_000 \
    train.seq_len=1024 train.batch_size=16 tracking=off out="$out/run" "${small[@]}"
cat "$out/steps.jsonl"
