"""--config: a file's flags act like typed ones; typed flags win; bad files give one sentence."""
import json
from types import SimpleNamespace

import pytest
import yaml

import generate
import train
from evaluations import evaluator
from runtime import versions
from runtime.errors import UserError
from runtime.flags import Parser, whole
from tests.conftest import call_main, train_arguments

NAMED = ["--exp-name", "x"]


def parsed(monkeypatch, module, *words):
    monkeypatch.setattr("sys.argv", ["script", *map(str, words)])
    return vars(module.parse_args())


@pytest.fixture
def put(tmp_path):
    def write(found, name="flags.yaml"):
        (tmp_path / name).write_text(found if isinstance(found, str) else yaml.safe_dump(found))
        return tmp_path / name
    return write


def test_flags_of_a_file_are_those_typed(monkeypatch, put):
    """All kinds: numbers, a number that YAML reads as text, lists, pairs, switches, a preset, required flags."""
    flags = {"exp-name": "x", "model": "SiT-B/2", "batch_size": 32, "learning-rate": "1e-3", "qk_norm": True,
             "hflip": True, "trigger_timesteps": [0.1, 0.5], "attn-layers": [[2, 7], [3, 9]], "fused-attn": False,
             "preset": "sit-b-2-repa", "num_classes": None}
    typed = ["--preset", "sit-b-2-repa", *NAMED, "--model", "SiT-B/2", "--batch-size", 32, "--learning-rate", 1e-3,
             "--qk-norm", "--hflip", "--trigger-timesteps", 0.1, 0.5, "--attn-layers", "2:7,3:9", "--no-fused-attn"]
    there = parsed(monkeypatch, train, "--config", put(flags))
    assert there == parsed(monkeypatch, train, *typed) and "config" not in there
    assert there["attn_layers"] == [[2, 7], [3, 9]] and there["attn_coeff"] == 0 and there["learning_rate"] == 1e-3
    text = json.dumps({"ckpt": "a.pt", "cfg": 2, "seed": 3})
    assert parsed(monkeypatch, generate, "--config", put(text)) == parsed(
        monkeypatch, generate, "--ckpt", "a.pt", "--cfg-scale", 2, "--global-seed", 3)


def test_facts_of_a_run_are_no_flags(monkeypatch, put):
    """settings.json of samples and args.json of a run hold facts too; some have the names of aliases here."""
    path = put({"ckpt": "a.pt", "num_steps": 2, "steps": 400_000, "class_names": ["a", "b"], "network_sha256": "0"})
    found = parsed(monkeypatch, generate, "--config", path)
    assert found == parsed(monkeypatch, generate, "--ckpt", "a.pt", "--num-steps", 2)
    run = {"environment": {}, "data": "hash", "processes": 8, "time_shift": 1.0, "vae": "mse",
           "mixed_precision": "fp16", "path_type": "cosine"}
    assert parsed(monkeypatch, generate, "--ckpt", "a.pt", "--config", put(run)) == parsed(
        monkeypatch, generate, "--ckpt", "a.pt", "--path-type", "cosine")
    parser = Parser()
    parser.add_argument("--processes", type=whole(1), default=1)
    assert parser.parse_args(["--config", str(put(run))]).processes == 1


def test_typed_flags_win(monkeypatch, put):
    path = put({"exp_name": "x", "seed": 1, "hflip": True, "batch_size": 8, "early_stop_fraction": 0.5})
    args = parsed(monkeypatch, train, f"--config={path}", "--seed", 2, "--no-hflip", "--early-stop-point", 7)
    assert (args["seed"], args["hflip"], args["batch_size"], args["early_stop_point"]) == (2, False, 8, 7)
    path = str(put({"prompt": [1, 2], "runs": ["a", "b"]}))
    for typed, found in ([], {"prompt": [1, 2], "runs": ["a", "b"]}), (["--prompt", "3", "c"],
                                                                       {"prompt": [3], "runs": ["c"]}):
        parser = Parser()
        parser.add_argument("--prompt", action="append", type=whole(0), default=[])
        parser.add_argument("runs", nargs="+")
        assert vars(parser.parse_args(["--config", path, *typed])) == found


def test_underscores_are_hyphens(monkeypatch):
    """As in the README of REPA; values stay as they are."""
    args = parsed(monkeypatch, generate, "--ckpt", "a_b.pt", "--num_steps=7", "--guidance_high", 0.7, "--prefix=--a_b")
    assert (args["ckpt"], args["num_steps"], args["guidance_high"], args["prefix"]) == ("a_b.pt", 7, 0.7, "--a_b")


