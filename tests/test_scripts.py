"""For every script: exit status and streams, outputs that are inputs, full disks, Ctrl-C, other users."""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace

import pytest

import export
import generate
import train
import train_t2i
from evaluations import baselines, caption_retrieval, curves, evaluator, probe, report, stats
from examples import train_vae
from examples.cifar10 import prepare as cifar10
from examples.emoji import prepare as emoji
from runtime.errors import UserError, run_script
from runtime.files import atomic_folder, check_output, prepare_output
from tests.conftest import ROOT, call_main, metrics, script, train_arguments
from tests.damage import CKPT, IMAGE, Planted, change_bytes, cut, damaged, put
from tests.test_bad_input import TEXT, WITH_TEACHER
from tests.worlds import NO_TEACHER, base

TOO_LONG = "a" * 300


@pytest.mark.parametrize("name, change, more, words", [
    ("generate.py", put(CKPT, {"ema": Planted()}), [], "holds code, which is not run"),
    ("train.py", None, ["--batch-size", "many"], "--batch-size: 'many' is no whole number"),
    ("train.py", cut(IMAGE), [*WITH_TEACHER, "--num-workers", 1], "img00000003.png is no readable image")])
def test_by_the_command_line(world, tmp_path, name, change, more, words):
    """In a process of its own: exit status and stderr, no traceback. A loader process finds the torn image."""
    w = tmp_path / "w"
    shutil.copytree(world, w)
    damaged(w, change)
    arguments = base({"generate.py": generate, "train.py": train}[name], w)
    done = script(name, *arguments, *(str(a).replace("{w}", str(w)) for a in more), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(f"^error: .*{words}", done.stderr.splitlines()[-1])


def test_rows_that_a_crash_has_left(monkeypatch, world, tmp_path):
    """NULs, too many fields, digits of other scripts: such lines of metrics.csv are dropped, the run goes on."""
    shutil.copytree(world, tmp_path / "w")
    for text in (b"1,2,3,4,5,6,7,8,9,10\n", "\u00b2,2,3,4,5,6,7,8\n".encode(), b"\0" * 200_000):
        change_bytes("out/run/metrics.csv", lambda data, text=text: data + text)(tmp_path / "w")
    more = [*NO_TEACHER, "--max-train-steps", 2]
    call_main(monkeypatch, train, *train_arguments(tmp_path / "w/data", tmp_path / "w/out", *more))
    assert [row["step"] for row in metrics(tmp_path / "w/out")] == ["1", "2"]


def test_a_log_on_a_full_disk(tiny_data, tmp_path):
    """log.txt loses its lines; the run goes on and prints nothing about it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.txt").symlink_to("/dev/full")
    done = script("train.py", *train_arguments(tiny_data, tmp_path, *NO_TEACHER, "--max-train-steps", 2))
    assert "Logging error" not in done.stderr and "Traceback" not in done.stderr


def test_no_room_for_the_teacher_cache(world, tmp_path):
    """Found when the files are made, not after hours of filling them."""
    done = script("train.py", *train_arguments(world / "data", tmp_path, "--enc-weights", world / "teacher.pth",
                                               "--teacher-cache", tmp_path / "cache"), check=False,
                  before="tests.test_resume.limit_file_size", env={"HASTE_TEST_LARGEST_FILE": "40000"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(f"error: {tmp_path}/cache/.* could not be written .File too large.*make room", done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name, module", [("train.py", train), ("train_t2i.py", train_t2i), ("generate.py", generate)])
def test_without_permission(request, name, module):
    """As a user without permission to read the folder."""
    w = request.getfixturevalue("text_world" if module in TEXT else "world")  # only its owner may open it
    with tempfile.TemporaryDirectory() as own:
        os.chmod(own, 0o777)
        where = ["--output-dir", own] if "train" in name else ["--sample-dir", own]
        done = script(name, *base(module, w), *where, check=False, before="tests.test_scripts.become_nobody")
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(rf"error: ({w.parent}|{ROOT})/.* cannot be read \(Permission denied\); give another", said), said


def become_nobody():
    os.seteuid(65534)


@pytest.mark.parametrize("out, suffixes, words", [
    ("a.npz", (".npz",), "is .*a.npz itself"), ("soft.npz", (".npz",), "itself"), ("hard.npz", (".npz",), "itself"),
    ("b.pt", (".npz",), "is a file of another kind"), ("folder", (".npz",), "itself"),
    ("..", (".npz",), "is a folder"), ("folder", (), "lie in each other"),
    ("folder/below", (), "lie in each other"), (".", (), "lie in each other"), ("/dev/null", (".npz",), "another kind"),
    ("c.npz", (".npz",), None), ("new.npz", (".npz",), None), ("folder/new.npz", (".npz",), None), ("other", (), None)])
def test_an_output_is_no_input(tmp_path, monkeypatch, out, suffixes, words):
    monkeypatch.chdir(tmp_path)
    for name in ("a.npz", "b.pt", "c.npz"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "soft.npz").symlink_to("a.npz")
    os.link("a.npz", "hard.npz")
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        check_output(out, suffixes, ["a.npz", tmp_path / "folder", None, "a/hub-name"])


def test_results_are_written_before_they_are_printed(tmp_path):
    args = Namespace(json=tmp_path / "out.json")
    with pytest.raises(ZeroDivisionError):
        evaluator.run(lambda args: {"FID": 1.5}, lambda result: [1 / 0], args)
    assert json.loads(args.json.read_text()) == {"FID": 1.5}


@pytest.mark.parametrize("command, words, there", [
    ("python {here} | head -1", "", True), ("python {here} 2>&1 | head -1", "", True),
    ("python {here} >&- 2>&-", "", True), ("python {here} ctrl-c", "stopped; the same", False)])
def test_closed_pipes_and_ctrl_c(tmp_path, command, words, there):
    """In a shell. Neither prints a traceback; Ctrl-C prints one line."""
    (tmp_path / "here.py").write_text(f"""import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from runtime.errors import run_script
from tqdm import tqdm
def main():
    for i in tqdm(range(30), disable=len(sys.argv) > 1):
        print(i, flush=True)
        time.sleep(0.01)
        if "ctrl-c" in sys.argv:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may ignore it
            os.kill(os.getpid(), signal.SIGINT)
    open({str(tmp_path / 'done')!r}, "w").close()
run_script(main, continues=True)
""")
    command = command.format(here=tmp_path / "here.py").replace("python", sys.executable)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert words in done.stderr and (tmp_path / "done").exists() == there


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("module, arguments", [
    (evaluator, [TOO_LONG, "x"]), (evaluator, ["x", "x", "--json", TOO_LONG]), (stats, ["x", TOO_LONG]),
    (curves, [TOO_LONG]), (report, [TOO_LONG]), (probe, [TOO_LONG]), (baselines, [TOO_LONG]),
    (export, ["x", TOO_LONG]), (caption_retrieval, [TOO_LONG, "x"]), (train_vae, ["--data", "x", "--out", TOO_LONG]),
    (emoji, ["--dest", TOO_LONG]), (cifar10, ["--dest", TOO_LONG])], ids=lambda value: getattr(value, "__name__", ""))
def test_names_of_300_characters(monkeypatch, module, arguments):
    with pytest.raises(UserError, match=f"{TOO_LONG}.* (cannot be read .File name too long|does not exist)"):
        call_main(monkeypatch, module, *arguments)


def test_names_that_the_locale_cannot_read(monkeypatch, capsys):
    """As a folder with an umlaut arrives under LC_ALL=C PYTHONUTF8=0."""
    monkeypatch.setattr(sys, "argv", ["script", "--out", "/tmp/l\udcc3\udcb6c"])
    with pytest.raises(SystemExit):
        run_script(lambda: pytest.fail("started"))
    assert re.match(r"error: The argument '/tmp/l.udcc3.udcb6c' is no text in this locale", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_leftovers_of_the_same_output_go(tmp_path, name):
    """Files and folders that a killed process left; those of other outputs stay."""
    (tmp_path / f".{name}.123.tmp").mkdir()
    (tmp_path / f".{name}.124.tmp").touch()
    (tmp_path / ".other.npz.123.tmp").touch()
    prepare_output(tmp_path / name, (".npz",) if "." in name else ())
    assert [path.name for path in tmp_path.iterdir()] == [".other.npz.123.tmp"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
