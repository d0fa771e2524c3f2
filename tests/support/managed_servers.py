"""Managed servers whose interpreter is a script that answers ``/health``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

# Says who it is, leaves a child of its own, and then does what FAKE_VLLM says.
FAKE_PYTHON = """#!{python} -IS
import http.server, json, os, signal, subprocess, sys
mode = os.environ.get("FAKE_VLLM", "ready")
port = int(sys.argv[sys.argv.index("--port") + 1])
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the child inherits it
child = subprocess.Popen([sys.executable, "-IS", "-c", "import signal; signal.pause()"])
cores = sorted(os.sched_getaffinity(0))
print(json.dumps(dict(pid=os.getpid(), child=child.pid, cores=cores)), flush=True)
if mode == "dies" or (mode == "second dies" and "server-1" in os.readlink("/proc/self/fd/1")):
    print("\\n".join("line %d" % i for i in range(40)) + "\\nValueError: no such model", flush=True)
    sys.exit(3)
if mode == "late":
    print("still loading", flush=True)
    signal.pause()

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("x" * 2**17 + "\\nCUDA error: device-side assert", flush=True)
            os._exit(7)
        if self.path == "/kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass

http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    script = tmp_path / "python"
    script.write_text(FAKE_PYTHON.format(python=sys.executable))
    script.chmod(0o755)
    return str(script)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
