"""Processes that fork, or end, while a thread generates. In processes of their own: a fork copies what pytest holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from law_helpers import CheckpointFactory

TIMEOUT = 120.0

FORK = """
import os, sys, threading, time
import specengine

def generate(**options):
    return specengine.generate([3, 4, 5], model=sys.argv[1], backend="native", num_threads=1, **options)

expected = generate(max_new_tokens=8).token_ids
engine = specengine.Engine(sys.argv[1], backend="native", num_threads=1)
is_running = threading.Event()
def work():
    while True:
        engine.generate([3, 4, 5], max_new_tokens=30, ignore_eos=True)
        generate(max_new_tokens=30, ignore_eos=True)
        is_running.set()
threading.Thread(target=work, daemon=True).start()
is_running.wait()
for turn in range(5):
    child = os.fork()
    if child == 0:
        try:
            engine.generate([3, 4, 5])
        except specengine.SpecEngineError as error:
            is_named = "forked" in str(error)
        engine.close()
        specengine.clear_cache()
        os._exit(0 if is_named and generate(max_new_tokens=8).token_ids == expected else 1)
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            sys.exit("the child hangs")
        time.sleep(0.01)
    assert status[1] == 0, status
os._exit(0)
"""

END = """
import sys, threading
import specengine

engine = specengine.Engine(sys.argv[1], backend="native", num_threads=1)
is_running = threading.Event()
def work():
    while True:
        for event in engine.stream([3, 4, 5], max_new_tokens=50, ignore_eos=True):
            is_running.set()
threading.Thread(target=work, daemon=True).start()
is_running.wait()
"""


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_a_forked_process_generates_with_engines_of_its_own(checkpoint: CheckpointFactory) -> None:
    done = run(FORK, checkpoint("gpt2", seed=9))
    assert done.returncode == 0, done.stderr


def test_a_process_ends_quietly_while_a_daemon_thread_generates(checkpoint: CheckpointFactory) -> None:
    for _ in range(2):
        done = run(END, checkpoint("gpt2", seed=9))
        assert (done.returncode, done.stderr) == (0, "")
