"""What generate.py and generate_t2i.py share: load the network, make each image once, write PNGs, .npz and grid."""
import inspect
import math
import numbers
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from tqdm import tqdm

from data_io.latent_scale import PIXELS, SD_SCALE, read_statistics, scale_of
from encoders.vae import VAES, open_vae
from models.checkpoint import load_network, weights_digest
from runtime import memory
from runtime.errors import UserError
from runtime.files import atomic_write, is_file, read_json, remove_temporaries, write_json
from runtime.images import IMAGE_ERRORS, image_grid, open_image, write_png
from runtime.setup import AUTOCAST, PROCESS_GROUP_TIMEOUT, cast_weights, check_compiler, connect, to_device, tune
from samplers import SAMPLERS, TIME_GRIDS, guided
from sampling.cache import CACHES, blocks_of, flops_of_call, sample_latents

CFG_SCALE = 1.5  # the published default
GRID_IMAGES = 72
PNG_WRITERS = 4  # threads
SAMPLING = ("mode", "num_steps", "cfg_scale", "guidance_low", "guidance_high", "heun", "path_type", "time_grid",
            "time_shift", "tolerance", "cache", "cache_interval", "cache_order", "cache_boundary")
# These flags change no image: a restart may set them differently.
NOT_IN_SETTINGS = ("sample_dir", "num_fid_samples", "per_proc_batch_size", "tf32", "fused_attn", "compile",
                   "projector_embed_dims", "encoder_depth", "class_names", "names_file", "legacy", "prefix")
# Entries of settings.json that are not compared: hashes or values stand for the paths.
NOT_COMPARED = ("ckpt", "vae", "latents_stats", "data_dir", "text_encoder", "num_classes", "cost")
MAX_IMAGES = 10 ** 7  # six digits name a file, and a list of more takes memory


def sample(network, vae, streams, y, y_null, mode="ode", num_steps=50, cfg_scale=CFG_SCALE, guidance_low=0.0,
           guidance_high=1.0, heun=False, path_type="linear", time_grid="uniform", time_shift=3.0, tolerance=1e-4,
           cache="none", cache_interval=3, cache_order=2, cache_boundary=0.5, cost=None):
    """uint8 (N, 3, R, R): image i from the noise of streams[i], a NumPy generator; y and y_null as in guided.

    Options are those of SAMPLERS and, from `cache` on, of sampling/cache.py. `cost`, a Counter, counts network calls
    per image: `calls`, and `computed`, the part that no cache saved.
    """
    def normals(shape, dtype):
        draws = np.stack([rng.standard_normal(shape, dtype=dtype) for rng in streams])
        return to_device(torch.from_numpy(draws), y.device)

    for name, value, known in (("mode", mode, SAMPLERS), ("cache", cache, CACHES),
                               ("time_grid", time_grid, TIME_GRIDS)):
        if value not in known:
            raise UserError(f"{name} {value!r} is not known; use {' or '.join(map(repr, known))}.")
    check_modes(mode, heun, cache)
    for name, value, low in (("num_steps", num_steps, 1), ("cache_interval", cache_interval, 1),
                             ("cache_order", cache_order, 0)):
        if not isinstance(value, numbers.Integral) or value < low:
            raise UserError(f"{name} is {value!r}; give a whole number from {low} on.")
    if not 1 <= cfg_scale < math.inf:
        raise UserError(f"cfg_scale is {cfg_scale}; give a number from 1 on.")
    options = {"heun": heun, "path_type": path_type, "time_grid": time_grid, "time_shift": time_shift,
               "tolerance": tolerance, "noise": lambda x: normals(x.shape[1:], np.float64)}
    velocity = guided(network, y, y_null, cfg_scale, guidance_low, guidance_high)
    latents, state = sample_latents(network, velocity, normals(network.latent_shape, np.float32), mode, num_steps,
                                    cache, cache_interval, cache_order, cache_boundary, **options)
    check_finite(latents)
    if cost is not None:
        cost.update(calls=state.rows, computed=state.computed / len(blocks_of(network)))
    return vae.decode(latents)


