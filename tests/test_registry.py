"""The champion's journal against a real MLflow database: killed at every call, raced, cut off, moved by hand."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nvr_tasks.artifacts import Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context
from nvr_tasks.registry import ChampionChangedError, Registry
from nvr_tasks.rollback import rollback
from nvr_tasks.tracking import PASSED_TAG, Tracking

MODEL = "retriever"
# Forked children start with mlflow imported, and each opens the database for itself.
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import all that a client needs, so that no child has to."""
    path = tmp_path_factory.mktemp("warm") / "mlflow.db"
    Tracking("e", f"sqlite:///{path}").client.search_registered_models()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, _warm: None) -> Path:
    """A database with a registered model of five versions."""
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"

    def make() -> None:
        client = Tracking("e", f"sqlite:///{path}").client
        client.create_registered_model(MODEL)
        for number in range(5):
            client.create_model_version(MODEL, source=f"s3://nowhere/{number}")

    in_child(make)
    return path


@pytest.fixture
def place(prepared: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the database."""
    (tmp_path / "mlflow.db").write_bytes(prepared.read_bytes())
    return tmp_path


def registry(place: Path) -> Registry:
    return Registry(Store(str(place / "artifacts")), Tracking("e", f"sqlite:///{place}/mlflow.db"), MODEL)


def in_child(function: Callable[..., Any], *arguments: Any, killed: bool = False) -> Any:
    """What a function returns in a process of its own (as JSON); with `killed`, whether it was killed."""
    reading, writing = os.pipe()

    def run() -> None:
        os.close(reading)
        try:
            answer = {"value": function(*arguments)}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        with os.fdopen(writing, "w") as file:
            json.dump(answer, file)

    child = FORK.Process(target=run)
    child.start()
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    child.join()
    if killed:
        return child.exitcode == -signal.SIGKILL
    answer = json.loads(text)
    assert "error" not in answer, answer["trace"]
    return answer["value"]


def aliases(found: Registry) -> dict[str, str]:
    given = found.tracking.client.get_registered_model(MODEL).aliases
    return {name: str(version) for name, version in given.items()}


def promote(place: Path, target: str, expected: str | None, decision: str | None = "file:///d") -> str | None:
    return registry(place).move("promote", target, expected, who="me", why="better", decision=decision).champion


def state(place: Path) -> dict[str, Any]:
    """After the next run has looked: aliases, tags, moves."""
    found = registry(place)
    champion = found.champion()
    return {
        "aliases": aliases(found),
        "tags": None if champion is None else dict(champion.tags),
        "moves": [(m.number, m.action, m.source, m.target, m.champion, m.closed) for m in found.history()],
    }


def test_first_second_and_back(place: Path) -> None:
    def story() -> dict[str, Any]:
        found = registry(place)
        assert found.champion() is None
        found.tracking.point(MODEL, "challenger", "1")
        promote(place, "1", None)
        assert aliases(found) == {"champion": "1"}
        promote(place, "2", "1", "file:///decision/2")
        promote(place, "2", "1")  # again: nothing happens
        with pytest.raises(ChampionChangedError, match="is version 2 now, not version 1"):
            promote(place, "3", "1")
        found.move("rollback", "1", "2", who="ann", why="worse on Mondays")
        return state(place)

    told = in_child(story)
    assert told["aliases"] == {"champion": "1", "previous": "2"}
    assert told["moves"] == [
        [1, "promote", None, "1", "1", True],
        [2, "promote", "1", "2", "2", True],
        [3, "rollback", "2", "1", "1", True],
    ]
    assert told["tags"][PASSED_TAG] == "file:///d"
    assert told["tags"]["nvr.promoted_by"] == "ann"


def killed_before_call(number: int) -> None:
    """Let this process die right before its n-th write to MLflow's registry or to the store; reads change nothing."""
    import mlflow

    from nvr_tasks.storage import LocalStorage

    made = iter(range(1, sys.maxsize))

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            if next(made) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapper

    for name in dir(mlflow.MlflowClient):
        if name.startswith(("set_", "delete_", "create_")) and ("model_version" in name or "registered_model" in name):
            setattr(mlflow.MlflowClient, name, counted(getattr(mlflow.MlflowClient, name)))
    LocalStorage.put_bytes = counted(LocalStorage.put_bytes)  # type: ignore[method-assign]


def killed_everywhere(place: Path, act: Callable[[Path], Any]) -> Iterator[Path]:
    """Copies of a place, in each of which a process died a write later than in the one before, until it lives to the end."""
    database, journal = (place / "mlflow.db").read_bytes(), place / "artifacts"
    for number in itertools.count(1):
        again = place / f"kill-{number}"
        again.mkdir()
        (again / "mlflow.db").write_bytes(database)
        for file in journal.rglob("*.json"):
            target = again / "artifacts" / file.relative_to(journal)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())

        def run(number: int = number, again: Path = again) -> None:
            killed_before_call(number)
            act(again)

        if not in_child(run, killed=True):
            assert number > 8
            return
        yield again


