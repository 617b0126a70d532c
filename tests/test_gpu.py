"""The CUDA path: golden numbers, tiles, skipped steps, whole runs, several processes. Skipped without a GPU.

HASTE_TEST_DEVICE=cpu runs the same tests on a CPU, without what only a GPU has: TF32, fp16 training, NCCL. On a GPU two
processes agree to a tolerance, as kernels may add in any order; tests that compare bits request deterministic kernels.
"""
import contextlib
import multiprocessing
import os
import signal
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image

import generate
import loss
import train
import train_t2i
from encoders.teachers import Teacher
from evaluations import features
from evaluations.features import load_extractor
from evaluations.images import open_images
from loss import SILoss, attention_loss
from models.checkpoint import saved_steps
from models.layers import QK, Alignment, attend
from runtime.setup import AUTOCAST, tune
from tests.conftest import ROOT, SERVER, call_main, checkpoint, metrics, script, tiny_run, train_arguments
from tests.golden.fill import fill_value
from tests.test_faults import wait_for
from tests.test_golden import NETWORKS, SAMPLES, close, golden, golden_sit, golden_teacher, sample, sit_inputs
from tests.test_resume import assert_same_run, assert_same_state
from tests.test_teacher import small_vit
from training.preemption import EXIT_CODE

DEVICE = os.environ.get("HASTE_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a GPU; HASTE_TEST_DEVICE=cpu runs what a CPU can", allow_module_level=True)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it, before CUDA starts
ON_GPU = DEVICE == "cuda"

# Precision of products -> bound on ||ours - golden|| / ||golden||; float32 compares every number.
PRECISIONS = {"float32": 1e-4, "tf32": 3e-3, "bf16": 3e-2, "fp16": 5e-3}
GPU_ONLY = pytest.mark.skipif(not ON_GPU, reason="only a GPU has it")
EACH_PRECISION = pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=GPU_ONLY) if name == "tf32" else name for name in PRECISIONS])
TRAINED = {"no": 1e-3, "bf16": 3e-2, "fp16": 3e-2}  # --mixed-precision -> bound on the losses of a few steps
EACH_TRAINED = pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=GPU_ONLY) if name == "fp16" else name for name in TRAINED])


@pytest.fixture(autouse=True)
def settings():
    """Restore settings that runs change in this process, and drop graphs compiled for other tests."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    torch._dynamo.reset()
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def products(precision):
    """Inside, products are in `precision`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    with torch.autocast(DEVICE, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
        yield


def error(actual, expected):
    """||actual - expected|| / ||expected||."""
    actual, expected = (torch.as_tensor(x).detach().cpu().double() for x in (actual, expected))
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def near(actual, expected, precision, passes=1):
    """`passes`: 2 for gradients, to which the forward and the backward pass add their errors."""
    if precision == "float32":
        close(torch.as_tensor(actual).detach().cpu(), expected, PRECISIONS[precision])
    found = error(actual, expected)
    assert found <= passes * PRECISIONS[precision], found  # a NaN is not


def to_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def teacher_on_device(seed):
    target = golden_teacher(seed)
    return Alignment(to_device(*target.features),
                     {block: QK(*to_device(qk.q, qk.k), qk.scale) for block, qk in target.attention.items()})


# ---- numbers ----

@EACH_PRECISION
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, fused, precision):
    file, (network, inputs, _) = golden(name), NETWORKS[name]
    model, (x, y, t, _) = network(fused_attn=fused).to(DEVICE), to_device(*inputs())
    with torch.no_grad(), products(precision):
        v, alignment = model(x, t, y, return_alignment=True)
    near(v, file["v"], precision)
    near(alignment.features[0][:, :8], file["proj"], precision)
    for block in (5, 7):
        near(alignment.attention[block].logits()[:, :, :4, :16], file[f"attn{block}"], precision)


@EACH_PRECISION
@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_gradients(name, precision):
    """The golden file of MMDiT has no gradients."""
    file, (network, inputs, seed) = golden(name), NETWORKS[name]
    model, (x, y, t, noise) = network().to(DEVICE), to_device(*inputs())
    with products(precision):
        losses = SILoss()(model, x, y, teacher_on_device(seed), t, noise)
    for ours, theirs in (("denoise", "denoise"), ("feature", "proj_loss"), ("attention", "attn_loss")):
        near(losses[ours], file[theirs], precision)
    (losses["denoise"].mean() + 0.5 * losses["feature"] + 0.5 * losses["attention"]).backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert np.isfinite(list(norms.values())).all()
    if "gnames" in file:
        assert sorted(norms) == sorted(file["gnames"].tolist())
        near(torch.tensor([norms[name] for name in file["gnames"].tolist()]), file["gnorms"], precision, 2)


