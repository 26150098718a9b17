"""A small made-up data set with made-up vectors of several teachers, in a real store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nvr_tasks import mine as stage
from nvr_tasks.artifacts import Identity, Store
from nvr_tasks.config import Recipe
from nvr_tasks.dataset import passage_text
from nvr_tasks.models import teacher_identity
from nvr_tasks.pipeline import Context, StageResult
from nvr_tasks.settings import Teacher
from nvr_tasks.vectors import sort_order, text_keys

PASSAGES, QUERIES, DIM = 150, 24, 8
TEACHERS = ("t", "u", "v")


class World:
    """A data set, a teacher's vectors and a recipe, with everything known about them."""

    def __init__(self, folder: Path, root: str = "store") -> None:
        rng = np.random.default_rng(11)
        self.folder = folder
        self.store = Store(str(folder / root))
        for name in TEACHERS:
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps({"is": name} if name != "t" else {}))
        self.docs = [f"s/d{i:03}" for i in range(PASSAGES)]
        self.texts = [f"passage {i - 1 if i % 10 == 9 else i}" for i in range(PASSAGES)]  # d009 has the text of d008
        self.groups = [i - 1 if i % 10 in (9, 5) else i for i in range(PASSAGES)]  # and d005 nearly that of d004
        self.query_ids = [f"s/q{i:02}" for i in range(QUERIES)]
        self.split = ["dev" if i % 8 == 7 else "train" for i in range(QUERIES)]
        self.qrels = []  # query, doc, relevance, split
        for q in range(QUERIES):
            for doc in rng.choice(PASSAGES, 3, replace=False).tolist():
                self.qrels.append((q, doc, int(rng.integers(1, 3)), self.split[q]))
            self.qrels.append((q, (q * 6 + 1) % PASSAGES, 1, "test"))
            self.qrels.append((q, (q * 6 + 2) % PASSAGES, 0, self.split[q]))
        self.qrels = list({(q, d): (q, d, r, s) for q, d, r, s in self.qrels}.values())
        by_text = {t: rng.standard_normal(DIM) for t in dict.fromkeys(self.texts)}
        self.y = np.array([by_text[t] for t in self.texts], np.float32)
        first = {q: d for q, d, r, s in reversed(self.qrels) if r >= 1 and s != "test"}
        self.x = np.array([self.y[first[q]] + 0.8 * rng.standard_normal(DIM) for q in range(QUERIES)], np.float32)
        self.y /= np.linalg.norm(self.y, axis=1, keepdims=True)
        self.x /= np.linalg.norm(self.x, axis=1, keepdims=True)
        self.vectors = {"t": (self.x, self.y)}  # queries and passages, per teacher
        for seed, name in enumerate(TEACHERS[1:]):
            self.vectors[name] = self._other_eyes(np.random.default_rng(100 + seed))
        self.dataset = self.store.publish(Identity("dataset", 1, {}), self._write_dataset).uri

    def _other_eyes(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What a teacher of another opinion and another dimension sees: the first one's vectors, turned and disturbed."""
        turn = rng.standard_normal((DIM, DIM + 4))
        noise = {text: rng.standard_normal(DIM + 4) for text in dict.fromkeys(self.texts)}
        y = self.y @ turn + np.array([noise[t] for t in self.texts])
        x = self.x @ turn + rng.standard_normal((QUERIES, DIM + 4))
        x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
        return x.astype(np.float32), y.astype(np.float32)

    def _write_dataset(self, folder: Path) -> dict[str, Any]:
        (folder / "corpus").mkdir()
        corpus = pd.DataFrame({"doc_id": self.docs, "title": "", "text": self.texts, "group": self.groups})
        corpus[:100].to_parquet(folder / "corpus" / "part-00000.parquet", index=False)
        corpus[100:].to_parquet(folder / "corpus" / "part-00001.parquet", index=False)
        queries = {
            "query_id": self.query_ids,
            "text": [f"ask {q}" for q in self.query_ids],
            "split": self.split,
            "source": "s",
        }
        pd.DataFrame(queries).to_parquet(folder / "queries.parquet", index=False)
        rows = sorted((self.query_ids[q], self.docs[d], r, s) for q, d, r, s in self.qrels)
        pd.DataFrame(rows, columns=["query_id", "doc_id", "relevance", "split"]).to_parquet(
            folder / "qrels.parquet", index=False
        )
        return {}

    def recipe(self, runtime: dict[str, Any] | None = None, **settings: Any) -> Recipe:
        beir = {"type": "beir", "uri": "nowhere"}
        models = {name: {"type": "path", "path": str(self.folder / name)} for name in TEACHERS}
        prompts = {"query": "query: ", "passage": ""}
        teachers = [{"name": name, "model": model, "prompts": prompts} for name, model in models.items()]
        return Recipe.model_validate(
            {
                "name": "small",
                "data": {"sources": [{"name": "s", "origin": beir}], "benchmark": [{"task": "T", "origin": beir}]},
                "embed": {"teachers": teachers},
                "mine": {"depth": 60, **settings},
                "train": {"student": {"model": models["t"]}, "hard_negatives": 1},
                "runtime": {"device": "cpu", **(runtime or {})},
            }
        )

    def embed(self, recipe: Recipe, shards: int = 2, spoil: str | None = None, **config: Any) -> list[str]:
        """Publish the vectors of all teachers at work, divided over shards; `spoil` is a text whose vector gets a NaN."""
        return [uri for t in recipe.teachers for uri in self._embed(t, shards, spoil, config)]

    def _embed(self, teacher: Teacher, shards: int, spoil: str | None, config: dict[str, Any]) -> list[str]:
        x, y = self.vectors[teacher.name]
        vectors = {f"ask {q}": (v, "query") for q, v in zip(self.query_ids, x, strict=True)}
        vectors |= {passage_text("", t): (v, "passage") for t, v in zip(self.texts, y, strict=True)}
        uris = []
        for shard in range(shards):
            mine_ = [t for i, t in enumerate(vectors) if i % shards == shard]
            keys = np.concatenate(
                [
                    text_keys([t], getattr(teacher.prompts, vectors[t][1]), getattr(teacher.max_tokens, vectors[t][1]))
                    for t in mine_
                ]
            )
            rows = np.array([vectors[t][0] for t in mine_], np.float32)
            if spoil in mine_:
                rows[mine_.index(spoil), 2] = np.nan
            order = sort_order(keys)

            def write(folder: Path, keys: np.ndarray = keys[order], rows: np.ndarray = rows[order]) -> dict[str, Any]:
                np.save(folder / "keys.npy", keys)
                np.save(folder / "vectors.npy", rows)
                return {}

            identity = {"teacher": teacher_identity(teacher), "shard": f"{shard}/{shards}", **config}
            uris.append(self.store.publish(Identity("embeddings", 1, identity, {"dataset": self.dataset}), write).uri)
        return uris

    def run(self, recipe: Recipe, embeddings: list[str], **options: str) -> StageResult:
        ctx = Context(recipe, self.store, options=options)
        inputs = {"dataset": [self.dataset], "embeddings": embeddings}
        return stage.build(ctx, inputs, stage.plan(ctx, inputs))

    def table(self, result: StageResult, role: str = "negatives") -> pd.DataFrame:
        (uri,) = result.outputs[role]
        return pd.read_parquet(self.store.fetch(self.store.open(uri)) / f"{role}.parquet")

    def digest(self, result: StageResult, role: str = "negatives") -> str:
        files = self.store.open(result.outputs[role][0]).manifest.files
        return next(f.sha256 for f in files if f.path.endswith(".parquet"))

    def stats(self, result: StageResult) -> dict[str, Any]:
        return self.store.open(result.outputs["negatives"][0]).manifest.stats
