"""The CUDA path without a GPU: training steps and samplers on PyTorch's fake tensors, on the device "cuda".

Fake tensors compute nothing. They refuse to mix devices, and to hand a number to Python, for which a GPU would have to
be waited for; here they also refuse copies between devices that wait. The backward pass needs CUDA itself: its
gradients are zeros here.
"""
import copy
from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map_only

import train
import train_t2i
from benchmarks import step_time
from encoders.teachers import TEACHERS, Teacher
from encoders.vae import open_vae
from models.mmdit import MMDiT_models
from models.sit import SiT_models
from sampling.images import sample
from tests.conftest import ROOT, call_main, forget_accelerator, tiny_run, train_arguments
from training import start
from training.trainer import Phase, Trainer

pytestmark = [pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
              pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")]
GPU = torch.device("cuda", 0)
TERMS = {"loss", "denoise", "grad_norm"}


class OnGPU(FakeTensorMode):
    """Fakes what happens on the device; tensors of the CPU stay real. With `never_waits` no copy may wait either."""

    never_waits = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        of_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not of_gpu and not any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        if self.never_waits and function is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            ends = {args[0].device.type, kwargs["device"].type}
            assert len(ends) == 1 or kwargs.get("non_blocking"), f"a copy that waits: {args[0].device} to {kwargs}"
        args, kwargs = tree_map_only(torch.Tensor, self.from_tensor, (args, kwargs))
        return super().__torch_dispatch__(function, types, args, kwargs)


@torch.no_grad()
def apply(module, function, recurse=True):
    """Module._apply by new weights: PyTorch's own, which keeps them, fails with fake tensors."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is not None and (new := function(value)) is not value:
                    is_parameter = isinstance(value, torch.nn.Parameter)
                    table[name] = torch.nn.Parameter(new, value.requires_grad) if is_parameter else new
    return module


def pin_memory(tensor):
    """As on a real GPU: only a CPU tensor can be pinned."""
    assert tensor.device.type == "cpu"
    return tensor


@pytest.fixture
def mode(monkeypatch):
    """Fake tensors, on a machine that seems to have a GPU."""
    monkeypatch.setattr(torch.nn.Module, "_apply", apply)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    yield OnGPU()
    forget_accelerator()


def faked(mode, thing):
    """A copy of `thing` whose tensors are fake."""
    with FakeCopyMode(mode):
        return copy.deepcopy(thing)


def move_vae(mode, vae):
    """Put a VAE of encoders/vae.py on the fake GPU, in place."""
    vae.vae, vae.device = faked(mode, vae.vae), GPU
    with mode:
        vae.vae.to(GPU)


def test_what_is_refused(mode):
    """What this file relies on: mixed devices and a number of the device's end in an error."""
    with mode:
        a = torch.zeros(3, device=GPU)
        with pytest.raises(FakeTensorDeviceMismatchError):
            a + torch.zeros(3)
        for wait in (torch.Tensor.item, bool, float):
            with pytest.raises(DataDependentOutputException):
                wait(a.sum())
        mode.never_waits = True
        for copy_to in (a.cpu, lambda: torch.zeros(3).to(GPU)):
            with pytest.raises(AssertionError, match="a copy that waits"):
                copy_to()
        assert torch.zeros(3).to(GPU, non_blocking=True).device == a.to(torch.float64).device == GPU


@pytest.fixture
def trainer(monkeypatch, mode):
    """trainer(module, arguments): the Trainer of this command line, on a fake GPU, without a backward pass."""
    def make(module, arguments, precision):
        made = []
        monkeypatch.setattr(start, "Trainer", lambda *parts: made.append(parts) or SimpleNamespace(run=lambda: None))
        call_main(monkeypatch, module, *arguments)
        args, accelerator, run, model, dataset, load_teacher, loss_fn, y_null, _ = made[0]
        for state in (AcceleratorState, PartialState):
            state._shared_state["device"] = GPU
        if precision == "fp16":
            AcceleratorState._shared_state["_mixed_precision"] = "fp16"
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cuda")
        fingerprint, teacher = dataset.fingerprint(), load_teacher and faked(mode, load_teacher())
        monkeypatch.setattr(dataset, "fingerprint", lambda: fingerprint)
        if dataset.vae:
            move_vae(mode, dataset.vae)
        with mode:
            trainer = Trainer(args, accelerator, run, faked(mode, model), dataset, load_teacher, loss_fn,
                              mode.from_tensor(y_null))
            if teacher:
                trainer.teacher = teacher.to(GPU)
                trainer.teacher.cast(accelerator.mixed_precision)
        trainer.bar, trainer.begun = SimpleNamespace(update=lambda: None), True

        def backward(loss):
            if accelerator.scaler is not None:
                loss = accelerator.scaler.scale(loss)
            assert loss.device == GPU and loss.requires_grad
            for parameter in trainer.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

        monkeypatch.setattr(accelerator, "backward", backward)
        return trainer
    return make


ALL_LOSSES = ["--relational-coeff", 1, "--dispersive-coeff", 1, "--latent-coeff", 1]
RUNS = {
    "as published": (train, []),
    "every loss": (train, [*ALL_LOSSES, "--spatial-norm", 0.6, "--projector", "conv"]),
    "other grids": (train, ["--enc-size", 84]),
    "teacher resampled": (train, ["--enc-size", 84, "--resample", "teacher"]),
    "other paths": (train, ["--path-type", "cosine", "--weighting", "lognormal", "--time-shift", 3, "--qk-norm",
                            "--no-fused-attn", "--grad-checkpointing", "--align-decay", "cosine"]),
    "accumulated": (train, ["--gradient-accumulation-steps", 2]),
    "encoded online": (train, ["--encode-online", "--vae", ROOT / "assets/vae-emoji", "--hflip"]),
    "pixels": (train, ["--vae", "none", "--model", "SiT-N/8"]),
    "text": (train_t2i, [])}
LOSSES = {name: {"feature", "attention"} for name in RUNS}
LOSSES["every loss"] |= {"relational", "dispersive", "latent"}


@pytest.mark.parametrize("name, precision", [("as published", "no"), ("as published", "fp16"),
                                             *((name, "bf16") for name in RUNS)])
def test_a_step_never_waits(trainer, mode, tiny_data, tiny_captions, teacher_file, tmp_path, name, precision):
    """A step of each phase, from the loader to the average: all on the GPU, no number of it is asked for."""
    module, more = RUNS[name]
    given = "bf16" if precision == "bf16" else "no"  # fp16 is refused on a CPU
    flags = ["--mixed-precision", given, "--enc-weights", teacher_file, "--early-stop-point", 1, *more]
    arguments = (train_arguments(tiny_data, tmp_path, *flags) if module is train
                 else tiny_run("MMDiT-T", tiny_captions, tmp_path, *flags))
    trainer, steps = trainer(module, arguments, precision), []
    trainer.metrics = SimpleNamespace(add=steps.append)
    for phase in (Phase(True, 1), Phase(False, 2)):
        with mode:
            batches = trainer.start_phase(phase)
            mode.never_waits = True
            trainer.train_step(phase, batches)
            mode.never_waits = False
    assert [set(terms) for terms in steps] == [TERMS | LOSSES[name], TERMS]
    assert {value.device for terms in steps for value in terms.values()} == {GPU}
    assert {p.device for network in (trainer.model, trainer.ema) for p in network.parameters()} == {GPU}


def test_a_timed_step(monkeypatch, mode):
    """step_time.py's: its batch is on the GPU from the start."""
    options = Namespace(model="SiT-N/2", resolution=128, enc_type="dinov2-vit-s", variants=("ours", "plain"),
                        no_attention=False)
    monkeypatch.setattr(Accelerator, "device", GPU)
    monkeypatch.setattr(Accelerator, "backward", lambda *_: None)
    with mode:
        run = step_time.Run(options, 2, "no")
        steps = [run.step(*key) for key in (("ours", 1), ("ours", 2), ("plain", 2))]
        mode.never_waits = True
        for step in steps:
            step()
        assert {p.device for variant in options.variants for p in run.model(variant)[0].parameters()} == {GPU}


NETWORKS = {  # one that samples, its condition, the empty one
    "SiT": (lambda: SiT_models["SiT-N/2"](input_size=16, num_classes=4, z_dims=()), torch.tensor([0, 1]),
            torch.tensor([4, 4])),
    "MMDiT": (lambda: MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=()), torch.zeros(2, 6, 16),
              torch.zeros(2, 6, 16))}


