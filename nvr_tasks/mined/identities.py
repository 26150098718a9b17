"""What candidates and negatives are named by. Light: nothing here needs more than the recipe and the models' files."""

from __future__ import annotations

from typing import Any

from nvr_tasks.artifacts import Identity
from nvr_tasks.models import reranker_identity, teacher_identity
from nvr_tasks.pipeline import Context
from nvr_tasks.settings import CrossEncoder, Reranker, Teacher

SEARCH_VERSION = 2
RESCORE_VERSION = 1


def candidate_identities(ctx: Context, dataset: str) -> dict[str, Identity]:
    """The candidates of every teacher at work, by name; a reranker comes after the teacher it rescores."""
    found = {t.name: search_identity(ctx, t, dataset) for t in ctx.recipe.teachers}
    for teacher in ctx.recipe.mining_teachers:
        if isinstance(teacher, Reranker):
            base = found[ctx.recipe.retriever(teacher).name]
            found[teacher.name] = rescore_identity(teacher, dataset, ctx.store.uri(base.kind, base.fingerprint))
    return found


def search_identity(ctx: Context, teacher: Teacher, dataset: str) -> Identity:
    """The candidates of an embedding teacher. The teacher, not its shards: vectors are the same however texts were divided."""
    mine = ctx.recipe.mine
    searched = {
        "teacher": teacher_identity(teacher),
        "depth": mine.depth,
        "duplicate_similarity": mine.duplicate_similarity,
        "query_similarity": mine.query_similarity,
        **(
            {}
            if mine.search == "exact"
            else {"search": [mine.search, mine.ivf_lists, mine.ivf_probes, mine.min_recall]}
        ),
    }
    return Identity("candidates", SEARCH_VERSION, searched, {"dataset": dataset})


def rescore_identity(reranker: Reranker, dataset: str, candidates: str) -> Identity:
    """The candidates of a reranker."""
    rescored = {**reranker_identity(reranker), "depth": reranker.depth}
    return Identity("candidates", RESCORE_VERSION, rescored, {"dataset": dataset, "candidates": candidates})


def selection_identity(ctx: Context) -> dict[str, Any]:
    """The settings that can change which negatives are selected; what a method does not look at is left out."""
    mine, seed = ctx.recipe.mine, ctx.recipe.seed
    draws = mine.sampling != "top"
    teachers = ctx.recipe.mining_teachers
    several = len(teachers) > 1
    seeded = draws or mine.method == "random" or (several and mine.ensemble == "cross_sample")
    config: dict[str, Any] = {
        "method": mine.method,
        "threshold": mine.resolved_threshold if several else mine.threshold_of(teachers[0].name),
        "shift": mine.shift if mine.method == "shifted" else None,
        "num_negatives": mine.num_negatives,
        "sampling": mine.sampling,
        "sample_from": mine.sample_from if draws else None,
        "temperature": mine.temperature if draws else None,
        "positive_policy": mine.positive_policy,
        "seed": seed if seeded else None,
    }
    # Keys of their own only where they say something: what was mined without them stays what it is.
    if mine.min_score is not None:
        config["min_score"] = mine.min_score
    if any(isinstance(t, CrossEncoder) for t in teachers):
        config["scales"] = [t.scale if isinstance(t, CrossEncoder) else None for t in teachers]
    if several:
        config["threshold"] = [mine.threshold_of(t.name) for t in teachers]
        config["ensemble"] = {"how": mine.ensemble, "teachers": [t.name for t in teachers]}  # the table has the names
    return config
