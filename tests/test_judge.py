"""The judge against a real HTTP server on loopback that speaks the chat-completions API, and fails on demand."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nvr_tasks.errors import NvrError
from nvr_tasks.judge import FAILURES_IN_A_ROW, TRIES, Budget, Endpoint, Judge, read_grade
from nvr_tasks.storage import LocalStorage

SECRET = "sk-very-secret"
PLENTY = Budget(10_000, 10_000_000)


def answer(text: str, **usage: int) -> tuple[int, dict[str, str], bytes]:
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    if usage:
        body["usage"] = usage
    return 200, {}, json.dumps(body).encode()


class Server:
    """Grades a pair by the first digit in its passage, modulo 4; `faults` come first, one per request."""

    def __init__(self) -> None:
        self.faults: list[tuple[int, dict[str, str], bytes] | Callable[[], tuple[int, dict[str, str], bytes]]] = []
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = self.most_busy = 0
        self.pause = 0.0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.seen.append(given)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                    fault = outer.faults.pop(0) if outer.faults else None
                time.sleep(outer.pause)
                passage = given["messages"][1]["content"].split("<passage>")[1]
                grade = int(re.findall(r"\d", passage)[0]) % 4
                status, headers, body = (fault() if callable(fault) else fault) or answer(
                    f'{{"grade": {grade}}}', prompt_tokens=90, completion_tokens=10, total_tokens=100
                )
                with outer.lock:
                    outer.busy -= 1
                if self.path != "/v1/chat/completions":
                    status = 404
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()


@pytest.fixture
def server() -> Iterator[Server]:
    it = Server()
    yield it
    it.http.shutdown()
    it.http.server_close()
    it.thread.join()


class World:
    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.storage = server, LocalStorage(folder)
        self.pauses: list[float] = []

    def judge(self, budget: Budget = PLENTY, concurrency: int = 1, timeout_s: float = 10.0) -> Judge:
        endpoint = Endpoint(self.server.url, "m", SECRET)
        return Judge(endpoint, self.storage, budget, concurrency, timeout_s, self.pauses.append)


@pytest.fixture
def world(server: Server, tmp_path: Path) -> World:
    return World(server, tmp_path)


PAIRS = [(f"q{i}", f"grade {i % 4}") for i in range(12)]


def test_grades_come_back_in_order_and_are_asked_for_once(world: World) -> None:
    first = world.judge(concurrency=3).grade([*PAIRS, PAIRS[0]])
    assert first.grades == [*(i % 4 for i in range(12)), 0]
    assert (first.calls, first.tokens, first.cached) == (12, 1200, 0)
    assert all(g["temperature"] == 0 and g["model"] == "m" for g in world.server.seen)
    assert set(world.server.keys) == {f"Bearer {SECRET}"}
    again = world.judge().grade(PAIRS)
    assert (again.grades, again.calls, again.tokens, again.cached) == (first.grades[:12], 0, 0, 12)
    assert len(world.server.seen) == 12
    other = Judge(Endpoint(world.server.url, "m2"), world.storage, PLENTY, sleep=world.pauses.append).grade(PAIRS[:1])
    assert other.cached == 0, "another model's answers are no answers of this one"


def test_busy_and_broken_servers_are_asked_again_later(world: World) -> None:
    world.server.faults = [
        (429, {"Retry-After": "7"}, b"slow down"),
        (500, {}, b""),
        (503, {}, b"x"),
        (200, {}, b"<html>"),
    ]
    found = world.judge().grade(PAIRS[:1])
    assert found.grades == [0]
    assert found.calls == 5, "every request counts"
    assert found.tokens == 100
    assert world.pauses == [7.0, 2.0, 4.0, 8.0]


def test_a_slow_answer_is_given_up(world: World) -> None:
    world.server.faults = [lambda: (time.sleep(0.6), answer('{"grade": 3}'))[1]]
    assert world.judge(timeout_s=0.2).grade([("q", "grade 1")]).grades == [1]
    assert world.pauses == [1.0]


def test_garbage_gets_a_second_chance_and_then_none(world: World) -> None:
    world.server.faults = [answer("I cannot say."), answer('Sure! ```json\n{"grade": 2}\n```')]
    assert world.judge().grade(PAIRS[:1]).grades == [2]
    world.server.faults = [answer("7"), answer("grade: 9")]
    found = world.judge().grade([("other", "grade 1")])
    assert (found.grades, found.unreadable) == ([None], 1)
    again = world.judge().grade([("other", "grade 1")])
    assert (again.grades, again.unreadable, again.calls) == ([None], 1, 0), "nothing is paid for twice"


def test_the_budget_holds(world: World) -> None:
    found = world.judge(Budget(5, 10**9), concurrency=4).grade(PAIRS)
    assert (found.calls, found.unasked) == (5, 7)
    assert sum(g is not None for g in found.grades) == 5
    assert len(world.server.seen) == 5
    # Tokens: as many as could be needed are put aside before a request is sent.
    need = 2000
    few = world.judge(Budget(100, need)).grade([(f"x{i}", "grade 2") for i in range(50)])
    assert 0 < few.calls < 50
    assert few.tokens <= need
    assert few.unasked == 50 - few.calls
    silent = world.judge(Budget(100, need))
    world.server.faults = [answer('{"grade": 1}')] * 50  # a server that does not count
    uncounted = silent.grade([(f"y{i}", "grade 1") for i in range(50)])
    assert uncounted.tokens <= need
    assert uncounted.calls < few.calls


def test_no_more_requests_at_a_time_than_asked_for(world: World) -> None:
    world.server.pause = 0.05
    world.judge(concurrency=3).grade(PAIRS)
    assert 1 < world.server.most_busy <= 3


def test_a_refusal_ends_it_with_what_to_do_and_without_the_key(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world.server.faults = [(401, {}, f"bad key {SECRET}".encode())]
    with pytest.raises(
        NvrError, match=r"answered status 401: check NVR_JUDGE_URL, NVR_JUDGE_MODEL and NVR_JUDGE_API_KEY"
    ) as raised:
        world.judge().grade(PAIRS)
    assert len(world.server.seen) == 1
    assert SECRET not in str(raised.value) + caplog.text + repr(world.judge().endpoint)
    for file in world.storage.root.rglob("*"):
        assert file.is_dir() or SECRET not in file.read_text()


def test_a_server_that_stays_down_ends_it_and_keeps_what_was_answered(world: World) -> None:
    down = [(503, {}, b"")] * (FAILURES_IN_A_ROW * TRIES)
    world.server.faults = [answer('{"grade": 3}'), *down]
    with pytest.raises(NvrError, match="8 pairs in a row got no answer"):
        world.judge().grade(PAIRS)
    world.server.faults = []
    assert world.judge().grade(PAIRS).cached == 1


def test_redirects_are_not_followed(world: World) -> None:
    world.server.faults = [(302, {"Location": "http://127.0.0.1:9/"}, b"")]
    with pytest.raises(NvrError, match="status 302"):
        world.judge().grade(PAIRS[:1])


def test_a_damaged_record_is_asked_for_again(world: World) -> None:
    world.judge().grade(PAIRS[:1])
    [file] = world.storage.root.rglob("*.json")
    file.write_text('{"grade": 17}')
    assert world.judge().grade(PAIRS[:1]).calls == 1


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ('{"grade": 2}', 2),
        ('<think>maybe {"grade": 1}?</think> {"grade": 3}', 3),
        ("{'grade': '0'}", 0),
        ("Grade: 1", 1),
        ("2", 2),
        (" 3.\n", 3),
        ("", None),
        ('{"grade": 4}', None),
        ('{"grade": 2.5}', None),
        ("it is 2 of 3", None),
    ],
)
def test_reading_grades(text: str, grade: int | None) -> None:
    assert read_grade(text) == grade


def test_the_endpoint_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVR_JUDGE_URL", "NVR_JUDGE_MODEL", "NVR_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert Endpoint.from_environment() is None
    monkeypatch.setenv("NVR_JUDGE_URL", "http://host:8000/v1/")
    with pytest.raises(NvrError, match="NVR_JUDGE_URL is set but NVR_JUDGE_MODEL is not"):
        Endpoint.from_environment()
    monkeypatch.setenv("NVR_JUDGE_MODEL", "m")
    monkeypatch.setenv("NVR_JUDGE_API_KEY", SECRET)
    found = Endpoint.from_environment()
    assert found == Endpoint("http://host:8000/v1", "m", SECRET)
    assert SECRET not in repr(found) + json.dumps(found.identity)
    for wrong in ("host:8000", "ftp://host", "http://user:pw@host/v1", "http://host/v1?key=x"):
        monkeypatch.setenv("NVR_JUDGE_URL", wrong)
        with pytest.raises(NvrError, match="is not the base URL") as raised:
            Endpoint.from_environment()
        assert "pw" not in str(raised.value)
