"""The table of teachers: each at its real width, taps after rotation, and all common weight files."""
import pickle
import warnings
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers

import train
from encoders.teacher_files import load_state
from encoders.teachers import ALIASES, PLACES, TEACHERS, Teacher, load_vit, teacher_list, teacher_row
from runtime.errors import UserError
from runtime.files import load_tensors
from tests.conftest import call_main


def shallow(monkeypatch, depth=2):
    """Every ViT that timm makes from here on has `depth` blocks."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: create(name, **{**more, "depth": depth}))


@pytest.mark.parametrize("name", [
    *(name for name in TEACHERS if name != "dinov2-vit-n"), "timm:vit_tiny_patch16_224",
    "timm:vit_small_patch16_rope_224"])
def test_every_teacher_at_its_width(monkeypatch, name, tmp_path):
    """One block each: features have the table's width; q and k are those that its own attention compares."""
    shallow(monkeypatch, depth=1)
    row = teacher_row(name)
    torch.manual_seed(0)
    torch.save(timm.create_model(row.timm_name.split(".")[0], num_classes=0, **dict(row.options)).state_dict(),
               tmp_path / "vit.pth")
    teacher, seen = Teacher(load_vit(name, tmp_path / "vit.pth"), 4, (0,)), []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **more: seen.append((q, k)) or attend(
        q, k, v, **more))
    out = teacher(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8))
    assert out.features[0].shape == (1, 16, row.width) and teacher.input_size == 4 * row.patch
    [(q, k)] = seen
    assert torch.equal(out.attention[0].q, q[:, :, row.prefix_tokens:]) and out.attention[0].q.shape[2] == 16
    assert torch.equal(out.attention[0].k, k[:, :, row.prefix_tokens:])
    assert row.final_norm == (not isinstance(teacher.vit.norm, torch.nn.Identity)) or "spatial" in row.timm_name


def test_rotation_depends_on_the_position(monkeypatch, tmp_path):
    """For equal patches: q is equal before rotation, not after; q k products depend on distances only."""
    shallow(monkeypatch)
    torch.save(timm.create_model("vit_small_patch16_dinov3", num_classes=0).state_dict(), tmp_path / "vit.pth")
    teacher = Teacher(load_vit("dinov3-vit-s16", tmp_path / "vit.pth"), 4, (0,))
    qk = teacher(torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)).attention[0]
    assert not torch.allclose(qk.q[:, :, 0], qk.q[:, :, 5], atol=1e-4)
    logits = qk.logits()[0]
    torch.testing.assert_close(logits[:, 0, 1], logits[:, 5, 6], rtol=1e-4, atol=1e-5)  # a column further
    torch.testing.assert_close(logits[:, 0, 4], logits[:, 5, 9], rtol=1e-4, atol=1e-5)  # a row further
    assert not torch.allclose(logits[:, 0, 1], logits[:, 0, 4], atol=1e-6)


def test_registers_from_torch_hub(monkeypatch, tmp_path):
    """torch.hub adds the class token's position; timm's register models have it inside the class token."""
    shallow(monkeypatch, depth=1)
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0)
    state = {("register_tokens" if name == "reg_token" else name): value for name, value in vit.state_dict().items()}
    position = torch.randn(1, 1, 384)
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "reg.pth")
    loaded = load_vit("dinov2reg-vit-s", tmp_path / "reg.pth").state_dict()
    assert torch.equal(loaded["cls_token"], state["cls_token"] + position)
    assert torch.equal(loaded["reg_token"], state["register_tokens"])


