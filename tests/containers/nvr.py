#!/usr/bin/env python3
"""A stand-in for the `nvr` command: runs the Python in $NVR_TEST_BODY; `result(…)` prints the marked line."""

import json
import os
import sys
import time
from pathlib import Path

XCOM = Path("/airflow/xcom")  # of the sidecar in a pod
RESULT = {"stage": sys.argv[1], "outputs": {"dataset": ["d"]}, "figures": {}, "skipped": None}


def result(**more):
    line = json.dumps({**RESULT, **more})
    if "--result-line" in sys.argv:
        print("NVR_RESULT " + line, flush=True)
    if XCOM.is_dir():
        XCOM.joinpath("return.json").write_text(line)


def tell(text):
    print(text, file=sys.stderr, flush=True)


exec(os.environ["NVR_TEST_BODY"], {**globals(), "time": time})
