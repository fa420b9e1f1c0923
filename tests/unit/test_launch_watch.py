"""Watches against a real HTTP server that ends, breaks, refuses and forgets: nothing may be lost, and nothing said twice."""

import queue
import threading
import time

import pytest

from components.launch.access import Login
from components.launch.api import Api, ApiError, Stop
from components.launch.watch import Mirror, watch
from tests.api_server import ApiServer, drops, event, listed, pod, promises_more, refuses, sends


def client(server):
    return Api(lambda: Login(server.url, "ns", lambda: ""))


def told(server, number, **options):
    """The first changes, as (type, name, version)."""
    stop = Stop()
    found = []
    for change, item in watch(client(server), "Pod", stop=stop, **options):
        meta = item.get("metadata", {})
        found.append((change, meta.get("name"), meta.get("resourceVersion")))
        if len(found) == number:
            break
    stop.set()
    return found


def versions(server):
    """From which version each watch went on; "" for lists."""
    return [each.query.get("resourceVersion", "") for each in server.asked]


SYNCED = ("SYNCED", None, None)


def test_first_what_there_is_and_then_what_changes():
    with ApiServer(listed("5", pod("a", "3"))) as server:
        changes = [
            event("ADDED", pod("b", "6")),
            event("MODIFIED", pod("a", "7")),
            event("DELETED", pod("a", "8")),
        ]
        server.answers.append(server.streams(*changes))
        assert told(server, 5, label_selector="x=y") == [
            ("ADDED", "a", "3"), SYNCED, ("ADDED", "b", "6"), ("MODIFIED", "a", "7"), ("DELETED", "a", "8"),
        ]  # fmt: skip
    first, second = (each.query for each in server.asked)
    assert first["labelSelector"] == second["labelSelector"] == "x=y"
    assert second["resourceVersion"] == "5"
    assert (second["watch"], second["allowWatchBookmarks"]) == ("true", "true")
    assert 200 < int(second["timeoutSeconds"]) <= 290


def test_an_event_may_come_in_any_pieces():
    big = event("ADDED", pod("b", "6", data="ä" * 500_000))
    with ApiServer(listed("5")) as server:
        server.answers.append(server.streams(big[:10], big[10:100_001], big[100_001:] + event("ADDED", pod("c", "7"))))
        assert told(server, 3) == [SYNCED, ("ADDED", "b", "6"), ("ADDED", "c", "7")]


def test_a_connection_that_ends_goes_on_at_the_newest_version():
    with ApiServer(listed("5", pod("a", "3"))) as server:
        server.answers += [
            server.streams(event("MODIFIED", pod("a", "6")), stay=False),
            server.streams(event("BOOKMARK", pod("", "90")), stay=False),
            server.streams(event("MODIFIED", pod("a", "91"))),
        ]
        assert told(server, 4) == [("ADDED", "a", "3"), SYNCED, ("MODIFIED", "a", "6"), ("MODIFIED", "a", "91")]
    assert versions(server) == ["", "5", "6", "90"]