@EACH_PRECISION
def test_teacher(precision):
    """Weights are cast once, as in training."""
    file, vit = golden("teacher_dinov2"), small_vit()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.copy_(torch.from_numpy(fill_value(name, tuple(parameter.shape))))
    images = torch.from_numpy(np.random.RandomState(77).randint(0, 256, (2, 3, 256, 256)).astype(np.uint8))
    teacher = Teacher(vit, 16, (1, 4)).to(DEVICE)
    teacher.cast(precision)
    with products(precision):
        out = teacher(images)
    near(out.features[0][:, :12], file["x_norm_patchtokens"], precision)
    for block in (1, 4):
        near(out.attention[block].logits()[:, :, :4, :24], file[f"attn{block}"], precision)


@pytest.mark.parametrize("name", SAMPLES)
def test_samplers(name):
    """On a network of one tanh, whose last bits are each device's own."""
    seed, sampler, arguments = SAMPLES[name]
    x = sample(seed, sampler, device=DEVICE, **arguments)
    assert x.device.type == DEVICE and x.dtype == torch.float64
    near(x, golden(name)["x"], "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 64, 72], ids=lambda width: f"head {width}")
def test_fused_attention(width, dtype):
    """Heads as wide as in SiT-T, B and XL: value and gradients against the map in float64."""
    torch.manual_seed(0)
    plain = [torch.randn(2, 16, 256, width, device=DEVICE).to(dtype).double().requires_grad_() for _ in range(3)]
    fused = [x.detach().to(dtype).requires_grad_() for x in plain]
    weights = torch.randn(2, 16, 256, width, device=DEVICE, dtype=torch.float64)
    results = [attend(*plain, fused=False), attend(*fused)]
    for result in results:
        (result.double() * weights).sum().backward()
    bound = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert error(results[1], results[0]) < bound
    for ours, theirs in zip(fused, plain, strict=True):
        assert error(ours.grad, theirs.grad) < bound


@pytest.fixture(scope="module")
def maps():
    """student and teacher q, k; the loss and its gradients by q and k in float64."""
    torch.manual_seed(0)
    shape = (8, 12, 256, 64) if ON_GPU else (2, 3, 256, 64)
    tensors = [(3 if i % 2 else 1) * torch.randn(shape, device=DEVICE) for i in range(4)]
    q, k, teacher_q, teacher_k = (tensor.double() for tensor in tensors)
    q.requires_grad_(), k.requires_grad_()
    p = QK(teacher_q, teacher_k).logits().softmax(dim=-1)
    expected = -(p * QK(q, k).logits().log_softmax(dim=-1)).sum(dim=-1).mean()
    expected.backward()
    return tensors, expected.detach(), q.grad, k.grad


@pytest.mark.parametrize("precision", [pytest.param("tf32", marks=GPU_ONLY), "float32"])
@pytest.mark.parametrize("power", [12, 16, 18, 20, 22, 23, 24, 25])
def test_attention_loss_in_tiles(monkeypatch, maps, power, precision):
    """At every benchmarked tile size, and below one map's rows: value and gradients against float64."""
    (q, k, teacher_q, teacher_k), expected, q_gradient, k_gradient = maps
    monkeypatch.setattr(loss, "tile_size", lambda device: 2 ** power)
    student = [x.clone().requires_grad_() for x in (q, k)]
    with products(precision):
        found = attention_loss([QK(*student)], [QK(teacher_q, teacher_k)])
        found.backward()
    bound = PRECISIONS[precision]
    assert error(found, expected) < bound
    assert error(student[0].grad, q_gradient) < bound and error(student[1].grad, k_gradient) < bound


def test_scores_have_full_float32(tmp_path):
    """Features equal the CPU's, whatever training has set."""
    torch.manual_seed(0)
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "scorer.pth")
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    found = []
    for device in ("cpu", DEVICE):
        extractor = load_extractor("efficientnet-lite0", tmp_path / "scorer.pth", device, "adm", verify=False)
        tune(tf32=True)
        with torch.autocast(device, torch.bfloat16):
            found.append(extractor(images)[0])
    assert found[1].device.type == DEVICE and found[1].dtype == torch.float32
    assert error(found[1], found[0]) < 2e-4  # TF32 gives 1e-3 and more


