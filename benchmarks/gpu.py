"""GPU measurements for gpu.sh that no other benchmark makes, one table each.

    python benchmarks/gpu.py machine            versions and hardware
    python benchmarks/gpu.py ceilings           a memory copy and square matrix products
    python benchmarks/gpu.py attention          fused attention as SiT-XL/2 calls it, by each kernel that PyTorch has
    python benchmarks/gpu.py tiles              the attention loss of SiT-XL/2 by the size of its tiles
    python benchmarks/gpu.py train              images/s of train.py on packed and PNG data
    python benchmarks/gpu.py profile            kernels of a training step
    python benchmarks/gpu.py scoring            images/s of the networks behind the scores
    python benchmarks/gpu.py encoding           images/s of dataset_tools.py encode (needs diffusers)

Weights and data are random and made here. --dry takes tiny sizes, for a CPU: its numbers mean nothing.
"""
import argparse
import contextlib
import csv
import functools
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import numpy as np
import torch
from accelerate import Accelerator
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import loss
from benchmarks.measure import added_memory, alternate, machine, spread, synchronize, table
from evaluations import features
from models.layers import QK
from runtime.errors import run_script
from runtime.setup import tune
from runtime.versions import environment, version

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS_A_ROW, PROFILED_STEPS, TOP = 10, 3, 15


def call(script, *arguments):
    """Run a script of the project; returns its stdout. Its output is shown if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nerror: {' '.join(command[1:])} ended with status {done.returncode}")
    return done.stdout


def ms(seconds, digits=3):
    """'median (lowest to highest)' in milliseconds."""
    return spread([1000 * s for s in seconds], digits)


def show_machine(args):
    rows = [["machine", machine(DEVICE).partition("; ")[2]], *environment(Accelerator(cpu=DEVICE == "cpu")).items(),
            ["/dev/shm, GiB free", f"{shutil.disk_usage('/dev/shm').free / 2 ** 30:.1f}"],
            *[[name, os.environ[name]] for name in sorted(os.environ) if name.startswith(("TORCH_", "NVIDIA_TF32"))],
            *[[name, version(name)] for name in ("triton", "imagecodecs", "pytest")]]
    if DEVICE == "cuda":
        query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (subprocess.run(query, check=False, capture_output=True, text=True).stdout
                  if shutil.which(query[0]) else "")
        rows += [["GPU", str(torch.cuda.get_device_properties(0))], ["driver", driver.strip() or "unknown"],
                 ["cuDNN", torch.backends.cudnn.version()]]
    print(table(["what", "value"], rows))


def show_ceilings(args):
    """TB/s count bytes read and written. Matrices hold random numbers: zeros draw less power and are faster."""
    size, side, rounds = (2 ** 20, 128, 1) if args.dry else (2 ** 31, 8192, 10)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    dest = torch.empty_like(source)
    seconds = alternate({"copy": lambda: dest.copy_(source)}, rounds, DEVICE)["copy"]
    rows = [[f"copy of {size / 2 ** 20:.0f} MiB", ms(seconds),
             f"{2 * size / statistics.median(seconds) / 1e12:.2f} TB/s"]]

    def multiply(a, b, tf32):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return a @ b

    works = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32),
                        ("float32", torch.float32)):
        a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        works[name] = functools.partial(multiply, a, b, name == "tf32")
    for name, seconds in alternate(works, rounds, DEVICE).items():
        rows.append([f"{name} product of {side} x {side}", ms(seconds),
                     f"{2 * side ** 3 / statistics.median(seconds) / 1e12:.1f} TFLOP/s"])
    print(table(["what", "ms", "rate"], rows))


def fused_kernels(work):
    """Names of the attention operators that `work()` calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    names = re.findall(r"aten::_scaled_dot_product_(\w+)", " ".join(event.key for event in found.key_averages()))
    return sorted({name for name in names if not name.endswith("_backward")})


