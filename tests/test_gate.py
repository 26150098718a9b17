"""From evaluations to a verdict and a moved alias: real MLflow database, real artefacts, chosen scores."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvr_tasks.artifacts import Artifact, Identity, Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError
from nvr_tasks.evaluation import tiers
from nvr_tasks.pipeline import Context, StageResult, execute
from nvr_tasks.registry import Registry
from nvr_tasks.rollback import rollback
from nvr_tasks.stages import stage
from nvr_tasks.tracking import DIGEST_TAG, MODEL_TAG, Tracking

MODEL = "nv-retriever"
FAST = ("gate.resamples=999",)
QUERIES = 120
STUDENT = {"model": {"digest": "untrained"}}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracking("nv-retriever", f"sqlite:///{path}").client.search_registered_models()
    return path


class Place:
    """A store and a registry to which models come with chosen scores."""

    def __init__(self, store: Store, recipe: Callable[..., Recipe]) -> None:
        self.store, self.recipe = store, recipe
        self.tracking = Tracking("nv-retriever")
        benchmark = Identity("benchmark", 1, {})
        self.benchmark = store.publish(benchmark, lambda _: {"figures": {}}).uri
        self.base = self.evaluation({"student": STUDENT}, {"A": 0.1, "B": 0.1}, 0)

    def evaluation(
        self,
        model: Mapping[str, Any],
        means: Mapping[str, float],
        seed: int,
        queries: int = QUERIES,
        tasks: Sequence[str] | None = None,
    ) -> str:
        import pandas as pd

        config: dict[str, Any] = {"model": dict(model), "dtype": "float32", "mteb": "2"}
        if tasks is not None:
            config["tasks"] = tasks

        def write(folder: Path) -> dict[str, Any]:
            random, rows = np.random.default_rng(seed), []
            for task, mean in means.items():
                values = random.normal(0, 0.1, queries)
                for number, value in enumerate(mean + values - values.mean()):
                    rows += [(task, f"q{number:03}", metric, value) for metric in ("ndcg_at_10", "recall_at_100")]
            table = pd.DataFrame(rows, columns=["task", "query_id", "metric", "value"])
            table.to_parquet(folder / "per_query.parquet", index=False)
            mean = sum(means.values()) / len(means)
            return {
                "scores": {task: {"ndcg_at_10": value} for task, value in means.items()},
                "aggregates": {},
                "mean": {"ndcg_at_10": mean, "recall_at_100": mean},
            }

        return self.store.publish(Identity("evaluation", 1, config, {"benchmark": self.benchmark}), write).uri

    def model(self, number: int, means: Mapping[str, float], queries: int = QUERIES) -> dict[str, list[str]]:
        """Register a model with these scores; the gate's inputs for it."""
        digest = f"digest-{number}"
        model = self.store.publish(
            Identity("model", 1, {"number": number, "student": STUDENT}),
            lambda _: {"digest": digest, "figures": {"dev nDCG@10": 0.5}},
        )
        client = self.tracking.client
        if self.tracking.created(MODEL) is None:
            client.create_registered_model(MODEL)
        version = client.create_model_version(
            MODEL, source=f"s3://nowhere/{number}", tags={DIGEST_TAG: digest, MODEL_TAG: model.uri}
        )
        record = {"name": MODEL, "version": str(version.version), "run_id": "r", "digest": digest}
        record["model"] = model.manifest.fingerprint

        def write(folder: Path) -> dict[str, Any]:
            (folder / "registration.json").write_text(json.dumps(record))
            return {}

        registration = self.store.publish(Identity("registration", 1, {}, {"model": model.uri}), write)
        return {
            "registration": [registration.uri],
            "evaluation": [self.evaluation({"digest": digest}, means, number, queries)],
            "evaluation_base": [self.base],
            "evaluation_champion": [],
            "screening": [],
        }

    def context(self, *overrides: str, run: str | None = None, **options: str) -> Context:
        return Context(self.recipe(*FAST, *overrides), self.store, run, options)

    def gate(self, inputs: dict[str, list[str]], *overrides: str, **options: str) -> StageResult:
        return execute(stage("gate"), self.context(*overrides, **options), inputs)

    def decision(self, result: StageResult) -> dict[str, Any]:
        return self.store.read_json(self.store.open(result.outputs["decision"][0]), "decision.json")

    def promote(self, decided: StageResult, *overrides: str, **options: str) -> StageResult:
        return execute(stage("promote"), self.context(*overrides, **options), {"decision": decided.outputs["decision"]})

    @property
    def champion(self) -> str | None:
        found = self.tracking.alias(MODEL, "champion")
        return None if found is None else str(found.version)

    @property
    def registry(self) -> Registry:
        return Registry(self.store, self.tracking, MODEL)


