#!/usr/bin/env bash
# What is measured and checked on a GPU, in stages that each end within ten minutes. Needs an environment with a CUDA build of torch, nvcc,
# and for the peers torchvision. MINIDAMAGE_DATA names the folder of the data sets; OUT (default: results/) is where numbers go.
#
#   bash results/gpu.sh tests              the doctor, then the whole suite with the CUDA kernels
#   bash results/gpu.sh sanitize           compute-sanitizer over the tests of all ops: memcheck, racecheck and initcheck side by side
#   bash results/gpu.sh benchmark-ops      every op beside torchvision, float32 and bfloat16
#   bash results/gpu.sh benchmark-models   whole models beside torchvision and segmentation_models_pytorch, float32 and bfloat16
#   bash results/gpu.sh benchmark          both of them, one after the other
#   bash results/gpu.sh train NAME         one run of results/reproduce.py, e.g. cars-full-damagenet; goes on where it was cut
#   bash results/gpu.sh budget MINUTES     the training runs that are missing most, until the minutes are over
#   bash results/gpu.sh all [MINUTES]      these in order, the training last (default: 8); a stage that fails does not stop the next
set -euo pipefail
cd "$(dirname "$0")/.."
export MINIDAMAGE_KERNELS=require OUT="${OUT:-results}" CUBLAS_WORKSPACE_CONFIG=:4096:8  # the last: deterministic mode asks for it
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
mkdir -p "$OUT"
within="timeout --signal=INT --kill-after=10"  # what a cut run has written by then stays

unpack_weights() {
  [ -f "$MINIDAMAGE_DATA/weights/resnet50_augnet.pth" ] || (cd "$MINIDAMAGE_DATA/weights" && python unpack.py resnet50_augnet.pth)
}

test_file() {
  python -m pytest -q -p no:cacheprovider "$1" > "$OUT/gpu-tests/$(basename "$1" .py).txt" 2>&1 || { echo "failed: $1"; return 1; }
}
export -f test_file

case "${1:-}" in
  tests)
    python -m minidamage.ops | tee "$OUT/gpu-doctor.txt"
    python -c "from minidamage.ops import _extension; _extension.build_emulated(); _extension.load_evaluation()"  # once, not in every process
    mkdir -p "$OUT/gpu-tests"  # a process a file, eight at a time: in one process the suite takes longer than ten minutes
    ls tests/test_*.py | $within 540 xargs -P 8 -I{} bash -c 'test_file {}' && echo "no test failed" ;;
  sanitize)
    python -c "from minidamage.ops import _extension; _extension.load(); _extension.build_emulated()"  # not under the sanitizer
    pids=()
    for tool in memcheck racecheck initcheck; do  # our kernels alone: the framework's are not ours to check
      $within 560 compute-sanitizer --tool "$tool" --kernel-name kns=minidamage --error-exitcode 9 \
        python -m pytest -q -p no:cacheprovider tests/test_nms.py tests/test_roi_align.py tests/test_roi_pool.py \
        tests/test_deform_conv2d.py tests/test_paste_masks.py tests/test_linear_attention.py tests/test_focal_loss.py tests/test_box_coding.py \
        > "$OUT/gpu-$tool.txt" 2>&1 &
      pids+=($!)
    done
    failed=0
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    tail -n 4 "$OUT"/gpu-{memcheck,racecheck,initcheck}.txt
    exit $failed ;;
  benchmark-ops | benchmark-models)
    what="${1#benchmark-}"
    for dtype in float32 bfloat16; do
      $within 290 python benchmark.py "--$what" --device cuda --dtype "$dtype" --batch 4 --json "$OUT/benchmark-gpu-$what-$dtype.json"
    done ;;
  benchmark)
    bash results/gpu.sh benchmark-ops
    bash results/gpu.sh benchmark-models ;;
  train)
    shift
    unpack_weights
    python results/reproduce.py --run "$@" ;;
  budget)
    unpack_weights
    python results/reproduce.py --budget "${2:-8}" --hardware gpu ;;
  all)
    failed=()
    for stage in tests sanitize benchmark-ops benchmark-models "budget ${2:-8}"; do
      echo "== gpu.sh $stage" && bash results/gpu.sh $stage || failed+=("${stage%% *}")
    done
    python results/reproduce.py --table
    [ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; } ;;
  *)
    sed -n '2,12p' "$0"; exit 2 ;;
esac
