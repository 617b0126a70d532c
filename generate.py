"""Sample images from a checkpoint of train.py: a folder of PNGs, an .npz for the ADM suite, and a preview grid.

    torchrun --nproc_per_node=8 generate.py --model SiT-XL/2 --ckpt exps/sitxl_haste/checkpoints/0400000.pt \\
        --mode sde --num-steps 250 --cfg-scale 1.65 --guidance-high 0.72

One process on a CPU or GPU: the same with `python generate.py`. What the checkpoint knows (model, resolution, classes,
path) need not be typed. Image i depends on --global-seed and i only, whatever the number of processes, and up to the
rounding of sums whatever the batch size. The same command again makes only what is missing. Output, in --sample-dir:
    {model}-{ckpt}-size-{R}-vae-{vae}-cfg-{w}-seed-{seed}-{mode}-high-{high}/{i:06d}.png, and beside it .npz (arr_0
    uint8 (n, R, R, 3)) and -grid.png
"""
import argparse
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from encoders.vae import open_vae
from models.checkpoint import load_checkpoint, load_weights, sizes_of
from models.sit import SIT_CONFIGS, SiT_models
from runtime.errors import MOST_CLASSES, UserError, check_bounds, run_script
from runtime.files import atomic_write, is_file, read_json, remove_temporaries
from runtime.images import IMAGE_ERRORS, image_grid, open_image
from runtime.setup import AUTOCAST, PROCESS_GROUP_TIMEOUT, cast_weights, check_compiler, end_processes, to_device, tune
from sampling.pipeline import VAES, choose_vae, sample

GRID_IMAGES = 72
PNG_WRITERS = 4  # threads
SAMPLING = ("mode", "num_steps", "cfg_scale", "guidance_low", "guidance_high", "heun", "path_type")
INF = float("inf")
BOUNDS = {  # argument of both sampling scripts -> lowest, highest
    **dict.fromkeys(("per_proc_batch_size", "num_steps", "num_fid_samples", "resolution"), (1, INF)),
    "num_classes": (1, MOST_CLASSES),
    **dict.fromkeys(("global_seed", "cfg_scale"), (0, INF)), **dict.fromkeys(("guidance_low", "guidance_high"), (0, 1))}


def add_sampling_arguments(parser):
    """Arguments of both sampling scripts."""
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--global-seed", type=int, default=0, help="image i is made from (seed, i) (default 0)")
    add("--tf32", action=flag, default=True, help="TF32 matrix products on Ampere and newer (default on)")
    add("--ckpt", required=True, help="checkpoint of train.py or of the published code, whose EMA is used, or an export of it")
    add("--sample-dir", default="samples", help="where the folder and .npz go (default samples)")
    add("--resolution", type=int, help="pixels a side (default: the checkpoint's, else 256)")
    add("--fused-attn", action=flag, default=True, help="fused attention (default on)")
    add("--vae", help="ema, mse, a folder in diffusers' format, or none for a network of pixels (default: none for "
        "such a checkpoint, else ema)")
    add("--per-proc-batch-size", type=int, default=32, help="images a batch and process (default 32)")
    add("--mode", choices=["ode", "sde"], default="ode", help="Euler ODE or Euler-Maruyama SDE (default %(default)s)")
    add("--cfg-scale", type=float, default=1.5, help="guidance scale, 1 = none (default %(default)s)")
    add("--guidance-low", type=float, default=0.0, help="guide where t is at least this (default 0)")
    add("--guidance-high", type=float, default=1.0, help="guide where t is at most this (default 1)")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="of the network alone (default no: float32)")
    add("--compile", action="store_true", help="torch.compile the network: a minute more at the start")
    add("--path-type", choices=["linear", "cosine"], help="interpolant (default: the checkpoint's, else linear)")
    add("--num-steps", type=int, default=50, help="sampler steps (default %(default)s)")
    add("--heun", action=flag, default=False, help="second order, ODE only (default off)")
    add("--encoder-depth", type=int, help="1-based depth of the projector, which sampling does not use (default: the "
        "model's)")
    add("--qk-norm", action=flag, default=None, help="LayerNorm on q and k (default: the checkpoint's, else off)")
    add("--projector-embed-dims", help="teacher widths of the projectors, such as 768 (default: read from the checkpoint)")


