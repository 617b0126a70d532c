#!/usr/bin/env bash
# Checks and measures the project on a GPU, in three parts, each of less than ten minutes and without network:
#
#     bash benchmarks/gpu.sh A|B|C [SECONDS] [--dry]
#
#     A  versions, copy and matrix products, attention kernels, tests/test_gpu.py
#     B  training steps beside the published recipe's, a profile, train.py's own speed, the attention loss, sampling
#     C  images/s of scoring and encoding, and for the rest of the time study.py on DATA, a folder as
#        examples/emoji/prepare.py makes it
#
# SECONDS is the time for all sections (default 480, 540, 480). Each has a limit of its own as well and prints one line:
# PASS, FAIL, or SKIP with the reason. A failure does not stop the next section, but makes the exit status 1. Raw output
# and a summary go to OUT (default benchmarks/results): DATE-gpu-PART.md and .json. PYTHON (default python3) needs
# torch >= 2.11, timm, accelerate and transformers; diffusers, pytest and pytest-xdist are used where they are installed.
# --dry: tiny sizes, on a CPU.
set -uo pipefail

part=${1:-} budget=480 dry=
case $part in A | B | C) shift ;; *) echo "usage: bash benchmarks/gpu.sh A|B|C [SECONDS] [--dry]" >&2; exit 2 ;; esac
[[ $part == B ]] && budget=540
for argument; do
    case $argument in
        --dry) dry=--dry ;;
        *[!0-9]* | "") echo "error: $argument is no number of seconds and not --dry." >&2; exit 2 ;;
        *) budget=$argument ;;
    esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$root/benchmarks/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
[[ -n ${DATA:-} ]] && DATA=$(realpath -m "$DATA")
if ! python=$(command -v "${PYTHON:-python3}"); then
    echo "error: there is no ${PYTHON:-python3}; name an interpreter with PYTHON=." >&2
    exit 1
fi
python=$(realpath -s "$python")  # of a virtual environment: not what its link points to
cd "$root" || exit 1
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=99
if [[ $dry ]]; then
    export CUDA_VISIBLE_DEVICES="" HASTE_TEST_DEVICE=cpu
elif ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "error: $python has no PyTorch that sees a GPU; name another with PYTHON=, or give --dry." >&2
    exit 1
fi
work=$(mktemp -d)
export TMPDIR=$work
raw=$out/$(date +%F)-gpu-$part${dry:+-dry}.md failed=0 SECONDS=0
printf '# gpu.sh %s\n' "$part $budget $dry" > "$raw" || exit 1

finish() {
    rm -rf "$work"
    "$python" benchmarks/gpu_summary.py "$raw" "${raw%.md}.json" || failed=1
    echo "$([[ $failed == 0 ]] && echo PASS || echo FAIL) part $part, $SECONDS s: ${raw%.md}.md and .json"
    exit "$failed"
}
trap finish EXIT
trap 'failed=1; exit' INT TERM

say() { tee -a "$raw" <<< "$1"; }

skip() { printf '\n## %s\n\n' "$1" >> "$raw"; say "SKIP $1 (0 s): $2"; }

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2> /dev/null; }

section() {  # name, seconds at most, arguments of Python
    local name=$1 limit=$2 left=$((budget - SECONDS)) begin=$SECONDS from status
    shift 2
    if ((left < 1)) || { [[ ! $dry ]] && ((left < limit / 2)); }; then
        skip "$name" "too little time is left"
        return
    fi
    printf '\n## %s\n\n$ %s\n\n' "$name" "python $*" >> "$raw"
    from=$(($(wc -l < "$raw") + 1))
    timeout -k 10 "$((limit < left ? limit : left))" "$python" "$@" < /dev/null >> "$raw" 2>&1
    status=$?
    [[ $(tail -c 1 "$raw") ]] && echo >> "$raw"
    if [[ $status == 0 ]]; then
        say "PASS $name ($((SECONDS - begin)) s)"
        return
    fi
    failed=1
    tail -n "+$from" "$raw" | tail -n 5 | cut -c 1-300
    [[ $status == 124 || $status == 137 ]] && status="$status, its time was up"
    say "FAIL $name ($((SECONDS - begin)) s): status $status"
}

