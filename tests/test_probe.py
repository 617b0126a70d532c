"""evaluations/probe.py: CKNNA and the linear probe against plain formulas, and whole runs on tiny data."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset import LatentImages
from evaluations import metrics, probe
from evaluations.student import block_tokens, noised, open_split
from models.mmdit import MMDiT_models
from models.sit import SiT_models
from tests.conftest import CLASSES, call_main, script, write_tiny_data
from tests.test_generate import make_checkpoint
from tests.test_generate_t2i import save_checkpoint


def plain_cknna(a, b, k):
    """The formula in probe.py, number by number."""
    first, second = ((rows @ rows.T).numpy() for rows in (F.normalize(a, dim=1), F.normalize(b, dim=1)))
    n = len(a)

    def near(kernel, i):
        return set(sorted(set(range(n)) - {i}, key=lambda j: -kernel[i, j])[:k])

    def alignment(kernel, other):
        return sum((kernel[i, j] - kernel[i].mean()) * (other[i, j] - other[i].mean())
                   for i in range(n) for j in near(kernel, i) & near(other, i))

    return alignment(first, second) / math.sqrt(alignment(first, first) * alignment(second, second))


@pytest.mark.parametrize("k", [1, 5, 39])
def test_cknna_is_its_formula(monkeypatch, k):
    """For 40 points in two spaces that share a part of their structure."""
    monkeypatch.setattr(metrics, "ROWS", 16)  # parts of 16, 16 and 8 rows
    generator = torch.Generator().manual_seed(0)
    shared, more, mix, other = (torch.randn(size, dtype=torch.float64, generator=generator)
                                for size in ((40, 4), (40, 3), (4, 6), (40, 5)))
    a, b = torch.cat([shared, more], dim=1), torch.cat([shared @ mix, other], dim=1) + 0.3
    assert metrics.cknna(a, b, k) == pytest.approx(plain_cknna(a, b, k), abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=generator)).Q
    assert metrics.cknna(a, 3 * a @ rotation, k) == pytest.approx(1, abs=1e-12)  # equal neighbourhoods


def test_probe_is_the_minimum(monkeypatch):
    """The gradient of the formula in probe.py is zero at the fitted weights, and the problem is convex."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=generator)
    x = torch.randn(90, 5, dtype=torch.float64, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1]) + 2
    x[:, 0] += 1.5 * labels
    found, solver = [], torch.optim.LBFGS
    monkeypatch.setattr(torch.optim, "LBFGS", lambda weights, **how: found.extend(weights) or solver(found, **how))
    accuracy = metrics.linear_probe(x[:60], labels[:60], x[60:], labels[60:], 3, l2=0.05)
    weight, bias = found
    logits = (x - x[:60].mean(0)) / x[:60].std(0) @ weight + bias
    chosen = logits[torch.arange(60), labels[:60]]
    loss = (logits[:60].exp().sum(1).log() - chosen).mean() + 0.05 / 2 * (weight ** 2).sum()
    assert all(gradient.abs().max() < 1e-5 for gradient in torch.autograd.grad(loss, found))
    assert accuracy == (logits[60:].argmax(1) == labels[60:]).double().mean() and 0.4 < accuracy < 1


def test_tokens_of_a_block_and_noise(tiny_data):
    data = LatentImages(tiny_data, 64, CLASSES)
    x = noised(data, [5, 3], 0.3, {}, seed=2)
    noise = np.random.default_rng((2, 5, 3)).standard_normal((4, 16, 16), dtype=np.float32)
    assert torch.equal(x[1], noised(data, [3], 0.3, {}, seed=2)[0])
    np.testing.assert_allclose(x[1], 0.7 * 0.18215 * data.moments(3)[:4].numpy() + 0.3 * noise, atol=1e-6)
    sit = SiT_models["SiT-N/2"](input_size=16, num_classes=CLASSES, z_dims=())
    mmdit = MMDiT_models["MMDiT-T"](input_size=16, context_dim=8, z_dims=())
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        t, y, text = torch.full((2,), 0.3), torch.tensor([0, CLASSES]), torch.randn(2, 5, 8)
        tokens, c = sit.x_embedder(x) + sit.pos_embed, sit.t_embedder(t) + sit.y_embedder(y)
        first = sit.blocks[0](tokens, c)[0]
        found = block_tokens(sit, x, 0.3, y, [1, 2])
        assert torch.equal(found[1], first) and torch.equal(found[2], sit.blocks[1](first, c)[0])
        tokens = mmdit.x_embedder(x) + mmdit.pos_embed
        _, image, _ = mmdit.joint_blocks[0](mmdit.context_embedder(text), tokens, mmdit.t_embedder(t))
        assert torch.equal(block_tokens(mmdit, x, 0.3, text, [1])[1], image)


def test_a_fifth_is_held_out(tiny_data):
    sit = SiT_models["SiT-N/2"](input_size=16, num_classes=CLASSES, z_dims=())
    train, val = open_split(sit, {"resolution": 64}, tiny_data, None, 1000, seed=0)
    assert len(val.positions) == 12 and sorted(train.positions + val.positions) == list(range(64))


def test_classes(monkeypatch, tiny_data, teacher_file, tmp_path, capsys):
    """Pooled tokens reveal the colour, but not at t = 1 (pure noise). Batches and processes change nothing."""
    ckpt, out = make_checkpoint(tmp_path / "0000005.pt", "SiT-N/2"), tmp_path / "probe.json"
    arguments = [ckpt, "--data", tiny_data, "--val-data", write_tiny_data(tmp_path / "val", 24), "--enc-type",
                 "dinov2-vit-n", "--enc-weights", teacher_file, "--k", 5, "--t", "0.1,1", "--blocks", "2,3",
                 "--device", "cpu", "--json", out]
    call_main(monkeypatch, probe, *arguments)
    table, result = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert result["images"] == {"training": 64, "held-out": 24} and result["largest class"] == 0.25
    rows = {(row["block"], row["t"]): row for row in result["rows"]}
    assert sorted(rows) == [(block, t) for block in (2, 3) for t in (0.1, 1)] and len(table) == 3 + len(rows)
    assert result["teacher"]["probe"] == rows[2, 0.1]["probe"] == 1
    assert rows[2, 1]["probe"] < 0.6
    assert rows[2, 0.1]["cknna"] > 0.3 > rows[2, 1]["cknna"]
    script("evaluations/probe.py", *arguments, "--batch-size", 7, processes=2)
    again = json.loads(out.read_text())
    assert again["images"] == result["images"]
    for row, other in zip(result["rows"], again["rows"], strict=True):
        assert row["cknna"] == pytest.approx(other["cknna"], abs=1e-4) and row["probe"] == other["probe"]


def test_text_has_no_labels(monkeypatch, tiny_captions, teacher_file, tmp_path, capsys):
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=())
    ckpt = save_checkpoint(tmp_path / "0000005.pt", model, model="MMDiT-T", data_dir=str(tiny_captions),
                           enc_type="dinov2-vit-n", enc_weights=str(teacher_file))
    call_main(monkeypatch, probe, ckpt, "--device", "cpu", "--t", "0.2", "--k", 3)
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("16 held-out images") and "probe" not in table[1] and len(table) == 2 + 4
