"""Time and peak memory of a training step, on a GPU also MFU: the published recipe, variants of ours, and plain SiT.

    python benchmarks/step_time.py --model SiT-B/2 --batch-size 8 --mixed-precision no
    python benchmarks/step_time.py --model SiT-XL/2 --batch-size 32 64 --mixed-precision bf16 fp16

All variants run in one process and take turns, `published` without what runtime.setup.tune does to memory. Weights are
random, data are in memory, noise is drawn ahead of each step as in training. `plain` is SiT without teacher, taps and
projector: the floor. `bf16-teacher` is ours with --enc-precision bf16. Memory is weights, average, optimizer state,
teacher and the step's own peak. The MFU of all variants except plain counts the matrix products of `ours`: forward,
backward and teacher.
"""
import argparse
import copy
import gc
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import timm
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import published
from benchmarks.measure import added_memory, alternate, machine, spread, table
from data_io.latent_scale import SD_SCALE
from data_io.loader import StepBatches, load_noise
from encoders.teachers import TEACHERS, Teacher
from loss import ALIGNMENT_LOSSES, SILoss
from models.sit import SIT_CONFIGS, SiT_models
from runtime.flags import Parser, whole
from runtime.setup import to_device, tune
from training.config import loss_weights
from training.step import backward_and_step, update_ema
from training.trainer import Trainer

# Dense, bf16 and fp16, by the maker's data sheets; the first name that the GPU's name contains.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12,
              "A100": 312e12}
VARIANTS = ("published", "ours", "bf16-teacher", "compiled", "plain")


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=SIT_CONFIGS, default="SiT-B/2", help="default SiT-B/2")
    add("--batch-size", type=int, nargs="+", default=[8], help="images a step, one or more (default 8)")
    add("--resolution", type=whole(16), default=256, help="pixels a side, latents an eighth of it (default 256)")
    add("--mixed-precision", nargs="+", choices=["no", "fp16", "bf16"], default=["no"], help="one or more (default no)")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default all")
    add("--phases", nargs="+", type=int, choices=[1, 2], default=[1, 2], help="default both")
    add("--rounds", type=whole(1), default=7, help="timed steps of each (default 7)")
    add("--enc-type", choices=TEACHERS, default="dinov2-vit-b", help="default dinov2-vit-b")
    add("--no-attention", action="store_true", help="without the attention loss, to see what memory it takes")
    return parser.parse_args()


