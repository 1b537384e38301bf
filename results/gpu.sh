#!/usr/bin/env bash
# What is measured and checked on a GPU, in stages that each fit ten minutes. Needs an environment with a CUDA build of torch, nvcc, and for
# the peers torchvision. MINIDAMAGE_DATA names the folder of the data sets; OUT (default: results/) is where numbers go.
#
#   bash results/gpu.sh tests        the whole suite with the CUDA kernels
#   bash results/gpu.sh sanitize     compute-sanitizer: memcheck, racecheck, initcheck over the ops' tests
#   bash results/gpu.sh benchmark    every op and whole models beside torchvision, float32 and bfloat16
#   bash results/gpu.sh train NAME   one run of results/reproduce.py, e.g. cars-full-damagenet; goes on where it was cut
set -euo pipefail
cd "$(dirname "$0")/.."
export MINIDAMAGE_KERNELS=require OUT="${OUT:-results}"
mkdir -p "$OUT"
case "${1:-}" in
  tests)
    python -m minidamage.ops | tee "$OUT/gpu-doctor.txt"
    python -m pytest -q | tee "$OUT/gpu-tests.txt" ;;
  sanitize)
    for tool in memcheck racecheck initcheck; do
      compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
        python -m pytest -q tests/test_nms.py tests/test_roi_align.py tests/test_paste_masks.py | tee "$OUT/gpu-$tool.txt"
    done ;;
  benchmark)
    python benchmark.py --ops --models --device cuda --json "$OUT/benchmark-gpu-float32.json"
    python benchmark.py --ops --models --device cuda --dtype bfloat16 --batch 4 --json "$OUT/benchmark-gpu-bfloat16.json" ;;
  train)
    shift
    [ -f "$MINIDAMAGE_DATA/weights/resnet50_augnet.pth" ] || (cd "$MINIDAMAGE_DATA/weights" && python unpack.py resnet50_augnet.pth)
    python results/reproduce.py --run "$@" ;;
  *)
    sed -n '2,8p' "$0"; exit 2 ;;
esac