def show_attention(args):
    """Forward and backward by each kernel, or why it refuses the inputs. Backward has 2.5 times forward's FLOPs."""
    n, h, t, d = (1, 2, 16, 8) if args.dry else (32, 16, 256, 72)
    rounds, forward_flops, rows = 1 if args.dry else 10, 4 * n * h * t * t * d, []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.manual_seed(0)
        # as the model makes them: (N, T, H, d) in memory
        q, k, v = (torch.randn(n, t, h, d, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
        gradient = torch.randn(n, t, h, d, device=DEVICE).to(dtype).transpose(1, 2)

        def both(q=q, k=k, v=v, gradient=gradient):
            return torch.autograd.grad(scaled_dot_product_attention(q, k, v), (q, k, v), gradient)

        @torch.no_grad()
        def forward(q=q, k=k, v=v):
            return scaled_dot_product_attention(q, k, v)

        kernels = {"default": None, **{name: getattr(SDPBackend, name) for name in (
            "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")}}
        for name, backend in kernels.items():
            row = [str(dtype).removeprefix("torch."), name]
            try:
                with sdpa_kernel(backend) if backend else contextlib.nullcontext(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # why a kernel refuses
                    taken = " ".join(fused_kernels(both))
                    found = alternate({"forward": forward, "both": both}, rounds, DEVICE)
                rate = 3.5 * forward_flops / statistics.median(found["both"]) / 1e12
                rows.append([*row, taken, ms(found["forward"]), ms(found["both"]), f"{rate:.1f}"])
            except RuntimeError as error:
                rows.append([*row, str(error).strip().partition("\n")[0], "-", "-", "-"])
    print(f"N {n}, H {h}, T {t}, d {d}\n")
    print(table(["dtype", "asked for", "taken", "forward, ms", "forward and backward, ms", "TFLOP/s"], rows))


def show_tiles(args):
    """Forward and backward, with the memory beyond the inputs; `whole maps` is the formula, by autograd."""
    n, h, t, d = (1, 2, 16, 8) if args.dry else (32, 12, 256, 72)  # the loss takes 12 of XL's heads
    powers, rounds = ((4, 8), 1) if args.dry else ((18, 20, 22, 23, 24, 25), 11)  # 2 ** power logits a tile
    torch.manual_seed(0)
    q, k, teacher_q, teacher_k = (torch.randn(n, h, t, d, device=DEVICE) for _ in range(4))
    student, teacher = QK(q.requires_grad_(), k.requires_grad_()), QK(teacher_q, teacher_k)
    tune(tf32=True)
    torch._dynamo.config.recompile_limit = 1000  # else compiling stops after 8 tile shapes

    def whole_maps():
        p = teacher.logits().softmax(dim=-1)
        return -(p * student.logits().log_softmax(dim=-1)).sum(dim=-1).mean()

    def tiled(power, tile):
        loss.tile_size = lambda device: 2 ** power
        return loss.attention_loss([student], [teacher], tile=tile)

    def step(form):
        q.grad = k.grad = None
        form().backward()

    forms, compiled = {"whole maps": whole_maps}, torch.compile(loss.attention_tile, dynamic=False)
    for power in powers:
        forms[f"tiles of 2^{power}"] = functools.partial(tiled, power, loss.attention_tile)
        forms[f"compiled tiles of 2^{power}"] = functools.partial(tiled, power, compiled)
    works = {name: functools.partial(step, form) for name, form in forms.items()}
    rows = [[name, ms(seconds, 2), f"{added_memory(works[name], DEVICE) / 2 ** 20:.0f}"]
            for name, seconds in alternate(works, rounds, DEVICE).items()]
    print(f"N {n}, H {h}, T {t}, d {d}\n")
    print(table(["form", "ms", "MiB"], rows))


def show_train(args):
    """train.py with its usual loader: the median over rows of ten steps, without the first row of each phase.

    Compare with step_time.py's numbers for the same model, batch and precision, which need no data.
    """
    import timm

    from encoders.teachers import TEACHERS
    model, resolution, batch, entries, rows_a_phase, teacher = (
        ("SiT-T/2", 64, 2, 32, 2, "dinov2-vit-s") if args.dry else ("SiT-B/2", 256, 128, 1024, 5, "dinov2-vit-b"))
    phase_steps, precision, found = STEPS_A_ROW * rows_a_phase, "no" if args.dry else "bf16", []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.save(timm.create_model(TEACHERS[teacher].timm_name, num_classes=0).state_dict(), folder / "teacher.pth")
        call("benchmarks/synthetic.py", folder, "--n", entries, "--resolution", resolution,
             "--forms", "folder", "packed")
        for form, name in (("packed", "packed"), ("folder", "PNG")):
            call("train.py", "--model", model, "--data-dir", folder / form, "--resolution", resolution,
                 "--batch-size", batch, "--mixed-precision", precision, "--allow-tf32", "--enc-type", teacher,
                 "--enc-weights", folder / "teacher.pth", "--early-stop-point", phase_steps, "--log-every", STEPS_A_ROW,
                 "--max-train-steps", 2 * phase_steps, "--sampling-steps", 0, "--report-to", "none",
                 "--output-dir", folder / "runs", "--exp-name", form)
            with open(folder / "runs" / form / "metrics.csv", newline="") as file:
                seconds = [float(row["seconds"]) / STEPS_A_ROW for row in csv.DictReader(file)]
            found += [(name, 1, seconds[1:rows_a_phase]), (name, 2, seconds[rows_a_phase + 1:])]
    print(f"{model}, {resolution} px, batch {batch}, precision {precision}; {len(os.sched_getaffinity(0))} CPU cores\n")
    print(table(["data", "phase", "seconds a step", "images/s"],
                [[name, phase, spread(s), f"{batch / statistics.median(s):.0f}"] for name, phase, s in found]))


def show_profile(args):
    """Busy: the sum of the kernels (on a CPU: operators). Idle: the rest of a step, timed without the profiler."""
    from benchmarks import step_time
    model, resolution, batch, precision = ("SiT-T/2", 64, 2, "no") if args.dry else ("SiT-XL/2", 256, 32, "bf16")
    sys.argv[1:] = ["--model", model, "--resolution", str(resolution), "--variants", "ours",
                    *(["--enc-type", "dinov2-vit-s"] if args.dry else [])]
    options = step_time.parse_args()
    tune(tf32=True)
    warnings.filterwarnings("ignore")
    run = step_time.Run(options, batch, precision)
    on_gpu = DEVICE == "cuda"
    kind, own_time = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
    rows, tops = [], []
    for phase in (1, 2):
        work = run.step("ours", phase)
        step = 1000 * statistics.median(alternate({"step": work}, 1 if args.dry else 5, DEVICE)["step"])
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
            for _ in range(PROFILED_STEPS):
                work()
            synchronize(DEVICE)
        kernels = [(event.key, getattr(event, own_time) / 1000 / PROFILED_STEPS, event.count / PROFILED_STEPS)
                   for event in found.key_averages() if event.device_type == kind and not event.is_user_annotation]
        busy = sum(time for _, time, _ in kernels)
        rows.append([phase, f"{step:.1f}", f"{busy:.1f}", f"{100 * max(0.0, 1 - busy / step):.1f} %",
                     f"{sum(calls for _, _, calls in kernels):.0f}"])
        tops += [[phase, name.replace("|", "/")[:100], f"{time:.2f}", f"{100 * time / busy:.1f} %", f"{calls:.0f}"]
                 for name, time, calls in sorted(kernels, key=lambda kernel: -kernel[1])[:TOP]]
    print(f"{model}, {resolution} px, batch {batch}, precision {precision}\n")
    print(table(["phase", "ms a step", "busy, ms", "idle", "kernels a step"], rows))
    print()
    print(table(["phase", "kernel", "ms a step", "share", "calls a step"], tops))


def show_scoring(args):
    """A batch of uint8 images from the CPU to features on the device, in full float32; random weights."""
    resolution, batch, rounds = (64, 2, 1) if args.dry else (256, 64, 5)
    images = torch.randint(0, 256, (batch, resolution, resolution, 3), dtype=torch.uint8)
    names = ("inception", "efficientnet-lite0") if args.dry else tuple(features.FEATURES)
    works = {}
    for name in names:
        torch.manual_seed(0)
        network = features.build(name).eval().requires_grad_(False).to(DEVICE)
        extractor = features.Extractor(name, "adm", network, torch.device(DEVICE))
        works[name] = lambda extractor=extractor: extractor(images)
    rows = [[name, ms(seconds, 1), f"{batch / statistics.median(seconds):.0f}"]
            for name, seconds in alternate(works, rounds, DEVICE).items()]
    print(f"{resolution} px, batch {batch}\n")
    print(table(["features", "ms a batch", "images/s"], rows))


def show_encoding(args):
    """Whole commands without import time, with a VAE of Stable Diffusion's sizes."""
    from diffusers import AutoencoderKL

    from benchmarks.synthetic import make_png
    from preprocessing import encode
    resolution, count, widths = (64, 4, (32,) * 4) if args.dry else (256, 2048, (128, 256, 512, 512))
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser.add_argument)
    with tempfile.TemporaryDirectory() as folder:
        folder, rng = Path(folder), np.random.default_rng(0)
        vae.save_pretrained(folder / "vae")
        (folder / "source").mkdir()
        for i in range(count):
            (folder / f"source/img{i:08d}.png").write_bytes(make_png(resolution, rng))

        def command(name, *more):
            def run():
                shutil.rmtree(folder / name, ignore_errors=True)
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    encode.run(parser.parse_args([f"--source={folder / 'source'}", f"--dest={folder / name}",
                                                  f"--model-url={folder / 'vae'}", *more]))
            return run

        found = alternate({"float32": command("float32"), "tf32": command("tf32", "--allow-tf32")}, 1)
    print(f"{resolution} px, {count} images\n")
    print(table(["products", "images/s"], [[name, f"{count / statistics.median(s):.1f}"] for name, s in found.items()]))


COMMANDS = {"machine": show_machine, "ceilings": show_ceilings, "attention": show_attention, "tiles": show_tiles,
            "train": show_train, "profile": show_profile, "scoring": show_scoring, "encoding": show_encoding}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        commands.add_parser(name).add_argument("--dry", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_script(main)
