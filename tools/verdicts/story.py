"""Every verdict of the gate, on real models and data, through the real scheduler, MLflow and UI: `make verdicts`.

Starts the services of `make up` in a folder of their own, triggers runs of `nv_retriever_retrain` and
`nv_retriever_rollback` over REST, answers approvals as a person would, and checks verdicts, reasons, aliases and history.
Writes docs/gate.md and, where Playwright and Chromium are, the screenshots beside it. Needs NVR_DATA with scifact and
nfcorpus. State is kept in `.nvr/verdicts`: a second time, artefacts are reused in a new registered model.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from services import Services, WrongOutcomeError, expect

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools" / "bench"))
PAGE, PICTURES = REPOSITORY / "docs" / "gate.md", REPOSITORY / "docs" / "images"
RETRAIN, ROLLBACK = "nv_retriever_retrain", "nv_retriever_rollback"
APPROVAL_HOURS = 0.02  # of a question that nobody answers: 72 seconds
OVER_CHAMPION = "gain over the champion"
LOST, BETTER = "Wins on average, loses one task beyond the limit", "A better one"
STOPPED = "A worse one, stopped by the quick tier"
PERSON = "admin"

NFCORPUS_ONLY, SCIFACT_ONLY = "train.sources={nfcorpus: 1}", "train.sources={scifact: 1}"
STEPS = "train.steps=40"
CAREFUL = (
    "gate.comparison=non_inferiority",
    "gate.non_inferiority_margin=0.05",
    "gate.max_loss_per_task=0.08",
    "gate.approval=unless_superior",
)
EQUAL = (STEPS, "seed=18")


@dataclass(frozen=True)
class Scenario:
    """A run, and what has to come of it.

    Attributes:
        what: for people.
        overrides: of the recipe.
        verdict: the gate's.
        failed: criteria that must not be met; with `only`, all that are not.
        answer: to the question of task `approve`; None: nobody is asked, "": nobody answers.
        champion: whose version is champion afterwards, by `label`.
        label: name of this run's model in later scenarios.
        left_out: tasks that must not be scored.
        again: no new run: the gate of the last one is cleared, as a person does who wants it to ask again.
    """

    what: str
    overrides: Sequence[str]
    verdict: str
    champion: str
    label: str
    failed: Sequence[str] = ()
    only: bool = False
    answer: str | None = None
    why: str = ""
    left_out: Sequence[str] = ()
    again: bool = False


@dataclass
class Rollback:
    """A run of the rollback DAG."""

    what: str
    conf: dict[str, Any]
    champion: str


@dataclass
class Refusal:
    """The gate of the last run is cleared, and nobody may be asked: Airflow would show what it asked before."""

    what: str


STORY: tuple[Scenario | Rollback | Refusal, ...] = (
    Scenario("The first model, trained on NFCorpus", (NFCORPUS_ONLY, "train.steps=40"), "promote", "first", "first"),
    Scenario(
        LOST,
        (SCIFACT_ONLY, STEPS, "gate.max_loss_per_task=0.005"),
        "hold",
        "first",
        "one task lost",
        failed=("loss on NFCorpus",),
        only=True,
    ),
    Scenario(BETTER, (STEPS,), "promote", "better", "better"),
    Scenario("An equal one: same recipe, other seed", EQUAL, "hold", "better", "equal", failed=(OVER_CHAMPION,)),
    Scenario("A worse one", ("train.steps=5",), "hold", "better", "worse", failed=(OVER_CHAMPION,)),
    Scenario(
        STOPPED,
        ("train.steps=4", "gate.quick={tasks: [SciFact]}"),
        "hold",
        "better",
        "stopped",
        failed=("quick tier",),
        only=True,
        left_out=("NFCorpus",),
    ),
    Scenario(
        "The equal one where not to be inferior is enough, rejected by a person",
        (*EQUAL, *CAREFUL),
        "needs-approval",
        "better",
        "equal",
        answer="Reject",
        why="not before the holidays",
    ),
    Scenario(
        "The same, asked again, and nobody answers", (), "needs-approval", "better", "equal", answer="", again=True
    ),
    Scenario(
        "The same, asked again, approved",
        (),
        "needs-approval",
        "equal",
        "equal",
        answer="Approve",
        why="the other seed's negatives look cleaner",
        again=True,
    ),
    Rollback("Rollback to `previous`", {"to": "previous", "reason": "short queries got worse"}, "better"),
    Refusal("The same, asked once more: refused, the decision is another one than the text that Airflow shows"),
    Scenario(
        "What was rolled back from, in a new run: promoted only by a person's word",
        (*EQUAL, *CAREFUL),
        "needs-approval",
        "equal",
        "equal",
        failed=("not rolled back from",),
        only=True,
        answer="Approve",
        why="the query parser was at fault",
    ),
)


@dataclass
class Told:
    """What came of a scenario."""

    what: str
    verdict: str
    scores: str
    reasons: list[str]
    answer: str
    champion: str
    seconds: float
    run: str
    decision: str = ""
    version: str = ""


@dataclass
class Book:
    """Versions by label, and the moves that the history must hold."""

    versions: dict[str, str] = field(default_factory=dict)
    moves: list[tuple[str, str | None, str]] = field(default_factory=list)
    champion: str | None = None
    last: str = ""  # run of the retraining DAG

    def move(self, action: str, version: str) -> None:
        """Note a move of the champion."""
        self.moves.append((action, self.champion, version))
        self.champion = version


def small_recipe(services: Services, path: Path, model: str) -> None:
    """beir-small, cut down to minutes: SciFact and NFCorpus alone, 64 tokens, batches of 32, few steps, one negative."""
    recipe = yaml.safe_load(services.nvr("config", "--recipe", "beir-small"))
    recipe["data"]["sources"] = [s for s in recipe["data"]["sources"] if s["name"] in ("scifact", "nfcorpus")]
    for source in recipe["data"]["sources"]:
        source["max_queries"] = 800
    recipe["data"]["dev_queries"] = 50
    recipe["embed"]["teachers"][0]["max_tokens"] = {"query": 32, "passage": 64}
    recipe["train"]["student"]["max_tokens"] = 64
    recipe["mine"]["threshold"] = 0.95
    recipe["train"] |= {"batch_size": 32, "max_tokens": 48, "warmup_steps": 5, "learning_rate": 5e-4}
    recipe["train"] |= {"hard_negatives": 1, "temperature": 0.05, "min_positive_score": None, "sources": {}}
    recipe["gate"] |= {"min_gain_over_base": 0.0, "max_loss_per_task": 0.03}
    recipe["register"] = {"model_name": model, "experiment": "verdicts"}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def play(services: Services, scenario: Scenario, recipe: str, model: str, book: Book) -> Told:
    """Run one scenario, check all that it promises."""
    clock = time.monotonic()
    if scenario.again:
        run = book.last
        services.clear(RETRAIN, run, "gate")
    else:
        run = book.last = services.trigger(RETRAIN, {"recipe": recipe, "overrides": list(scenario.overrides)})
    if scenario.answer:
        services.answer(run, "approve", scenario.answer, scenario.why)
    state = services.wait(run)
    expect(state == "success", f"the run ended as {state}: {run}")
    gate = services.result(run, "gate")
    figures = gate["figures"]
    version = str(figures["version"])
    expect(book.versions.setdefault(scenario.label, version) == version, f"{scenario.label} is version {version} now")
    expect(figures["verdict"] == scenario.verdict, f"{scenario.what}: {figures['verdict']}: {figures['criteria']}")
    wrong = [c for c in figures["criteria"] if not c["passed"] and c["looked_at"]]
    names = [c["name"] for c in wrong]
    expect(set(scenario.failed) <= set(names), f"{scenario.what} failed {names}")
    expect(not scenario.only or names == list(scenario.failed), f"{scenario.what} failed {names}")
    decision = services.decision(gate["outputs"]["decision"][0])
    expect(not set(scenario.left_out) & set(decision["scores"]["challenger"]), f"{scenario.left_out} was scored")
    said = _check_answer(services, scenario, run)
    if book.champion != book.versions[scenario.champion]:
        book.move("promote", book.versions[scenario.champion])
    champion = services.alias(model, "champion")
    expect(champion == book.champion, f"champion is version {champion}, not {book.champion}")
    return Told(
        what=scenario.what,
        verdict=figures["verdict"],
        scores=_scores(decision["scores"]),
        reasons=[f"{c['name']}: {c['reason']}" for c in wrong],
        answer=said,
        champion=f"version {champion}",
        seconds=time.monotonic() - clock,
        run=run,
        decision=gate["outputs"]["decision"][0],
        version=version,
    )


def _check_answer(services: Services, scenario: Scenario, run: str) -> str:
    """What became of the question, in words; checks that `promote` heard it."""
    state = services.state(run, "promote")
    if scenario.answer is None:
        expect(state == ("success" if scenario.verdict == "promote" else "skipped"), f"promote is {state}")
        return ""
    heard = services.xcom(run, "approve")
    if scenario.answer == "Approve":
        expect(heard == {"approved-by": PERSON, "reason": scenario.why}, str(heard))
        expect(state == "success", f"promote is {state}")
        return f"approved by {PERSON}: {scenario.why}"
    expect(state == "skipped", f"promote is {state}")
    who = (PERSON, scenario.why) if scenario.answer else ("nobody", "no answer before the deadline")
    expect(heard == {"rejected-by": who[0], "reason": who[1]}, str(heard))
    told = services.result(run, "promote")["skipped"]
    expect(told == f"rejected by {who[0]}: {who[1]}", told)
    return str(told)


def go_back(services: Services, rollback: Rollback, recipe: str, model: str, book: Book) -> Told:
    """Run the rollback DAG, check that it did what it says."""
    clock = time.monotonic()
    run = services.trigger(ROLLBACK, {"recipe": recipe, **rollback.conf})
    state = services.wait(run)
    expect(state == "success", f"the rollback ended as {state}")
    book.move("rollback", book.versions[rollback.champion])
    champion = services.alias(model, "champion")
    expect(champion == book.champion, f"champion is version {champion}, not {book.champion}")
    reason = f"reason: {rollback.conf['reason']}"
    return Told(rollback.what, "–", "–", [reason], "", f"version {champion}", time.monotonic() - clock, run)


def refuse(services: Services, refusal: Refusal, model: str, book: Book) -> Told:
    """Clear the gate of a run that has asked before, and check that the changed decision is put before nobody."""
    clock = time.monotonic()
    services.clear(RETRAIN, book.last, "gate")
    state = services.wait(book.last)
    states = [services.state(book.last, task) for task in ("gate", "approve", "promote")]
    expect((state, states) == ("failed", ["success", "failed", "upstream_failed"]), f"{state}: {states}")
    champion = services.alias(model, "champion")
    expect(champion == book.champion, f"champion is version {champion}, not {book.champion}")
    figures = services.result(book.last, "gate")["figures"]
    reasons = [f"{c['name']}: {c['reason']}" for c in figures["criteria"] if not c["passed"]]
    return Told(
        refusal.what,
        figures["verdict"],
        "–",
        reasons,
        "not asked: task `approve` failed",
        f"version {champion}",
        time.monotonic() - clock,
        book.last,
    )


def check_history(services: Services, recipe: str, model: str, book: Book) -> list[dict[str, Any]]:
    """The journal holds exactly the moves that the story made, and the aliases are its last ones."""
    everything: list[dict[str, Any]] = services.history(recipe)
    history = [entry for entry in everything if entry["action"] != "reject"]
    rejected = [(entry["who"], entry["why"]) for entry in everything if entry["action"] == "reject"]
    answers = [part for part in STORY if isinstance(part, Scenario) and part.answer not in (None, "Approve")]
    wanted = [(PERSON, part.why) if part.answer else ("nobody", "no answer before the deadline") for part in answers]
    expect(rejected == wanted, f"the rejections on record are {rejected}, not {wanted}")
    told = [(move["action"], move["source"], move["champion"]) for move in history]
    expect(told == book.moves, f"the history is {told}, not {book.moves}")
    expect(services.alias(model, "previous") == book.moves[-1][1], "previous is not the champion before the last move")
    approved = [move["who"] for move in history if move["why"].startswith("approved: ")]
    expect(approved == [PERSON, PERSON], f"approvals are by {approved}")
    return everything


def _scores(scores: dict[str, dict[str, float]]) -> str:
    """Challenger (champion) per task."""
    theirs = scores.get("champion", {})
    return ", ".join(
        f"{task} {score:.3f}" + (f" ({theirs[task]:.3f})" if task in theirs else "")
        for task, score in scores["challenger"].items()
    )


def page(
    commit: str, told: Sequence[Told], history: Sequence[dict[str, Any]], pictures: Sequence[tuple[str, str]]
) -> str:
    """docs/gate.md."""
    from run import machine  # tools/bench

    rows = [
        "| run | verdict | nDCG@10 (champion's) | what was not met, or why | a person's answer | champion after | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in told:
        cells = (t.what, t.verdict, t.scores, "<br>".join(t.reasons), t.answer, t.champion, f"{t.seconds:.0f}")
        rows.append(f"| {' | '.join(cell.replace('|', '/') or '–' for cell in cells)} |")
    moves = ["| move | from → to | who | why |", "|---|---|---|---|"]
    moves += [
        f"| {m['number'] or '–'} {m['action']} | {m['source'] or '–'} {'↛' if m['action'] == 'reject' else '→'} {m['target']} "
        f"| {m['who']} | {m['why']} |"
        for m in history
    ]
    shown = [f"![{title}](images/{name}.png)\n\n*{title}*" for name, title in pictures]
    today = datetime.datetime.now(datetime.UTC)
    return "\n".join(
        [
            "# The gate at work",
            "",
            "Written by `NVR_DATA=/folder/with/scifact/and/nfcorpus make verdicts`, which triggers every run over REST in a real "
            "Airflow and MLflow, answers approvals over REST, and fails unless verdict, reasons, aliases and history are those below.",
            "",
            f"Commit {commit}, {today:%Y-%m-%d}; {machine()}.",
            "",
            "Teacher, student, benchmark and sources are those of `beir-small`, cut down so that a run takes minutes: SciFact and "
            "NFCorpus alone as training data, 800 queries each, 64 tokens, batches of 32, 4 to 40 steps. Scores are therefore lower "
            "than in [beir-small.md](beir-small.md).",
            "",
            *rows,
            "",
            "`nvr history` afterwards:",
            "",
            *moves,
            "",
            *("\n\n".join(shown).splitlines() if shown else ["No screenshots: Playwright or Chromium was not there."]),
            "",
        ]
    )


def main() -> None:
    """The whole story."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".nvr" / "verdicts", help="folder of all state")
    parser.add_argument("--chromium", help="Chromium to take the screenshots with; without it there are none")
    given = parser.parse_args()
    if not os.environ.get("NVR_DATA"):
        sys.exit("NVR_DATA is not set: point it at a folder with the BEIR sets scifact and nfcorpus")
    home, commit = given.home.absolute(), Services.commit()  # before anything is written
    services = Services(home, {"NVR_APPROVAL_HOURS": str(APPROVAL_HOURS), "NVR_RETRY_DELAY_S": "5"})
    model = f"verdicts-{datetime.datetime.now(datetime.UTC):%m%d-%H%M%S}"
    recipe = home / f"{model}.yaml"
    services.up()
    try:
        services.end_runs(RETRAIN)
        small_recipe(services, recipe, model)
        book, told = Book(), []
        for part in STORY:
            if isinstance(part, Scenario):
                said = play(services, part, str(recipe), model, book)
            elif isinstance(part, Rollback):
                said = go_back(services, part, str(recipe), model, book)
            else:
                said = refuse(services, part, model, book)
            told.append(said)
            print(f"» {said.what}: {said.verdict}, champion {said.champion}, {said.seconds:.0f} s", flush=True)
            for reason in (*said.reasons, *([said.answer] if said.answer else [])):
                print(f"    {reason}", flush=True)
        history = check_history(services, str(recipe), model, book)
        pictures: list[tuple[str, str]] = []
        if given.chromium:
            from pages import shoot

            by_what = {t.what: t for t in told}
            shown = {
                "better": by_what[BETTER],
                "lost": by_what[LOST],
                "stopped": by_what[STOPPED],
                "approved": told[-1],
            }
            pictures = shoot(services, given.chromium, PICTURES, model, shown)
        PAGE.write_text(page(commit, told, history, pictures), encoding="utf-8")
        print(f"» {len(told)} scenarios as they should be; {PAGE.relative_to(REPOSITORY)} is written", flush=True)
    except WrongOutcomeError as wrong:
        sys.exit(f"not as it should be: {wrong}")
    finally:
        services.down()


if __name__ == "__main__":
    main()
