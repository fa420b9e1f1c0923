"""Hosts of their own, in network namespaces that a bridge connects: the same model as on one host, and who is slow or dead.

Needs root and iproute2; each host has an address, a host name and a link that can be slowed down or cut.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.test_train_nodes import DEADLINE, Job, digests, free_port
from tests.tiny import tiny_dataset

pytestmark = pytest.mark.parallel

SHORT = ["train.max_steps=12", "train.eval_every=6", "parallel.nccl.socket_ifname=eth0"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


class Network:
    """Three hosts at 10.71.0.1 and so on, each a namespace with a link to a bridge in a fourth."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hosts = [f"{name}h{number}" for number in range(3)]
        self.all = [f"{name}br", *self.hosts]

    def __enter__(self) -> Network:
        try:
            for space in self.all:
                ip("netns", "add", space)
                ip("-n", space, "link", "set", "lo", "up")
            bridge = self.all[0]
            ip("-n", bridge, "link", "add", "br0", "type", "bridge")
            ip("-n", bridge, "link", "set", "br0", "up")
            for number, host in enumerate(self.hosts):
                ip("-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", f"to{number}", "netns", bridge)
                ip("-n", bridge, "link", "set", f"to{number}", "master", "br0", "up")
                ip("-n", host, "addr", "add", f"10.71.0.{number + 1}/24", "dev", "eth0")
                ip("-n", host, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.all:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True, timeout=20)


@pytest.fixture
def network() -> Iterator[Network]:
    if not shutil.which("ip"):
        pytest.skip("no iproute2")
    name = f"mr{os.getpid() % 10000}"
    if subprocess.run(["ip", "netns", "add", f"{name}x"], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    subprocess.run(["ip", "netns", "del", f"{name}x"], check=True)
    with Network(name) as made:
        yield made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=120).folder


class Hosts(Job):
    """A job whose nodes are hosts of a network."""

    def __init__(self, network: Network, dataset: Path, place: Path, count: int, host: str = "10.71.0.1") -> None:
        self.network, self.host = network, host
        super().__init__(dataset, place, *SHORT, count=count)

    def at(self, rank: int) -> list[str]:
        script = f'hostname host-{rank} && exec "$@"'
        return ["ip", "netns", "exec", self.network.hosts[rank], "unshare", "--uts", "sh", "-c", script, "sh"]

    def wait_for(self, pattern: str) -> None:
        end = time.monotonic() + DEADLINE
        while not re.search(pattern, self.output()):
            assert time.monotonic() < end, self.output()
            time.sleep(0.1)


def test_two_hosts_make_the_model_of_one(network, dataset, tmp_path):
    from tests.parallel.test_train_nodes import WORDS

    out = tmp_path / "local"
    command = [sys.executable, "-m", "trainer", "train", "--in", f"dataset={dataset}", "--out", f"model={out}", *WORDS]
    one = subprocess.Popen([*command, *SHORT[:2], "train.processes=2"], stdout=subprocess.DEVNULL)
    try:
        with Hosts(network, dataset, tmp_path / "job", count=2) as job:
            assert job.finish() == [0, 0], job.output()
            assert one.wait(timeout=DEADLINE) == 0
            assert digests(job.out) == digests(out)
            assert re.search(r"rank 0 \(node 0, host-0\) - rank 1 \(node 1, host-1\)", job.output()), job.output()
            assert "slow" not in job.output().replace("slowest", "")
    finally:
        one.kill()
        one.wait()


@pytest.mark.fault
@pytest.mark.slow
def test_a_slow_host_is_named_before_training_starts(network, dataset, tmp_path):
    if not shutil.which("tc"):
        pytest.skip("no tc")
    shape = ["tc", "-n", network.hosts[2], "qdisc", "add", "dev", "eth0", "root", "tbf"]
    subprocess.run([*shape, "rate", "40mbit", "burst", "32k", "latency", "200ms"], check=True, timeout=20)
    with Hosts(network, dataset, tmp_path / "job", count=3) as job:
        assert job.finish() == [0, 0, 0], job.output()
        said = job.output()
        assert "preflight: node 2 (host-2) is slow" in said
        assert said.index("is slow") < said.index("step=")
        pairs = re.findall(r"rank (\d) \(.*\) - rank (\d) \(.*\)(  slow)?$", said, re.MULTILINE)
        assert [pair for *pair, slow in pairs if not slow] == [["0", "1"]], said
        assert pairs[-1][:2] == ("0", "1"), said


@pytest.mark.fault
@pytest.mark.slow
def test_a_host_that_is_cut_off_is_named(network, dataset, tmp_path):
    # The rendezvous, at another address, gets through, and nothing else does: what a wrong firewall does.
    for number, host in enumerate(network.hosts):
        ip("-n", host, "addr", "add", f"10.72.0.{number + 1}/24", "dev", "eth0")
    for other in (0, 2):
        ip("-n", network.hosts[1], "route", "add", "blackhole", f"10.71.0.{other + 1}/32")
    with Hosts(network, dataset, tmp_path / "job", count=3, host="10.72.0.1") as job:
        job.wait_for(r"preflight: node 1 \(host-1\) with rank 1 is cut off from the others")
        assert "step=" not in job.output()


SILENT = """
import os, sys, time
import torch
from trainer.parallel.group import process_group
from trainer.parallel import group
if os.environ["RANK"] == "2":
    group.preflight = lambda *_: time.sleep(600)
try:
    with process_group("gloo", 3.0, torch.device("cpu"), check=True):
        print("trained")
except Exception as error:
    print(type(error).__name__, error, flush=True)
    os._exit(3)
"""


@pytest.mark.fault
@pytest.mark.slow
def test_a_rank_that_sends_nothing_is_named():
    ranks = []
    common = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    try:
        for rank in range(3):
            environment = {**common, "RANK": str(rank), "LOCAL_WORLD_SIZE": "1"}
            ranks.append(
                subprocess.Popen([sys.executable, "-c", SILENT], env=environment, stdout=subprocess.PIPE, text=True)
            )
        said = [each.communicate(timeout=120)[0] for each in ranks[:2]]
    finally:
        for each in ranks:
            each.kill()
            each.communicate()
    for text in said:
        assert re.search(r"PeerLost preflight: no data comes from rank 2 \(node 2", text), said
        assert "trained" not in text