def test_args_of_a_run_are_a_file(monkeypatch, tiny_data, tmp_path):
    """It starts the same run under another name, whatever args.json holds besides flags."""
    call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-train-steps", 2,
                                                   "--early-stop-fraction", 0.5))
    first = json.loads((tmp_path / "run/args.json").read_text())
    call_main(monkeypatch, train, "--config", tmp_path / "run/args.json", "--exp-name", "again")
    again = json.loads((tmp_path / "again/args.json").read_text())
    assert {**again, "exp_name": "run"} == first and "environment" in first
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("run", "again")]
    assert [[row.split(",")[:3] for row in each] for each in rows] == [[row.split(",")[:3] for row in rows[0]]] * 2


@pytest.mark.parametrize("found, words", [
    ({"batchsize": 8}, "flags.yaml has the key 'batchsize', which is no flag of this script; the nearest is 'batch_s"),
    ({"config": "other.yaml"}, "has the key 'config', which is no flag"),
    ({"batch_size": 0}, "flags.yaml: batch_size is 0; it must be "),
    ({"batch_size": True}, "batch_size: 'True' is no whole number"),
    ({"model": "SiT-Q/2"}, "model: invalid choice: 'SiT-Q/2'"),
    ({"hflip": "yes, please"}, "hflip is 'yes, please'; it must be true or false"),
    ({"batch_size": [1, 2]}, "batch_size: '1,2' is no whole number"),
    ("[1, 2]", "holds a list; write a flag a line"), ("a: [", "cannot be read .while parsing"),
    ("\0", "cannot be read"), ("", "holds a NoneType")])
def test_what_cannot_be_used(monkeypatch, put, found, words):
    with pytest.raises(UserError, match=words):
        parsed(monkeypatch, train, *NAMED, "--config", put(found))


def test_no_such_file_and_no_name(monkeypatch, tmp_path):
    for path in (tmp_path, "/dev/zero"):  # the second never ends
        with pytest.raises(UserError, match=f"--config {path} is no file of flags; give one in YAML or JSON"):
            parsed(monkeypatch, train, *NAMED, "--config", path)
    with pytest.raises(UserError, match="--config .*none.yaml cannot be read .No such file"):
        parsed(monkeypatch, train, "--config", tmp_path / "none.yaml")
    with pytest.raises(UserError, match="--config: expected one argument"):
        parsed(monkeypatch, train, *NAMED, "--config")


def test_files_run_no_code(monkeypatch, put):
    with pytest.raises(UserError, match="cannot be read .could not determine a constructor"):
        parsed(monkeypatch, train, "--config", put("seed: !!python/object/apply:os.getpid []"))


def test_positional_arguments_of_a_file(monkeypatch, put):
    seen = []
    monkeypatch.setattr(evaluator, "run", lambda evaluate, lines, args: seen.append(args))
    call_main(monkeypatch, evaluator, "--config", put({"reference": "a.npz", "sample": "b.npz"}))
    assert (seen[0].reference, seen[0].sample) == ("a.npz", "b.npz")


def test_help_is_a_page():
    """What is required, words, flags with short values, and last the commands of the docstring."""
    parser = Parser(prog="x.py", description="Do it:\n\n    python x.py --ckpt A \\\n        --steps 3\n\nMore.\n")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--num-steps", "--steps", type=whole(1), help="of the sampler, "
                        "a-hyphenated-word-that-is-kept-in-one")
    parser.add_argument("--tf32", action="store_true")
    text = parser.format_help()
    assert text.startswith("usage: x.py --ckpt CKPT RUN... [flags]\n\nDo it.\n\nMore.\n")
    assert "  --num-steps, --steps N " in text and "  --[no-]tf32" in text
    assert " a-hyphenated-word-that-is-kept-in-one\n" in text
    assert text.endswith("examples:\n    python x.py --ckpt A \\\n        --steps 3\n")


def test_the_commit_is_that_of_the_code(monkeypatch):
    commit = versions.commit.__wrapped__  # without its cache
    assert commit() == "unknown" or len(commit().removesuffix("-dirty")) == 40
    monkeypatch.setattr("subprocess.run", lambda *_, **more: SimpleNamespace(stdout=f"{'a' * 40}-dirty\n"))
    assert commit() == "a" * 40 + "-dirty"
    monkeypatch.undo()
    monkeypatch.setattr(versions, "__file__", "/tmp/runtime/versions.py")
    assert commit() == "unknown"