@pytest.fixture
def group():
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_through_ddp(group):
    """The raw module around one process, by NCCL on a GPU: with the buckets' memory as gradients, twice."""
    x, y, t, noise = to_device(*sit_inputs())
    found = []
    for wrapped in (False, True):
        model = network = golden_sit().to(DEVICE)
        if wrapped:
            network = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=[0] if ON_GPU else None, gradient_as_bucket_view=True)
        for _ in range(2):
            losses = SILoss()(network, x, y, teacher_on_device(11), t, noise)
            (losses["denoise"].mean() + 0.5 * losses["feature"] + 0.5 * losses["attention"]).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).cpu())
    assert error(found[1], found[0]) < 1e-5


# ---- runs ----

SWITCH, STEPS = 3, 6  # a run's first step without alignment, and its length
WAYS = {"eager": [], "compiled": ["--compile"], "checkpointing": ["--grad-checkpointing"],
        "compiled and checkpointing": ["--compile", "--grad-checkpointing"]}


def run(monkeypatch, *arguments):
    call_main(monkeypatch, train, *arguments, device=DEVICE)


def run_arguments(data, teacher_file, out, *more):
    return train_arguments(data, out, "--enc-weights", teacher_file, "--early-stop-point", SWITCH,
                           "--max-train-steps", STEPS, *more)


@pytest.fixture(scope="module")
def expected(tiny_data, teacher_file, tmp_path_factory):
    """metrics.csv of the float32 run of one CPU process."""
    out = tmp_path_factory.mktemp("expected")
    script("train.py", *run_arguments(tiny_data, teacher_file, out))
    return metrics(out)


def assert_expected(rows, expected, bound=TRAINED["no"]):
    """Same losses until fp16's scaler skips a step; all numbers finite; both phases."""
    assert [row["step"] for row in rows] == [str(step + 1) for step in range(STEPS)]
    assert [bool(row["attention"]) for row in rows] == [True] * SWITCH + [False] * (STEPS - SWITCH)
    kept = [row["skipped"] == "0" for row in rows]
    for i, (row, other) in enumerate(zip(rows, expected, strict=True)):
        if all(kept[:i + 1]):
            for name in ("loss", "denoise", *(("feature", "attention") if i < SWITCH else ())):
                close_to = pytest.approx(float(other[name]), rel=bound, abs=bound / 10)
                assert float(row[name]) == close_to, (name, row, other)
    return kept


@EACH_TRAINED
@pytest.mark.parametrize("way", WAYS)
def test_a_run(monkeypatch, tiny_data, teacher_file, tmp_path, expected, way, precision):
    run(monkeypatch, *run_arguments(tiny_data, teacher_file, tmp_path, *WAYS[way], "--mixed-precision", precision))
    kept = assert_expected(metrics(tmp_path), expected, TRAINED[precision])
    assert all(kept) or precision == "fp16" and sum(kept) >= 3  # a scale of 2 ** 16 may be too high at first
    assert f"on {'cuda' if ON_GPU else 'cpu'}" in (tmp_path / "run/log.txt").read_text()


def test_sampling_scripts(monkeypatch, tiny_data, tmp_path):
    """generate.py from a run on pixels: network in bf16, guidance, a cache."""
    run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--vae", "none", "--model", "SiT-N/8",
                                      "--max-train-steps", 1))
    call_main(monkeypatch, generate, "--ckpt", tmp_path / "run/checkpoints/0000001.pt", "--sample-dir", tmp_path,
              "--num-fid-samples", 3, "--num-steps", 6, "--cfg-scale", 2, "--cache", "taylor", "--mixed-precision",
              "bf16", device=DEVICE)
    assert next(open_images(next(tmp_path.glob("*.npz"))).batches(0, 3, 3)).std() > 5


