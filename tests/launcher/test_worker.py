"""A rank's process is never there for longer than it may be."""

import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from armillary.launcher.worker import end_processes

FENCED = """
import os, sys, threading, time
from armillary.launcher import worker
worker.FENCE_SECONDS, worker.HEAD_EVERY = 0.05, 1
print(os.getpid(), flush=True)
threading.Thread(target=worker._fence, args=(os.getppid(), ("127.0.0.1", int(sys.argv[1]))), daemon=True).start()
time.sleep(600)
"""
AGENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"  # its only child is the rank


@pytest.fixture
def head():
    """What answers as the head of a cluster does, until it is closed."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        yield server


@pytest.fixture
def fenced(head):
    """(the agent, its rank), both at work."""
    command = [sys.executable, "-c", AGENT, FENCED, str(head.getsockname()[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        rank = psutil.Process(int(agent.stdout.readline()))
        time.sleep(1)
        assert rank.is_running()
        yield agent, rank
        agent.kill()
        if rank.is_running():
            rank.kill()


def test_a_rank_ends_with_its_nodes_agent(fenced):
    agent, rank = fenced
    agent.kill()
    rank.wait(5)


def test_a_rank_that_does_not_reach_the_head_any_more_ends(fenced, head):
    agent, rank = fenced
    head.close()
    rank.wait(5)
    assert agent.wait(5) == 0, "its agent was there all the time"


@pytest.mark.parametrize("state", [signal.SIGCONT, signal.SIGSTOP])
def test_what_is_left_of_an_earlier_launch_is_killed_and_what_only_has_its_number_is_not(state):
    process = psutil.Popen(["sleep", "60"])
    process.send_signal(state)
    began = process.create_time()
    end_processes([(process.pid, began - 1)])
    assert process.is_running()
    end_processes([(process.pid, began)])
    assert not process.is_running()
    end_processes([(process.pid, began)])
