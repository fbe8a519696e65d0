#!/usr/bin/env bash
# From photos of your own classes to a packed low-bit network: full precision, its 4-bit student, the packed file.
#
#   bash examples/own_classes.sh DIR [OUT] [SIZE] [WEIGHTS]
#
# DIR holds train/ and val/ with a folder a class; OUT gets the results (out); SIZE is that of the images in pixels (96);
# WEIGHTS are of a full-precision DeiT-Tiny to start from (none: from the beginning). PYTHON, EPOCHS (30), BATCH (32) and
# FLAGS, for all of main.py's runs, are taken from the environment. Repeating it goes on where it was stopped.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 out=${2:-out} size=${3:-96} weights=${4:-}
code=$(dirname "$0")/..
python=${PYTHON:-$code/.venv/bin/python}
[ -x "$python" ] || python=python
read -r -a flags <<< "${FLAGS:-}"
common=(--data-path "$data" --input-size "$size" --epochs "${EPOCHS:-30}" --batch-size "${BATCH:-32}" --no-repeated-aug
        --resume auto "${flags[@]}")

echo "== 1/3 full precision -> $out/full"
"$python" "$code/main.py" "${common[@]}" --model deit_tiny_distilled_patch16_224 --warmup-epochs 2 --lr 4e-3 \
    ${weights:+--finetune "$weights"} --output_dir "$out/full"
echo "== 2/3 4 bits, from it and taught by it -> $out/low-bit"
"$python" "$code/main.py" "${common[@]}" --model fourbits_deit_tiny_patch16_224 --warmup-epochs 0 --weight-decay 0. \
    --lr 2e-3 --opt fusedlamb --distillation-type hard --finetune "$out/full/best_checkpoint.pth" \
    --teacher-path "$out/full/best_checkpoint.pth" --output_dir "$out/low-bit"
echo "== 3/3 the packed file"
"$python" "$code/deploy.py" pack "$out/low-bit/best_checkpoint.pth"
