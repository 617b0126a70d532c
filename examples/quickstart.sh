#!/usr/bin/env bash
# The whole pipeline: data, training with alignment and its stop, samples, scores, and a page that shows it all, on the
# embedded emoji for classes or captions, or on the photographs of CIFAR-10. Run it by `make quickstart`,
# `make quickstart-t2i` or `make quickstart-cifar10`. Every command is printed before it runs, so that each can be
# repeated or changed by hand. With QUICKSTART=short it takes a few steps only and shows that everything works.
set -euo pipefail

task=${1:-classes} form=${2:-full}
size=64 vae=assets/vae-emoji cfg=3.0 batch=36
case $task in
    classes) name=quickstart steps=1200 images=72 references=178 ;;
    captions) name=quickstart-t2i steps=1200 images=178 ;;
    cifar10) name=quickstart-cifar10 steps=2000 images=500 references=1000 size=32 batch=100
        vae=assets/vae-cifar10 ;;
    *) echo "error: $task is none of classes, captions and cifar10." >&2; exit 1 ;;
esac
case $form in
    full) ;;
    short) name=$name-short steps=40 images=9 references=18 ;;
    *) echo "error: QUICKSTART=$form is neither full nor short." >&2; exit 1 ;;
esac
ending=$(printf %07d $steps)-size-$size-vae-${vae##*/}-cfg-$cfg-seed-0-ode-high-1.0
teacher_precision=no  # these students are too narrow to gain by bfloat16, the teacher does
python -c 'import sys; from runtime import setup; sys.exit(not setup.fast_bf16())' && teacher_precision=bf16

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

# All else is the preset's: python train.py --preset list
training=(--exp-name $name --mixed-precision no --enc-precision $teacher_precision)
if [ $form = short ]; then
    training+=(--max-train-steps $steps --early-stop-point 20 --checkpointing-steps 20 --sampling-steps 10
        --log-every 1)
fi
sampling=(--ckpt "exps/$name/checkpoints/$(printf %07d $steps).pt" --vae $vae --cfg-scale $cfg --mode ode --num-steps 30
    --per-proc-batch-size $batch --sample-dir samples/$name)

if [ $task = classes ]; then
    stage data python examples/emoji/prepare.py --dest data/emoji --vae $vae
    stage train python train.py --preset embedded "${training[@]}"
    stage sample python generate.py "${sampling[@]}" --num-fid-samples $images --labels balanced
    made=samples/$name/SiT-T-2-$ending
    stage scores python evaluations/baselines.py $made.npz --reference-images $references
    pictures=("$made")
    found="$made-grid.png (a column per class: $(tr -d '[]"' < data/emoji/classes.json)),
         $made-scores.json"
elif [ $task = cifar10 ]; then
    data=data/cifar10 reference=data/cifar10/ref-val-$references.npz
    stage data python examples/cifar10/prepare.py --dest $data --reference-images $references
    stage train python train.py --preset cifar10 "${training[@]}"
    stage sample python generate.py "${sampling[@]}" --num-fid-samples $images --labels balanced \
        --class-names $data/classes.json
    made=samples/$name/SiT-XS-2-$ending
    stage scores python evaluations/evaluator.py $reference $made.npz --features efficientnet-lite0 \
        --efficientnet-weights $data/efficientnet-lite0.pth --json $made-scores.json
    pictures=("$made")
    found="$made-grid.png (a column per class),
         $made-scores.json (against $references held-out photographs)"
else
    captions=data/emoji-captions
    stage data python examples/emoji/prepare.py --dest data/emoji
    stage captions python examples/emoji/captions.py --dest $captions --vae $vae
    stage train python train_t2i.py --preset embedded-t2i "${training[@]}"
    stage sample python generate_t2i.py "${sampling[@]}" --num-fid-samples $images \
        --data-dir $captions
    stage prompts python generate_t2i.py "${sampling[@]}" --prompts assets/prompts-emoji.txt \
        --text-encoder $captions/text-encoder
    made=samples/$name/MMDiT-T-$ending
    stage retrieval python evaluations/caption_retrieval.py $captions/val "$made"
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