@pytest.mark.parametrize("registers", [0, 4])
def test_weights_of_transformers(monkeypatch, tmp_path, registers):
    """Features equal those of transformers' own DINOv2."""
    shallow(monkeypatch)
    torch.manual_seed(0)
    options = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 518,
               "patch_size": 14}
    if registers:
        theirs = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
            **options, num_register_tokens=registers)).eval()
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**options)).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    vit = load_vit("dinov2reg-vit-s" if registers else "dinov2-vit-s", tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(vit.forward_features(images), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_moco(monkeypatch, tmp_path):
    """MoCo v3's prefix, the layers that the file of L misnames; S has 12 heads. Also from REPA's default folder."""
    shallow(monkeypatch, depth=15)
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12).eval()
    wrong = {"blocks.13.norm1": "blocks.13.norm13", "blocks.13.mlp.fc1": "blocks.13.mlp.fc13",
             "blocks.14.norm2": "blocks.14.norm14", "blocks.14.mlp.fc2": "blocks.14.mlp.fc14"}
    state = {}
    for name, value in vit.state_dict().items():
        for old, new in wrong.items():
            name = name.replace(old, new)
        state[f"module.base_encoder.{name}"] = value
    state |= {f"module.{name}": torch.zeros(1) for name in ("base_encoder.head.0.weight", "momentum_encoder.norm.bias")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / PLACES["mocov3-vit-s"]).parent.mkdir()
    torch.save({"state_dict": state, "epoch": 300}, tmp_path / PLACES["mocov3-vit-s"])
    images = torch.randn(1, 3, 224, 224)
    found = load_vit("mocov3-vit-s")
    assert torch.equal(found.forward_features(images), vit.forward_features(images))
    assert found.blocks[0].attn.num_heads == 12
    with pytest.raises(UserError, match="no hub has its weights; give --enc-weights .a file: mocov3_vitb.pth"):
        load_vit("mocov3-vit-b")


@pytest.mark.parametrize("name, wrap", [
    ("mae-vit-l", lambda state: {"model": state}),
    ("jepa-vit-h", lambda state: {"encoder": {f"module.{name}": value for name, value in state.items()}}),
    ("dinov1-vit-b", lambda state: state)])
def test_weights_of_the_authors(monkeypatch, tmp_path, name, wrap):
    shallow(monkeypatch, depth=1)
    torch.manual_seed(0)
    vit = timm.create_model(teacher_row(name).timm_name.split(".")[0], num_classes=0).eval()
    torch.save(wrap(vit.state_dict()), tmp_path / "weights.pth")
    images, found = torch.randn(1, 3, 224, 224), load_vit(name, tmp_path / "weights.pth")
    if not teacher_row(name).final_norm:
        vit.norm = torch.nn.Identity()
    assert torch.equal(found.forward_features(images), vit.forward_features(images))


def test_names(monkeypatch, capsys):
    assert len(set(TEACHERS) - {"dinov2-vit-n"}) == 27  # the tests add n
    for name, row in TEACHERS.items():
        if name.startswith("dinov2") and name != "dinov2-vit-n":
            config = timm.get_pretrained_cfg(row.timm_name)
            assert (row.mean, row.std, row.interpolation) == (config.mean, config.std, config.interpolation)
    assert all(teacher_row(alias) is TEACHERS[name] for alias, name in ALIASES.items())
    assert all(name in teacher_list() for name in TEACHERS)
    with pytest.raises(SystemExit):
        call_main(monkeypatch, train, "--enc-type", "list")
    assert "mocov3-vit-l          1024" in capsys.readouterr().out
    for name, words in (("dinov4", "is not known; use none, timm:NAME"), ("timm:nothing", "timm has no model nothing"),
                        ("timm:resnet18", "resnet18 is no plain ViT")):
        with pytest.raises(UserError, match=words):
            teacher_row(name)


def test_the_input_follows_the_tokens(monkeypatch):
    """For all teachers at 512 px, without weights."""
    shallow(monkeypatch, depth=1)
    for name, row in TEACHERS.items():
        with torch.device("meta"):
            teacher = Teacher(timm.create_model(row.timm_name.split(".")[0], num_classes=0, **dict(row.options)), 32)
        assert (teacher.input_size, teacher.vit.patch_embed.grid_size) == (32 * row.patch, (32, 32)), name


class Clip(torch.nn.Module):
    """OpenAI's names: the visual part under visual., in float16, and some of the text part."""

    def __init__(self, width, depth, patch):
        super().__init__()
        self.visual = visual = torch.nn.Module()
        visual.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        visual.class_embedding = torch.nn.Parameter(torch.randn(width))
        visual.positional_embedding = torch.nn.Parameter(torch.randn((224 // patch) ** 2 + 1, width))
        visual.ln_pre, visual.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        visual.proj = torch.nn.Parameter(torch.randn(width, 512))
        visual.transformer = torch.nn.Module()
        visual.transformer.resblocks = torch.nn.Sequential()
        for _ in range(depth):
            block = torch.nn.Module()
            block.attn, block.mlp = torch.nn.MultiheadAttention(width, 2), torch.nn.Sequential()
            block.ln_1, block.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
            block.mlp.add_module("c_fc", torch.nn.Linear(width, 4 * width))
            block.mlp.add_module("c_proj", torch.nn.Linear(4 * width, width))
            visual.transformer.resblocks.append(block)
        self.text_projection = torch.nn.Parameter(torch.randn(4, 5))
        self.register_buffer("context_length", torch.tensor(77))
        self.half()

    def forward(self, x):
        return x


def test_openais_archive(monkeypatch, tmp_path):
    """Its tensors load by name, its classes and code do not; the file of another CLIP is named."""
    shallow(monkeypatch, depth=1)
    torch.manual_seed(0)
    clip = Clip(768, 1, 16)
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(clip, torch.zeros(1)), tmp_path / "ViT-B-16.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    found, state = load_tensors(tmp_path / "ViT-B-16.pt"), clip.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())
    vit, blocks = load_vit("clip-vit-B", tmp_path / "ViT-B-16.pt"), clip.visual.transformer.resblocks
    assert torch.equal(vit.blocks[0].attn.qkv.weight, blocks[0].attn.in_proj_weight.float())
    assert torch.equal(vit.patch_embed.proj.weight, clip.visual.conv1.weight.float())
    assert isinstance(vit.norm, torch.nn.Identity) and vit.blocks[0].attn.num_heads == 12
    with pytest.raises(UserError, match="does not hold the weights of clip-vit-L .*, but those of clip-vit-B; give"):
        load_vit("clip-vit-L", tmp_path / "ViT-B-16.pt")
    with torch.device("meta"), pytest.raises(ValueError, match="another size"):  # timm would resample
        load_state(vit, Clip(768, 1, 32).state_dict())


def test_an_archive_with_code_in_its_data(tmp_path):
    """A class that is not the archive's own is refused, not imported."""
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"a": Evil()}, protocol=2))
        archive.writestr("evil/constants.pkl", b"")
        archive.writestr("evil/version", b"3\n")
    with pytest.raises(UserError, match="holds code, which is not run"):
        load_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists()


def test_perception_encoders_own_positions(monkeypatch, tmp_path):
    """Unlike timm: the table is resampled bilinearly without antialiasing; rotations count patches on any grid."""
    shallow(monkeypatch, depth=1)
    state = timm.create_model("vit_pe_core_base_patch16_224", num_classes=0).state_dict()
    torch.save(state, tmp_path / "pe.pth")
    small, large = (Teacher(load_vit("pe-vit-b", tmp_path / "pe.pth"), grid).vit for grid in (7, 16))
    table = state["pos_embed"][:, 1:].mT.unflatten(2, (14, 14))
    for vit, grid in ((small, 7), (large, 16)):
        expected = F.interpolate(table, size=(grid, grid), mode="bilinear").flatten(2).mT
        torch.testing.assert_close(vit.pos_embed[:, 1:], expected, rtol=1e-5, atol=1e-6)
    corner = large.rope.get_embed((16, 16)).unflatten(0, (16, 16))[:7, :7]
    assert torch.equal(small.rope.get_embed((7, 7)).unflatten(0, (7, 7)), corner)


@pytest.mark.parametrize("name", [name for name in TEACHERS if name.startswith("siglip2")])
def test_siglip_has_the_approximate_gelu(name):
    """As in its training; timm uses the exact one for two of the sizes."""
    row = TEACHERS[name]
    with torch.device("meta"):
        vit = timm.create_model(row.timm_name.split(".")[0], num_classes=0, depth=1, **dict(row.options))
    x = torch.linspace(-3, 3, 20)
    assert torch.equal(vit.blocks[0].mlp.act(x), F.gelu(x, approximate="tanh"))
