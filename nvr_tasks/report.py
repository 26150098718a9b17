"""The gate's report: one self-contained HTML page, no network, right in light and dark."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from nvr_tasks.html import Measured, bars, mark, page, table

ROLES = ("challenger", "champion", "base")
WORDS = {
    "promote": "every criterion is met",
    "hold": "not every criterion is met",
    "needs-approval": "a person has the last word",
}


def decision_report(decision: dict[str, Any]) -> str:
    """A decision as HTML: verdict and criteria, scores and differences with intervals, costs, making, lineage."""
    verdict, model, version = decision["verdict"], escape(decision["model"]), escape(decision["challenger"])
    champion = f"version {decision['champion']}" if decision["champion"] else "none yet"
    dry = " (dry run: nothing is moved)" if decision["dry_run"] else ""
    parts = [
        f'<h1>{model} version {version}: <span class="{verdict}">{verdict}</span>{dry}</h1>',
        f"<p>{WORDS[verdict].capitalize()}. Champion when decided: {escape(champion)}.</p>",
        _stopped(decision.get("quick")),
        f"<h2>Criteria</h2>{_criteria(decision['criteria'])}",
        _changes(decision["criteria"]),
        _quick_tier(decision.get("quick")),
        f"<h2>Scores</h2>{_scores(decision)}",
        _differences(decision["comparison"], decision["policy"]),
        _footprints(decision["footprints"]),
        _making(decision["lineage"]),
        f"<h2>Lineage</h2>{_lineage(decision)}",
        f"<h2>Policy</h2><pre><code>{escape(json.dumps(decision['policy'], indent=2, sort_keys=True))}</code></pre>",
    ]
    return page(f"{decision['model']} version {decision['challenger']}: {verdict}", "".join(parts))


def _stopped(quick: dict[str, Any] | None) -> str:
    if quick is None or not quick["stopped"]:
        return ""
    return (
        "<p><b>The quick tier stopped this challenger.</b> Only the tasks of that tier were scored; scores and comparison below "
        "are of them alone, and the other criteria were not looked at.</p>"
    )


def _quick_tier(quick: dict[str, Any] | None) -> str:
    """What was scored first, and whether it was reason enough to stop."""
    if quick is None:
        return ""
    theirs = quick["champion"]
    rows = [
        (task, f"{quick['queries'][task]:,}", *([] if theirs is None else [f"{theirs[task]:.4f}"]), f"{score:.4f}")
        for task, score in quick["challenger"].items()
    ]
    head = ("task", "queries", *([] if theirs is None else ["champion"]), "challenger")
    words = f"Mean {quick['mean']:.4f}"
    if quick["min_mean"] is not None:
        words += f", at least {quick['min_mean']:.4f} wanted"
    if quick["gain"] is not None:
        words += (
            f". Gain over the champion {quick['gain']:+.4f}, one-sided bound {quick['high']:+.4f}; the rest is not scored if it "
            f"is shown to be below {quick['limit']:+.4f} (sign flips: p = {quick['p']:.4g})"
        )
    end = "stopped" if quick["stopped"] else "gone on"
    return f"<h2>Quick tier: {end}</h2>{table(head, rows, range(1, len(head)))}<p>{escape(words)}.</p>"


def _criteria(criteria: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td class={'yes' if c['passed'] else 'no' if c.get('looked_at', True) else 'unknown'}>{mark(c)}</td>"
        f"<td>{escape(c['name'])}</td><td>{escape(c['reason'])}</td></tr>"
        for c in criteria
    )
    return f"<table>{rows}</table>"


def _changes(criteria: list[dict[str, Any]]) -> str:
    wanted = [(c["name"], c["to_pass"]) for c in criteria if not c["passed"] and c["to_pass"]]
    if not wanted:
        return ""
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(change)}</li>" for name, change in wanted)
    return f"<h2>What would have to change</h2><ul>{items}</ul>"


def _scores(decision: dict[str, Any]) -> str:
    scores, intervals = decision["scores"], decision["intervals"]
    roles = [role for role in ROLES if role in scores]
    groups = {
        task: [_bar(role, scores[role][task], intervals[role][task]) for role in roles]
        for task in sorted(scores["challenger"])
    }
    if len(groups) > 1:
        groups = {
            "mean": [Measured(role, decision["means"][role], colour=ROLES.index(role)) for role in roles],
            **groups,
        }
    level = 1 - 2 * decision["policy"]["alpha"]
    return bars(groups, f"nDCG@10 with {level:.0%} bootstrap intervals over queries")


def _bar(role: str, value: float, interval: list[float]) -> Measured:
    low, high = interval
    return Measured(role, value, low, high, ROLES.index(role))


def _differences(found: dict[str, Any] | None, policy: dict[str, Any]) -> str:
    if found is None:
        return ""
    everything = Measured("all tasks", found["gain"], found["low"], found["high"])
    single = [
        Measured(t["task"][:20], t["difference"], t["low"], t["high"], colour=3 if t["difference"] >= 0 else 1)
        for t in found["tasks"]
    ]
    plot = bars(
        {"mean": [everything], "by task": single},
        f"challenger − champion, nDCG@10, {found['level']:.0%} intervals; dashed: the margin and the largest allowed loss of a task",
        [m for m in (found["margin"], -policy["max_loss_per_task"]) if m],
    )
    rows = [
        (
            t["task"],
            f"{t['queries']:,}",
            f"{t['champion']:.4f}",
            f"{t['challenger']:.4f}",
            f"{t['difference']:+.4f}",
            f"{t['low']:+.4f} … {t['high']:+.4f}",
            f"{t['wins']}/{t['losses']}",
            f"{t['p_difference']:.4f}",
        )
        for t in found["tasks"]
    ]
    head = ("task", "queries", "champion", "challenger", "difference", "interval", "better/worse", "p (Holm)")
    words = (
        f"Paired over {found['queries']:,} queries, tasks as strata. With this benchmark, a true difference of "
        f"{found['margin'] + found['detectable']:+.4f} or more ({found['detectable']:.4f} above the margin of "
        f"{found['margin']:+.4f}) would have been found with a chance of {policy['power']:.0%}; the sign-flip test "
        f"gives p = {found['p']:.4g} against the margin and "
        f"{found['p_superior']:.4g} against no gain at all."
    )
    return f"<h2>Challenger against champion</h2>{plot}<p>{escape(words)}</p>{table(head, rows, range(1, 8))}"


def _footprints(costs: dict[str, dict[str, Any]]) -> str:
    if not costs:
        return ""
    rows = [
        (
            role,
            f"{c['dimension']:,}",
            f"{c['model_mb']:,.1f}",
            f"{c['index_mb']:,.1f}",
            f"{c['p95_ms']:.2f}",
        )
        for role, c in costs.items()
    ]
    head = ("model", "dimension", "weights, MB", "float32 index of the benchmark, MB", "p95 of one query, ms")
    return f"<h2>Cost of serving</h2>{table(head, rows, range(1, 5))}"


def _making(lineage: list[dict[str, Any]]) -> str:
    """Key figures of data, mining and training."""
    rows = [
        (entry["kind"], " · ".join(f"{name} {_value(value)}" for name, value in entry["figures"].items()))
        for entry in lineage
        if entry.get("figures") and entry["kind"] != "evaluation"
    ]
    return f"<h2>Data, mining and training</h2>{table(('step', 'figures'), rows)}" if rows else ""


def _lineage(decision: dict[str, Any]) -> str:
    facts = [
        ("recipe", decision["recipe"]),
        ("pipeline run", decision["pipeline_run"] or "by hand"),
        ("weights", decision["digest"]),
    ]
    made = [
        (e["kind"], e["fingerprint"], e.get("content", "deleted")[:32], f"{e.get('code', '')} {e.get('made', '')}")
        for e in decision["lineage"]
    ]
    return table(("", ""), facts) + table(("artefact", "identity", "digest of its content", "made by, at"), made)


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
