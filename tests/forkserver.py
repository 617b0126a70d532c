"""A process that has imported everything and forks to run a script: a run then starts in milliseconds, not in seconds.

Reads one JSON request a line from stdin and answers with one JSON line: {"run": script, "argv", "env", "out", "err",
"before"} -> its pid, {"wait": pid, "timeout"} -> its exit status as subprocess has it, or null. The child is a process
group of its own, with one thread, like a script that was started by its command line. "before" names a function
"module.function" to call first.
"""
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch._dynamo  # the first optimizer step would import it

import generate  # noqa: F401
import generate_t2i  # noqa: F401
import train  # noqa: F401
import train_t2i  # noqa: F401
from runtime import versions
from runtime.errors import run_script
from tests import nano  # noqa: F401

# Scripts import some modules only when they need them. A test may close the folder of the code by then.
for package in ("data_io", "encoders", "models", "runtime", "sampling", "training"):
    for module in pkgutil.iter_modules([str(Path(__file__).resolve().parents[1] / package)]):
        importlib.import_module(f"{package}.{module.name}")

with contextlib.suppress(ImportError):  # most tests run without it
    from diffusers import AutoencoderDC, AutoencoderKL  # noqa: F401


def run(request):
    """Become the script: never returns."""
    os.setpgid(0, 0)
    for path, number in ((request["out"], 1), (request["err"], 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(request["env"])
    sys.argv = [request["run"], *request["argv"]]
    status = 1
    try:
        if request["before"]:
            module, _, function = request["before"].rpartition(".")
            getattr(importlib.import_module(module), function)()
        run_script(importlib.import_module(request["run"].removesuffix(".py").replace("/", ".")).main)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001 - print it and return an exit status, as Python does
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(pid, timeout):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def main():
    torch.set_num_threads(1)
    versions.commit()
    gc.freeze()  # children then do not collect shared objects
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest's own business
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(wait(request["wait"], request["timeout"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            sys.stdin.close()
            run(request)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()