def check_finite(latents):
    """Raise UserError for latents that are not finite: they would become black images."""
    if not latents.isfinite().all():
        raise UserError("The sampler's latents are not finite: the weights are damaged or diverged, or fp16 is too "
                        "narrow for them; try --mixed-precision no, or another checkpoint.")


def check_modes(mode, heun, cache):
    """Raise UserError for options that do not go together."""
    taken = inspect.signature(SAMPLERS[mode]).parameters
    if heun and "heun" not in taken:
        raise UserError("--heun is for --mode ode; leave one of them out.")
    if cache != "none" and "tolerance" in taken:
        raise UserError(f"--cache {cache} needs steps that are known before, which --mode {mode} has not; leave one of "
                        "them out.")


def open_network(path, vae, device, kind=None, source="ema", latents_stats=None, **typed):
    """(network, VAE, the VAE's name, args of training) of a checkpoint; see load_network and choose_vae.

    Scale and shift of the latents come from the file `latents_stats` or, without one, from the training. The network
    is on the CPU. The checkpoint is read first, as opening the VAE may download it. Raises UserError.
    """
    network, args = load_network(path, kind, source, **typed)
    name = choose_vae(vae, args, path)
    if name == PIXELS and latents_stats:
        raise UserError(f"--latents-stats is for a VAE's latents, and {path} was trained on pixels; leave it out.")
    scale = read_statistics(latents_stats) if latents_stats else scale_of(args)
    scale.check(network.in_channels, latents_stats or path)
    vae = open_vae(name, device, scale)
    channels, side, _ = network.latent_shape
    args |= {"resolution": args.get("resolution") or side * vae.factor, "path_type": args.get("path_type") or "linear"}
    vae.check(channels, side, args["resolution"])
    return network, vae, name, args


def choose_vae(vae, args, path):
    """The `vae` asked for; None: the VAE of the training, or "ema" if that was Stable Diffusion's, as published.

    Raises UserError for a VAE that cannot decode these latents.
    """
    is_pixels = args.get("vae") == PIXELS
    if vae is not None and (vae == PIXELS) != is_pixels and (is_pixels or "vae" in args):
        trained, remedy = ("pixels", "leave --vae out") if is_pixels else ("the latents of a VAE", "give a VAE")
        raise UserError(f"{path} was trained on {trained} (--vae {args['vae']}), which --vae {vae} cannot decode; "
                        f"{remedy}.")
    published = "latents" not in args or args.get("vae") in (None, *VAES.values())  # older ones: "ema" for any VAE
    return vae or (PIXELS if is_pixels else "ema" if published else args["vae"])


def check_guidance(path, cfg_scale, trained):
    """Raise UserError if `cfg_scale` needs a null condition that, by its args, the training never showed."""
    if cfg_scale > 1 and trained.get("cfg_prob") == 0:
        raise UserError(f"{path} was trained with --cfg-prob 0, so it has not learned what guidance needs, images "
                        "without a condition; give --cfg-scale 1.")


def start(args):
    """Refuse flags that contradict each other, start the process group -> accelerate's PartialState."""
    from accelerate import PartialState  # here: --help need not wait for it
    if args.guidance_low > args.guidance_high:
        raise UserError(f"--guidance-low {args.guidance_low} lies above --guidance-high {args.guidance_high}, so "
                        "nothing would be guided; swap them, or give --cfg-scale 1.")
    check_modes(args.mode, args.heun, args.cache)
    state = connect(lambda: PartialState(cpu=not torch.cuda.is_available(), timeout=PROCESS_GROUP_TIMEOUT))
    torch.set_grad_enabled(False)
    tune(args.tf32)
    if args.mixed_precision == "fp16" and state.device.type == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU; use bf16 or no.")
    if args.compile:
        check_compiler(state.device)
    return state