def test_a_run_on_text(monkeypatch, tiny_captions, teacher_file, tmp_path):
    """MMDiT in both phases, the gradient trigger compared once."""
    call_main(monkeypatch, train_t2i, *tiny_run(
        "MMDiT-T", tiny_captions, tmp_path, "--enc-weights", teacher_file, "--max-train-steps", 4,
        "--early-stop-point", 3, "--early-stop-trigger", "gradient", "--trigger-start", 1, "--trigger-every", 2,
        "--trigger-samples", 8, "--trigger-threshold", -1, "--mixed-precision", "bf16", "--dispersive-coeff",
        0.1), device=DEVICE)
    rows = metrics(tmp_path)
    assert [row["attention"] != "" for row in rows] == [True] * 3 + [False]
    assert any(row["cosine"] for row in rows)


@pytest.mark.parametrize("more, precision", [
    (["--allow-tf32", "--num-workers", 2, "--enc-precision", "bf16"], "bf16"), (["--teacher-cache", "cache"], "no")])
def test_options_of_a_run(monkeypatch, tiny_data, teacher_file, tmp_path, expected, more, precision):
    """TF32, loader processes and a teacher of its own precision; a teacher cache."""
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, *run_arguments(tiny_data, teacher_file, tmp_path, *more))
    assert all(assert_expected(metrics(tmp_path), expected, TRAINED[precision]))


@EACH_TRAINED
def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch, tiny_data, tmp_path, precision):
    """Weights, moments and step count stay, and the run continues; fp16's scale is halved."""
    mean_flat, calls, broken = loss.mean_flat, [], 5

    def break_one(x):
        calls.append(1)
        if len(calls) == broken:
            x.register_hook(lambda gradient: gradient * float("nan"))
        return mean_flat(x)

    monkeypatch.setattr(loss, "mean_flat", break_one)
    run(monkeypatch, *train_arguments(
        tiny_data, tmp_path, "--enc-type", "none", "--max-skipped-steps", 20, "--checkpointing-steps", 1,
        "--max-train-steps", broken + 3, "--mixed-precision", precision))
    before, after, end = (checkpoint(tmp_path, step) for step in (broken - 1, broken, broken + 3))
    assert metrics(tmp_path)[broken - 1]["skipped"] == "1"
    assert_same_state(before["model"], after["model"])
    assert_same_state(before["opt"]["state"], after["opt"]["state"])
    assert not torch.equal(after["model"]["final_layer.linear.bias"], end["model"]["final_layer.linear.bias"])
    assert all(value.isfinite().all() for value in end["model"].values())
    if precision == "fp16":
        assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2


@EACH_TRAINED
def test_a_resumed_run_is_the_whole_one(monkeypatch, tiny_data, teacher_file, tmp_path, precision):
    """9 = 4 + 3 + 2 across the switch at 5: bit for bit in float32 and on a CPU, else to 1e-3 of the weights' norm.

    Attention's backward on a GPU has a fixed order here, as 64 tokens are a single block of keys.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    more = ["--batch-size", 16, "--enc-weights", teacher_file, "--log-every", 5, "--early-stop-point", 5,
            "--mixed-precision", precision, "--max-train-steps"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kernels without a deterministic order
        run(monkeypatch, *train_arguments(tiny_data, tmp_path / "whole", *more, 9))
        for stop in (4, 7, 9):
            run(monkeypatch, *train_arguments(tiny_data, tmp_path / "parts", *more, stop))
    if precision == "no" or not ON_GPU:
        return assert_same_run(tmp_path / "whole", tmp_path / "parts", 9)
    whole, parts = (checkpoint(tmp_path / name, 9) for name in ("whole", "parts"))
    assert whole.get("scaler") == parts.get("scaler")
    for part in ("model", "ema"):
        weights = [torch.cat([value.flatten() for value in state[part].values()]) for state in (parts, whole)]
        assert error(*weights) < 1e-3


def test_previews_and_scores(monkeypatch, data, teacher_file, tmp_path):
    """In bf16 with TF32: pictures have the right size, and each row that is due a score has one."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(features, "EFFICIENTNET_SHA256", "")
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "scorer.pth")
    run(monkeypatch, *run_arguments(
        data, teacher_file, tmp_path, "--mixed-precision", "bf16", "--allow-tf32", "--sampling-steps", 3,
        "--eval-steps", 3, "--eval-samples", 6, "--eval-ref", data / "images", "--eval-features", "efficientnet-lite0",
        "--eval-weights", tmp_path / "scorer.pth", "--vae", ROOT / "assets/vae-emoji"))
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows if row["FD-EffLite0"]] == ["3", "6"]
    assert all(float(row["FD-EffLite0"]) > 0 for row in rows if row["FD-EffLite0"])
    pictures = sorted(path.name for path in (tmp_path / "run/previews").iterdir())
    assert pictures == ["0000003.png", "0000006.png", "truth.png"]
    for name in pictures:
        with Image.open(tmp_path / "run/previews" / name) as image:
            assert image.size[0] == image.size[1] > 64 and np.asarray(image).std() > 0


