"""--init-from and --freeze: a run starts from another run's weights and keeps some of them fixed."""
import argparse
import shutil

import pytest
import torch

from models.sit import SiT_models
from runtime.errors import UserError
from runtime.files import load_tensors
from tests.conftest import CLASSES, NO_TEACHER, checkpoint, write_tiny_data
from tests.test_generate import save_random
from training.fine_tune import init_from


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with random EMA weights and trained weights, in the published form."""
    torch.manual_seed(1)
    net, other = (SiT_models["SiT-N/2"](input_size=16, num_classes=CLASSES, z_dims=(48,)) for _ in range(2))
    path = tmp_path_factory.mktemp("trained") / "0000005.pt"
    return save_random(path, net, argparse.Namespace(model="SiT-N/2", num_classes=CLASSES), model=other.state_dict())


def started(path, source="ema", **kwargs):
    """(A network initialised from `path`, its weights before)."""
    network = SiT_models["SiT-N/2"](**{"input_size": 16, "num_classes": CLASSES, "z_dims": (48,), **kwargs})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    init_from(network, argparse.Namespace(init_from=path, init_weights=source, path_type="linear", freeze=None))
    return network.state_dict(), before


def test_parts_of_another_shape_are_made_anew(trained, caplog):
    """The log names each; all other weights come from the checkpoint, EMA or not."""
    caplog.set_level("INFO", "haste")
    saved = load_tensors(trained)
    for source in ("ema", "model"):
        now, _ = started(trained, source)
        assert now.keys() == saved[source].keys() and all(torch.equal(now[name], saved[source][name]) for name in now)
    assert "anew" not in caplog.text
    assert f"initialised from the weights (model) of {trained}, after 5 steps" in caplog.text
    for kwargs, begin, words in (
            ({"num_classes": 9}, "y_embedder",
             "table is initialised anew, y_embedder.embedding_table.weight being (5, 32)"),
            ({"input_size": 8}, "pos_embed", "the position table is initialised anew"),
            ({"z_dims": (64,)}, "projectors.0.", "a projector is initialised anew, projectors.0.4.bias being (48,)"),
            ({"z_dims": (48, 64)}, "projectors.1.", "projectors.1.0.bias being missing in"),
            ({"z_dims": ()}, "nothing", "and missing here")):
        caplog.clear()
        now, before = started(trained, **kwargs)
        assert words in caplog.text and caplog.text.count("anew") == 1
        for name, value in now.items():
            assert torch.equal(value, before[name] if name.startswith(begin) else saved["ema"][name]), name


def test_no_random_labels_are_kept(run, trained, tmp_path):
    with pytest.raises(UserError, match="--freeze names the label table, which is initialised anew"):
        run(tmp_path, *NO_TEACHER, "--init-from", trained, "--num-classes", 9, "--freeze", "y_embedder")


def test_a_run_begins_with_these_weights(run, trained, tmp_path):
    """At step 0, in weights and average alike; a restart no longer needs the file."""
    data = write_tiny_data(tmp_path / "data", count=8)
    shutil.copy(trained, tmp_path / "5.pt")
    arguments = [*NO_TEACHER, "--init-from", tmp_path / "5.pt", "--ema-decay", 0.5, "--learning-rate", 0,
                 "--max-train-steps"]
    run(tmp_path, *arguments, 1, data=data)
    saved, begun = checkpoint(tmp_path, 1), load_tensors(trained)["ema"]
    for part in ("model", "ema"):
        assert all(torch.equal(value, begun[name]) for name, value in saved[part].items())
    assert len(saved["opt"]["state"]) and saved["steps"] == 1
    (tmp_path / "5.pt").unlink()
    run(tmp_path, *arguments, 2, data=data)


def test_frozen_parts_stay(run, trained, teacher_file, tmp_path):
    """In both phases, weights and average stay bit for bit; everything else is trained."""
    patterns = ("blocks.[0-1]", "x_embedder", "projectors.0.4.*")
    run(tmp_path, "--enc-weights", teacher_file, "--init-from", trained, "--early-stop-point", 2,
        "--max-train-steps", 3, "--ema-decay", 0.5, "--freeze", *patterns)
    saved, begun = checkpoint(tmp_path, 3), load_tensors(trained)["ema"]
    for part in ("model", "ema"):
        for name, value in saved[part].items():
            frozen = name.startswith(("blocks.0.", "blocks.1.", "x_embedder.", "projectors.0.4.", "pos_embed"))
            if frozen or name != "y_embedder.embedding_table.weight":
                assert torch.equal(value, begun[name]) == frozen, name


def test_what_cannot_be(run, trained, tmp_path):
    def refused(words, *more):
        with pytest.raises(UserError, match=words):
            run(tmp_path, *NO_TEACHER, *more)

    refused("is a checkpoint of another model: x_embedder.proj.weight", "--init-from", trained, "--model", "SiT-N/8")
    refused("is a checkpoint of another model: blocks.0.attn.q_norm", "--init-from", trained, "--qk-norm")
    refused("does not exist", "--init-from", tmp_path / "absent.pt")
    refused("--freeze blocks.7 names no weight of SiT-N/2; its parts are x_embedder", "--freeze", "blocks.7")
    refused("--freeze leaves nothing to train", "--freeze", "*")
    with pytest.raises(UserError, match="--freeze names weights of block 2, whose gradients"):
        run(tmp_path, "--early-stop-trigger", "gradient", "--trigger-start", 1, "--trigger-samples", 8,
            "--freeze", "blocks.1.mlp")
