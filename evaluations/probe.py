"""How much a network knows about its images, block by block: a linear probe, and CKNNA with the teacher's features.

    python evaluations/probe.py CKPT --val-data data/emoji/val
    python evaluations/probe.py CKPT --data DATA --enc-type dinov2-vit-b --blocks 2,8,14,20 --t 0.5 --json probe.json

Features are the image tokens after a block (1-based, as in --encoder-depth), averaged over the tokens; the teacher's
are its averaged patch tokens after the final norm. The network (EMA) sees latents noised to time t, without class or
text, which would reveal the label. Data, teacher and resolution default to the checkpoint's; a run without a teacher
needs --enc-type and --enc-weights. Without --val-data the seed picks a fifth of the images as held-out.

Probe: accuracy on held-out images of the multinomial logistic regression that minimises mean cross-entropy
+ l2 / 2 |W|^2 over the training images, on standardised features. The problem is convex: it is solved without a seed.
CKNNA (arXiv 2405.07987, as plotted in REPA, 2410.06940), over held-out images i, j = 1 .. n with features a_i and b_i
of length 1, K_ij = <a_i, a_j> and L_ij = <b_i, b_j>:
    CKNNA(K, L) = A(K, L) / sqrt(A(K, K) A(L, L)),  A(K, L) = sum_ij m_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il),
m_ij = 1 if j /= i is among the k nearest of i both by K and by L, else 0. It is 1 for equal neighbourhoods and about 0
for unrelated ones. It depends on n and k: compare at equal ones. Runs on several processes under torchrun.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from evaluations.evaluator import run
from runtime.errors import MAX_SEED, UserError, run_script
from runtime.flags import Parser, number, pixels, whole


def evaluate(args):
    """Scores -> dict for --json on process 0, None on the others."""
    import torch
    from tqdm import tqdm

    from evaluations.extract import join_processes, rank
    from evaluations.metrics import cknna, linear_probe
    from evaluations.student import mean_tokens, open_split, open_teacher
    from models.checkpoint import load_network
    from sampling.cache import blocks_of
    network, trained = load_network(args.ckpt)
    depth = len(blocks_of(network))
    blocks = args.blocks or list(range(1, depth + 1))
    if max(blocks) > depth:
        raise UserError(f"--blocks names {max(blocks)}, the network has blocks 1 to {depth}; choose among these.")
    if args.enc_type not in (None, trained.get("enc_type")):  # the run's weights are for another teacher
        trained |= {"enc_weights": None, "enc_blocks": None, "enc_size": None, "attn_teacher": None}
    given = {name: getattr(args, name) for name in ("enc_type", "enc_weights", "enc_blocks", "resolution")}
    trained |= {name: value for name, value in given.items() if value is not None}
    data = args.data or trained.get("data_dir")
    if not data:
        raise UserError(f"{args.ckpt} does not say what it was trained on; give --data.")
    train, val = open_split(network, trained, data, args.val_data, args.images, args.seed)
    if len(val.positions) <= args.k:
        raise UserError(f"There are {len(val.positions)} held-out images, too few for --k {args.k} neighbours; give "
                        "more, or a smaller --k.")
    device = join_processes(args.device)
    network, teacher = network.to(device), open_teacher(network, trained).to(device)
    known, held_out = (mean_tokens(network, teacher, part, args.t, blocks, args.seed, trained, args.batch_size)
                       for part in (train, val))
    if rank():
        return None
    result = {"ckpt": args.ckpt, "data": data, "val_data": args.val_data, "seed": args.seed, "k": args.k, "l2": args.l2,
              "teacher": {"name": trained["enc_type"], "blocks": teacher.num_blocks},
              "images": {"training": len(train.positions), "held-out": len(val.positions)}, "rows": []}

    def accuracy(name):
        return linear_probe(known[name], labels[0], held_out[name], labels[1], network.num_classes, args.l2)

    if train.dataset:
        labels = [torch.from_numpy(each.dataset.labels[each.positions]).to(device) for each in (train, val)]
        result["teacher"]["probe"] = accuracy("teacher")
        result["largest class"] = (labels[1] == labels[0].bincount().argmax()).double().mean().item()
    for t, block in tqdm([(t, block) for t in args.t for block in blocks], desc="probes", unit="block", disable=None):
        row = {"block": block, "t": t, **({"probe": accuracy((block, t))} if train.dataset else {})}
        result["rows"].append({**row, "cknna": cknna(held_out[block, t], held_out["teacher"], args.k)})
    return result


def lines(result):
    """The table for stdout."""
    n, teacher = result["images"], result["teacher"]
    has_labels = "probe" in teacher
    yield f"{n['held-out']} held-out images, k = {result['k']}; teacher {teacher['name']}, {teacher['blocks']} blocks"
    if has_labels:
        yield (f"probe on {n['training']} training images: teacher {teacher['probe']:.3f}, largest class "
               f"{result['largest class']:.3f}")
    yield f"{'block':>5} {'t':>6}" + has_labels * f" {'probe':>7}" + f" {'CKNNA':>7}"
    for row in result["rows"]:
        probe = f" {row['probe']:>7.3f}" if has_labels else ""
        yield f"{row['block']:>5} {row['t']:>6g}{probe} {row['cknna']:>7.3f}"


def listed(kind):
    """A `type` for add_argument: a comma-separated list."""
    return lambda text: [kind(part) for part in text.split(",")]


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("ckpt", metavar="CKPT", help="checkpoint of ours or published, or an export; its EMA is probed")
    add("--data", help="training images and latents, as train.py's --data-dir (default: the checkpoint's)")
    add("--val-data", help="held-out images with labels of the same classes (default: a fifth of --data); not for text")
    add("--enc-type", help="teacher (default: the checkpoint's)")
    add("--enc-weights", help="its weights (default: the checkpoint's, else from the hub)")
    add("--enc-blocks", type=whole(1), help="use its first N blocks only (default: the checkpoint's)")
    add("--resolution", type=pixels, help="pixels a side (default: the checkpoint's, else 256)")
    add("--blocks", type=listed(whole(1)), help="1-based blocks of the network, such as 2,8,14 (default all)")
    add("--t", type=listed(number(0, 1)), default=[0.25, 0.5, 0.75], help="times, 0 = no noise (default 0.25,0.5,0.75)")
    add("--images", type=whole(1), default=10_000, help="images of each split at most (default 10000)")
    add("--k", type=whole(1), default=10, help="neighbours of CKNNA (default 10)")
    add("--l2", type=number(0), default=1e-2, help="weight of the probe's |W|^2 / 2 (default 0.01)")
    add("--seed", type=whole(0, MAX_SEED), default=0, help="of noise and choice of images (default 0)")
    add("--batch-size", type=whole(1), default=64, help="images at a time and process (default 64)")
    add("--device", choices=("cpu", "cuda"), help="default cuda if there is a GPU")
    add("--json", metavar="OUT", help="also write the scores, with their settings, to this file")
    run(evaluate, lines, parser.parse_args())


if __name__ == "__main__":
    run_script(main)
