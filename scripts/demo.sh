#!/usr/bin/env bash
# Sets up .venv and runs the main job on real handwritten digits that ship with scikit-learn: a full-precision DeiT-Tiny,
# then a 4-bit one from it with hard distillation and DGD, its evaluation, and a summary. Repeating it reuses what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup requirements.txt

out=${1:-output/demo}
common=(--input-size 16 --model-kwargs patch_size=8 --no-repeated-aug --drop-path 0 --batch-size 32 --num_workers 0
        --print-freq 15 --resume auto)

echo "== 1/3 full-precision DeiT-Tiny (the teacher) -> $out/teacher"
.venv/bin/python main.py "${common[@]}" --model deit_tiny_distilled_patch16_224 --epochs 14 --warmup-epochs 2 \
    --lr 1.6e-2 --output_dir "$out/teacher"

echo "== 2/3 4-bit DeiT-Tiny from it, with hard distillation and DGD -> $out/student"
.venv/bin/python main.py "${common[@]}" --model fourbits_deit_tiny_patch16_224 --epochs 6 --warmup-epochs 0 \
    --weight-decay 0. --lr 8e-3 --opt fusedlamb --distillation-type hard --finetune "$out/teacher/best_checkpoint.pth" \
    --teacher-path "$out/teacher/best_checkpoint.pth" --output_dir "$out/student"

echo "== 3/3 evaluation of the checkpoint"
.venv/bin/python main.py --eval --resume "$out/student/best_checkpoint.pth" --num_workers 0
.venv/bin/python scripts/summary.py "$out/teacher" "$out/student"