def open_checkpoint(args, kind, device):
    """(network of --ckpt, its VAE, hashes and numbers that identify both), on `device`; `kind` as in load_network.

    Fills in `args` from the checkpoint. Raises UserError for a flag that contradicts the weights.
    """
    known = ("model", "resolution", "num_classes", "qk_norm", "path_type", "encoder_depth", "context_shape",
             "class_names")
    typed = {name: value for name, value in vars(args).items() if name in known and value is not None}
    network, vae, args.vae, trained = open_network(args.ckpt, args.vae, device, kind, args.weights, args.latents_stats,
                                                   **typed)
    check_guidance(args.ckpt, args.cfg_scale, trained)
    widths = ",".join(map(str, network.z_dims))
    if args.projector_embed_dims and args.projector_embed_dims != widths:
        raise UserError(f"--projector-embed-dims {args.projector_embed_dims}: {args.ckpt} has projectors to "
                        f"{widths or 'nothing'}; leave the flag out.")
    if args.encoder_depth not in (None, trained["encoder_depth"]):
        raise UserError(f"--encoder-depth {args.encoder_depth} is outside the model, which has fewer blocks; leave it "
                        "out.")
    vars(args).update({name: trained.get(name) for name in known if hasattr(args, name)})
    identity = {"steps": trained["steps"], "network_sha256": weights_digest(network),
                "vae_sha256": vae.vae and weights_digest(vae.vae)}
    if vae.vae and vae.latent_scale != SD_SCALE:  # older folders lack it
        identity["latents"] = vae.latent_scale.plain()
    return prepare_model(network, args, device), vae, identity


def prepare_model(model, args, device):
    """`model` on `device`, compiled and in the precision asked for."""
    model.fused_attn = args.fused_attn
    if args.compile:
        model.compile()
    if args.mixed_precision != "no":
        cast_weights(model, args.mixed_precision)
        model.forward = torch.autocast(device.type, AUTOCAST[args.mixed_precision])(model.forward)
    return model.to(device)


def is_finished(path, resolution):
    """Whether `path` is a complete PNG of the right size."""
    try:
        with open_image(path) as picture:
            picture.load()
            return picture.mode == "RGB" and picture.size == (resolution, resolution)
    except IMAGE_ERRORS:
        return False


def folder_name(args, name):
    """The folder of the PNGs of these settings; `name` is the model's name, for own texts with the set's name."""
    return Path(args.sample_dir) / (
        f"{args.prefix}{name.replace('/', '-')}-{Path(args.ckpt).stem}-size-{args.resolution}-vae-"
        f"{Path(args.vae).name}-cfg-{args.cfg_scale}-seed-{args.global_seed}-{args.mode}-high-{args.guidance_high}")


def sample_folder(args, name, state, identity):
    """The folder of this run's PNGs. Raises UserError if it holds images of other settings or of other weights.

    `identity` holds values that identify weights and conditions, as files under the same path may change.
    """
    folder = folder_name(args, name)
    settings = {key: value for key, value in vars(args).items() if key not in NOT_IN_SETTINGS} | identity
    path, old = folder / "settings.json", {}
    if is_file(path):
        old = read_json(path, dict)
        if changed := [f"{key} {shorten(str(old.get(key)), 60)} -> {shorten(str(settings.get(key)), 60)}"
                       for key in {**old, **settings} if key not in NOT_COMPARED and old.get(key) != settings.get(key)]:
            raise UserError(f"{folder} holds images of other settings ({', '.join(changed)}); delete it, or name "
                            "another --sample-dir or --prefix.")
    elif any(folder.glob("*.png")):
        raise UserError(f"{folder} holds images, but no settings.json that says how they were made; delete it, or name "
                        "another --sample-dir or --prefix.")
    state.wait_for_everyone()  # all have read it
    if state.is_main_process:
        remove_temporaries(folder)
        for ending in (".npz.", "-grid.png."):
            remove_temporaries(folder.parent, folder.name + ending)
        write_json(path, settings | ({"cost": old["cost"]} if "cost" in old else {}), indent=2)
    state.wait_for_everyone()  # before anyone writes a temporary file
    return folder


