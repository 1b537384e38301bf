#!/usr/bin/env bash
# What is measured and checked on a GPU, in stages that each end within ten minutes. Needs an environment with a CUDA build of torch, nvcc,
# and for the peers torchvision. MINIDAMAGE_DATA names the folder of the data sets; OUT (default: results/) is where numbers go.
#
#   bash results/gpu.sh waiting            what no card has shown yet of the four below
#   bash results/gpu.sh tests [FILE...]    the doctor, then the whole suite with the CUDA kernels, or tests/test_FILE.py
#   bash results/gpu.sh sanitize [OP...]   compute-sanitizer over the GPU tests of all ops: memcheck, racecheck and initcheck
#   bash results/gpu.sh benchmark-ops [WORD...]     every op beside torchvision, float32 and bfloat16, or the rows that hold a word
#   bash results/gpu.sh benchmark-models [WORD...]  whole models beside torchvision and segmentation_models_pytorch, the same
#   bash results/gpu.sh benchmark          both of them, one after the other
#   bash results/gpu.sh train NAME         one run of results/reproduce.py, e.g. cars-full-damagenet; goes on where it was cut
#   bash results/gpu.sh together NAME...   several runs side by side, five at a time (AT_ONCE): a step waits for the CPU that launches it
#   bash results/gpu.sh budget MINUTES     the training runs that are missing most, until the minutes are over
#   bash results/gpu.sh all [MINUTES]      these in order, the training last (default: 8); a stage that fails does not stop the next
set -euo pipefail
cd "$(dirname "$0")/.."
export MINIDAMAGE_KERNELS=require OUT="${OUT:-results}" CUBLAS_WORKSPACE_CONFIG=:4096:8  # the last: deterministic mode asks for it
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
mkdir -p "$OUT"
longest="sanitizers emulated train distributed export masks models nvcc evaluate mask_rcnn hostile_arguments no_waiting"
within="timeout --signal=INT --kill-after=10"  # what a cut run has written by then stays

unpack_weights() {
  [ -f "$MINIDAMAGE_DATA/weights/resnet50_augnet.pth" ] || (cd "$MINIDAMAGE_DATA/weights" && python unpack.py resnet50_augnet.pth)
}

# one_pytest LOG COMMAND...: one process; a name is said where it fails, its output lies in LOG.
one_pytest() {
  local log="$1"; shift
  "$@" > "$log" 2>&1 || { echo "failed: $log"; tail -n 3 "$log"; return 1; }
}
export -f one_pytest

case "${1:-}" in
  tests)
    for build in load build_emulated load_evaluation; do                 # once, side by side, not in every process
      python -c "from minidamage.ops import _extension; _extension.$build()" &
    done
    wait
    failed=0
    python -m minidamage.ops | tee "$OUT/gpu-doctor.txt" || { failed=1; echo "failed: the doctor"; }
    mkdir -p "$OUT/gpu-tests"  # a process a file, ten at a time, the longest first: one process takes longer than ten minutes
    { for name in ${*:2}; do echo "tests/test_$name.py"; done
      [ $# -gt 1 ] || { for name in $longest; do echo "tests/test_$name.py"; done; ls tests/test_*.py; }; } | awk '!seen[$0]++' | $within 540 xargs -P 10 -I{} \
      bash -c 'one_pytest "$OUT/gpu-tests/$(basename {} .py).txt" python -m pytest -q -p no:cacheprovider {}' && echo "no test failed" || failed=1
    exit $failed ;;
  sanitize)  # our kernels alone, but initcheck, which has to see what every kernel writes
    python -c "from minidamage.ops import _extension; _extension.load()" # not under the sanitizer
    mkdir -p "$OUT/gpu-sanitize"
    ops="${*:2}"
    for tool in "racecheck --kernel-name kns=minidamage" "memcheck --kernel-name kns=minidamage" initcheck; do
      for op in ${ops:-roi_align deform_conv2d linear_attention roi_pool focal_loss box_coding nms paste_masks}; do echo "$op $tool"; done
    done | $within 560 xargs -P 6 -L 1 bash -c 'one_pytest "$OUT/gpu-sanitize/$0-$1.txt" compute-sanitizer --print-limit 20 --tool "$@" \
      --error-exitcode 9 python -m pytest -q -p no:cacheprovider -k cuda "tests/test_$0.py"' && echo "no tool complained" ;;
  benchmark-ops | benchmark-models)
    what="${1#benchmark-}" failed=0                                      # of a dtype that is cut, the rows so far are kept
    for dtype in float32 bfloat16; do
      $within 290 python benchmark.py "--$what" --device cuda --dtype "$dtype" --batch 4 --budget 1 \
        --json "$OUT/benchmark-gpu-$what${2:+-${2//[^a-zA-Z0-9_]/}}-$dtype.json" ${2:+--only "${@:2}"} || failed=$?
    done
    exit $failed ;;
  waiting)
    failed=0
    bash results/gpu.sh tests box_coding deform_conv2d emulated focal_loss hostile_arguments linear_attention roi_align roi_pool \
      benchmark_models data_real no_waiting segmenters train train_segmentation \
      nms paste_masks mask_rcnn evaluate evaluate_segmentation distributed || failed=1 # since: bindings at -O1, how a model is validated
    bash results/gpu.sh sanitize linear_attention deform_conv2d roi_align || failed=1
    bash results/gpu.sh benchmark-ops linear_attention roi_pool paste_masks focal_loss nms code_boxes deterministic deform || failed=1
    bash results/gpu.sh benchmark-models context_cracknet CAGM danet || failed=1
    bash results/gpu.sh benchmark-models 448x448 || failed=1             # every segmenter, as far as the time reaches
    exit $failed ;;
  benchmark)
    failed=0
    bash results/gpu.sh benchmark-ops || failed=1
    bash results/gpu.sh benchmark-models || failed=1
    exit $failed ;;
  train)
    shift
    unpack_weights
    python results/reproduce.py --run "$@" ;;
  together)
    shift
    unpack_weights
    printf '%s\n' "$@" | OMP_NUM_THREADS=1 xargs -P "${AT_ONCE:-5}" -I{} python results/reproduce.py --run {} ;;
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
    sed -n '2,14p' "$0"; exit 2 ;;
esac