@torch.no_grad()
@pytest.mark.parametrize("name, cache, options", [
    ("SiT", "none", {"mode": "ode"}), ("SiT", "taylor", {"mode": "sde"}), ("SiT", "delta", {"heun": True}),
    ("MMDiT", "none", {"mode": "dpm"}), ("MMDiT", "taylor", {"mode": "ode"}), ("MMDiT", "delta", {"mode": "sde"})])
def test_a_sampler_never_waits(monkeypatch, mode, name, cache, options):
    """From noise to pictures, with guidance on a part of the times. (dopri5 has to ask whether all images are done.)"""
    monkeypatch.setattr("sampling.images.check_finite", lambda latents: None)  # waits once, at the end
    make, *conditions = NETWORKS[name]
    vae, network = open_vae(str(ROOT / "assets/vae-emoji")), faked(mode, make())
    move_vae(mode, vae)
    streams = [np.random.default_rng(i) for i in range(2)]
    with mode:
        network.to(GPU)
        conditions = [y.to(GPU) for y in conditions]
        mode.never_waits = True
        images = sample(network, vae, streams, *conditions, num_steps=5, cfg_scale=2.0, guidance_low=0.2,
                        guidance_high=0.7, cache=cache, cost=Counter(), **options)
    assert images.device == GPU and images.dtype == torch.uint8


@pytest.mark.parametrize("name", ["dinov2-vit-b", "clip-vit-B", "siglip2-vit-b", "dinov3-vit-b16", "pe-vit-b"])
def test_teachers_of_full_size(mode, name):
    """Position tables and rotations of every kind of teacher follow its weights to the device."""
    row = TEACHERS[name]
    with torch.device("meta"):
        vit = timm.create_model(row.timm_name, num_classes=0, **dict(row.options)).eval().requires_grad_(False)
    vit.row = row
    apply(vit, lambda weight: FakeTensor(mode, weight.detach(), torch.device("cpu")))
    with mode:
        teacher = Teacher(vit, 16, (3, 5), precision="bf16").to(GPU)
        teacher.cast("no")
        features, attention, _ = teacher(torch.zeros(2, 3, 256, 256, dtype=torch.uint8))
    assert [tokens.shape for tokens in features] == [(2, 256, row.width)]
    assert {x.device for x in (*features, *(x for qk in attention.values() for x in qk[:2]))} == {GPU}