def read_checkpoint(args, device, configs, landmark, **published):
    """(EMA weights, arguments of the model) of --ckpt, for models of the table `configs`, and the VAE on `device`.

    `args` that were not typed are filled in from the checkpoint's or, where it says nothing, from `published`. Latent
    size and channels follow from --resolution and the weights; `landmark` is a weight that only these models have. What is
    wrong with --ckpt or a flag is said before the VAE is looked for.
    """
    checkpoint = load_checkpoint(args.ckpt)
    args.vae = choose_vae(args.vae, checkpoint["args"], args.ckpt)
    published = {"resolution": 256, "qk_norm": False, "path_type": "linear", **published}
    for name, default in published.items():
        if getattr(args, name, None) is None:
            known = checkpoint["args"].get(name)
            setattr(args, name, default if known is None else known)
    weights = checkpoint["ema"]
    for name in ("x_embedder.proj.weight", landmark):
        if name not in weights:
            raise UserError(f"{args.ckpt} is no checkpoint of this kind of model, having no {name}; generate.py takes those "
                           "of train.py, generate_t2i.py those of train_t2i.py.")
    if args.model not in configs:
        raise UserError(f"--model {args.model} is not known; use one of {', '.join(configs)}.")
    sizes = sizes_of(weights)
    widths = sizes["z_dims"]
    if args.projector_embed_dims and args.projector_embed_dims != ",".join(map(str, widths)):
        raise UserError(f"--projector-embed-dims {args.projector_embed_dims}: {args.ckpt} has projectors to "
                       f"{','.join(map(str, widths)) or 'nothing'}; leave the flag out.")
    check_bounds(args, BOUNDS)
    if args.guidance_low > args.guidance_high:
        raise UserError(f"--guidance-low {args.guidance_low} lies above --guidance-high {args.guidance_high}, so nothing would "
                       "be guided; swap them, or give --cfg-scale 1.")
    if args.heun and args.mode == "sde":
        raise UserError("--heun is for --mode ode; leave one of them out.")
    config = configs[args.model]
    patch, args.encoder_depth = config["patch_size"], args.encoder_depth or config["encoder_depth"]
    if not 1 <= args.encoder_depth <= config["depth"]:
        raise UserError(f"--encoder-depth {args.encoder_depth} is outside 1 to {config['depth']}, the model's depth.")
    vae = open_vae(VAES.get(args.vae, args.vae), device)
    if args.resolution % (vae.factor * patch):
        raise UserError(f"--resolution {args.resolution} is no multiple of {vae.factor * patch}, the VAE's factor "
                       f"{vae.factor} times the patch of {args.model}.")
    side = args.resolution // vae.factor
    vae.check(sizes["in_channels"], side, args.resolution)
    typed = {"num_classes": args.num_classes} if "num_classes" in sizes else {}
    return weights, {**sizes, **typed, "input_size": side, "encoder_depth": args.encoder_depth, "qk_norm": args.qk_norm,
                     "fused_attn": args.fused_attn}, vae


def ready(model, weights, args, device):
    """`model` with the weights of --ckpt, on `device`, in eval mode; it is called in the precision asked for."""
    load_weights(model, weights, args.ckpt)
    if args.compile:
        model.compile()
    if args.mixed_precision != "no":
        cast_weights(model, args.mixed_precision)
        model.forward = torch.autocast(device.type, AUTOCAST[args.mixed_precision])(model.forward)
    return model.to(device).eval()


def is_finished(path, resolution):
    """Whether `path` is a complete PNG of the right size."""
    try:
        with open_image(path) as picture:
            picture.load()
            return picture.mode == "RGB" and picture.size == (resolution, resolution)
    except IMAGE_ERRORS:
        return False


def sample_folder(args, name):
    """Folder of this run's PNGs; refuses one that was made with other settings, since its pictures would mix."""
    folder = Path(args.sample_dir) / (
        f"{name}-{Path(args.ckpt).stem}-size-{args.resolution}-vae-{Path(args.vae).name}-cfg-{args.cfg_scale}-"
        f"seed-{args.global_seed}-{args.mode}-high-{args.guidance_high}")
    ignored = ("sample_dir", "num_fid_samples", "per_proc_batch_size", "tf32", "fused_attn", "compile", "projector_embed_dims",
               "encoder_depth", "class_names")
    settings = {key: value for key, value in vars(args).items() if key not in ignored}
    for key in ("ckpt", "vae"):
        if Path(settings[key]).exists():  # however it was spelled
            settings[key] = str(Path(settings[key]).resolve())
    path = folder / "settings.json"
    if is_file(path) and (old := read_json(path)) != settings:
        changed = [f"{key} {old.get(key)} -> {settings.get(key)}" for key in {**old, **settings}
                   if old.get(key) != settings.get(key)]
        raise UserError(f"{folder} holds images of other settings ({', '.join(changed)}); delete it or name another "
                       "--sample-dir.")
    state = PartialState()
    state.wait_for_everyone()  # all have read it
    if state.is_main_process:
        remove_temporaries(folder)
        remove_temporaries(folder.parent, folder.name)  # the .npz and the grid
        with atomic_write(path, "w") as file:
            json.dump(settings, file, indent=2)
    state.wait_for_everyone()  # before anyone writes a temporary file
    return folder


