#!/usr/bin/env python3
"""A stand-in for the `nvr` command: keeps its contract, does no work, and fails as a test tells it to.

$NVR_FAKE_PLAN is JSON by command, e.g. {"train": {"exit": 1, "times": 2}, "promote": {"exit": 99}}.
$NVR_FAKE_CALLS collects one JSON line per call: arguments and environment.
"""
# ruff: noqa: T201  printing is its job

import json
import os
import sys
import time
from pathlib import Path

MAKES = {
    "begin": ["recipe"],
    "download": ["dataset", "benchmark"],
    "embed": ["embeddings"],
    "mine": ["candidates", "negatives"],
    "train": ["model"],
    "register": ["registration"],
    "screen": ["screening"],
    "score": ["scores"],
    "mirror": ["benchmark"],
    "sources": [],
    "index": ["index"],
    "swap": ["pointer"],
    "search": ["candidates"],
    "cell": ["cell"],
    "ablation": ["ablation"],
    "evaluate": ["evaluation", "evaluation_base"],  # and no evaluation_champion: the first run has none
    "gate": ["decision"],
    "promote": ["promotion"],
    "rollback": [],
}


def main() -> int:
    command = sys.argv[1]
    options = [a.removeprefix("--").partition("=")[::2] for a in sys.argv[2:]]
    calls = Path(os.environ["NVR_FAKE_CALLS"])
    with calls.open("a") as file:
        file.write(
            json.dumps({"command": command, "options": options, "env": dict(os.environ), "cwd": str(Path.cwd())}) + "\n"
        )
    plan = json.loads(os.environ.get("NVR_FAKE_PLAN", "{}"))
    given = dict(options)
    part_asked = given.get("of") or given.get("task") or given.get("cell")
    told = plan.get(f"{command} {part_asked}") or plan.get(command, {})
    before = sum(json.loads(line)["command"] == command for line in calls.read_text().splitlines()) - 1
    print(f"12:00:00 [{command}] {command}: start", file=sys.stderr)
    if "sleep" in told:
        time.sleep(told["sleep"])
    status = told.get("exit", 0) if before < told.get("times", 1000) else 0
    if status not in (0, 99):
        print(f"nvr: {command} was told to fail: mend the plan", file=sys.stderr)
        return status
    if command == "finish":
        print("summary of the run")
        return status
    shard = dict(options).get("shard", "")
    part_of = shard or dict(options).get("task") or dict(options).get("cell", "")
    part = f"-{part_of.replace('/', 'of').replace(':', '-')}" if part_of else ""
    result = {
        "stage": command,
        "outputs": told["outputs"]
        if "outputs" in told
        else {}
        if command == "mine" and shard
        else {role: [f"{dict(options)['root']}/{role}/fake{part}"] for role in MAKES[command]},
        "figures": told.get("figures", {}),
        "reused": bool(told.get("reused")),
        "skipped": "verdict: hold" if status == 99 else None,
        "seconds": 0.0,
    }
    if command == "begin":
        result["figures"] = {
            "shards": told.get("shards", ["0/2", "1/2"]),
            "blocks": told.get("blocks", []),
            "tasks": ["SciFact", "NFCorpus"],
            "cells": told.get("cells", ["naive:1", "naive:2", "perc_pos:1", "perc_pos:2"]),
            "mlflow_run_url": "http://127.0.0.1:5000/#/experiments/1/runs/abc",
        }
    print("a stray line on stdout")
    print("NVR_RESULT " + json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
