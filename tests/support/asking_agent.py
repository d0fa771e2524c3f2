"""A command-line agent of the standard library: asks the policy, then does what its words say.

``asking_agent.py QUESTION [ACT ...]``; it prints what it was given and what it was answered.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.parse
from pathlib import Path

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(1000)"]
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"


def ask(question: str) -> str:
    url = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
    client = http.client.HTTPConnection(url.netloc)
    body = {"model": os.environ["SDP_MODEL"], "messages": [{"role": "user", "content": question}]}
    key = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    client.request("POST", f"{url.path}/chat/completions", json.dumps(body), key)
    return json.load(client.getresponse())["choices"][0]["message"]["content"]


def leave_processes(file: str) -> None:
    """Start a child, one in a session of its own, and one of that kind that ignores SIGTERM."""
    started = [subprocess.Popen(SLEEP), subprocess.Popen(SLEEP, start_new_session=True)]
    daemon = (
        f"import subprocess; print(subprocess.Popen({[*SLEEP[:-1], STUBBORN]!r}, stdout=2).pid)"
    )
    made = [sys.executable, "-I", "-S", "-c", daemon]
    orphan = subprocess.run(made, start_new_session=True, stdout=subprocess.PIPE, check=True).stdout
    numbers = [os.getpid(), os.getppid(), *(each.pid for each in started), int(orphan)]
    partial = Path(f"{file}.part")
    partial.write_text(json.dumps(numbers))
    partial.rename(file)


def act(what: str) -> None:
    kind, _, value = what.partition("=")
    if kind == "exit":
        sys.exit(int(value))
    elif kind == "die":
        os.kill(os.getpid(), signal.Signals[value])
    elif kind == "ask":
        print("answered:", ask(value), flush=True)
    elif kind == "write":
        name, _, text = value.partition(":")
        Path(name).write_text(text)
    elif kind == "fifo":
        os.mkfifo(value)
    elif kind == "say":
        print(value * 10_000, flush=True)
    elif kind == "alone":
        descriptor = os.open(value, os.O_CREAT | os.O_EXCL)  # an error if another one runs
        ask("alone?")
        os.close(descriptor)
        os.unlink(value)
    elif kind == "leave":
        leave_processes(value)
    elif kind == "unguard":
        os.kill(os.getppid(), signal.SIGKILL)
    elif kind == "hang":
        signal.pause()


if __name__ == "__main__":
    given = {"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    given["row"] = json.loads(Path(os.environ["SDP_ROW"]).read_text())
    seen = [Path(f"/proc/{each}/cmdline").read_text() for each in (os.getpid(), os.getppid())]
    given["key is seen"] = any(os.environ["OPENAI_API_KEY"] in text for text in seen)
    print(json.dumps(given), flush=True)
    for word in sys.argv[2:]:
        act(word)
