"""Programs run without the harness: each in a process of its own, which cannot import it.

The processes are forked from one that has torch, megatron-core, ModelOpt and transformers imported and
nothing else, so that importing is paid for once; ``fresh`` is a new interpreter.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
from functools import cache
from pathlib import Path

_SECONDS = 600
_ISOLATED = (sys.executable, "-I", "-W", "ignore", "-c")
_FRESH = "import runpy, sys; sys.modules['harness'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
_SERVER = f"""
import os, runpy, signal, sys, traceback
sys.modules["harness"] = None
import torch, transformers
import megatron.core.models.gpt, megatron.training.arguments
import modelopt.torch.export, modelopt.torch.quantization

def run(script, out, err):
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.alarm({_SECONDS})
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = run(*line.rstrip("\\n").split("\\t"))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def alone(script: Path, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run it; its exit code, minus a signal's number where that ended it, and what it printed."""
    if fresh:
        command = [*_ISOLATED, _FRESH, str(script)]
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    server, out, err = _server(), script.with_suffix(".out"), script.with_suffix(".err")
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{script}\t{out}\t{err}\n")
    server.stdin.flush()
    code = int(server.stdout.readline())
    return subprocess.CompletedProcess([str(script)], code, out.read_text(), err.read_text())


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [*_ISOLATED, _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(server.kill)
    assert server.stdout is not None
    # What the libraries print as they are imported comes first.
    while server.stdout.readline() != "ready\n":
        assert server.poll() is None
    return server
