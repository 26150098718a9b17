"""What an ablation found, for people: one HTML page, and a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from nvr_tasks.html import Measured, bars, lines, page, table

Record = Mapping[str, Any]
SEEDS_RULE = 2.0  # spread of seeds over the standard error of queries, above which the page warns


def ablation_report(record: Record) -> str:
    """The page, from the content of `ablation.json`."""
    title = f"Ablation of {record['recipe']}"
    level = f"{1 - record['alpha']:.0%}"
    seeds = record["seeds"]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(record['variants'])} variants × {len(seeds)} {_seeds(seeds)}; nDCG@10 by mteb, mean over seeds. Data set, "
        f"embeddings and candidates are the same for all; each is compared with <b>{escape(record['baseline'])}</b>.</p>",
        "<h2>Scores</h2>",
        _scores(record),
        f"<p>Intervals cover {level}. They and p come from {record['resamples']:,} resamples of queries (within their task) and "
        f"seeds{_seed_note(seeds)}, the same for all variants, so differences are paired by query and seed; p is two-sided, "
        f"with Holm's correction over variants.{_unsteady(record)}</p>",
        _gains(record, level),
        "<h2>Speed of training</h2>",
        *_speed(record),
        "<h2>What was mined</h2>",
        _mining(record),
        "<h2>Variants</h2>",
        table(
            ("variant", "what it changes in the recipe"),
            [(r["name"], _changes(r["changes"])) for r in record["variants"]],
        ),
        f"<h2>Made from</h2>{table(('', ''), [(k, v) for k, v in record['shared'].items()])}",
        "<details><summary>Models</summary>",
        table(("cell", "model"), list(record["models"].items())),
        "</details>",
    ]
    return page(title, "".join(body))


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"


def _seed_note(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return " (with one seed they say nothing of the spread between seeds)"
    rough = " (with few seeds their spread is known only roughly, and a small p is smaller than it should be)"
    return rough if len(seeds) < 5 else ""


def _unsteady(record: Record) -> str:
    """A warning where seeds differ so much that the intervals of a few say too little."""
    ratios = {
        row["name"]: row["difference"]["seeds_to_queries"] or 0
        for row in record["variants"]
        if row["difference"] is not None
    }
    wide = [f"{escape(name)} ({ratio:.1f}×)" for name, ratio in ratios.items() if ratio > SEEDS_RULE]
    if not wide:
        return ""
    return (
        " <b>More seeds are needed</b> where they differ by more than queries explain, and the interval is too narrow: "
        f"{', '.join(wide)} the standard error over queries."
    )


def _scores(record: Record) -> str:
    tasks = list(record["queries"])
    head = [
        "variant",
        *(f"{t} ({record['queries'][t]:,})" for t in tasks),
        "mean",
        "± seeds",
        "difference",
        "interval",
        "p (Holm)",
    ]
    best = {t: max(r["tasks"][t]["mean"] for r in record["variants"]) for t in tasks}
    top = max(r["mean"]["mean"] for r in record["variants"])
    cells = []
    for row in record["variants"]:
        of_tasks = "".join(_number(row["tasks"][t]["mean"], best[t]) for t in tasks)
        spread = row["mean"]["by_seed"]
        cells.append(
            f"<tr><td>{escape(row['name'])}</td>{of_tasks}{_number(row['mean']['mean'], top)}"
            f"<td class=n>{(max(spread) - min(spread)) / 2:.4f}</td>{_difference(row['difference'], record['alpha'])}</tr>"
        )
    first = "".join(f"<th{' class=n' if i else ''}>{escape(h)}</th>" for i, h in enumerate(head))
    return f"<table><tr>{first}</tr>{''.join(cells)}</table>"


def _number(value: float, best: float) -> str:
    text = f"{value:.4f}"
    return f"<td class=n>{f'<b>{text}</b>' if value == best else text}</td>"


def _difference(found: Record | None, alpha: float) -> str:
    if found is None:
        return "<td class=n>baseline</td><td></td><td></td>"
    shown = "" if found["p_holm"] > alpha else " yes" if found["mean"] > 0 else " no"
    return (
        f'<td class="n{shown}">{found["mean"]:+.4f}</td><td class=n style="white-space:nowrap">{found["low"]:+.4f} … {found["high"]:+.4f}</td>'
        f"<td class=n>{found['p_holm']:.4f}</td>"
    )


def _gains(record: Record, level: str) -> str:
    """Differences from the baseline with intervals: of the mean, and task by task."""
    groups: dict[str, list[Measured]] = {}
    for name in ("mean", *record["queries"]):
        for number, row in enumerate(record["variants"]):
            found = row["difference"]
            if found is not None:
                of = found if name == "mean" else found["tasks"][name]
                groups.setdefault(name, []).append(
                    Measured(_short(row["name"]), of["mean"], of["low"], of["high"], number)
                )
    if not groups:
        return ""
    return bars(groups, f"nDCG@10, difference from {record['baseline']}, with {level} intervals over queries and seeds")


def _short(name: str) -> str:
    """A name of a grid differs at its end as well as at its beginning."""
    return name if len(name) <= 20 else f"{name[:9]}…{name[-10:]}"


def _speed(record: Record) -> list[str]:
    speed = record["speed"]
    if not speed["variants"]:
        return [
            "<p>There are no dev curves to compare: training logged no dev nDCG@10 (set data.dev_queries, and train.eval_every_steps "
            "below train.steps), or variants train on different sources, so that their dev queries differ.</p>"
        ]
    curves = {name: [(x, mean) for x, mean, _, _ in v["curve"]] for name, v in speed["variants"].items()}
    spread = {name: [(x, low, high) for x, _, low, high in v["curve"]] for name, v in speed["variants"].items()}
    rows = []
    fastest = [v["steps"] for v in speed["variants"].values() if v["steps"] is not None]
    for name, v in speed["variants"].items():
        first = v["curve"][0][0]
        ratio = f"{v['steps'] / min(fastest):.2f}×" if v["steps"] else "–"
        rows.append(
            (
                name,
                f"{v['final']:.4f}",
                _steps(v["steps"], first, "never"),
                ratio,
                ", ".join(_steps(s, first, "–") for s in v["by_seed"]),
                f"{v['seconds']:,.0f}" if v["seconds"] is not None else "–",
                f"{v['seconds_per_step']:.3f}" if v["seconds_per_step"] else "–",
            )
        )
    head = ("variant", "final", "steps", "of the fastest", "steps by seed", "seconds", "seconds per step")
    return [
        lines(curves, "step", "dev nDCG@10", bands=spread, level=speed["target"], from_zero=False),
        "<p>Lines: mean over seeds; bands: lowest and highest seed. Level line: "
        f"{record['reach']:.0%} of the best final score ({speed['best_final']:.4f}, {escape(speed['best'])}), "
        f"{speed['target']:.4f}. The table says from when on each variant's mean curve stays there (between two evaluations a curve "
        "is a straight line; ≤: it was there at the first). Seconds are steps times the median time of a step, without fetching "
        "batches, evaluation and checkpoints, over all cells with the same settings of training: on cells that ran beside each other "
        f"it is longer.{_machines(speed['machines'])}</p>",
        table(head, rows, range(1, 7)),
    ]


def _steps(steps: float | None, first: int, otherwise: str) -> str:
    if steps is None:
        return otherwise
    return f"≤ {steps:.0f}" if steps == first else f"{steps:.0f}"


def _machines(machines: list[str]) -> str:
    if len(machines) < 2:
        return f" Machine: {escape(machines[0])}." if machines else ""
    return f" Cells were trained on different machines, so seconds are left out: {escape('; '.join(machines))}."


def _mining(record: Record) -> str:
    rows = []
    experiments = list(dict.fromkeys(e["experiment"] for r in record["variants"] for e in r["relevant"] or []))
    for row in record["variants"]:
        mined = row["mining"] or {}
        audited = {e["experiment"]: e for e in row["relevant"] or []}
        rows.append(
            (
                row["name"],
                f"{mined['pairs']:,.0f} of {mined['of_pairs']:,.0f}" if mined else "no mined negatives",
                f"{mined['short']:.2%}" if mined else "–",
                f"{mined['own_source']:.1%}" if mined else "–",
                f"{mined['mean_margin']:.4f}" if "mean_margin" in mined else "–",
                *(_share(audited.get(e)) if mined else "–" for e in experiments),
            )
        )
    head = (
        "variant",
        "pairs trained on",
        "short",
        "of the same source",
        "mean margin",
        *(f"relevant ({e}, all pairs)" for e in experiments),
    )
    told = (
        "Of the (query, positive) pairs that were mined, those of the sources that are trained on, without positives that "
        "train.min_positive_score leaves out. Short: pairs with fewer negatives than training uses; random passages take their place. "
        "Of the same source: negatives from the data set that the query is of. Mean margin: score of the positive minus that of the "
        "hardest negative."
    )
    told += (
        " Relevant: what share of negatives is really relevant, by the audit of this recipe."
        if experiments
        else " What share of negatives is really relevant, `nvr audit` estimates; it was not run for this recipe and data."
    )
    return table(head, rows, range(1, len(head))) + f"<p>{escape(told)}</p>"


def _share(found: Record | None) -> str:
    return f"{found['value']:.2%} ({found['low']:.2%} to {found['high']:.2%})" if found else "–"


def _changes(changes: Record) -> str:
    return " · ".join(f"{key}={value}" for key, value in changes.items()) or "nothing"


def text_table(record: Record) -> str:
    """The scores, for a terminal."""
    tasks = list(record["queries"])
    rows = [["variant", *tasks, "mean", "difference", "interval", "p (Holm)", f"steps to {record['reach']:.0%}"]]
    for row in record["variants"]:
        d = row["difference"]
        steps = record["speed"]["variants"].get(row["name"], {}).get("steps")
        rows.append(
            [
                row["name"],
                *(f"{row['tasks'][t]['mean']:.4f}" for t in tasks),
                f"{row['mean']['mean']:.4f}",
                f"{d['mean']:+.4f}" if d else "baseline",
                f"{d['low']:+.4f} … {d['high']:+.4f}" if d else "",
                f"{d['p_holm']:.4f}" if d else "",
                f"{steps:.0f}" if steps is not None else "–",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([text[0].rstrip(), "─" * len(text[0]), *(line.rstrip() for line in text[1:])])