step=benchmarks/step_time.py
case $part in
    A)
        section machine 60 benchmarks/gpu.py machine $dry
        section ceilings 90 benchmarks/gpu.py ceilings $dry
        section attention 120 benchmarks/gpu.py attention $dry
        if ! has pytest; then
            skip tests "pytest is not installed"
        elif [[ $dry ]]; then
            section tests 300 -m pytest tests/test_gpu.py -p no:cacheprovider \
                -k "float32 and not mmdit or test_samplers or ddp or finite_changes_nothing"
        else
            has xdist && parallel="-n 4" || parallel=
            export TORCHINDUCTOR_COMPILE_THREADS=4
            section tests 420 -m pytest tests/test_gpu.py -p no:cacheprovider -vv -ra $parallel
        fi
        ;;
    B)
        if [[ $dry ]]; then
            tiny="--resolution 64 --batch-size 2 --rounds 1"
            section "step time" 120 $step $tiny --model SiT-S/2 --enc-type dinov2-vit-s --variants published ours plain
            section profile 120 benchmarks/gpu.py profile --dry
            section "train.py" 300 benchmarks/gpu.py train --dry
            section "attention loss" 60 benchmarks/gpu.py tiles --dry
            section sampling 120 benchmarks/sampling.py $tiny --model SiT-T/2 --variants published ours bf16 \
                --modes sde ode --num-steps 2
        else
            xl="--model SiT-XL/2 --mixed-precision bf16"
            section "step time, XL/2, batch 32" 120 $step $xl --batch-size 32 --rounds 5 \
                --variants published ours bf16-teacher plain
            section "step time, XL/2, batch 32, compiled" 180 $step $xl --batch-size 32 --rounds 5 \
                --variants published compiled
            section "step time, XL/2, batch 128" 90 $step $xl --batch-size 128 --rounds 3 --variants ours
            section profile 120 benchmarks/gpu.py profile
            section "train.py" 210 benchmarks/gpu.py train
            section sampling 100 benchmarks/sampling.py --model SiT-XL/2 --batch-size 32 --modes sde ode --num-steps 6 \
                --rounds 2 --variants published ours bf16
            section "attention loss" 150 benchmarks/gpu.py tiles
            section "step time, XL/2, fp16" 60 $step --model SiT-XL/2 --mixed-precision fp16 --batch-size 32 \
                --rounds 3 --variants published ours
            section "step time, B/2" 120 $step --model SiT-B/2 --mixed-precision bf16 --batch-size 128 --rounds 3 \
                --variants published ours plain compiled
            section "step time, XL/2, batch 128, compiled" 120 $step $xl --batch-size 128 --rounds 3 --variants compiled
        fi
        ;;
    C)
        section scoring 150 benchmarks/gpu.py scoring $dry
        if has diffusers; then
            section encoding 120 benchmarks/gpu.py encoding $dry
        else
            skip encoding "diffusers is not installed"
        fi
        if [[ -z ${DATA:-} ]]; then
            skip study "no data: set DATA to a folder as examples/emoji/prepare.py makes it"
        elif ! has diffusers; then
            skip study "diffusers is not installed"
        else
            study="--model SiT-S/2 --steps ${STUDY_STEPS:-2000} --jobs 4 --seeds 0 --mixed-precision bf16"
            [[ $dry ]] && study="--model SiT-T/2 --steps 8 --jobs 2 --seeds 0 --samples 4"
            minutes=$(awk "BEGIN { print ($budget - $SECONDS - 60) / 60 }")  # scoring at the end takes some
            section study "$((budget - SECONDS))" benchmarks/study.py --data emoji --data-dir "$DATA" --out "$work/study" --minutes "$minutes" $study
            [[ -f $work/study/results/curves.png ]] && cp "$work/study/results/curves.png" "${raw%.md}-study-curves.png"
        fi
        ;;
esac
