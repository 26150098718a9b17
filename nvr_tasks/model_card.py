"""The model card (README.md) of a trained model, written from its lineage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvr_tasks.artifacts import Identity, fingerprint_of
from nvr_tasks.config import Recipe


def model_card(recipe: Recipe, identity: Identity, figures: Mapping[str, Any]) -> str:
    """Markdown with metadata, use, training and lineage. Deterministic: no dates, no rates."""
    mine, train = recipe.mine, recipe.train
    threshold = f", threshold {mine.resolved_threshold}" if mine.resolved_threshold is not None else ""
    prompts = train.student.prompts
    steady = {k: v for k, v in figures.items() if not k.endswith("_per_s")}
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [sentence-transformers, feature-extraction, nv-retriever, hard-negatives]",
        "---",
        "",
        f"# {recipe.register_.model_name}, model {identity.fingerprint[:12]}",
        "",
        f"A text embedding model for retrieval, fine-tuned with recipe `{recipe.name}`. {recipe.description}".rstrip(),
        "",
        "## Use",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("<this folder>")',
        'queries = model.encode_query(["what is a hard negative?"])',
        'passages = model.encode_document(["A hard negative is a passage that looks relevant but is not."])',
        "print(model.similarity(queries, passages))",
        "```",
        "",
        f"Longest input: {train.student.max_tokens} tokens. Prompts: query {prompts.query!r}, passage {prompts.passage!r}. Similarity: cosine.",
        "",
        "## Training",
        "",
        f"- Hard negatives: {mine.method}{threshold}, {mine.num_negatives} per (query, positive), sampling {mine.sampling}, "
        f"{_teachers(recipe)} (arXiv:2407.15831 §3.1).",
        f"- Loss: InfoNCE, τ {train.temperature}, in-batch negatives and {train.hard_negatives} mined per query.",
        f"- AdamW, learning rate {train.learning_rate}, {train.warmup_steps} warm-up steps, "
        f"{train.steps} steps × {train.batch_size}, {train.dtype}, seed {recipe.seed}.",
        *(f"- {name}: {value}" for name, value in steady.items()),
        "",
        "## Lineage",
        "",
        *(f"- {role}: `{fingerprint_of(uri)}`" for role, uri in sorted(identity.inputs.items())),
        f"- training data: {', '.join(s.name for s in recipe.data.sources)}",
        "",
        "Licences of the training data and of the base model apply.",
        "",
    ]
    return "\n".join(lines)


def _teachers(recipe: Recipe) -> str:
    names = [t.name for t in recipe.mining_teachers]
    return f"teacher {names[0]}" if len(names) == 1 else f"teachers {', '.join(names)} ({recipe.mine.ensemble})"
