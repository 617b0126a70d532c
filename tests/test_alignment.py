"""Rows of ALIGNMENT_LOSSES, projectors and spatial normalisation against their formulas written out, and as flags."""
import math
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F

import dataset
import train
from encoders import teachers
from encoders.teachers import Teacher, load_teachers, load_vit, split_teachers
from loss import SILoss, dispersive_loss, feature_loss, relational_loss, spatial_normalize
from models.checkpoint import load_network
from models.layers import Alignment, patchify, unpatchify
from models.sit import SiT_models
from runtime.errors import UserError
from tests.conftest import CLASSES, call_main, checkpoint, metrics, train_arguments
from training import trainer as training

# ---- formulas, in float64, one number after the other ----


def cosine(a, b):
    return float((a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt())


def tokens(seed, n=3, t=4, width=5):
    return torch.randn(n, t, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_relational_loss():
    """Widths may differ; the loss is 0 if the target is the student's tokens, scaled and rotated."""
    ours, theirs = tokens(0), tokens(1, width=7)
    squares = [(cosine(a[i], a[j]) - cosine(b[i], b[j])) ** 2
               for a, b in zip(ours, theirs, strict=True) for i in range(4) for j in range(4)]
    assert float(relational_loss(ours, theirs)) == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    turned = 3 * ours @ torch.linalg.qr(tokens(2, 1, 5)[0]).Q
    assert float(relational_loss(ours, turned)) < 1e-10
    coarse = ours.mean(dim=1, keepdim=True)  # 2 x 2 tokens on a grid of one
    assert relational_loss(ours, tokens(1, t=1)) == relational_loss(coarse, tokens(1, t=1)) < 1e-10
    with torch.autocast("cpu", torch.bfloat16):
        assert float(relational_loss(ours, theirs)) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_dispersive_loss():
    """Uses all pairs of images, each with itself too; its gradient drives images apart."""
    z = 2 * tokens(0)
    pairs = [math.exp(-float(((a - b) ** 2).sum()) / a.numel()) for a in z for b in z]
    assert float(dispersive_loss(z)) == pytest.approx(math.log(sum(pairs) / 9), rel=1e-5)
    z = z.float().requires_grad_()
    dispersive_loss(z).backward()
    assert dispersive_loss(z - z.grad) < dispersive_loss(z) < dispersive_loss(torch.ones(3, 4, 5)) == 0
    alone = torch.ones(1, 4, 5, requires_grad=True)
    dispersive_loss(alone).backward()
    assert not alone.grad.any()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_spatial_normalisation(alpha):
    y = tokens(0) + 3
    for image, found in zip(y, spatial_normalize(y, alpha), strict=True):
        for channel in range(5):
            values = image[:, channel].tolist()
            mean = sum(values) / 4
            std = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)  # unbiased
            assert found[:, channel].tolist() == pytest.approx([(v - alpha * mean) / (std + 1e-6) for v in values],
                                                               rel=1e-5, abs=1e-5)


def test_patches_are_the_tokens_of_an_image():
    x = torch.randn(2, 3, 8, 8)
    patches = patchify(x, 16)
    assert torch.equal(unpatchify(patches, 2), x) and patches.shape == (2, 16, 12)
    assert torch.equal(patches[1, 6], x[1, :, 2:4, 4:6].permute(1, 2, 0).flatten())  # row 1, column 2


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_as_projector(kernel):
    """On the grid of tokens, row by row, with zeros around it."""
    model = small("conv", kernel)
    [project], x = model.projectors, torch.randn(2, 9, 32)
    grid = F.pad(x.unflatten(1, (3, 3)), (0, 0, *[kernel // 2] * 4))
    for row in range(3):
        for column in range(3):
            window = grid[:, row:row + kernel, column:column + kernel]  # (N, k, k, D)
            expected = torch.einsum("nrsd,zdrs->nz", window, project.weight) + project.bias
            torch.testing.assert_close(project(x)[:, 3 * row + column], expected, rtol=1e-4, atol=1e-5)


def small(projector, kernel=3, z_dims=(48,)):
    return SiT_models["SiT-N/2"](input_size=8, num_classes=CLASSES, z_dims=z_dims, projector=projector,
                                 projector_kernel=kernel)


@pytest.mark.parametrize("projector, kernel, renamed", [("mlp", 3, True), ("linear", 3, True), ("conv", 3, False),
                                                        ("conv", 1, True)])
def test_checkpoints_know_their_projectors(tmp_path, projector, kernel, renamed):
    """The weights alone suffice, also under iREPA's names."""
    model = small(projector, kernel, (48, 16))
    weights = {name.replace("projectors.0.", "projectors.0.projection_layer.").replace(
        "projectors.1.", "projectors.1.projection_layer.") if renamed else name: value
        for name, value in model.state_dict().items()}
    torch.save({"ema": weights, "steps": 1, "args": {"model": "SiT-N/2"}}, tmp_path / "0000001.pt")
    found, _ = load_network(tmp_path / "0000001.pt")
    assert found.z_dims == (48, 16)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long)
    for ours, theirs in zip(found(x, t, y, return_alignment=True)[1].features,
                            model(x, t, y, return_alignment=True)[1].features, strict=True):
        assert torch.equal(ours, theirs)


def test_all_losses_of_a_batch():
    """Each loss takes its part of student and teachers; teachers' projectors come first, the latents' last."""
    x, h = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 6)
    projected = [torch.randn(2, 16, width) for width in (5, 7, 16)]
    targets = [torch.randn(2, 16, width) for width in (5, 7)]

    def model(x_t, t, y, return_alignment=False):
        return x_t, Alignment(projected, {}, h)

    names = ("feature", "relational", "dispersive", "latent")
    losses = SILoss(attn_pairs=(), terms=names, spatial_norm=0.6)(model, x, None, Alignment(targets, {}))
    normed = [spatial_normalize(target, 0.6) for target in targets]
    expected = {
        "feature": (feature_loss(projected[0], normed[0]) + feature_loss(projected[1], normed[1])) / 2,
        "relational": (relational_loss(h, normed[0]) + relational_loss(h, normed[1])) / 2,
        "dispersive": dispersive_loss(h), "latent": feature_loss(projected[2], patchify(x, 16))}
    for name in names:
        torch.testing.assert_close(losses[name], expected[name])
    alone = SILoss(attn_pairs=(), terms=("latent",))(model, x, None, Alignment([], {}))
    assert list(alone) == ["denoise", "latent"] and alone["latent"] == expected["latent"]


# ---- as flags ----

def test_without_a_teacher(monkeypatch, tiny_data, tmp_path):
    """A run reads no picture and makes no teacher; the trigger compares these losses; they end with Phase I."""
    monkeypatch.setattr(dataset, "decode_image", None)
    monkeypatch.setattr(teachers, "load_vit", None)
    call_main(monkeypatch, train, *train_arguments(
        tiny_data, tmp_path, "--enc-type", "none", "--dispersive-coeff", 0.5, "--latent-coeff", 0.25,
        "--early-stop-point", 2, "--max-train-steps", 3, "--early-stop-trigger", "gradient", "--trigger-start", 1,
        "--trigger-every", 9, "--trigger-samples", 8, "--trigger-timesteps", 0.5, "--trigger-threshold", -1))
    rows = metrics(tmp_path)
    for row in rows[:2]:
        assert row["feature"] == row["attention"] == row["relational"] == ""
        parts = float(row["denoise"]) + 0.5 * float(row["dispersive"]) + 0.25 * float(row["latent"])
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-4)
    assert rows[0]["cosine"] and rows[2]["latent"] == rows[2]["dispersive"] == ""
    text = (tmp_path / "run/log.txt").read_text()
    assert "aligned: dispersive x 0.5 (by --dispersive-coeff), latent x 0.25 (by --latent-coeff), until step 2" in text
    saved = checkpoint(tmp_path, 3)
    assert saved["args"]["enc_type"] == "none" and saved["args"]["proj_coeff"] == 0
    assert saved["model"]["projectors.0.4.weight"].shape[0] == 16  # 2 x 2 latents of 4 channels


def test_irepa_and_relations(monkeypatch, tiny_data, teacher_file, tmp_path):
    call_main(monkeypatch, train, *train_arguments(
        tiny_data, tmp_path, "--enc-weights", teacher_file, "--projector", "conv", "--spatial-norm", 0.6,
        "--attn-coeff", 0, "--relational-coeff", 2, "--max-train-steps", 2))
    for row in metrics(tmp_path):
        parts = float(row["denoise"]) + 0.5 * float(row["feature"]) + 2 * float(row["relational"])
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-4) and float(row["relational"]) > 0
    assert checkpoint(tmp_path, 2)["model"]["projectors.0.weight"].shape == (48, 32, 3, 3)


