#!/usr/bin/env bash
# On a card, one command of at most nine minutes: the suite of tests/cuda, then the benchmark, and a report.
#
#   scripts/gpu_report.sh               into docs/benchmarks, or into $OUT where it is set
#   DEVICE=cpu scripts/gpu_report.sh    rehearses it on the processor, with tiny shapes
#
# PYTHON is what runs it (default: .venv/bin/python, else python3), WHEELS a folder of wheels to install first
# where no index can be reached. Each part has its own limit, and one that fails does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
BUDGET=${BUDGET:-525} # seconds for all parts; SUITE: for the first
OUT=${OUT:-docs/benchmarks}
CACHE=${CACHE:-${HOME:-/tmp}/.cache/ldm-bench} # folders of random weights
PAGES=$(mktemp -d)
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} LDM_TEST_DEVICE=$([ "$DEVICE" = cpu ] && echo cpu || echo cuda:0)
[ -d "${WHEELS:-}" ] && "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl

card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
name=$(date +%F)-$(echo "${card:-$DEVICE}" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' -)-report
report=$OUT/$name.md
{
    echo "# $(date '+%F %H:%M'): ${card:-no card, rehearsed on $DEVICE}"
    echo
    echo '```'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>/dev/null
    "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())'
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(triton|diffusers|transformers|accelerate|peft|safetensors|xformers) '
    echo "ldm $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(nproc) cores"
    echo '```'
} > "$report"

# part TITLE LIMIT COMMAND...: runs it for so many seconds at most, and less where less is left.
part() {
    local title=$1 limit=$2 began=$SECONDS log=$PAGES/log
    shift 2
    limit=$((limit < BUDGET - SECONDS ? limit : BUDGET - SECONDS))
    printf '\n## %s\n\n`%s`\n\n' "$title" "${*/#$PYTHON/python}" >> "$report"
    [ "$limit" -lt 20 ] && { echo "left out: no time was left" >> "$report"; return; }
    timeout -k 5 "$limit" "$@" > "$log" 2>&1
    local code=$?
    echo "$((SECONDS - began)) s of $limit, exit code $code$([ $code = 124 ] && echo ' (ran out of its time)')" >> "$report"
    printf '\n```\n%s\n```\n' "$(tail -c 3000 "$log" | tail -n 25 | cut -c 1-300)" >> "$report"
}

# bench NAME LIMIT FLAGS...: a part whose page follows it, as far as it came.
bench() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" scripts/bench.py --device "$DEVICE" --cache "$CACHE" --out "$PAGES" --name "$name" "$@"
    [ -f "$PAGES/$name.md" ] && { echo; sed 's/^#/##&/' "$PAGES/$name.md" | grep -v '\.svg'; } >> "$report"
    [ -f "$PAGES/$name.json" ] && cp "$PAGES/$name.json" "${report%.md}-$name.json"
}

part "Suite" "${SUITE:-215}" "$PYTHON" -m pytest -m cuda tests/cuda -q -p no:xdist --durations 10
if [ "$DEVICE" = cpu ]; then
    bench postcard 120 --models postcard --rows unet decode --peers ldm-fp32 diffusers-fp32 --size 64 --rounds 2
else
    drawn=(unet decode encode text picture)
    bench sd15 80 --models sd15 --rows "${drawn[@]}" --peers ldm-fp16 ldm-bf16 diffusers-fp16 diffusers-bf16
    bench sdxl 110 --models sdxl --rows unet decode picture --peers ldm-fp16 diffusers-fp16 --rounds 3
    bench sd15-compiled 240 --models sd15 --rows unet decode \
        --peers ldm-fp16 ldm-compiled-fp16 diffusers-fp16 diffusers-compiled-fp16
fi
rm -r "$PAGES"
echo "$report in $SECONDS s"
