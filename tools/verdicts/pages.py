"""Screenshots of the runs that `story.py` made: Airflow, MLflow and the report, with Playwright and Chromium."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services import USER, Services

WIDTH, HEIGHT = 1200, 760
SETTLE_MS = 4000  # pages draw and fetch after they have loaded
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def shoot(
    services: Services, chromium: str, folder: Path, model: str, told: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Take the screenshots; returns (name of the file, title) of each.

    Args:
        chromium: the browser's program.
        folder: where they go.
        told: what came of the scenarios `better`, `lost`, `approved` and `stopped`.
    """
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})

        def take(name: str, title: str, url: str, height: int = HEIGHT) -> None:
            page.set_viewport_size({"width": WIDTH, "height": height})
            page.goto(url)
            page.wait_for_timeout(SETTLE_MS)
            for close in page.get_by_role("button", name="Close").all():  # of panels that MLflow opens by itself
                close.click(timeout=SETTLE_MS)
            page.wait_for_timeout(SETTLE_MS / 4)
            page.screenshot(path=folder / f"{name}.png")
            _fewer_colours(folder / f"{name}.png")
            taken.append((name, title))

        page.goto(services.airflow_url)
        page.fill("input[name=username]", USER)
        page.fill("input[name=password]", services.password)
        page.click("button[type=submit]")
        page.wait_for_timeout(SETTLE_MS)
        in_ui = {
            name: services.airflow_url + t.run.removeprefix("/api/v2").replace("/dagRuns/", "/runs/")
            for name, t in told.items()
        }
        take("airflow-run", "The run of the better model in Airflow", in_ui["better"])
        take(
            "airflow-approval",
            "What a person was asked, and answered",
            f"{in_ui['approved']}/tasks/approve/required_actions",
        )
        take(
            "mlflow-version",
            "The champion in MLflow",
            f"{services.mlflow_url}/#/models/{model}/versions/{told['approved'].version}",
            520,  # below are tags with paths of the machine
        )
        take(
            "report-held",
            "The report of a model that loses one task",
            services.report(told["lost"].decision).as_uri(),
            1150,
        )
        take(
            "report-stopped",
            "The report of a model that the quick tier stopped",
            services.report(told["stopped"].decision).as_uri(),
            900,
        )
        browser.close()
    return taken


def _fewer_colours(path: Path) -> None:
    """A third of the size, and nobody sees it."""
    from PIL import Image

    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
