"""Train a small VAE like those in assets/: a diffusers AutoencoderKL with factor 4, one for each embedded data set.

    python examples/train_vae.py --data data/emoji/train/images --out assets/vae-emoji
    python examples/train_vae.py --data data/cifar10/train/images --out assets/vae-cifar10 --channels 8 \\
        --augment mirror --batch-size 16 --steps 12000

Loss: mean |x - x'| + mean (x - x')^2 + kl_weight * KL per latent value. Use the training split only. At the end
the channel means and the standard deviation of the latents are folded into the last convolution of the encoder and the
first of the decoder, so that the scale 0.18215 fits this VAE too.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data_io.latent_scale import SD_SCALE
from data_io.storage import Packed, open_files
from evaluations.images import decode
from runtime.errors import MAX_SEED, UserError, run_script
from runtime.files import atomic_folder, is_file, prepare_output
from runtime.flags import Parser, number, whole
from runtime.setup import tune

FACTOR = 4  # pixels per latent pixel and side


def read_images(folder):
    """All images of a folder with dataset.json, PNGs or the packed form: uint8 (N, 3, R, R)."""
    if not is_file(folder / "dataset.json"):
        raise UserError(f"{folder} has no dataset.json; build the data first (examples/emoji/prepare.py).")
    files = open_files(folder.parent, folder.name, ".png")
    places = range(len(files.index.numbers))
    if not places:
        raise UserError(f"{folder} holds no images; build the data first (examples/emoji/prepare.py).")
    if isinstance(files, Packed):
        return torch.from_numpy(files.arrays(places))
    pictures = [decode(files.name(i)) for i in places]
    for i, (height, width, _) in enumerate(picture.shape for picture in pictures):
        if height != width or height != len(pictures[0]) or height % FACTOR:
            raise UserError(f"{files.name(i)} is {width}x{height}; all images must be squares of one size, a multiple "
                            f"of {FACTOR}.")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def in_range(pixels):
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def mirror(images, generator):
    """Mirror half of the images (N, 3, R, R)."""
    return torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)


def draw_anew(images, generator):
    """Shift by up to 8 px (white comes in), mirror, permute the colours: (N, 3, R, R) -> the same. For drawings."""
    size = images.shape[-1]
    padded = F.pad(images, (8, 8, 8, 8), value=1.0)
    out = []
    for image in padded:
        top, left, side, permute = torch.randint(0, 17, (4,), generator=generator).tolist()
        image = image[:, top:top + size, left:left + size]
        image = image.flip(-1) if side < 8 else image
        out.append(image[torch.randperm(3, generator=generator)] if permute < 6 else image)
    return torch.stack(out)


AUGMENTATIONS = {"drawings": draw_anew, "mirror": mirror}


@torch.no_grad()
def normalise_latents(vae, images):
    """Give the latents of `images` zero mean in each channel and the standard deviation 1 / SD_SCALE, exactly.

    images: uint8 (N, 3, R, R).

    mean' = a (mean - m) and logvar' = logvar + 2 log a in quant_conv; z = z' / a + m in post_quant_conv.
    """
    batches = (in_range(batch).to(vae.device) for batch in images.split(64))
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])  # (N, C, h, w)
    shift = means.mean(dim=(0, 2, 3))
    factor = 1 / (SD_SCALE.scale * (means - shift.view(1, -1, 1, 1)).std())
    channels = len(shift)
    vae.quant_conv.weight[:channels] *= factor
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - shift) * factor
    vae.quant_conv.bias[channels:] += 2 * factor.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    vae.post_quant_conv.weight /= factor


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of images with dataset.json")
    add("--out", type=Path, required=True, help="folder to write, in diffusers' format")
    add("--channels", type=whole(1, 64), default=4, help="of the latents (default 4)")
    add("--augment", choices=AUGMENTATIONS, default="drawings", help="drawings: shift on white, mirror, permute "
        "colours; mirror: for photographs (default drawings)")
    add("--steps", type=whole(2), default=9000, help="training steps (default 9000)")
    add("--batch-size", type=whole(1), default=8, help="images a step (default 8)")
    add("--learning-rate", type=number(0), default=2e-3, help="peak, decayed to 0 by a cosine (default 2e-3)")
    add("--kl-weight", type=number(0), default=1e-3, help="weight of the KL per latent value (default 1e-3)")
    add("--seed", type=whole(0, MAX_SEED), default=0, help="default 0")
    args = parser.parse_args()
    from diffusers import AutoencoderKL  # takes seconds: import after parsing
    torch.manual_seed(args.seed)
    tune(tf32=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare_output(args.out, inputs=[args.data])
    images = read_images(args.data)
    vae = AutoencoderKL(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
                        latent_channels=args.channels, down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3, mid_block_add_attention=False,
                        sample_size=images.shape[-1], scaling_factor=SD_SCALE.scale)
    vae = vae.to(device, memory_format=torch.channels_last)  # a fifth faster on a CPU
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(images)} images")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.02)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.time()
    for step in tqdm(range(args.steps), mininterval=10):
        x = in_range(images[torch.randint(len(images), (args.batch_size,), generator=generator)])
        x = AUGMENTATIONS[args.augment](x, generator)
        x = x.to(device, memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (x - y).abs().mean() + F.mse_loss(x, y) + args.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == args.steps - 1:
            if not loss.isfinite():
                raise UserError(f"The loss is {loss.item()} at step {step}; nothing is written. Lower --learning-rate.")
            tqdm.write(f"step {step} loss {loss.item():.4f} kl {kl.item():.2f} "
                       f"PSNR {10 * torch.log10(4 / F.mse_loss(x, y)).item():.2f} dB, {time.time() - start:.0f} s")
    vae.eval()
    normalise_latents(vae, images)
    with atomic_folder(args.out) as folder:
        vae.save_pretrained(folder)


if __name__ == "__main__":
    run_script(main)