@pytest.mark.parametrize("cache", [False, True])
def test_who_is_resampled(monkeypatch, tiny_data, teacher_file, tmp_path, cache):
    """The student has 8 x 8 tokens, the teacher 4 x 4: either side is resampled to the other's grid."""
    seen, plain = {}, SILoss.__call__

    def watched(self, model, x, y, target, *more):
        seen["grids"] = [target.features[0].shape[1], *(qk.k.shape[2] for qk in target.attention.values())]
        return plain(self, model, x, y, target, *more)

    monkeypatch.setattr(SILoss, "__call__", watched)
    cached = ["--teacher-cache", tmp_path / "cache"] if cache else []
    for who, count in (("student", 16), ("teacher", 64)):
        call_main(monkeypatch, train, *train_arguments(
            tiny_data, tmp_path / who, "--enc-weights", teacher_file, "--enc-size", 56, "--resample", who,
            "--relational-coeff", 1, "--max-train-steps", 1, *cached))
        assert seen["grids"] == [count] * 3
    ours, theirs = (metrics(tmp_path / who)[0] for who in ("student", "teacher"))
    assert ours["denoise"] == theirs["denoise"]
    assert all(ours[name] != theirs[name] for name in ("feature", "attention", "relational"))


# ---- several teachers ----

TWO = "dinov2-vit-n,timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def two_files(teacher_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("second") / "tiny.pth"
    with torch.random.fork_rng():
        torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path)
    return f"{teacher_file},{path}"