def sample_images(args, state, network, vae, folder, condition, names, columns=None, texts=None):
    """Make the images that are missing in `folder`, then the .npz of all and the grid of the first ones.

    `names` holds a file name without .png per image; condition(i, rng) -> (y, y_null) of image i. `columns` and `texts`
    are the grid's.
    """
    paths = [folder / f"{name}.png" for name in names]
    cost = make_images(args, state, network, vae, paths, condition)
    if state.is_main_process:
        if cost:
            write_json(folder / "settings.json", read_json(folder / "settings.json") | {"cost": cost}, indent=2)
            computed = f", of which {cost['computed']:,.1f} were computed" if args.cache != "none" else ""
            print(f"an image took {cost['calls']:,.1f} network calls (a guided one counts twice){computed}: "
                  f"{cost['gflops']:,.0f} GFLOPs without the VAE")
        write_npz(folder.with_name(f"{folder.name}.npz"), paths, args.resolution)
        count = GRID_IMAGES // columns * columns if columns else GRID_IMAGES  # whole rows
        first = np.stack([np.array(open_image(path)) for path in paths[:count]])
        first = torch.from_numpy(first).permute(0, 3, 1, 2)
        write_png(folder.with_name(f"{folder.name}-grid.png"), image_grid(first, columns, texts and texts[:count]))
        print(f"{len(paths)} images in {folder}, with {folder.name}.npz and {folder.name}-grid.png beside it")


def make_images(args, state, network, vae, paths, condition):
    """Sample and save this process's share of the images that are not finished -> {name: cost of an image}.

    Process p makes the batches b of the whole list with b % processes = p. The last batch is filled up, as sums of
    another shape may round differently.
    """
    size = min(args.per_proc_batch_size, len(paths))
    todo = [i for i, path in enumerate(paths) if i // size % state.num_processes == state.process_index
            and not is_finished(path, args.resolution)]
    options = {name: getattr(args, name) for name in SAMPLING}
    cost, flops = Counter(), 0
    with ThreadPoolExecutor(PNG_WRITERS) as writers:  # Pillow compresses outside Python's lock
        written = []
        for start in tqdm(range(0, len(todo), size), unit="batch", disable=not state.is_main_process):
            batch = todo[start:start + size]
            filled = batch + [batch[-1]] * (size - len(batch))
            streams = [np.random.default_rng((args.global_seed, i)) for i in filled]
            conditions = [condition(i, rng) for i, rng in zip(filled, streams, strict=True)]
            y, y_null = (to_device(torch.stack(c), state.device) for c in zip(*conditions, strict=True))
            flops = flops or flops_of_call(network, y)
            with memory.explained_sampling(size):
                images = sample(network, vae, streams, y, y_null, cost=cost, **options)
            images = images.permute(0, 2, 3, 1).cpu().numpy()
            for task in written:  # the batch before was written meanwhile; raise its errors
                task.result()
            written = [writers.submit(write_png, paths[i], images[row]) for row, i in enumerate(batch)]
        for task in written:
            task.result()
    from accelerate.utils import gather_object  # here: --help need not wait for it
    cost["images"] = size * math.ceil(len(todo) / size)
    flops = max(gather_object([flops]))
    cost = sum((Counter(each) for each in gather_object([dict(cost)])), Counter())
    if not cost["images"]:
        return {}
    each = {name: round(cost[name] / cost["images"], 3) for name in ("calls", "computed")}
    return each | {"gflops": round(each["computed"] * flops / 1e9, 3)}


def write_npz(path, paths, resolution):
    """`arr_0` uint8 (n, R, R, 3) from PNG files, one picture in memory at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), resolution, resolution, 3)}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, \
            archive.open("arr_0.npy", "w", force_zip64=True) as array:
        np.lib.format.write_array_header_1_0(array, header)
        for picture in paths:
            array.write(np.asarray(open_image(picture).convert("RGB")).tobytes())
