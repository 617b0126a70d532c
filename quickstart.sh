#!/usr/bin/env bash
# The whole pipeline on the embedded emoji data: data, training with alignment and its stop, samples, scores, and a page
# that shows it all, for classes or captions. Run it by `make quickstart` or `make quickstart-t2i`. Every command is printed
# before it runs, so that each can be repeated or changed by hand. With QUICKSTART=short it takes a few steps only and
# shows that everything works.
set -euo pipefail

task=${1:-classes} form=${2:-full}
case $task in
    classes) name=quickstart steps=1200 images=72 references=178 ;;
    captions) name=quickstart-t2i steps=1200 images=178 ;;
    *) echo "error: $task is neither classes nor captions." >&2; exit 1 ;;
esac
case $form in
    full) ;;
    short) name=$name-short steps=40 images=9 references=18 ;;
    *) echo "error: QUICKSTART=$form is neither full nor short." >&2; exit 1 ;;
esac
ending=$(printf %07d $steps)-size-64-vae-vae-emoji-cfg-3.0-seed-0-ode-high-1.0
precision=no
python -c 'import sys, speed; sys.exit(not speed.fast_bf16())' && precision=bf16

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

vae=assets/vae-emoji
training=(--exp-name $name --mixed-precision $precision)  # all else is the preset's: python train.py --preset list
if [ $form = short ]; then
    training+=(--max-train-steps $steps --early-stop-point 20 --checkpointing-steps 20 --sampling-steps 10
        --log-every 1)
fi
sampling=(--ckpt "exps/$name/checkpoints/$(printf %07d $steps).pt" --vae $vae --cfg-scale 3 --mode ode --num-steps 30
    --per-proc-batch-size 36)

if [ $task = classes ]; then
    stage data python preprocessing/embedded.py --dest data/emoji --vae $vae
    stage train python train.py --preset embedded "${training[@]}"
    stage sample python generate.py "${sampling[@]}" --sample-dir samples/$name --num-fid-samples $images --labels balanced
    made=samples/$name/SiT-T-2-$ending
    stage scores python evaluations/anchors.py $made.npz --reference-images $references
    pictures=("$made")
    found="$made-grid.png (a column per class: $(tr -d '[]"' < data/emoji/classes.json)),
         $made-scores.json"
else
    captions=data/emoji-captions
    stage data python preprocessing/embedded.py --dest data/emoji
    stage captions python preprocessing/embedded_captions.py --dest $captions --vae $vae
    stage train python train_t2i.py --preset embedded-t2i "${training[@]}"
    stage sample python generate_t2i.py "${sampling[@]}" --sample-dir samples/$name --num-fid-samples $images \
        --data-dir $captions
    stage prompts python generate_t2i.py "${sampling[@]}" --sample-dir samples/$name --prompts assets/prompts-emoji.txt \
        --text-encoder $captions/text-encoder
    made=samples/$name/MMDiT-T-$ending
    stage agreement python evaluations/agreement.py $captions/val "$made"
    pictures=("$made" "${made/MMDiT-T/MMDiT-T-prompts-emoji}")
    found="$made-grid.png (captions held out from training),
         ${made/MMDiT-T/MMDiT-T-prompts-emoji}-grid.png (assets/prompts-emoji.txt)"
fi
stage curves python evaluations/curves.py exps/$name
stage report python evaluations/report.py exps/$name --samples "${pictures[@]}"

printf '\n%s\n' "${stages[@]}"
printf '%-10s %4d s\n' total $SECONDS
echo "Look at: exps/$name/report.html in a browser, which shows all of it;"
echo "         $found,"
echo "         exps/$name/curves.png, exps/$name/previews/"