def next_run(place: Path) -> list[Any]:
    """What a reader sees at once, what the next run sees, and what becomes of the killed task's retry."""
    at_once = aliases(registry(place)).get("champion")
    told = state(place)
    became = promote(place, "2", "1", "file:///decision/2")
    return [at_once, told, became, len(registry(place).history())]


def test_killed_before_any_write_the_next_run_is_consistent(place: Path) -> None:
    in_child(promote, place, "1", None, "file:///decision/1")
    in_child(lambda: registry(place).tracking.point(MODEL, "challenger", "2"))
    outcomes = []
    for again in killed_everywhere(place, lambda there: promote(there, "2", "1", "file:///decision/2")):
        at_once, told, became, moves = in_child(next_run, again)
        assert at_once in ("1", "2")  # never none
        champion = told["aliases"]["champion"]
        if len(told["moves"]) == 1:  # the intent was not written: as if it had never begun
            assert told["aliases"] == {"champion": "1", "challenger": "2"}
        else:
            assert told["moves"][1] == [2, "promote", "1", "2", "2", True]
            assert told["aliases"] == {"champion": "2", "previous": "1"}
            assert told["tags"]["nvr.decision"] == "file:///decision/2"
        assert (became, moves) == ("2", 2)
        outcomes.append(champion)
    assert outcomes == sorted(outcomes)  # once past the intent, never back
    assert {"1", "2"} <= set(outcomes)


@pytest.fixture
def go_back(tiny_recipe: Callable[..., Recipe]) -> Callable[..., str | None]:
    """Roll back to `previous`, by hand or for a pipeline run."""
    recipe = tiny_recipe("register.model_name=" + MODEL)

    def go(place: Path, run: str | None) -> str | None:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}/mlflow.db"  # of a child
        return rollback(Context(recipe, Store(str(place / "artifacts")), run), "previous", "worse on Mondays").champion

    return go


@pytest.mark.parametrize("run", ["scheduled__1", None])
def test_a_rollback_killed_before_any_write_is_done_once(
    place: Path, run: str | None, go_back: Callable[..., str | None]
) -> None:
    in_child(promote, place, "1", None, "file:///decision/1")
    in_child(promote, place, "2", "1", "file:///decision/2")

    def tried_again(there: Path) -> list[Any]:
        became = []
        for _ in range(2):
            try:
                became.append(go_back(there, run))
            except NvrError as error:
                became.append(str(error))
        return [became, state(there)]

    for again in killed_everywhere(place, lambda there: go_back(there, run)):
        (first, second), told = in_child(tried_again, again)
        assert told["moves"][2:] == [[3, "rollback", "2", "1", "1", True]]
        assert told["aliases"] == {"champion": "1", "previous": "2"}
        assert first == "1"
        assert second == "1" if run else "--to 2 --reason WHY" in second  # typed twice: asked which version is meant