class Run:
    """Models, optimizers, teacher and one batch, for all variants of one batch size and precision."""

    def __init__(self, options, batch_size, precision):
        self.accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
        self.device, config = self.accelerator.device, SIT_CONFIGS[options.model]
        coefficients = {row.flag: row.default for row in ALIGNMENT_LOSSES.values()}
        self.args = argparse.Namespace(path_type="linear", weighting="uniform", time_shift=1.0, cfg_prob=0.1,
                                       max_grad_norm=1.0, ema_decay=0.9999, **coefficients)
        self.pairs = () if options.no_attention else config["attn_pairs"]
        self.name, self.side, row = options.model, options.resolution // 8, TEACHERS[options.enc_type]
        self.width = row.width
        vit = timm.create_model(row.timm_name, pretrained=False, num_classes=0).eval().requires_grad_(False)
        grid = self.side // config["patch_size"]
        tapped = [block for _, block in self.pairs]
        self.teachers = {name: Teacher(copy.deepcopy(vit), grid, tapped, precision="bf16" if "bf16" in name else None)
                         for name in ("ours", "bf16-teacher", "compiled") if name in ("ours", *options.variants)}
        for name, teacher in self.teachers.items():
            teacher.cast(precision)
            if name == "compiled":
                teacher.compile()
        if "published" in options.variants:
            on_gpu = self.device.type == "cuda"
            self.teachers["published"] = Teacher(vit, grid, range(len(vit.blocks)) if on_gpu else ())
            for block in [] if on_gpu else vit.blocks:
                block.attn = published.PlainAttention(block.attn)
        self.teachers = {name: teacher.to(self.device) for name, teacher in self.teachers.items()}
        shape = (4, self.side, self.side)
        self.noise = load_noise(StepBatches(batch_size, batch_size, 0, 0, 1 << 30), shape, self.device.type == "cuda")
        generator = torch.Generator().manual_seed(0)
        self.batch = {"moments": torch.cat([torch.randn(batch_size, *shape, generator=generator),
                                            torch.full((batch_size, *shape), 0.1)], dim=1).to(self.device),
                      "y": torch.randint(1000, (batch_size,), generator=generator).to(self.device),
                      "image": torch.randint(256, (batch_size, 3, options.resolution, options.resolution),
                                             dtype=torch.uint8, generator=generator).to(self.device)}
        self.y_null = torch.tensor(1000, device=self.device)
        self.parts = {}

    def model(self, variant):
        """(model, average, optimizer, prepared model, prepared optimizer), made once.

        `compiled` and `plain` have their own model, `published` only its own optimizer.
        """
        key = "ours" if variant == "bf16-teacher" else variant
        if key in self.parts:
            return self.parts[key]
        if key == "published":
            model, ema, _, wrapped, _ = self.model("ours")
            optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0)
            # Without prepare(): it would unscale fp16's gradients once per optimizer of these weights.
            prepared = wrapped, AcceleratedOptimizer(optimizer, scaler=self.accelerator.scaler)
        else:
            torch.manual_seed(0)
            z_dims = () if key == "plain" else (self.width,)
            with self.device:  # a CPU takes 8 seconds to draw the weights of XL
                model = SiT_models[self.name](input_size=self.side, z_dims=z_dims).to(self.device)
            with torch.no_grad():  # move adaLN off its zeros, as after some training
                for block in model.blocks:
                    block.adaLN_modulation[1].weight.normal_(std=0.02)
            ema = copy.deepcopy(model).requires_grad_(False)
            if key == "compiled":
                model.compile()
            optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0, fused=True)
            prepared = self.accelerator.prepare(model, optimizer)
        self.parts[key] = model, ema, optimizer, *prepared
        return self.parts[key]

    def draws(self):
        """The noise of the next step, on the device."""
        return {name: to_device(value, self.device) for name, value in next(self.noise).items()}

    def step(self, variant, phase):
        """The function that does one step."""
        model, ema, optimizer, wrapped, wrapped_optimizer = self.model(variant)
        loss_fn, teacher, aligned = SILoss(attn_pairs=self.pairs), self.teachers.get(variant), phase == 1
        if variant == "compiled":
            loss_fn.compile()
        if variant == "published":
            def work():
                model.projectors.requires_grad_(True)  # shared with `ours`, which freezes them in Phase II
                published.training_step(self.args, self.accelerator, model, ema, wrapped_optimizer, teacher, self.pairs,
                                        self.batch, self.draws(), self.y_null, aligned)
            return work

        trainer = Trainer.__new__(Trainer)  # only what a step needs, no run folder
        vars(trainer).update(args=self.args, accelerator=self.accelerator, y_null=self.y_null, loss_fn=loss_fn,
                             ddp_model=wrapped, teacher=teacher if aligned else None, weights=loss_weights(self.args),
                             latent_scale=SD_SCALE)

        def work():
            model.projectors.requires_grad_(aligned)
            loss, _ = trainer.loss(self.batch, self.draws())
            backward_and_step(self.args, self.accelerator, loss, model, optimizer, wrapped_optimizer)
            update_ema(ema, model, self.args.ema_decay)
        return work

    def held(self, variant, phase):
        """Bytes of weights, average, optimizer state and, if loaded, the teacher."""
        model, ema, optimizer, *_ = self.model(variant)
        tensors = [*model.state_dict().values(), *ema.state_dict().values(),
                   *(value for state in optimizer.state.values() for value in state.values())]
        if variant in self.teachers and (phase == 1 or variant == "published"):
            tensors += self.teachers[variant].vit.state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def flops(work):
    """FLOPs of the matrix products in one call; None if memory does not suffice, as beside a compiled network."""
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    except torch.OutOfMemoryError:
        return None
    return counter.get_total_flops()


def measure(options, batch_size, precision):
    run = Run(options, batch_size, precision)
    wanted = {(variant, phase): run.step(variant, phase) for variant in options.variants for phase in options.phases
              if (variant, phase) not in (("plain", 1), ("bf16-teacher", 2)) or options.phases == [phase]}
    seconds = alternate(wanted, options.rounds, run.device, [key for key in wanted if key[0] == "published"])
    rows, floor = [], next((statistics.median(s) for (v, _), s in seconds.items() if v == "plain"), None)
    gpu = torch.cuda.get_device_name() if run.device.type == "cuda" and precision != "no" else ""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
    for (variant, phase), work in wanted.items():
        gc.collect()
        memory = (added_memory(work, run.device) + run.held(variant, phase)) / 2 ** 30
        median = statistics.median(seconds[variant, phase])
        base = None if variant == "plain" else seconds.get(("published", phase))
        count = flops(run.step("ours", phase)) if peak and variant != "plain" else None
        rows.append([variant, "-" if variant == "plain" else phase, spread(seconds[variant, phase]),
                     f"{statistics.median(base) / median:.2f}" if base else "-",
                     f"{median / floor:.3f}" if floor else "-", f"{memory:.2f}",
                     f"{100 * count / median / peak:.1f} %" if count else "-"])
    print(f"\n{options.model}, {options.resolution} px, batch {batch_size}, precision {precision}"
          + (", no attention loss" if options.no_attention else "") + "\n")
    print(table(["variant", "phase", "seconds a step: median (lowest to highest)", "times faster than published",
                 "seconds / plain's", "peak GiB", "MFU"], rows), flush=True)


def main():
    options = parse_args()
    warnings.filterwarnings("ignore")
    tune(tf32=True)
    print(machine("cuda" if torch.cuda.is_available() else "cpu"))
    for precision in options.mixed_precision:
        for batch_size in options.batch_size:
            Accelerator().state._reset_state(reset_partial_state=True)
            measure(options, batch_size, precision)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