def test_half_a_line_is_thrown_away_and_comes_whole_the_next_time():
    line = event("MODIFIED", pod("a", "6"))
    with ApiServer(listed("5", pod("a", "3"))) as server:
        server.answers += [
            server.streams(line[: len(line) // 2], stay=False),
            server.streams(line[:-1], stay=False),  # all of the JSON, but not the end of its line
            server.streams(line[:20], cut=True),
            server.streams(line, event("DELETED", pod("a", "7"))),
        ]
        assert told(server, 4)[2:] == [("MODIFIED", "a", "6"), ("DELETED", "a", "7")]
    assert versions(server) == ["", "5", "5", "5", "5"]


def gone(kind):
    """Two ways in which the server says that a version is too old."""
    status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
    if kind == "answer":
        return lambda server: refuses(410, "Expired")
    return lambda server: server.streams(event("ERROR", status), stay=False)


@pytest.mark.parametrize("kind", ["answer", "event"])
def test_after_410_only_the_difference_is_told(kind):
    before = [pod("same", "1"), pod("changed", "2"), pod("vanished", "3"), pod("again", "4", uid="one")]
    after = [pod("same", "1"), pod("changed", "8"), pod("again", "9", uid="two"), pod("fresh", "10")]
    with ApiServer(listed("5", *before)) as server:
        server.answers += [
            gone(kind)(server),
            listed("20", *after),
            server.streams(event("DELETED", pod("same", "21"))),
        ]
        found = told(server, 11)
    assert found[4] == SYNCED
    assert found[5:] == [
        ("DELETED", "vanished", "3"), ("DELETED", "again", "4"), ("MODIFIED", "changed", "8"), ("ADDED", "again", "9"),
        ("ADDED", "fresh", "10"), SYNCED,
    ]  # fmt: skip
    with ApiServer(listed("5", *before)) as server:
        server.answers += [
            gone(kind)(server),
            listed("20", *before),
            server.streams(event("DELETED", pod("same", "21"))),
        ]
        assert told(server, 7)[5:] == [SYNCED, ("DELETED", "same", "21")]
    assert versions(server) == ["", "5", "", "20"]


TROUBLE = {
    "busy": refuses(429, "TooManyRequests", Retry_After="1"),
    "internal": refuses(500, "InternalError"),
    "starting": sends(503, b"not JSON"),
    "dropped": drops,
    "cut": promises_more,
    "junk": sends(200, b'{"type": "ADDED"}\n'),
    "no-json": sends(200, b"<html>\n"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_survived_and_each_time_of_it_told_once(name):
    said = []
    with ApiServer(TROUBLE[name], listed("5", pod("a", "3")), *[TROUBLE[name]] * 2) as server:
        server.answers.append(server.streams(event("MODIFIED", pod("a", "6"))))
        assert told(server, 3, on_trouble=said.append) == [("ADDED", "a", "3"), SYNCED, ("MODIFIED", "a", "6")]
    assert versions(server)[-1] == "5"
    assert said[-1] == ""
    # The list's trouble, and that of two watches: two times of it where each was opened before it broke.
    times = 3 if name in ("cut", "junk", "no-json") else 2
    assert [bool(each) for each in said] == [True, False] * times


def test_a_server_that_is_stopped_in_the_middle_is_waited_for():
    with ApiServer(listed("5", pod("a", "3"))) as server:
        mirror = Mirror(client(server), "Pod", changes := queue.Queue())
        mirror.__enter__()
        assert mirror.synced.wait(10)
    changes.get(), changes.get()
    while not mirror.trouble:
        time.sleep(0.01)
    assert "does not answer" in mirror.trouble
    assert list(mirror.objects) == ["a"]
    back = ApiServer(port=server.port)
    back.answers.append(back.streams(event("MODIFIED", pod("a", "6"))))
    with back:
        found = changes.get(timeout=30)
        assert (found.type, found.object["metadata"]["resourceVersion"]) == ("MODIFIED", "6")
        assert mirror.trouble == ""
        mirror.close()
    assert back.asked[0].query["resourceVersion"] == "5"


def test_patience_has_an_end():
    with ApiServer() as server:
        api = client(server)
    with pytest.raises(ApiError, match="does not answer"):
        list(watch(api, "Pod", stop=Stop(), patience_s=0.5))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_patience_mends_is_an_error(status):
    with ApiServer(*[refuses(status, "Reason")] * 2) as server, pytest.raises(ApiError) as caught:
        list(watch(client(server), "Pod", stop=Stop()))
    assert caught.value.status == status


def test_a_server_that_drops_every_watch_is_not_asked_without_pause():
    with ApiServer(listed("5")) as server:
        server.answers += [server.streams(stay=False)] * 1000
        stop = Stop()
        timer = threading.Timer(2.0, stop.set)
        timer.start()
        assert [change for change, _ in watch(client(server), "Pod", stop=stop)] == ["SYNCED"]
        timer.join()
        # Without pause, there are several hundred.
        assert 2 <= len(server.asked) < 20


def test_a_watch_that_gets_nothing_asks_nothing_and_ends_at_once():
    with ApiServer(listed("5")) as server, Mirror(client(server), "Pod") as mirror:
        assert mirror.synced.wait(10)
        while len(server.asked) < 2:
            time.sleep(0.01)
        spent = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - spent < 0.1
        assert len(server.asked) == 2
        mirror.close()
        assert not mirror._thread.is_alive()


def test_a_mirror_holds_what_there_is():
    changes = queue.Queue()
    with ApiServer(listed("5", pod("a", "3"), pod("b", "4"))) as server:
        server.answers.append(server.streams(event("DELETED", pod("a", "6")), event("ADDED", pod("c", "7", x=1))))
        with Mirror(client(server), "Pod", changes, label_selector="l") as mirror:
            found = [changes.get(timeout=10) for _ in range(5)]
            assert mirror.objects == {"b": found[1].object, "c": found[4].object}
            assert found[4].object["x"] == 1
    assert [(each.kind, each.type) for each in found] == [
        ("Pod", "ADDED"), ("Pod", "ADDED"), ("Pod", "SYNCED"), ("Pod", "DELETED"), ("Pod", "ADDED"),
    ]  # fmt: skip


def test_a_mirror_says_why_it_ended():
    changes = queue.Queue()
    with (
        ApiServer(refuses(403, "Forbidden", "pods is forbidden")) as server,
        Mirror(client(server), "Pod", changes) as m,
    ):
        found = changes.get(timeout=10)
        assert found.type == "ERROR"
        assert "pods is forbidden" in found.error.message
        assert m.error is found.error
        assert not m.synced.is_set()


def test_a_mirror_that_breaks_says_so_however_it_broke():
    """Its thread would end in silence, and whoever waits for the changes would wait for ever."""
    asked = []

    def token():
        asked.append(1)
        if len(asked) > 1:
            raise OSError("no token")
        return ""

    changes = queue.Queue()
    with (
        ApiServer(listed("1", pod("a", "1"))) as server,
        Mirror(Api(lambda: Login(server.url, "ns", token)), "Pod", changes),
    ):
        kinds = [changes.get(timeout=10) for _ in range(3)]
    assert [each.type for each in kinds] == ["ADDED", "SYNCED", "ERROR"]
    assert "no token" in str(kinds[-1].error)