def test_a_rollback_killed_before_any_write_survives_that_the_bad_version_is_deleted(
    place: Path, go_back: Callable[..., str | None]
) -> None:
    in_child(promote, place, "1", None, "file:///decision/1")
    in_child(promote, place, "2", "1", "file:///decision/2")

    def tried_again(there: Path) -> list[Any]:
        registry(there).tracking.client.delete_model_version(MODEL, "2")
        state(there)  # whoever looks is not stopped
        try:
            became = go_back(there, "scheduled__1")
        except NvrError as error:  # its alias went with the champion before the intent was written or carried out
            became = str(error)
        return [became, state(there)]

    outcomes = []
    for again in killed_everywhere(place, lambda there: go_back(there, "scheduled__1")):
        became, told = in_child(tried_again, again)
        assert all(closed for *_, closed in told["moves"])
        assert (became == "1") == (told["aliases"].get("champion") == "1"), became
        assert became == "1" or "has no champion" in became
        outcomes.append(became == "1")
    assert outcomes == sorted(outcomes)
    assert {False, True} == set(outcomes)


def compete(place: Path, name: str, rounds: int, gate: Any, results: Any) -> None:
    """Each round both try to promote a version of their own over the champion that both have seen."""
    found = registry(place)
    won = 0
    for number in range(rounds):
        expected = str(found.champion().version)
        target = str(2 + 2 * (number % 2) + (name == "b"))  # a: 2, 4, 2, …; b: 3, 5, 3, …
        gate.wait()
        try:
            found.move("promote", target, expected, who=name, why=f"round {number}")
            won += 1
        except ChampionChangedError:
            pass
        gate.wait()
    results.put((name, won))


def test_two_processes_promoting_at_once_leave_one_champion_and_a_whole_history(place: Path) -> None:
    rounds = 50
    in_child(promote, place, "1", None)
    in_child(lambda: registry(place).tracking.client.create_model_version(MODEL, source="s3://nowhere/6") and None)
    gate, results = FORK.Barrier(2, timeout=120), FORK.Queue()
    both = [FORK.Process(target=compete, args=(place, name, rounds, gate, results)) for name in ("a", "b")]
    for process in both:
        process.start()
    won = dict(results.get(timeout=300) for _ in both)
    for process in both:
        process.join()
        assert process.exitcode == 0
    told = in_child(state, place)
    assert won["a"] + won["b"] == rounds, won  # one winner a round
    assert min(won.values()) > 0, won  # and not always the same
    assert len(told["moves"]) == rounds + 1
    champion = None
    for number, (at, _, source, target, became, closed) in enumerate(told["moves"], 1):
        assert (at, source, became, closed) == (number, champion, target, True)
        champion = target
    assert told["aliases"]["champion"] == champion
    assert told["aliases"]["previous"] == told["moves"][-1][2]


