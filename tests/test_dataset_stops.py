"""convert and encode by several processes, and stopped at any moment: the bytes stay the same."""
import os
import random
import signal
import time
from pathlib import Path

import pytest

from preprocessing import convert, destinations, encode
from tests import test_dataset_tools as tools
from tests.conftest import SERVER, script
from tests.test_faults import wait_for

source, made = tools.source, tools.made  # fixtures


def making(kind, source, made, dest):
    """The command that makes what `made` holds as `kind`, images or latents, a folder or a zip, at `dest`."""
    if kind.startswith("images"):
        return tools.converting(source, dest, "--num-workers=2")
    return tools.encoding(made / kind.replace("vae-sd", "images"), dest)


def slow_groups(size=4, seconds=0.005):
    """Many groups, slowly written, so that there is time to kill at any place."""
    convert.GROUP = size
    fsync, add = os.fsync, destinations.add
    os.fsync = lambda number: time.sleep(seconds) or fsync(number)
    destinations.add = lambda *arguments: time.sleep(seconds / 2) or add(*arguments)


def one_step():
    """Pause after each new file, so that five kills find work left on a machine of any speed."""
    slow_groups()
    fsync, dest, most = os.fsync, Path(os.environ["HASTE_TEST_DEST"]), int(os.environ["HASTE_TEST_MOST"])
    command = os.getpid()

    def stand_still(number):
        while progress_of(dest) > most and command in (os.getpid(), os.getppid()):  # a worker alone goes on and sees it
            time.sleep(0.02)
        fsync(number)

    os.fsync = stand_still


def slow_writes():
    slow_groups(16, 0.05)


def even_shares():
    """Fail unless this process gets half of the twelve batches."""
    encode_groups = encode.encode_groups

    def checked(vae, groups, *more):
        assert len(groups) == 6
        return encode_groups(vae, groups, *more)

    encode.encode_groups = checked
    slow_groups()


def progress_of(dest):
    """Number of finished files; for a zip, of its parts."""
    work = dest.with_name(dest.name + ".parts") if dest.suffix == ".zip" else dest
    return len([path for path in work.rglob("*.???") if not path.name.startswith(".")])


def test_processes_change_no_byte(source, made, tmp_path):
    script("preprocessing/dataset_tools.py", *tools.converting(source, tmp_path / "images", "--num-workers=3"),
           before="tests.test_dataset_stops.slow_groups")
    assert tools.files(tmp_path / "images") == tools.files(made / "images")
    done = script("preprocessing/dataset_tools.py", *tools.encoding(made / "images", tmp_path / "vae-sd"), processes=2,
                  before="tests.test_dataset_stops.even_shares")
    assert tools.files(tmp_path / "vae-sd") == tools.files(made / "vae-sd")
    assert "48 files, 3 classes, 0 pictures skipped" in done.stdout


@pytest.mark.parametrize("kind", ["images", "vae-sd.zip"])
def test_kill_9_and_the_same_command(source, made, tmp_path, kind):
    """Five kills each at random moments, with and without the workers, one of a zip while it is put together: the bytes
    are those of no kill."""
    dest, moment, seen = tmp_path / kind, random.Random(kind), [0]
    command = making(kind, source, made, dest)
    processes = 2 if kind == "vae-sd.zip" else 1
    while len(seen) < 6:
        putting_together = len(seen) == 5 and dest.suffix == ".zip"
        before = f"tests.test_dataset_stops.{'slow_groups' if putting_together else 'one_step'}"
        started = SERVER.start_all("preprocessing/dataset_tools.py", *command, processes=processes, before=before,
                                   env={"HASTE_TEST_DEST": str(dest), "HASTE_TEST_MOST": str(seen[-1])})
        if putting_together:
            wait_for(lambda: list(tmp_path.glob(f".{kind}.*.tmp")))
        else:
            wait_for(lambda: progress_of(dest) > seen[-1])
        time.sleep(moment.uniform(0, 0.01))
        for process in started:
            (os.killpg if len(seen) % 2 else os.kill)(process.pid, signal.SIGKILL)
        assert started[0].wait() == -signal.SIGKILL, started[0].stderr
        assert all(process.wait() for process in started)
        wait_for(lambda group=started[0].pid: not group_is_alive(group))  # workers end by themselves
        seen.append(progress_of(dest))
        assert not (dest / "dataset.json").exists() and (dest.suffix != ".zip" or not dest.exists())
    assert 0 < seen[1] < seen[2] < seen[3] < seen[4] <= 48, seen
    script("preprocessing/dataset_tools.py", *command, processes=processes)
    if dest.suffix == ".zip":
        assert dest.read_bytes() == (made / kind).read_bytes()
    assert tools.files(dest) == tools.files(made / kind)
    assert {path.name for path in tmp_path.iterdir()} == {
        kind, "classes.json", *["latents.json"] * kind.startswith("vae")}


def ctrl_c_as_in_a_terminal():
    slow_writes()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may ignore it


@pytest.mark.parametrize("kill, number", [(os.kill, signal.SIGKILL), (os.killpg, signal.SIGINT)])
def test_workers_end_with_their_parent(source, tmp_path, kill, number):
    """At once: each completes at most the pictures on their way to the disk, not its sixteen. After Ctrl-C, which all
    processes of a terminal get, the workers say nothing."""
    command = tools.converting(source, tmp_path / "images", "--num-workers=2")
    started = SERVER.start("preprocessing/dataset_tools.py", *command,
                           before="tests.test_dataset_stops.ctrl_c_as_in_a_terminal")
    wait_for(lambda: progress_of(tmp_path / "images") >= 2)
    kill(started.pid, number)
    assert started.wait() != 0
    there = progress_of(tmp_path / "images")
    wait_for(lambda: not group_is_alive(started.pid), seconds=8)
    assert progress_of(tmp_path / "images") <= there + 2 * (destinations.WRITERS + 1)
    assert started.stderr.count("Traceback") <= 1 and "Worker" not in started.stderr, started.stderr


def group_is_alive(group):
    """Whether a process of the group runs; zombies do not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False