def test_two_teachers(two_files):
    """Each gives its features, the chosen one its attention; inputs are of each one's patch."""
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    both = load_teachers(TWO, two_files, 4, (1, 3), attn_teacher=2)
    first, second = (Teacher(load_vit(name, file), 4, (1, 3)) for name, file in split_teachers(TWO, two_files))
    assert (first.input_size, second.input_size) == (56, 64)
    found = both(images)
    assert torch.equal(found.features[0], first(images).features[0])
    assert torch.equal(found.features[1], second(images).features[0]) and len(found.features) == 2
    assert list(found.attention) == [1, 3] and torch.equal(found.attention[3].q, second(images).attention[3].q)
    assert split_teachers("a,b,c", "x,,z") == [("a", "x"), ("b", None), ("c", "z")]
    assert split_teachers("a", "with,comma") == [("a", "with,comma")] and split_teachers("none") == []
    with pytest.raises(UserError, match="names 3 files for 2 teachers"):
        split_teachers(TWO, "a,b,c")


def test_a_run_with_two_teachers(monkeypatch, tiny_data, teacher_file, tmp_path):
    """A projector each, both freed at the switch; a cache for each; a run goes on with the same teachers only."""
    monkeypatch.setitem(teachers.TEACHERS, "small", teachers.TEACHERS["dinov2-vit-n"]._replace(
        width=32, options=(("embed_dim", 32),)))
    small = timm.create_model("vit_nano_patch14_dinov2", embed_dim=32)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    types, files = ["dinov2-vit-n", "small"], [str(teacher_file), str(tmp_path / "small.pth")]
    made, freed, load, update = [], [], load_vit, training.update_ema

    def loaded(*args):
        vit = load(*args)
        made.append(weakref.ref(vit))
        return vit

    monkeypatch.setattr(teachers, "load_vit", loaded)
    monkeypatch.setattr(training, "update_ema",
                        lambda *args: freed.append([vit() is None for vit in made]) or update(*args))
    more = ["--enc-type", ",".join(types), "--enc-weights", ",".join(files), "--attn-teacher", 2,
            "--early-stop-point", 2]
    call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path / "a", *more, "--max-train-steps", 3))
    assert freed == [[False] * 2] * 2 + [[True] * 2]
    call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path / "b", *more, "--max-train-steps", 2,
                                                   "--teacher-cache", tmp_path / "cache"))
    weights = checkpoint(tmp_path / "a", 3)["model"]
    assert [weights[f"projectors.{i}.4.weight"].shape[0] for i in (0, 1)] == [48, 32]
    for ours, cached in zip(metrics(tmp_path / "a")[:2], metrics(tmp_path / "b"), strict=True):
        for name in ("feature", "attention"):
            assert float(ours[name]) == pytest.approx(float(cached[name]), rel=3e-3)
    names = sorted(sorted(path.stem for path in folder.glob("*.complete")) for folder in tmp_path.glob("cache/*/"))
    assert names == [["block7", "block9", "features0"], ["features0"]]
    swapped = ["--enc-type", ",".join(types[::-1]), "--enc-weights", ",".join(files[::-1])]
    for change, setting in ((swapped, "enc_type"), (["--attn-teacher", 1], "attn_teacher")):
        with pytest.raises(UserError, match=f"another run: {setting} was"):
            call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path / "a", *more, *change))


@pytest.mark.parametrize("more, words", [
    (["--attn-teacher", 3], "--attn-teacher 3 is none of the 2 that --enc-type names"),
    (["--proj-coeff", 0], "attention is aligned to one of them only"),
    (["--enc-weights", "one.pth"], "names 1 files for 2 teachers")])
def test_teachers_that_do_not_fit(monkeypatch, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        call_main(monkeypatch, train, *train_arguments(tmp_path, tmp_path, "--enc-type", TWO, *more))
