"""Scores and features against the TensorFlow evaluator's numbers (golden) and against plain formulas."""
import dataclasses

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import timm
import torch
import torch.nn.functional as F

from evaluations import features, metrics
from evaluations.extract import FeatureSet
from evaluations.features import INCEPTION_URL, load_extractor, resize_tf1
from evaluations.inception import Inception
from evaluations.scores import score
from runtime.errors import UserError
from runtime.setup import tune
from tests.conftest import ROOT
from tests.golden.fill import inception_state


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests/golden/evaluations.npz", allow_pickle=False) as file:
        return dict(file)


def save_inception(path):
    """Write the synthetic Inception weights of the golden values, which lack the counters, to a file."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Inception().state_dict().items()}
    torch.save({key: torch.from_numpy(value) for key, value in inception_state(shapes).items()}, path)
    return path


def save_efficientnet(path):
    """Write random EfficientNet-Lite0 weights in the layout of the published file -> timm's network with these."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("tf_efficientnet_lite0").eval()
    state = enumerate(network.state_dict().items())
    torch.save({f"_{i}.{key.rsplit('.', 1)[1]}": value for i, (key, value) in state}, path)
    return network


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = save_inception(tmp_path_factory.mktemp("weights") / "inception.pth")
    return load_extractor("inception", path, verify=False)


def moments(x):
    """Mean and covariance by NumPy."""
    x = np.asarray(x, np.float64)
    return x.mean(0), np.cov(x, rowvar=False)


def test_resize_equals_tensorflow_bit_for_bit(golden):
    resized = resize_tf1(torch.from_numpy(golden["img"]).permute(0, 3, 1, 2).float(), 299)
    rows, columns = golden["resize_pos"].T
    assert np.array_equal(resized.permute(0, 2, 3, 1)[:, rows, columns].numpy(), golden["resize_val"])


def test_features_equal_tensorflow(golden, inception):
    assert len(inception.network.state_dict()) == 566              # as in the published file
    pool, spatial = inception(golden["img"])
    for ours, theirs in ((pool, golden["pool"]), (spatial, golden["spatial"])):
        assert ours.shape == theirs.shape
        assert np.linalg.norm(ours.numpy() - theirs) < 1e-4 * np.linalg.norm(theirs)
        assert np.abs(ours.numpy() - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_precision_recall_equal_tensorflow(golden):
    reference, sample = torch.from_numpy(golden["pr_ref"]), torch.from_numpy(golden["pr_sample"])
    assert metrics.precision_recall(reference, sample) == tuple(golden["pr_tf_fp16"])
    assert metrics.precision_recall(reference, sample, torch.float32) == tuple(golden["pr_fp64"])
    assert torch.equal(reference, torch.from_numpy(golden["pr_ref"]))       # rounding left the features alone
    np.testing.assert_allclose(metrics.manifold_radii(reference), golden["radii_ref_tf"][:, 0], rtol=1e-2)


def test_fid_equals_tensorflow(golden):
    statistics = []
    for key in ("pr_ref", "pr_sample"):
        each = metrics.Moments(64)
        for rows in torch.from_numpy(golden[key]).split(70):
            each.add(rows)
        statistics += each.result()
    assert metrics.frechet_distance(*statistics) == pytest.approx(golden["fid64"], rel=1e-6)


def test_inception_score_equals_tensorflow(golden, inception):
    pool = torch.from_numpy(golden["is_pool"]).float()             # 40 rows: the last split of 16 is short
    found = metrics.inception_score(pool, inception.classifier, split_size=16)
    assert found == pytest.approx(golden["is_split16"], rel=1e-6)
    assert metrics.inception_score(torch.eye(4) * 1e4, torch.eye(4)) == pytest.approx(4)  # float32's softmax has zeros


def test_inception_score_splits_at_5000():
    """The formula on rows 0 to 4,999 and on the three after them; both splits count equally."""
    generator = np.random.default_rng(8)
    pool, classifier = generator.normal(size=(5003, 6)), generator.normal(size=(9, 6))
    p = scipy.special.softmax(pool @ classifier.T, axis=1)
    plain = np.mean([np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in (p[:5000], p[5000:])])
    sets = [FeatureSet("made", "inception", "adm", len(pool), torch.from_numpy(pool),
                       classifier=torch.from_numpy(classifier)) for _ in range(2)]
    assert score(*sets, ("is",))["Inception Score"] == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (10, 200), (200, 10), (2, 2)])