def test_an_unreachable_registry_loses_nothing(place: Path) -> None:
    def story() -> list[Any]:
        from mlflow.exceptions import MlflowException

        promote(place, "1", None)
        found = registry(place)
        real = found.tracking.client.set_registered_model_alias

        def down(*_: Any) -> None:
            raise MlflowException("API request to http://127.0.0.1:1/api failed: Connection refused")

        found.tracking.client.set_registered_model_alias = down
        with pytest.raises(NvrError, match=r"cannot use MLflow at .*is it up"):
            found.move("promote", "2", "1", who="me", why="better")
        assert aliases(found)["champion"] == "1"
        assert [m.closed for m in found.history()] == [True, False]
        found.tracking.client.set_registered_model_alias = real
        assert str(found.champion().version) == "2"
        return [m.closed for m in found.history()]

    assert in_child(story) == [True, True]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://name:secret@127.0.0.1:9", "Connection refused"),
        (
            "http://nowhere.invalid:5000",
            r"(Name or service not known|Temporary failure in name resolution|No address associated with hostname)",
        ),
    ],
)
def test_an_mlflow_that_cannot_be_reached_is_told_in_one_clause(
    url: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def story() -> str:
        with pytest.raises(NvrError) as raised:
            Tracking("e", url).alias(MODEL, "champion")
        return str(raised.value)

    shown = url.replace("name:secret@", "")
    assert re.fullmatch(rf"cannot use MLflow at {re.escape(shown)} \({why}\): is it up, and are .*", in_child(story))


def test_an_alias_that_was_moved_by_hand_is_taken_note_of(place: Path) -> None:
    def story() -> dict[str, Any]:
        found = registry(place)
        found.tracking.point(MODEL, "champion", "4")  # before there was a journal
        assert str(found.champion().version) == "4"
        promote(place, "2", "4")
        found.tracking.point(MODEL, "champion", "3")
        with pytest.raises(ChampionChangedError):
            promote(place, "1", "2")
        found.tracking.client.delete_registered_model_alias(MODEL, "champion")
        return state(place)

    told = in_child(story)
    assert told["moves"] == [
        [1, "found", None, "4", "4", True],
        [2, "promote", "4", "2", "2", True],
        [3, "found", "2", "3", "3", True],
        [4, "found", "3", None, None, True],
    ]


def test_an_intent_whose_version_was_deleted_is_given_up(place: Path) -> None:
    def story() -> dict[str, Any]:
        promote(place, "1", None)
        found = registry(place)
        folder = found._folder()
        found._append(folder, found._entry(found.settle(), "promote", "9", "me", "better", None))
        return state(place)

    told = in_child(story)
    assert told["moves"][1] == [2, "promote", "1", "9", "1", True]
    assert told["aliases"]["champion"] == "1"


def test_a_move_can_be_finished_after_the_version_that_it_left_was_deleted(place: Path) -> None:
    """Its process died between the alias and the end of the entry."""

    def story() -> dict[str, Any]:
        promote(place, "1", None)
        found = registry(place)
        found._append(found._folder(), found._entry(found.settle(), "promote", "2", "me", "better", None))
        found.tracking.point(MODEL, "champion", "2")
        found.tracking.client.delete_model_version(MODEL, "1")
        return state(place)

    told = in_child(story)
    assert told["moves"][1] == [2, "promote", "1", "2", "2", True]
    assert told["aliases"] == {"champion": "2"}


def test_a_champion_that_went_and_came_back_is_not_the_one_that_was_seen(place: Path) -> None:
    def story() -> None:
        promote(place, "1", None)
        found = registry(place)
        seen = found.standing()
        promote(place, "2", "1")
        found.move("rollback", "1", "2", who="ann", why="worse on Mondays")
        with pytest.raises(ChampionChangedError, match="is version 1 again, but has moved meanwhile"):
            found.move("promote", "2", "1", who="me", why="better", after=seen.moves)
        assert found.move("promote", "2", "1", who="me", why="better", after=found.standing().moves).champion == "2"

    in_child(story)


def test_an_owner_that_may_be_alive_is_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVR_PROMOTION_LEASE_S", "1.5")

    def story() -> float:
        import time
        from dataclasses import replace

        promote(place, "1", None)
        found = registry(place)
        entry = found._entry(found.settle(), "promote", "2", "me", "better", None)
        found._append(found._folder(), replace(entry, owner="another-host:1:x"))
        clock = time.monotonic()
        assert str(found.champion().version) == "2"
        return time.monotonic() - clock

    assert in_child(story) >= 1.5


def test_a_process_that_slept_through_its_lease_cannot_bring_its_champion_back(place: Path) -> None:
    """It wakes right at the move of the alias: others have finished its entry and gone on."""

    def story() -> dict[str, Any]:
        promote(place, "1", None)
        sleeper = registry(place)
        point = sleeper.tracking.point

        def late(name: str, alias: str, version: str) -> None:
            if alias == "champion" and not woken:
                woken.append(True)
                others = registry(place)
                others._working.clear()  # as another process sees it, once the lease is over
                assert str(others.champion().version) == "2"
                others.move("promote", "3", "2", who="other", why="better still")
            point(name, alias, version)

        woken: list[bool] = []
        sleeper.tracking.point = late  # type: ignore[method-assign]
        sleeper.move("promote", "2", "1", who="sleeper", why="better")
        assert woken
        return state(place)

    told = in_child(story)
    assert told["aliases"]["champion"] == "3"
    assert [m[3] for m in told["moves"]] == ["1", "2", "3"]
