"""--preset: every row is a valid command line, typed flags override it, and the list is shown."""
import re
import subprocess
import sys

import pytest

import train
import train_t2i
from docs.make_flags import parser_of
from models.mmdit import MMDIT_CONFIGS
from models.sit import SIT_CONFIGS
from tests.conftest import ROOT, call_main
from training.presets import NEVER, PRESETS

SCRIPTS = {"train.py": (train, SIT_CONFIGS), "train_t2i.py": (train_t2i, MMDIT_CONFIGS)}


def parsed(monkeypatch, name, *more):
    """The script's arguments, resolved as main does."""
    module, _ = SCRIPTS[PRESETS[name][0]]
    monkeypatch.setattr(sys, "argv", ["script", "--exp-name", "x", *map(str, more)])
    return module.parse_args()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_flags_typed_are(monkeypatch, name):
    """So each argument exists and has a valid type and choice."""
    flags = [word for key, value in PRESETS[name][1].items()
             for word in (f"--{key.replace('_', '-')}", *[value] * (value is not True))]
    preset, typed = (vars(parsed(monkeypatch, name, *more)) for more in (["--preset", name], flags))
    assert preset.pop("preset") == name and typed.pop("preset") is None
    assert preset == typed
    assert {key: type(value) for key, value in preset.items()} == {key: type(value) for key, value in typed.items()}


def test_the_papers_runs(monkeypatch):
    """Table 16 and appendix A, from the preset, the model's row and the defaults together."""
    for name, model, depth, stop in (("sit-xl-2-haste", "SiT-XL/2", 8, 250_000),
                                     ("sit-l-2-haste", "SiT-L/2", 8, 250_000),
                                     ("sit-xl-2-haste-512", "SiT-XL/2", 8, 300_000),
                                     ("sit-b-2-haste", "SiT-B/2", 5, 100_000), ("mmdit-haste", "MMDiT", 8, 200_000),
                                     ("sit-b-2-repa", "SiT-B/2", 5, NEVER)):
        args = parsed(monkeypatch, name, "--preset", name)
        assert (args.model, args.encoder_depth, args.early_stop_point) == (model, depth, stop)
        assert (args.proj_coeff, args.attn_coeff) == (0.5, 0.0 if "repa" in name else 0.5)
        assert (args.batch_size, args.learning_rate) == (256, 1e-4)
        assert (args.early_stop_trigger, args.align_decay) == ("step", "none")
    assert parsed(monkeypatch, "sit-b-2-vanilla", "--preset", "sit-b-2-vanilla").enc_type == "none"
    args = parsed(monkeypatch, "sit-b-2-haste-trigger", "--preset", "sit-b-2-haste-trigger")
    assert (args.trigger_start, args.trigger_every, args.trigger_samples) == (50_000, 10_000, 2048)
    assert (args.trigger_timesteps, args.trigger_block, args.trigger_threshold) == ([0.02, 0.1, 0.5, 0.8], 5, -0.05)
    assert (args.early_stop_trigger, args.early_stop_point) == ("gradient", 100_000)


@pytest.mark.parametrize("form", [["--batch-size", 8, "--preset", "embedded"], ["--preset=embedded", "--batch-size", 8],
                                  ["--pres", "embedded", "--batch-size", 8]])
def test_typed_flags_win(monkeypatch, form):
    args = parsed(monkeypatch, "embedded", *form)
    assert (args.batch_size, args.model, args.learning_rate) == (8, "SiT-T/2", 1e-3)


def test_the_quickstart_looks_for_the_last_checkpoint_of_its_presets():
    steps = {PRESETS[name][1]["max_train_steps"] for name in ("embedded", "embedded-t2i", "cifar10")}
    assert set(map(int, re.findall(r"quickstart\S* steps=(\d+)",
                                   (ROOT / "examples/quickstart.sh").read_text()))) == steps


@pytest.mark.parametrize("module", [train, train_t2i])
def test_list(monkeypatch, capsys, module):
    """Every name, its command line and the numbers; no other flag is needed."""
    with pytest.raises(SystemExit) as end:
        call_main(monkeypatch, module, "--preset", "list")
    text = capsys.readouterr().out
    assert not end.value.code and all(f"\n{name}\n" in text for name in PRESETS)
    assert "train.py --model SiT-B/2 --early-stop-trigger gradient" in text and "FID 39.9 at 100K steps" in text


def test_list_into_a_closed_pipe_and_in_the_help():
    done = subprocess.run(f"{sys.executable} train.py --preset list | head -1", shell=True, cwd=ROOT, check=True,
                          capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    page = "".join(parser_of(train).format_help().split())
    assert all(name in page for name, row in PRESETS.items() if row[0] == "train.py")


def test_the_cifar10_quickstart_names_its_presets_model():
    model = PRESETS["cifar10"][1]["model"].replace("/", "-")
    assert f"samples/$name/{model}-$ending" in (ROOT / "examples/quickstart.sh").read_text()
