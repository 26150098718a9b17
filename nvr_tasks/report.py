"""The gate's report: one self-contained HTML page, no network, right in light and dark."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --soft: #8882; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.promote, .yes { color: var(--good); } .hold, .no { color: var(--bad); }
.bar { height: .7rem; background: currentColor; opacity: .55; border-radius: 2px; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 3px; overflow-wrap: anywhere; }
"""


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
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(decision['model'])} version {escape(decision['challenger'])}: "
        f'<span class="{verdict}">{verdict}</span>{dry}</h1>'
        f"<p>Champion when decided: {escape(champion)}.</p>"
        f"<h2>Criteria</h2><table>{criteria}</table>"
        f"<h2>nDCG@10</h2>{_scores(decision['scores'])}"
        f"<h2>Lineage</h2><table>{rows}</table></body></html>\n"
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
