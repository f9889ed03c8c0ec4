#!/usr/bin/env bash
# Everything that pays most on an accelerator, in one go: make the bundled networks, measure their gates, run the recipes.
#
#     benchmarks/gpu/run.sh OUTPUT [part ...]        parts: assets teacher flow gates recipes overhead memory
#                                                    kernels stability compile (default: all)
#
# The last four are the checks of real sizes, bounded to less than nine minutes in all.
#
# A part that fails or runs out of time leaves the others alone. Checkpoints lie under runs/, so the same command goes on.
set -uo pipefail
cd "$(dirname "$0")/../.."
output=${1:?"where results go"}
shift
parts=${*:-assets teacher flow gates recipes overhead memory kernels stability compile}
limit=${PART_SECONDS:-500} # of each step
mkdir -p "$output"
export PYTHONPATH=. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
summary="$output/summary.txt"
: > "$summary"

part() { # name, command ...
  local name=$1 began=$SECONDS
  shift
  timeout "$limit" "$@" > "$output/$name.log" 2>&1
  printf '%-28s exit %3d  %5d s\n' "$name" $? $((SECONDS - began)) | tee -a "$summary"
}

make() { part "$1" python benchmarks/shapes/make_assets.py "$1" --device cuda "${@:2}"; }

for name in $parts; do
  case $name in
    assets)
      make clip --steps 6000
      make text --steps 2000
      make autoencoder --steps 20000
      make decoder --steps 8000
      make assemble
      ;;
    teacher)
      part teacher python -m stepdistill train recipes/shapes/teacher.yaml device=cuda stages.0.steps=20000 \
        stages.0.batch_size=256 data.count=100000 checkpoints.every=1000 previews.every=2000
      # The parts below measure and distil what lies in assets/.
      make install && cp -r assets/shapes "$output/"
      ;;
    flow)
      make assemble-flow
      part flow_teacher python -m stepdistill train recipes/shapes/flow_teacher.yaml device=cuda stages.0.steps=30000 \
        stages.0.batch_size=256 data.count=100000 checkpoints.every=1000 previews.every=2000
      make install-flow && cp -r assets/shapes "$output/"
      ;;
    gates)
      part gates python benchmarks/shapes/gates.py --device cuda --output "$output/shapes_gates.json"
      ;;
    recipes)
      for recipe in quickstart shapes/dmd2_1step shapes/dmd2_4step shapes/vsd_1step; do
        run="runs/gpu/${recipe//\//_}"
        part "${recipe//\//_}" python -m stepdistill train "$recipe" output="$run" device=cuda precision=bf16
        cp "$run/report/report.json" "$output/${recipe//\//_}.json" 2> /dev/null
      done
      ;;
    overhead)
      for kind in "" "--lora"; do
        part "overhead$kind" python benchmarks/overhead.py --device cuda $kind --output "$output/overhead.json"
      done
      ;;
    memory)
      part memory python benchmarks/gpu/memory.py "$output/memory" --cases sdxl_lora sd15_lora sd15_full --seconds 100
      ;;
    kernels)
      part kernels python benchmarks/gpu/memory.py "$output/kernels" --cases attention --seconds 40
      ;;
    stability)
      part stability python benchmarks/gpu/memory.py "$output/stability" --cases stability --seconds 80
      ;;
    compile)
      # Beside the same case without compilation in part memory.
      part compile python benchmarks/gpu/memory.py "$output/compile" --cases sd15_compile --seconds 100
      ;;
    *) echo "unknown part $name" | tee -a "$summary" ;;
  esac
done
cat "$summary"