# ---- processes ----

@pytest.fixture
def fresh(monkeypatch):
    """On a GPU scripts run in new interpreters: a process that has looked for GPUs should not fork."""
    if ON_GPU:
        monkeypatch.setattr(SERVER, "context", multiprocessing.get_context("spawn"))
        monkeypatch.setattr(SERVER, "env", {})


def run_group(*arguments, **more):
    """Run all processes of train.py as a launcher starts them; with a single GPU they share it."""
    started = SERVER.start_all("train.py", *arguments, **more)
    codes = [process.wait() for process in started]
    assert not any(codes), "".join(process.stderr[-4000:] for process in started)


def use_gloo():
    """For a script's process: two NCCL processes cannot share a GPU."""
    initialise = dist.init_process_group
    dist.init_process_group = lambda *_, backend=None, **more: initialise(backend="gloo", **more)


def test_a_signal_saves_and_the_run_goes_on(monkeypatch, fresh, tiny_data, teacher_file, tmp_path):
    """SIGTERM during steps; the same command continues to the weights of an uninterrupted run."""
    arguments = ["--enc-weights", teacher_file, "--early-stop-point", 2, "--num-workers", 1,
                 "--checkpointing-steps", 10_000, "--max-train-steps"]
    process = SERVER.start("train.py", *train_arguments(tiny_data, tmp_path / "a", *arguments, 10_000))
    wait_for(lambda: (tmp_path / "a/run/metrics.csv").is_file() and len(metrics(tmp_path / "a")) > 3, 120)
    process.send(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_CODE, process.stderr
    stopped = max(saved_steps(tmp_path / "a/run/checkpoints"))
    assert f"stopped by a signal after step {stopped}; the same command continues" in process.stderr
    for out in ("a", "b"):
        run(monkeypatch, *train_arguments(tiny_data, tmp_path / out, *arguments, stopped + 2))
    rows = [metrics(tmp_path / out)[-1] for out in ("a", "b")]
    assert rows[0]["step"] == rows[1]["step"] == str(stopped + 2)
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[1]["loss"]), rel=1e-2 if ON_GPU else 1e-6)


def test_one_process_of_a_group(fresh, tiny_data, teacher_file, tmp_path, expected):
    """As a launcher starts it for one GPU, with NCCL. (accelerate makes DDP from two processes on.)"""
    run_group(*run_arguments(tiny_data, teacher_file, tmp_path), processes=1)
    assert all(assert_expected(metrics(tmp_path), expected))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_two_processes_on_one_gpu(fresh, tiny_data, teacher_file, tmp_path, expected, precision):
    run_group(*run_arguments(tiny_data, teacher_file, tmp_path, "--mixed-precision", precision), processes=2,
              before="tests.test_gpu.use_gloo" if ON_GPU else None)
    assert all(assert_expected(metrics(tmp_path), expected, TRAINED[precision]))
    assert "2 process(es)" in (tmp_path / "run/log.txt").read_text()


@EACH_TRAINED
def test_fsdp_2(fresh, tiny_data, teacher_file, tmp_path, expected, precision):
    """By one NCCL process as accelerate's launcher sets it up; by two on a CPU, where accelerate has to be told."""
    arguments = run_arguments(tiny_data, teacher_file, tmp_path, "--mixed-precision", precision,
                              "--checkpointing-steps", 3)
    if ON_GPU:
        run_group(*arguments, processes=1, env={
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})
    else:
        run_group(*arguments, processes=2, before="tests.test_faults.fsdp_on_a_cpu")
    kept = assert_expected(metrics(tmp_path), expected, TRAINED[precision])
    assert all(kept) or precision == "fp16" and sum(kept) >= 3  # a scale of 2 ** 16 may be too high at first
    assert sorted(saved_steps(tmp_path / "run/checkpoints")) == [3, 6]
    assert all(value.isfinite().all() for value in checkpoint(tmp_path, 6)["model"].values())
