"""What ranks find out about each other before they train: who is missing, cut off, slow or dead; NCCL's variables, /dev/shm."""

from __future__ import annotations

import subprocess
import threading
from itertools import chain, combinations

import pytest
from torch.distributed import HashStore

from trainer.config import Params
from trainer.config.parallel import Nccl
from trainer.errors import ConfigError
from trainer.parallel import network, preflight, rollcall
from trainer.parallel.arrivals import PeerLost
from trainer.parallel.rollcall import Name, roll_call, verdict

FAST, SLOW = 10e9, 1e9


def names(*nodes: int) -> list[Name]:
    return [Name(rank, node, f"host-{node}") for rank, node in enumerate(nodes)]


def called(ranks: list[int], size: int, monkeypatch, timeout_s: float = 5.0) -> dict[int, object]:
    """What each of some ranks gets from the roll call of `size`, as threads with a store between them."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store, found = HashStore(), {}

    def call(rank: int) -> None:
        try:
            found[rank] = roll_call(store, rank, size, timeout_s)
        except PeerLost as error:
            found[rank] = error.message

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_who_come_know_each_other(monkeypatch):
    found = called([0, 1, 2], 3, monkeypatch)
    assert [[name.node for name in found[rank]] for rank in range(3)] == [[0, 1, 2]] * 3


def test_ranks_that_do_not_come_are_named_by_all_others(monkeypatch):
    found = called([0, 2], 4, monkeypatch, timeout_s=0.5)
    wanted = "preflight: rank 1 (node 1), rank 3 (node 3) did not come in 0.5 s; 2 of 4 are there"
    assert found == {0: wanted, 2: wanted}


def test_a_missing_first_rank_is_named(monkeypatch):
    monkeypatch.setattr(rollcall, "CONNECT_S", 0.2)
    found = called([1], 2, monkeypatch, timeout_s=0.2)
    assert "rank 0 (node 0) did not come" in found[1]


def test_a_rank_that_nobody_reaches_is_told_to_all(monkeypatch):
    monkeypatch.setattr(rollcall, "CONNECT_S", 0.3)
    own = rollcall._reaches
    first = {}

    def reaches(place):
        first.setdefault("place", place)
        return False if place == first["place"] else own(place)

    monkeypatch.setattr(rollcall, "_reaches", reaches)
    found = called([0, 1, 2], 3, monkeypatch)
    assert len(set(found.values())) == 1
    assert "is cut off from the others" in found[0]


def test_of_two_ranks_both_are_named():
    said = verdict({0: [1], 1: []}, [], names(0, 1))
    assert said == "preflight: rank 0 (node 0, host-0) does not reach rank 1 (node 1, host-1)"


def test_a_node_is_cut_off_only_if_all_that_is_broken_is_its_own():
    four = names(0, 0, 1, 2)
    assert "node 1 (host-1) with rank 2 is cut off" in verdict({0: [2], 1: [2], 2: [0, 1, 3], 3: [2]}, [], four)
    assert "does not reach" in verdict({0: [2], 1: [3]}, [], four)
    assert "rank 3 (node 2, host-2) came and then fell silent" in verdict({0: [3]}, [3], four)
    assert verdict({0: [], 1: []}, [], four) == ""


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 16, 33])
def test_pairs_of_a_round_have_no_rank_in_common(size):
    rounds = preflight.pairs_by_round(size)
    for pairs in rounds:
        members = list(chain.from_iterable(pairs))
        assert len(members) == len(set(members))
    every = {frozenset(pair) for pairs in rounds for pair in pairs}
    if size <= preflight.ALL_PAIRS:
        assert every == {frozenset(pair) for pair in combinations(range(size), 2)}
    else:
        assert every == {frozenset((rank, (rank + 1) % size)) for rank in range(size)}
        assert len(rounds) <= 3


def speeds(size, slow=()):
    """All pairs; those of a slow rank, and slow pairs, at a tenth."""
    found = {}
    for pair in combinations(range(size), 2):
        found[pair] = SLOW if pair in slow or set(pair) & {each for each in slow if isinstance(each, int)} else FAST
    return found


def test_a_slow_rank_is_named_and_not_those_who_talk_to_it():
    assert preflight.slow(speeds(3, [2]), names(0, 1, 2)) == ([2], [])
    assert preflight.slow(speeds(4, [0]), names(0, 1, 2, 3)) == ([0], [])


def test_a_slow_pair_of_two_good_ranks_is_named_as_such():
    assert preflight.slow(speeds(4, [(1, 3)]), names(0, 1, 2, 3)) == ([], [(1, 3)])


def test_the_network_is_not_slow_because_a_node_is_faster_within():
    two = names(0, 0, 1, 1)
    found = {pair: FAST if two[pair[0]].node == two[pair[1]].node else SLOW for pair in combinations(range(4), 2)}
    assert preflight.slow(found, two) == ([], [])


def test_of_two_ranks_neither_is_slow():
    assert preflight.slow({(0, 1): 1.0}, names(0, 1)) == ([], [])


def test_a_whole_node_is_named_and_the_slowest_pairs_come_first():
    four = names(0, 1, 2, 2)
    found = {**speeds(4, [2, 3]), (2, 3): FAST * 10}
    lines = preflight.report(found, four)
    assert "node 2 (host-2) is slow" in lines[-1]
    values = [float(line.split()[0]) for line in lines if line.startswith("  ")]
    assert values == sorted(values)
    assert len(values) == 6


def test_of_many_ranks_only_the_slowest_pairs_are_shown():
    ring = {(rank, (rank + 1) % 64): FAST for rank in range(64)}
    lines = preflight.report({**ring, (7, 8): SLOW, (8, 9): SLOW}, names(*range(64)))
    assert "7" in lines[1]
    assert "8" in lines[1]
    assert f"{64 - preflight.LINES} more; the median is 10" in lines[-2]
    assert "node 8 (host-8) is slow" in lines[-1]


def test_a_dead_rank_is_named_and_not_those_who_waited_for_it():
    three = names(0, 1, 2)
    assert preflight.dead({(0, 1): FAST, (0, 2): 0.0, (1, 2): 0.0}, [], three).endswith("rank 2 (node 2, host-2)")
    assert preflight.dead({(0, 1): FAST, (0, 2): 0.0, (1, 2): 0.0}, [2], three).endswith("rank 2 (node 2, host-2)")
    assert "between rank 0" in preflight.dead({(0, 1): 0.0}, [], names(0, 1))
    assert preflight.dead(speeds(3), [], three) == ""


def test_the_environment_counts_before_the_configuration():
    nccl = Nccl(ib_hca="mlx5", debug="INFO", algo="Ring", ib_disable=True)
    environment = {"NCCL_DEBUG": "WARN", "NCCL_IB_DISABLE": "0"}
    network.set_variables(nccl, environment)
    assert environment == {"NCCL_DEBUG": "WARN", "NCCL_IB_DISABLE": "0", "NCCL_IB_HCA": "mlx5", "NCCL_ALGO": "Ring"}


def test_nothing_is_set_that_is_not_asked_for():
    environment: dict[str, str] = {}
    network.set_variables(Params().parallel.nccl, environment)
    assert environment == {}


def test_gloo_gets_the_whole_name_of_an_interface():
    environment: dict[str, str] = {}
    network.set_variables(Nccl(socket_ifname="=lo"), environment)
    assert environment == {"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.parametrize(
    ("pattern", "name"),
    {
        "eth": "eth0",
        "=eth1": "eth1",
        "^docker,lo": "eth0",
        "^=eth0": "docker0",
        "ib,eth1": "eth1",
        "^eth": "docker0",
    }.items(),
)
def test_interfaces_are_meant_as_nccl_means_them(pattern, name):
    assert network.interface(pattern, ["lo", "docker0", "eth0", "eth1"]) == name


@pytest.mark.parametrize("pattern", ["ib", "=eth", "^docker,eth,lo"])
def test_an_interface_that_is_not_there_is_told(pattern):
    with pytest.raises(ConfigError, match="docker0, eth0"):
        network.interface(pattern, ["lo", "docker0", "eth0"])


def test_little_shared_memory_is_told_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)
    place = tmp_path / "shm"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        said = network.shared_memory_is_small(4, place)
        assert "64 MiB are free" in said
        assert "emptyDir with medium: Memory" in said
        assert network.shared_memory_is_small(1, place) == ""
        monkeypatch.setenv("NCCL_SHM_DISABLE", "1")
        assert network.shared_memory_is_small(4, place) == ""
    finally:
        subprocess.run(["umount", place], check=True)