def test_frechet_of_any_rank(n, m):
    """With centred data A, B: tr (S1 S2)^(1/2) = the sum of singular values of A B^T / sqrt((n - 1)(m - 1))."""
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(n, 64)) + 0.3, 2 * generator.normal(size=(m, 64))
    a, b = moments(x), moments(y)
    cross = (x - a[0]) @ (y - b[0]).T / np.sqrt((n - 1) * (m - 1))
    plain = ((a[0] - b[0]) ** 2).sum() + a[1].trace() + b[1].trace() - 2 * np.linalg.svd(cross)[1].sum()
    assert metrics.frechet_distance(*a, *b) == pytest.approx(plain, rel=1e-7)
    assert abs(metrics.frechet_distance(*a, *a)) < 1e-6
    if min(n, m) > 64:  # as published
        root = scipy.linalg.sqrtm(a[1] @ b[1]).real.trace()
        plain = ((a[0] - b[0]) ** 2).sum() + a[1].trace() + b[1].trace() - 2 * root
        assert metrics.frechet_distance(*a, *b) == pytest.approx(plain, rel=1e-9)


def test_kid_equals_the_plain_formula():
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(1100, 5)), generator.normal(size=(30, 5)) + 0.5  # x: more rows than a block

    def kernel(u, v):
        return (u @ v.T / 5 + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    plain = ((xx.sum() - xx.trace()) / (1100 * 1099) + (yy.sum() - yy.trace()) / (30 * 29)
             - 2 * kernel(x, y).mean())
    found = metrics.kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(plain, rel=1e-10)


@pytest.mark.parametrize("block", [3, 37, 10_000])
def test_precision_recall_equal_the_plain_formula_in_any_blocks(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    generator = np.random.default_rng(4)
    x, y = generator.integers(0, 6, (70, 3)), generator.integers(2, 9, (50, 3))     # integers: exact ties

    def inside(points, manifold):
        radii = np.sort(((manifold[:, None] - manifold) ** 2).sum(2), axis=1)[:, 3]
        return (((points[:, None] - manifold) ** 2).sum(2) <= radii).any(1).mean()

    for dtype in (torch.float16, torch.float32):                   # both are exact on small integers
        found = metrics.precision_recall(*(torch.from_numpy(z).float() for z in (x, y)), dtype)
        assert found == pytest.approx((inside(y, x), inside(x, y)))
        assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_half_precision_distances_round_and_do_not_overflow():
    one, zero = torch.tensor([[1.0004]]), torch.zeros(1, 1)        # half precision has 1 and 1.00098
    assert metrics.squared_distances(one, zero) == 1
    assert metrics.squared_distances(one, zero, torch.float32).item() == pytest.approx(1.0004 ** 2)
    x = torch.tensor([[300.0, 1.0], [0.0, 0.0]])                   # 300 ** 2 is beyond half precision's 65504
    assert metrics.squared_distances(x, x)[0, 1] == 90001


def test_pytorch_fid_preset_is_half_pixel_and_scaled_to_one(inception, golden):
    extractor = dataclasses.replace(inception, preset="pytorch-fid")
    seen = []
    hook = extractor.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    extractor(golden["img"][:1])
    hook.remove()
    source = (np.arange(299) + 0.5) * 64 / 299 - 0.5
    low = np.floor(source).astype(int)
    weight = np.zeros((299, 64))
    np.add.at(weight, (np.arange(299), low.clip(0)), 1 - (source - low))
    np.add.at(weight, (np.arange(299), (low + 1).clip(max=63)), source - low)
    plain = np.einsum("ih,hwc,jw->cij", weight, golden["img"][0].astype(float), weight, optimize=True) / 255 * 2 - 1
    np.testing.assert_allclose(seen[0][0].numpy(), plain, atol=1e-4)


def test_dinov2_reads_the_class_token_of_hub_weights(tmp_path, monkeypatch):
    """A small DINOv2 in torch.hub's layout. Its 37 x 37 table is a ramp, which bicubic nearly keeps."""
    monkeypatch.setattr(features, "DINOV2_ARCH", "vit_small_patch14_dinov2")
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    ramp = torch.arange(37.0).repeat_interleave(37)[None, :, None].expand(1, -1, 384)
    hub = network.state_dict() | {"pos_embed": torch.cat([torch.zeros(1, 1, 384), ramp], dim=1),
                                  "mask_token": torch.zeros(1, 384)}
    torch.save(hub, tmp_path / "hub.pth")
    extractor = load_extractor("dinov2-vit-l", tmp_path / "hub.pth")
    table = extractor.network.pos_embed.detach()
    rows = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    assert torch.allclose(table[0, 1:, 0].reshape(16, 16)[1:-1, 3], rows[1:-1], atol=0.06)  # 37 / 16: 0.2 off

    torch.save(hub | {"pos_embed": hub["pos_embed"][:, 1:]}, tmp_path / "registers.pth")  # as timm's with registers
    with pytest.raises(UserError, match="registers.pth has 1369 positions, not a class token's and those of a square"):
        load_extractor("dinov2-vit-l", tmp_path / "registers.pth")

    images = np.random.default_rng(5).integers(0, 256, (2, 32, 32, 3), np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / std[:, None, None]
    network.pos_embed.data = table
    with torch.no_grad():
        plain = network(x)                                 # timm's pooled output = class token, final norm
    pool, spatial = extractor(images)
    assert spatial is None
    assert torch.allclose(pool, plain, atol=1e-4)


def test_efficientnet_is_fed_as_it_was_trained(tmp_path):
    network, path = save_efficientnet(tmp_path / "w.pth"), tmp_path / "w.pth"
    images = np.random.default_rng(6).integers(0, 256, (2, 224, 224, 3), np.uint8)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    extractor = load_extractor("efficientnet-lite0", path, verify=False)
    with torch.no_grad():
        plain = network.global_pool(network.forward_features(x))
        stem = F.conv2d(F.pad(x, (0, 1, 0, 1)), network.conv_stem.weight, stride=2)     # TensorFlow's 'same'
        assert torch.allclose(extractor.network.conv_stem(x), stem, atol=1e-5)
    assert torch.allclose(extractor(images)[0], plain, atol=1e-5)
    assert extractor(images)[0].shape == (2, extractor.dim)


def test_scoring_leaves_the_random_stream_and_settings_alone(tmp_path):
    """Scoring runs in full float32, whatever a training loop has set."""
    save_efficientnet(tmp_path / "w.pth")
    tune(tf32=True)
    before, inside = torch.get_rng_state(), []
    extractor = load_extractor("efficientnet-lite0", tmp_path / "w.pth", verify=False)
    extractor.network.conv_stem.register_forward_hook(lambda *_: inside.append(
        (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu"))))
    with torch.autocast("cpu", torch.bfloat16):
        pool, _ = extractor(np.zeros((1, 8, 8, 3), np.uint8))
    assert pool.dtype == torch.float32 and not pool.requires_grad and inside == [(False, False, False)]
    assert torch.equal(torch.get_rng_state(), before) and torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
    tune(tf32=False)
    assert torch.get_float32_matmul_precision() == "highest"  # PyTorch raises if the flags disagree


def test_downloads_are_checked(monkeypatch, tmp_path):
    """torch.hub compares the hash with the end of the file name; a file of another hash is refused and deleted."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.save({}, tmp_path / "weights-6726825d.pth")
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "weights-6726825d.pth").as_uri())
    with pytest.raises(UserError, match="weights-6726825d.pth could not be fetched .invalid hash value"):
        load_extractor("inception")
    assert not list((tmp_path / "hub").rglob("*.pth"))
    assert INCEPTION_URL.endswith(f"-{features.INCEPTION_SHA256[:8]}.pth")