def make_images(args, folder, model, vae, condition, path_of):
    """Sample and save this process's share of the images that are not there yet.

    Batch b of the global list belongs to process b % processes. The last batch is filled up, as other shapes can round
    otherwise. condition(i, rng) -> y of image i; model, y and y_null as samplers.guided takes them.
    """
    state, size = PartialState(), min(args.per_proc_batch_size, args.num_fid_samples)
    share = [i for i in range(args.num_fid_samples) if i // size % state.num_processes == state.process_index]
    todo = [i for i in share if not is_finished(path_of(i), args.resolution)]
    starts = tqdm(range(0, len(todo), size), unit="batch", disable=not state.is_main_process)
    with ThreadPoolExecutor(PNG_WRITERS) as writers:  # Pillow compresses outside Python's lock
        written = []
        for start in starts:
            batch = todo[start:start + size]
            images = make_batch(args, model, vae, batch + [batch[-1]] * (size - len(batch)), condition)[:len(batch)]
            for task in written:  # of the batch before, meanwhile; raises what they raised
                task.result()
            written = [writers.submit(write_png, path_of(i), image) for i, image in zip(batch, images, strict=True)]
        for task in written:
            task.result()
    state.wait_for_everyone()


def make_batch(args, model, vae, ids, condition):
    """Images `ids` as uint8 (n, R, R, 3), each from a stream of random numbers of its own."""
    device = PartialState().device
    streams = [np.random.default_rng((args.global_seed, i)) for i in ids]
    conditions = [condition(i, rng) for i, rng in zip(ids, streams, strict=True)]
    y, y_null = (to_device(torch.stack(c), device) for c in zip(*conditions, strict=True))
    images = sample(model, vae, streams, y, y_null, **{name: getattr(args, name) for name in SAMPLING})
    return images.permute(0, 2, 3, 1).cpu().numpy()


def write_png(path, image):
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, "PNG")


def write_npz(path, paths, resolution):
    """`arr_0` uint8 (n, R, R, 3) from PNG files, one picture in memory at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), resolution, resolution, 3)}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, \
            archive.open("arr_0.npy", "w", force_zip64=True) as array:
        np.lib.format.write_array_header_1_0(array, header)
        for picture in paths:
            array.write(np.asarray(open_image(picture).convert("RGB")).tobytes())


def write_outputs(args, folder, path_of, columns=None, texts=None):
    """The .npz of all images and the grid of the first ones, with their `texts` if given, by the main process."""
    if not PartialState().is_main_process:
        return
    paths = [path_of(i) for i in range(args.num_fid_samples)]
    write_npz(folder.with_name(folder.name + ".npz"), paths, args.resolution)
    count = GRID_IMAGES // columns * columns if columns else GRID_IMAGES  # whole rows
    first = np.stack([np.array(open_image(path)) for path in paths[:count]])
    first = torch.from_numpy(first).permute(0, 3, 1, 2)
    write_png(folder.with_name(folder.name + "-grid.png"), image_grid(first, columns, texts and texts[:count]))
    print(f"{len(paths)} images in {folder}, with {folder.name}.npz and {folder.name}-grid.png beside it")


def setup(args):
    """The process state, with the switches that both sampling scripts share."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PROCESS_GROUP_TIMEOUT)
    torch.set_grad_enabled(False)
    tune(state.num_processes, args.tf32)
    if args.mixed_precision == "fp16" and state.device.type == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU; use bf16 or no.")
    if args.compile:
        check_compiler(state.device)
    return state


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_arguments(parser)
    add = parser.add_argument
    add("--model", choices=SIT_CONFIGS, help="default: the checkpoint's, else SiT-XL/2")
    add("--num-classes", type=int, help="default: the checkpoint's, else 1000")
    add("--num-fid-samples", type=int, default=50_000, help="images to make (default 50000)")
    add("--labels", choices=["random", "balanced"], default="random",
        help="classes drawn at random, or i mod classes (default random)")
    add("--class-names", help="JSON file with the names of the classes in their order, to be written into the grid")
    return parser.parse_args()


def class_names(args):
    """The names in --class-names, one for each class, or None. Raises UserError."""
    if args.class_names is None:
        return None
    names = read_json(args.class_names, list)
    if len(names) != args.num_classes or not all(isinstance(name, str) for name in names):
        raise UserError(f"--class-names {args.class_names} must hold {args.num_classes} names, one for each class of "
                       "the checkpoint; give its data's file, or leave it out.")
    return names


def main():
    args = parse_args()
    state = setup(args)
    weights, sizes, vae = read_checkpoint(args, state.device, SIT_CONFIGS, "y_embedder.embedding_table.weight",
                                          model="SiT-XL/2", num_classes=1000)
    names = class_names(args)
    model = ready(SiT_models[args.model](**sizes), weights, args, state.device)
    folder = sample_folder(args, args.model.replace("/", "-"))

    def label(i, rng):
        return int(rng.integers(args.num_classes)) if args.labels == "random" else i % args.num_classes

    def condition(i, rng):
        return torch.tensor(label(i, rng)), torch.tensor(model.null_label)

    def path_of(i):
        return folder / f"{i:06d}.png"

    make_images(args, folder, model, vae, condition, path_of)
    few = args.num_classes if args.labels == "balanced" and args.num_classes <= 16 else None
    texts = names and [names[label(i, np.random.default_rng((args.global_seed, i)))] for i in range(GRID_IMAGES)]
    write_outputs(args, folder, path_of, few, texts and texts[:args.num_fid_samples])
    end_processes()


if __name__ == "__main__":
    run_script(main)
