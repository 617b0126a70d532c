#!/usr/bin/env bash
# The whole pipeline on the embedded emoji data: data, training with alignment and its stop, samples, scores. Run it
# by `make quickstart`. Every command is printed before it runs, so that each can be repeated or changed by hand.
# `make quickstart QUICKSTART=short` takes a few steps only and shows that everything works.
set -euo pipefail

steps=1200 stop=600 every=600 images=72 references=178 name=quickstart
if [ "${1:-full}" = short ]; then steps=40 stop=20 every=40 images=9 references=18 name=quickstart-short; fi
checkpoint=$(printf %07d $steps)
samples=samples/$name/SiT-T-2-$checkpoint-size-64-vae-vae-emoji-cfg-3.0-seed-0-ode-high-1.0
precision=no
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && precision=bf16

echo "To repeat a command by hand: export PATH=$(dirname "$(command -v python)"):\$PATH"
stages=()
stage() {  # stage NAME COMMAND...: print, run, time
    local title=$1 begin=$SECONDS
    shift
    printf '\n== %s\n+ %s\n' "$title" "$*"
    "$@"
    stages+=("$(printf '%-10s %4d s' "$title" $((SECONDS - begin)))")
    echo "== ${stages[-1]}"
}

stage data python preprocessing/embedded.py --dest data/emoji --vae assets/vae-emoji
stage train python train.py --exp-name $name --model SiT-T/2 --resolution 64 --num-classes 9 \
    --data-dir data/emoji/train --vae assets/vae-emoji \
    --enc-type dinov2-vit-s --enc-weights data/emoji/teacher.safetensors --enc-blocks 10 \
    --teacher-cache data/emoji/teacher-cache --early-stop-point $stop --max-train-steps $steps \
    --checkpointing-steps $every --sampling-steps $every --batch-size 32 --learning-rate 1e-3 --ema-decay 0.995 \
    --mixed-precision $precision --num-workers 0 --report-to none
stage curves python evaluations/curves.py exps/$name
stage sample python generate.py --ckpt exps/$name/checkpoints/$checkpoint.pt --vae assets/vae-emoji \
    --sample-dir samples/$name --num-fid-samples $images --labels balanced --cfg-scale 3 --num-steps 30 \
    --per-proc-batch-size 36
stage scores python evaluations/anchors.py $samples.npz --reference-images $references

printf '\n%s\n' "${stages[@]}"
printf '%-10s %4d s\n' total $SECONDS
echo "Look at: $samples-grid.png (a column per class: $(tr -d '[]"' < data/emoji/classes.json)),"
echo "         exps/$name/curves.png, exps/$name/previews/, $samples-scores.json"