@pytest.fixture
def place(
    store: Store, tiny_recipe: Callable[..., Recipe], database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    import mlflow

    (tmp_path / "mlflow.db").write_bytes(database.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield Place(store, tiny_recipe)
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


OLD, EQUAL, BETTER, WORSE = {"A": 0.5, "B": 0.4}, {"A": 0.5, "B": 0.4}, {"A": 0.56, "B": 0.44}, {"A": 0.44, "B": 0.36}
ONE_TASK_LOST = {"A": 0.7, "B": 0.37}


def test_promoted_held_and_promoted_again(place: Place) -> None:
    assert place.gate(place.model(1, OLD)).figures["promotion"] == "champion is version 1"
    for number, scores, held_by in (
        (2, EQUAL, ["gain over the champion"]),
        (3, WORSE, ["gain over the champion", "loss on A", "loss on B"]),
        (4, ONE_TASK_LOST, ["loss on B"]),
    ):
        result = place.gate(place.model(number, scores))
        assert result.figures["verdict"] == "hold"
        assert [c["name"] for c in result.figures["criteria"] if not c["passed"]] == held_by
        assert place.champion == "1"
    result = place.gate(place.model(5, BETTER))
    assert (result.figures["verdict"], place.champion) == ("promote", "5")
    assert [(m.action, m.source, m.target) for m in place.registry.history()] == [
        ("promote", None, "1"),
        ("promote", "1", "5"),
    ]
    decision = place.decision(result)
    assert decision["comparison"]["gain"] == pytest.approx(0.05)
    assert decision["comparison"]["low"] < 0.05 < decision["comparison"]["high"]
    assert {e["kind"] for e in decision["lineage"]} == {"benchmark", "evaluation", "model"}
    assert all(len(e["content"]) == 64 for e in decision["lineage"])
    version = place.tracking.version(MODEL, "5")
    assert version is not None
    assert version.tags["nvr.decision"] == version.tags["nvr.passed_gate"] == result.outputs["decision"][0]


def test_not_inferior_is_promoted_or_put_before_a_person(place: Place) -> None:
    place.gate(place.model(1, OLD))
    policy = ("gate.comparison=non_inferiority", "gate.non_inferiority_margin=0.02")
    careful = (*policy, "gate.approval=unless_superior")
    inputs = place.model(2, EQUAL)
    decided = place.gate(inputs, *careful, decide_only="1")
    assert decided.figures["verdict"] == "needs-approval"
    waiting = place.promote(decided, *careful)
    assert waiting.skipped is not None
    assert "--approved-by NAME" in waiting.skipped
    assert place.champion == "1"
    done = place.promote(decided, *careful, approved_by="ann", reason="fine by me")
    assert (done.skipped, place.champion) == (None, "2")
    last = place.registry.history()[-1]
    assert (last.who, last.why, last.decision) == ("ann", "approved: fine by me", decided.outputs["decision"][0])
    assert place.gate(place.model(3, EQUAL), *policy).figures["verdict"] == "promote"


def test_a_champion_that_changed_is_compared_with_anew(place: Place) -> None:
    place.gate(place.model(1, OLD))
    good, best = place.model(2, BETTER), place.model(3, {"A": 0.7, "B": 0.6})
    first, second = place.gate(good, decide_only="1"), place.gate(best, decide_only="1")
    assert place.promote(second).figures["champion"] == "3"
    beaten = place.promote(first)  # better than version 1, which it was compared with, but not than version 3
    assert beaten.skipped is not None
    assert "verdict hold (compared again, with version 3)" in beaten.skipped
    assert place.champion == "3"
    slow = place.gate(place.model(4, {"A": 0.8, "B": 0.7}), decide_only="1")
    rollback(place.context(), "previous", "a test")
    assert place.promote(slow).figures["champion"] == "4"  # compared again with version 1, and better
    assert [m.target for m in place.registry.history()] == ["1", "3", "1", "4"]


def test_an_approval_is_for_one_comparison_only(place: Place) -> None:
    place.gate(place.model(1, OLD))
    asked = place.gate(place.model(2, {"A": 0.8, "B": 0.7}), "gate.approval=always", decide_only="1")
    place.gate(place.model(3, BETTER))
    again = place.promote(asked, "gate.approval=always", approved_by="ann")
    assert again.skipped is not None
    assert "needs-approval (compared again, with version 3)" in again.skipped
    assert place.champion == "3"


def test_a_champion_without_scores_is_an_error_with_the_next_step(place: Place) -> None:
    place.gate(place.model(1, OLD))
    decided = place.gate(place.model(2, BETTER), decide_only="1")
    stranger = place.tracking.client.create_model_version(MODEL, source="s3://nowhere/x", tags={DIGEST_TAG: "other"})
    place.tracking.point(MODEL, "champion", str(stranger.version))
    with pytest.raises(NvrError, match="was never scored on this benchmark: run `nvr evaluate` and `nvr gate` again"):
        place.promote(decided)
    with pytest.raises(NvrError, match="run `nvr evaluate` again"):
        place.gate(place.model(4, BETTER))
    assert place.champion == str(stranger.version)
    assert place.registry.history()[-1].action == "found"


def test_too_few_queries_are_no_verdict(place: Place) -> None:
    result = place.gate(place.model(1, OLD), "gate.min_queries=121")
    assert result.figures["verdict"] == "hold"
    [reason] = [c["reason"] for c in result.figures["criteria"] if not c["passed"]]
    assert "A has 120, B has 120; a verdict needs at least 121 queries of each task" in reason


def test_rollback_wants_a_reason_and_a_version_that_passed(place: Place) -> None:
    ctx = place.context()
    with pytest.raises(NvrError, match="has no champion"):
        place.model(1, OLD)
        rollback(ctx, "previous", "why not")
    place.gate(place.model(2, OLD))
    with pytest.raises(NvrError, match="no version 'previous' to go back to"):
        rollback(ctx, "previous", "why not")
    place.gate(place.model(3, BETTER))
    with pytest.raises(NvrError, match="needs a reason"):
        rollback(ctx, "previous", " ")
    with pytest.raises(NvrError, match="no version '77'"):
        rollback(ctx, "77", "x")
    with pytest.raises(NvrError, match="version 1 of nv-retriever never passed a gate"):
        rollback(ctx, "1", "x")
    with pytest.raises(NvrError, match="is the champion already"):
        rollback(ctx, "3", "x")
    rollback(ctx, "previous", "worse on Mondays", by="ann")
    assert place.champion == "2"
    rollback(ctx, "1", "an emergency", force=True)
    assert place.champion == "1"
    told = [(m.action, m.target, m.why) for m in place.registry.history()[-2:]]
    assert told == [("rollback", "2", "worse on Mondays"), ("rollback", "1", "an emergency (forced)")]


def test_a_pipeline_run_rolls_back_once_however_often_it_tries(place: Place) -> None:
    for number, scores in ((1, OLD), (2, BETTER)):
        place.gate(place.model(number, scores))
    first = rollback(place.context(run="r1"), "previous", "worse on Mondays")
    assert rollback(place.context(run="r1"), "previous", "worse on Mondays") == first
    assert (place.champion, [m.target for m in place.registry.history()]) == ("1", ["1", "2", "1"])
    place.gate(place.model(3, {"A": 0.8, "B": 0.7}))
    assert rollback(place.context(run="r1"), "previous", "worse on Mondays") == first  # tried again after a week
    assert place.champion == "3"
    assert rollback(place.context(run="r2"), "previous", "another reason").target == "1"


def test_previous_never_leads_back_to_what_was_rolled_back_from(place: Place) -> None:
    for number, scores in ((1, OLD), (2, BETTER)):
        place.gate(place.model(number, scores))
    rollback(place.context(), "previous", "worse on Mondays", by="ann")
    for run in (None, "r2"):  # typed twice, or another run of the DAG
        with pytest.raises(NvrError, match=r"ann rolled back from \(move 3: worse on Mondays\).* --to 2 --reason WHY$"):
            rollback(place.context(run=run), "previous", "worse on Mondays")
    assert place.champion == "1"
    rollback(place.context(), "2", "it was the data")
    assert place.champion == "2"


@pytest.mark.parametrize("passed", [True, False])
def test_a_forced_rollback_is_undone_by_the_command_that_is_printed(
    place: Place, tiny_file: Path, capsys: pytest.CaptureFixture[str], passed: bool
) -> None:
    """Whether the champion that it left had passed a gate or not; plain `nvr rollback` refuses and prints the same."""
    from nvr_tasks import cli

    where = ["--recipe", str(tiny_file), "--root", place.store.root]
    place.model(1, OLD)
    inputs = place.model(2, BETTER)
    if passed:
        place.gate(inputs)
    else:
        place.tracking.point(MODEL, "champion", "2")
    assert cli.main(["rollback", *where, "--to", "1", "--force", "--reason", "an emergency"]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "to undo this: " in line)
    assert cli.main(["rollback", *where, "--reason", "it is over"]) == 1
    refused = capsys.readouterr().err
    command = told.split("to undo this: ")[1]
    assert f"name it: {command}" in refused
    assert "rolled back from" in refused
    assert ("--force" in command) != passed
    assert cli.main(["over" if word == "WHY" else word for word in shlex.split(command)[1:]]) == 0
    assert place.champion == "2"
    assert cli.main(["rollback", *where, "--to", "2", "--reason", "again"]) == 1
    assert "is the champion already, by move " in (said := capsys.readouterr().err)
    assert "over" in said
    assert "your reason is not recorded" in said


def test_a_rejection_is_on_record_and_told_to_whoever_approves_after_all(
    place: Place, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nvr_tasks import cli

    careful = "gate.approval=always"
    asked = place.gate(place.model(1, OLD), careful, decide_only="1")
    [uri] = asked.outputs["decision"]
    where = ["--recipe", str(tiny_file), "--root", place.store.root]
    promote = ["promote", *where, "--input", f"decision={uri}"]
    for _ in range(2):  # a task's next try makes no second record
        assert cli.main([*promote, "--rejected-by", "bob", "--reason", "not now"]) == 0
    version = place.tracking.version(MODEL, "1")
    assert version is not None
    kept = {name: value for name, value in version.tags.items() if name.startswith("nvr.rejected_")}
    assert kept.pop("nvr.rejected_at")
    assert kept == {"nvr.rejected_by": "bob", "nvr.rejected_reason": "not now", "nvr.rejected_decision": uri}
    assert (place.champion, place.registry.history()) == (None, [])
    capsys.readouterr()
    assert cli.main(["history", *where]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("reject – ↛ 1 bob", f"not now {uri}"):
        assert part in shown
    with pytest.raises(SystemExit) as usage:
        cli.main([*promote, "--approved-by", "bob", "--rejected-by", "bob"])
    assert usage.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
    assert cli.main([*promote, "--approved-by", "ann"]) == 0
    assert "bob rejected this version before" in capsys.readouterr().out
    assert (place.champion, place.registry.history()[-1].why) == ("1", "approved")  # no reason is no words about one
    assert cli.main([*promote, "--approved-by", "ann", "--reason", "late"]) == 0
    said = capsys.readouterr().out
    assert "version 1 is champion already, by move 1 (ann, " in said
    assert "nothing moved; your reason is not recorded" in said
    assert "champion already, so this is not recorded" in str(place.promote(asked, rejected_by="cid").skipped)
    assert cli.main(["history", *where, "--json"]) == 0
    moves = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(m["action"], m["number"], m["who"], m["champion"]) for m in moves] == [
        ("reject", None, "bob", None),
        ("promote", 1, "ann", "1"),
    ]


def test_what_a_killed_process_began_is_told_to_who_asks_for_it_again(
    place: Place, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nvr_tasks import cli

    def killed(action: str, target: str) -> None:
        found = place.registry
        found._append(found._folder(), found._entry(found.settle(), action, target, "ann", "so it began", None))

    place.gate(place.model(1, OLD))
    decided = place.gate(place.model(2, BETTER), decide_only="1")
    killed("promote", "2")
    [note] = place.promote(decided, approved_by="bob", reason="fine").figures["notes"]
    assert note.startswith("version 2 is champion already, by move 2 (ann, ")
    assert note.endswith("so it began): nothing moved; your reason is not recorded")
    killed("rollback", "1")
    assert cli.main(["rollback", "--recipe", str(tiny_file), "--root", place.store.root, "--reason", "worse"]) == 0
    said = capsys.readouterr().out
    assert "move 3 was begun before (ann: so it began); your reason is not recorded" in said
    assert place.champion == "1"


def test_an_approval_that_was_not_needed_is_on_record_too(place: Place) -> None:
    place.promote(place.gate(place.model(1, OLD), decide_only="1"), approved_by="bob", reason="looks fine")
    [move] = place.registry.history()
    assert move.why == "met every criterion of recipe tiny; approved by bob: looks fine"
    assert "@" in move.who


def test_what_was_rolled_back_from_comes_back_only_by_a_persons_word(place: Place) -> None:
    place.gate(place.model(1, OLD))
    inputs = place.model(2, BETTER)
    decided = place.gate(inputs, decide_only="1")
    place.promote(decided)
    rollback(place.context(), "previous", "worse on Mondays", by="ann")
    rerun = place.gate(inputs)  # nothing new
    assert (rerun.figures["verdict"], place.champion) == ("needs-approval", "1")
    [criterion] = [c for c in rerun.figures["criteria"] if not c["passed"]]
    assert criterion["name"] == "not rolled back from"
    assert "ann rolled back from this version (move 3" in criterion["reason"]
    for cleared in (
        place.promote(decided),
        place.promote(decided, approved_by="ann"),
    ):  # champion 1 again: not as before
        assert cleared.skipped is not None
        told = "(compared again, with version 1, which has moved and come back since): not rolled back from: ann"
        assert f"needs-approval {told}" in cleared.skipped
    assert place.champion == "1"
    assert place.promote(rerun, approved_by="bob", reason="mended").figures["champion"] == "2"
    assert place.registry.history()[-1].who == "bob"
    place.gate(place.model(3, {"A": 0.8, "B": 0.7}))
    rollback(place.context(), "previous", "back to version 2")
    assert place.registry.withdrawn("2") is None  # its last move was to the top
    assert place.registry.withdrawn("3") is not None


def test_an_old_approval_is_not_for_a_champion_that_came_back(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    careful = "gate.approval=always"
    place.gate(place.model(1, OLD))
    asked = place.gate(place.model(2, BETTER), careful, decide_only="1")
    place.promote(asked, careful, approved_by="ann")
    rollback(place.context(), "1", "worse on Mondays")
    replayed = place.promote(asked, careful, approved_by="ann")
    assert "it has moved and come back since: comparing again" in caplog.text
    assert replayed.skipped is not None
    assert "needs-approval (compared again" in replayed.skipped
    assert place.champion == "1"


def test_a_rejection_or_a_dry_run_stops_any_promotion(place: Place) -> None:
    challenger = place.model(1, OLD)
    decided = place.gate(challenger, decide_only="1")
    assert decided.figures["verdict"] == "promote"
    assert place.promote(decided, rejected_by="ann", reason="no!").skipped == "rejected by ann: no!"
    assert place.promote(decided, rejected_by="ann", approved_by="bob").skipped == "rejected by ann"
    overruled = str(place.promote(decided).skipped)
    assert "ann rejected this version before" in overruled, "a machine overrules nobody"
    assert "--approved-by NAME" in overruled
    anew = place.gate(challenger)  # as the next run does
    assert anew.figures["verdict"] == "needs-approval"
    assert [c["name"] for c in anew.figures["criteria"] if not c["passed"]] == ["not rejected"]
    assert place.champion is None
    assert "dry run" in str(place.promote(decided, "gate.promote=false").skipped)
    dry = place.gate(place.model(2, OLD), "gate.promote=false", decide_only="1")
    assert "dry run" in str(place.promote(dry).skipped)
    assert (place.champion, place.registry.history()) == (None, [])
    assert place.promote(anew, approved_by="bob").figures["champion"] == "1"
    place.gate(place.model(3, BETTER))
    rollback(place.context(), "1", "worse on Mondays")
    place.gate(place.model(4, BETTER))
    assert place.gate(challenger).figures["verdict"] == "hold", "it was champion since: nobody's no stands any more"


def test_a_decision_is_compared_again_by_its_own_policy(place: Place) -> None:
    place.gate(place.model(1, OLD))
    asked = place.gate(place.model(2, {"A": 0.8, "B": 0.7}), "gate.approval=always", decide_only="1")
    place.gate(place.model(3, BETTER))
    again = place.promote(asked, approved_by="ann")  # under a recipe that asks nobody
    assert "needs-approval (compared again, with version 3)" in str(again.skipped)
    assert place.champion == "3"


def test_the_command_that_is_printed_for_approval_works(
    place: Place, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nvr_tasks import cli

    inputs = [f"--input={role}={uri}" for role, uris in place.model(1, OLD).items() for uri in uris or [""]]
    where = ["--recipe", str(tiny_file), "--root", place.store.root]
    assert cli.main(["gate", *where, *inputs, "--set", "gate.approval=always", "--set", "gate.resamples=999"]) == 0
    said = capsys.readouterr().out
    told = shlex.split(said[said.index("nvr promote") :].splitlines()[0])
    assert told[: told.index("--input")] == ["nvr", "promote", "--root", place.store.root, "--recipe", str(tiny_file)]
    with pytest.raises(SystemExit):
        cli.main(["ann" if word == "NAME" else word for word in told[1:]] + ["--rejected-by", " "])
    assert place.champion is None
    assert cli.main(["ann" if word == "NAME" else word for word in told[1:]]) == 0
    assert place.champion == "1"


def test_scores_of_other_weights_or_from_elsewhere_are_refused(place: Place) -> None:
    place.gate(place.model(1, OLD))
    worse, better = place.model(2, WORSE), place.model(3, BETTER)
    with pytest.raises(NvrError, match="holds the scores of other weights than nv-retriever version 2"):
        place.gate({**worse, "evaluation": better["evaluation"]})
    with pytest.raises(
        NvrError, match="holds the scores of another model than nv-retriever version 3 was trained from"
    ):
        place.gate({**better, "evaluation_base": worse["evaluation"]})
    place.benchmark = place.store.publish(Identity("benchmark", 1, {"another": True}), lambda _: {"figures": {}}).uri
    elsewhere = place.evaluation({"student": STUDENT}, {"A": 0.1, "B": 0.1}, 0)
    with pytest.raises(NvrError, match="scored on other benchmarks or in other ways"):
        place.gate({**better, "evaluation_base": [elsewhere]})
    easy = place.evaluation({"digest": "digest-1"}, WORSE, 9)  # the champion's, on another benchmark
    decided = place.decision(place.gate({**better, "evaluation_champion": [easy]}, decide_only="1"))
    assert decided["evaluations"]["evaluation_champion"] not in easy
    assert place.champion == "1"


def test_what_is_scored_indexed_and_served_is_the_journals_champion(place: Place) -> None:
    """The alias lags behind a move whose process was killed."""
    from nvr_tasks import index
    from nvr_tasks.evaluation.subjects import subjects

    for look in (
        lambda: next(s.identity for s in subjects(place.context(model="champion"), {}))["digest"],
        lambda: index._champion(place.context()).tags[DIGEST_TAG],
    ):
        number = len(place.registry.history()) + 1
        place.model(number, OLD)
        found = place.registry
        found._append(found._folder(), found._entry(found.settle(), "promote", str(number), "me", "better", None))
        assert look() == f"digest-{number}"


def test_the_report_says_it_all_and_needs_no_network(place: Place) -> None:
    place.gate(place.model(1, OLD))
    result = place.gate(place.model(2, ONE_TASK_LOST), decide_only="1")
    artifact: Artifact = place.store.open(result.outputs["decision"][0])
    html = (place.store.fetch(artifact) / "report.html").read_text()
    for part in ("What would have to change", "loss on B", "challenger − champion", "would have been found", "Lineage"):
        assert part in html
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_the_report_escapes(place: Place) -> None:
    from nvr_tasks.report import decision_report

    decided = place.decision(place.gate(place.model(1, OLD), decide_only="1"))
    decided |= {"model": "m<script>", "recipe": "<b>r</b>"}
    html = decision_report(decided)
    assert "<script" not in html
    assert "&lt;b&gt;r&lt;/b&gt;" in html


QUICK = (
    "data.benchmark=[{task: A, official: false, origin: {type: beir, uri: a}}, {task: B, official: false, origin: {type: beir, uri: b}}]",
    "gate.quick={tasks: [A]}",
)


def screened(
    place: Place, number: int, means: Mapping[str, float], *, stopped: bool | None = None
) -> dict[str, list[str]]:
    """The gate's inputs for a model that was screened on task A against version 1; made to stop or not, if told."""
    found = tiers.screen(
        place.context(*QUICK).recipe.gate,
        {"A": chosen(means["A"], number)},
        {"A": chosen(OLD["A"], 1)},
        {},
    )
    if stopped is not None:
        found = replace(found, stopped=stopped)
    inputs = place.model(number, means)
    if found.stopped:  # then evaluations have the tasks of the tier alone
        inputs["evaluation"] = [
            place.evaluation({"digest": f"digest-{number}"}, {"A": means["A"]}, number, tasks=["A"])
        ]
        inputs["evaluation_base"] = [place.evaluation({"student": STUDENT}, {"A": 0.1}, 0, tasks=["A"])]
        inputs["evaluation_champion"] = [place.evaluation({"digest": "digest-1"}, {"A": OLD["A"]}, 1, tasks=["A"])]
    config = {
        "policy": tiers.tier_identity(place.context(*QUICK).recipe.gate),
        "models": {"challenger": {"digest": f"digest-{number}"}, "champion": {"digest": "digest-1"}},
        "number": number,
    }

    def write(folder: Path) -> dict[str, Any]:
        (folder / tiers.RECORD).write_text(json.dumps(asdict(found)))
        return {"stopped": found.stopped, "figures": {}}

    made = place.store.publish(Identity(tiers.KIND, 1, config, {"benchmark": place.benchmark}), write)
    return {**inputs, tiers.KIND: [made.uri]}


def chosen(mean: float, seed: int) -> dict[str, float]:
    values = np.random.default_rng(seed).normal(0, 0.1, QUERIES)
    return {f"q{n:03}": float(mean + v) for n, v in enumerate(values - values.mean())}


@pytest.fixture
def tiered(place: Place) -> Place:
    """A place whose benchmark has the tasks A and B, with version 1 as its champion."""
    tasks = {"tasks": {"A": {}, "B": {}}, "figures": {}}
    place.benchmark = place.store.publish(Identity("benchmark", 1, {"tiers": 2}), lambda _: tasks).uri
    place.base = place.evaluation({"student": STUDENT}, {"A": 0.1, "B": 0.1}, 0)
    place.gate(place.model(1, OLD))
    return place


def test_a_stop_of_the_quick_tier_is_a_hold_whatever_anybody_says(tiered: Place) -> None:
    result = tiered.gate(screened(tiered, 2, WORSE), *QUICK, decide_only="1")
    decision = tiered.decision(result)
    assert decision["verdict"] == "hold"
    assert [c["name"] for c in decision["criteria"]] == [
        "quick tier",
        "queries",
        "mean nDCG@10",
        "gain over the untrained base",
        "gain over the champion",
        "loss on A",
        "loss on B",
    ]
    assert [c["name"] for c in decision["criteria"] if c["looked_at"]] == ["quick tier"]
    reason = decision["criteria"][0]["reason"]
    for part in ("0.4400 over 120 queries of the quick tier", "-0.0600 against the champion", "one-sided bound -0.0"):
        assert part in reason
    assert {c["reason"] for c in decision["criteria"][1:]} == {"not looked at: the quick tier stopped"}
    for more in ({}, {"approved_by": "ann"}):
        told = tiered.promote(result, *QUICK, **more)
        assert str(told.skipped).startswith("verdict hold: quick tier: ")
        assert "not looked at" not in str(told.skipped)
    assert tiered.champion == "1"
    html = (tiered.store.fetch(tiered.store.open(result.outputs["decision"][0])) / "report.html").read_text()
    for part in ("The quick tier stopped this challenger", "Quick tier: stopped", "<td class=unknown>–</td>"):
        assert part in html


def test_a_quick_tier_that_goes_on_is_one_criterion_of_many(tiered: Place) -> None:
    result = tiered.gate(screened(tiered, 2, BETTER), *QUICK)
    criteria = result.figures["criteria"]
    assert (criteria[0]["name"], result.figures["verdict"], tiered.champion) == ("quick tier", "promote", "2")
    assert "worth scoring on the rest" in criteria[0]["reason"]
    assert [c["name"] for c in criteria if not c["passed"]] == []
    slower = tiered.gate(
        screened(tiered, 3, ONE_TASK_LOST, stopped=False), *QUICK
    )  # 0.535 in the mean, version 2 has 0.5
    assert [c["name"] for c in slower.figures["criteria"] if not c["passed"]] == ["loss on B"]


def test_comparing_again_keeps_what_the_quick_tier_said(tiered: Place) -> None:
    decided = tiered.gate(screened(tiered, 2, {"A": 0.8, "B": 0.7}), *QUICK, decide_only="1")
    tiered.gate(tiered.model(3, BETTER))
    done = tiered.promote(decided, *QUICK)
    assert (done.figures["champion"], tiered.champion) == ("2", "2")
    uri = tiered.registry.history()[-1].decision
    assert uri is not None
    first = tiered.store.read_json(tiered.store.open(uri), "decision.json")["criteria"][0]
    assert first["name"] == "quick tier"
    assert "against the champion of then, which has moved since" in first["reason"]
    assert "of then" not in decided.figures["criteria"][0]["reason"]


def test_scores_of_a_quick_tier_are_no_scores_of_the_whole(tiered: Place) -> None:
    stopped = screened(tiered, 2, WORSE)
    with pytest.raises(NvrError, match="holds the scores of A, but the verdict is about the whole benchmark: run"):
        tiered.gate({**stopped, "screening": []}, QUICK[0])  # a recipe without the tier
    with pytest.raises(NvrError, match="holds the scores of the whole benchmark, but the verdict is about A"):
        tiered.gate({**tiered.model(2, WORSE), "screening": stopped["screening"]}, *QUICK)
    better = screened(tiered, 4, BETTER)
    with pytest.raises(NvrError, match="is about other weights than nv-retriever version"):
        tiered.gate({**better, "screening": stopped["screening"]}, *QUICK)
    with pytest.raises(NvrError, match=r"was made by another policy than gate\.quick"):
        tiered.gate(better, QUICK[0], "gate.quick={tasks: [A], max_shortfall: 0.1}")
    with pytest.raises(NvrError, match="expected one input 'screening', got 0"):
        tiered.gate({**better, "screening": []}, *QUICK)
    assert tiered.champion == "1"


def test_a_stop_stands_when_the_champion_has_moved_since(tiered: Place) -> None:
    """The new one has no scores on the tier alone, and none are needed to hold."""
    stopped = screened(tiered, 2, WORSE)
    tiered.gate(tiered.model(3, BETTER))
    result = tiered.gate(stopped, *QUICK)
    assert (result.figures["verdict"], tiered.champion) == ("hold", "3")
    assert tiered.decision(result)["comparison"] is None


def test_history_and_rollback_by_hand(place: Place, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nvr_tasks import cli

    where = ["--recipe", str(tiny_file), "--root", place.store.root]
    assert cli.main(["history", *where]) == 0
    assert "never moved" in capsys.readouterr().out
    place.gate(place.model(1, OLD))
    place.gate(place.model(2, BETTER))
    assert cli.main(["rollback", *where, "--reason", "worse on Mondays", "--by", "ann"]) == 0
    assert "champion 1" in capsys.readouterr().out
    assert cli.main(["history", *where]) == 0
    shown = capsys.readouterr().out
    for part in ("–   → 1", "1   → 2", "2   → 1", "ann", "worse on Mondays", "/decision/"):
        assert part.replace("   ", " ") in " ".join(shown.split())
    assert cli.main(["history", *where, "--json"]) == 0
    moves = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(m["action"], m["champion"], m["who"] == "ann") for m in moves] == [
        ("promote", "1", False),
        ("promote", "2", False),
        ("rollback", "1", True),
    ]
    assert cli.main(["rollback", *where, "--to", "9", "--reason", "x"]) == 1
    assert "has no version '9'" in capsys.readouterr().err
