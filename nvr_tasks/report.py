"""The gate's report: one self-contained HTML page, no network, right in light and dark."""

from __future__ import annotations

from html import escape
from typing import Any

from nvr_tasks.html import page


def decision_report(decision: dict[str, Any]) -> str:
    """A decision as HTML: verdict, criteria, scores per task and role, lineage."""
    verdict = decision["verdict"]
    title = f"{decision['model']} version {decision['challenger']}: {verdict}"
    champion = f"version {decision['champion']}" if decision["champion"] else "none yet"
    criteria = "".join(
        f"<tr><td class={'yes' if c['passed'] else 'no'}>{'✓' if c['passed'] else '✗'}</td>"
        f"<td>{escape(c['name'])}</td><td>{escape(c['reason'])}</td></tr>"
        for c in decision["criteria"]
    )
    dry = " (dry run: nothing is moved)" if decision["dry_run"] else ""
    lineage = {
        "recipe": decision["recipe"],
        "pipeline run": decision["pipeline_run"] or "by hand",
        "model artefact": decision["model_artifact"],
        **{role.replace("_", " "): fingerprint for role, fingerprint in decision["evaluations"].items()},
    }
    rows = "".join(f"<tr><td>{escape(k)}</td><td><code>{escape(str(v))}</code></td></tr>" for k, v in lineage.items())
    return page(
        title,
        f"<h1>{escape(decision['model'])} version {escape(decision['challenger'])}: "
        f'<span class="{verdict}">{verdict}</span>{dry}</h1>'
        f"<p>Champion when decided: {escape(champion)}.</p>"
        f"<h2>Criteria</h2><table>{criteria}</table>"
        f"<h2>nDCG@10</h2>{_scores(decision['scores'])}"
        f"<h2>Lineage</h2><table>{rows}</table>",
    )


def _scores(scores: dict[str, dict[str, float]]) -> str:
    rows = []
    for task in sorted(scores["challenger"]):
        for number, (role, values) in enumerate(scores.items()):
            first = f'<td rowspan="{len(scores)}">{escape(task)}</td>' if number == 0 else ""
            rows.append(
                f'<tr>{first}<td>{escape(role)}</td><td class="n">{values[task]:.4f}</td>'
                f'<td style="width:50%"><div class="bar" style="width:{100 * values[task]:.1f}%"></div></td></tr>'
            )
    return f"<table><tr><th>task</th><th>model</th><th>score</th><th></th></tr>{''.join(rows)}</table>"
