"""How much a network knows of its images, block by block: a linear probe, and how its neighbours are the teacher's (CKNNA).

    python evaluations/probe.py CKPT --val-data data/emoji/val
    python evaluations/probe.py CKPT --data DATA --enc-type dinov2-vit-b --blocks 2,8,14,20 --t 0.5 --json probe.json

Features are the image tokens after a block (1-based, as --encoder-depth), averaged over the tokens; the teacher's are its
patch tokens after the final norm, averaged too. The network (EMA) sees latents noised to time t, without class or text: a
label would be known from the condition. Data, teacher and resolution are the checkpoint's unless given; runs without
teacher need --enc-type and --enc-weights. Without --val-data a fifth of the images is held out, chosen by the seed.

Probe: accuracy on held-out images of the multinomial logistic regression that minimises mean cross-entropy + l2 / 2 |W|^2
over the training images, features being standardised by these. It is a convex problem, solved from zero: no seed in it.
CKNNA (arXiv 2405.07987, as plotted in REPA, 2410.06940), over held-out images i, j = 1 .. n with features a_i and b_i, both
of length 1, and K_ij = <a_i, a_j> and L_ij = <b_i, b_j>:
    CKNNA(K, L) = A(K, L) / sqrt(A(K, K) A(L, L)),  A(K, L) = sum_ij m_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il),
m_ij = 1 where j /= i is among the k nearest of i both by K and by L, else 0. 1 for equal neighbourhoods, about 0 for
unrelated ones. It depends on n and k: compare at equal ones. Runs on several processes under torchrun.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
from evaluations.evaluator import positive, run
from evaluations.extract import gather_rows, join_processes, rank, shard
from evaluations.student import block_tokens, noised, null_condition, open_dataset, open_teacher
from files import BadInput, check_bounds, run_script
from pipeline import load_network

HELD_OUT = 5  # one image in so many, where no --val-data is given
ROWS = 1024  # of the kernels at a time
ITERATIONS = 500  # of L-BFGS, which ends earlier when the gradient is below its tolerance


def cknna(a, b, k=10):
    """CKNNA of features a (n, D) and b (n, E), as in the docstring above; float64. k is at most n - 1."""
    a, b = (F.normalize(features.double(), dim=1) for features in (a, b))
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for start in range(0, len(a), ROWS):
        centred, near = [], []
        for features in (a, b):
            kernel = features[start:start + ROWS] @ features.T  # (rows, n)
            centred.append(kernel - kernel.mean(dim=1, keepdim=True))
            own = torch.arange(len(kernel), device=kernel.device)
            kernel[own, start + own] = -torch.inf  # no image is its own neighbour
            near.append(torch.zeros_like(kernel).scatter_(1, kernel.topk(k, dim=1).indices, 1))
        (x, y), (near_x, near_y) = centred, near
        sums += torch.stack([(near_x * near_y * x * y).sum(), (near_x * x * x).sum(), (near_y * y * y).sum()])
    both, first, second = sums.tolist()
    return both / (first * second) ** 0.5


def linear_probe(train, train_labels, val, val_labels, classes, l2=1e-2):
    """Accuracy on `val` (m, D) of the logistic regression fitted to `train` (n, D); labels int64 (n,) and (m,)."""
    train, val = train.double(), val.double()
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-12)
    train, val = (train - mean) / std, (val - mean) / std
    weight = train.new_zeros(train.shape[1], classes, requires_grad=True)
    bias = train.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-6, tolerance_change=0,
                               line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(train @ weight + bias, train_labels) + l2 / 2 * (weight ** 2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return ((val @ weight + bias).argmax(dim=1) == val_labels).double().mean().item()


def choose(args, network, trained):
    """(training set, its positions, held-out set, its positions); the training set is None where there are no labels."""
    if hasattr(network, "context_embedder"):
        dataset = open_dataset(network, trained, args.data, "val")
        return None, [], dataset, order(dataset, args)[:args.images]
    dataset = open_dataset(network, trained, args.data)
    if args.val_data:
        held_out = open_dataset(network, trained, args.val_data)
        return dataset, order(dataset, args)[:args.images], held_out, order(held_out, args)[:args.images]
    positions, share = order(dataset, args), len(dataset) // HELD_OUT
    return dataset, positions[share:][:args.images], dataset, positions[:share][:args.images]


def order(dataset, args):
    return np.random.default_rng(args.seed).permutation(len(dataset)).tolist()


@torch.no_grad()
def features(args, network, teacher, dataset, positions, path_type, device):
    """{"teacher" or (block, t): (n, D)} of the images at `positions`, on process 0; on the others None for each."""
    start, stop = shard(len(positions))
    rows = {}
    for first in range(start, stop, args.batch_size):
        batch = positions[first:min(first + args.batch_size, stop)]
        found = {"teacher": teacher(torch.stack([dataset.image(i) for i in batch])).features[0]}
        y = torch.stack([null_condition(network, dataset)] * len(batch)).to(device)
        for t in args.t:
            x = noised(dataset, batch, t, args.seed, path_type).to(device)
            found |= {(block, t): tokens for block, tokens in block_tokens(network, x, t, y, args.blocks).items()}
        for name, tokens in found.items():
            rows.setdefault(name, []).append(tokens.mean(dim=1).cpu())
    names = ["teacher", *((block, t) for t in args.t for block in args.blocks)]
    widths = {name: teacher.vit.embed_dim if name == "teacher" else network.pos_embed.shape[2] for name in names}
    return {name: gather_rows(torch.cat(rows.get(name, [torch.zeros(0, widths[name])]))) for name in names}


def evaluate(args):
    """Scores -> dict for --json on process 0, None on the others."""
    network, trained = load_network(args.ckpt)
    depth = len(network.joint_blocks if hasattr(network, "joint_blocks") else network.blocks)
    args.blocks = args.blocks or list(range(1, depth + 1))
    if not all(1 <= block <= depth for block in args.blocks):
        raise BadInput(f"--blocks names {max(args.blocks)}, the network has blocks 1 to {depth}; choose among these.")
    given = {name: getattr(args, name) for name in ("enc_type", "enc_weights", "enc_blocks", "resolution")}
    if args.enc_type not in (None, trained.get("enc_type")):  # another teacher: the run's weights and blocks are not its
        trained = {**trained, "enc_weights": None, "enc_blocks": None}
    trained = {**trained, **{name: value for name, value in given.items() if value is not None}}
    if args.val_data and hasattr(network, "context_embedder"):
        raise BadInput("--val-data is for classes; of captioned images the split val in --data is held out.")
    args.data = args.data or trained.get("data_dir")
    if not args.data:
        raise BadInput(f"{args.ckpt} does not say what it was trained on; give --data.")
    train, train_positions, val, val_positions = choose(args, network, trained)
    if len(val_positions) <= args.k:
        raise BadInput(f"There are {len(val_positions)} held-out images, too few for --k {args.k} neighbours; give more, or a "
                       "smaller --k.")
    device = join_processes(args.device)
    teacher = open_teacher(network, trained).to(device)
    extracted = [{}, {}]
    for i, (dataset, positions) in enumerate(((train, train_positions), (val, val_positions))):
        if dataset:
            extracted[i] = features(args, network.to(device), teacher, dataset, positions, trained.get("path_type") or "linear",
                                    device)
    if rank():
        return None
    known, held_out = ({name: value.to(device) for name, value in part.items()} for part in extracted)
    result = {"ckpt": args.ckpt, "data": args.data, "val_data": args.val_data, "seed": args.seed, "k": args.k, "l2": args.l2,
              "teacher": {"name": trained["enc_type"], "blocks": teacher.num_blocks},
              "images": {"training": len(train_positions), "held-out": len(val_positions)}, "rows": []}

    def accuracy(name):
        return linear_probe(known[name], labels[0], held_out[name], labels[1], network.num_classes, args.l2)

    if train:
        labels = [torch.tensor([part.labels[i] for i in positions], device=device)
                  for part, positions in ((train, train_positions), (val, val_positions))]
        result["teacher"]["probe"] = accuracy("teacher")
        result["largest class"] = (labels[1] == labels[0].bincount().argmax()).double().mean().item()
    for t in args.t:
        for block in args.blocks:
            row = {"block": block, "t": t, **({"probe": accuracy((block, t))} if train else {})}
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
        yield f"{row['block']:>5} {row['t']:>6g}" + (f" {row['probe']:>7.3f}" if has_labels else "") + f" {row['cknna']:>7.3f}"


def numbers(kind):
    """Parser of a comma-separated list, for argparse."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    parse.__name__ = f"list of {kind.__name__}s"  # for argparse's message
    return parse


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("ckpt", metavar="CKPT", help="checkpoint of ours or published, or an export; its EMA is probed")
    add("--data", help="training images and latents, as train.py's --data-dir (default: the checkpoint's)")
    add("--val-data", help="held-out ones, with labels of the same classes (default: a fifth of --data); a text-to-image data "
        "set has its own val/")
    add("--enc-type", help="teacher (default: the checkpoint's)")
    add("--enc-weights", help="its weights (default: the checkpoint's, else from the hub)")
    add("--enc-blocks", type=int, help="its first N blocks only (default: the checkpoint's)")
    add("--resolution", type=int, help="pixels a side (default: the checkpoint's, else 256)")
    add("--blocks", type=numbers(int), help="such as 2,8,14: 1-based blocks of the network (default all)")
    add("--t", type=numbers(float), default=[0.25, 0.5, 0.75], help="times, 0 = no noise (default 0.25,0.5,0.75)")
    add("--images", type=positive, default=10_000, help="images of each split at most (default 10000)")
    add("--k", type=positive, default=10, help="neighbours of CKNNA (default 10)")
    add("--l2", type=float, default=1e-2, help="weight of the probe's |W|^2 / 2 (default 0.01)")
    add("--seed", type=int, default=0, help="of noise and choice of images (default 0)")
    add("--batch-size", type=positive, default=64, help="images at a time and process (default 64)")
    add("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    add("--json", metavar="OUT", help="also write the scores and what they were made of here")
    args = parser.parse_args()
    check_bounds(args, {"seed": (0, float("inf")), "l2": (0, float("inf")), "enc_blocks": (1, float("inf"))})
    for t in args.t:
        if not 0 <= t <= 1:
            raise BadInput(f"--t has {t}; times go from 0, the image, to 1, noise alone.")
    return args


def main():
    run(evaluate, lines, parse_args())


if __name__ == "__main__":
    run_script(main)
