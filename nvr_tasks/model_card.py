"""The model card (README.md) of a trained model, written from its lineage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvr_tasks.artifacts import Identity, fingerprint_of
from nvr_tasks.config import Recipe
from nvr_tasks.settings import Prompts
from nvr_tasks.training_settings import Student, TrainingStage


def model_card(recipe: Recipe, identity: Identity, figures: Mapping[str, Any]) -> str:
    """Markdown with metadata, use, training and lineage. Deterministic: no dates, no rates."""
    mine, train = recipe.mine, recipe.train
    threshold = f", threshold {mine.resolved_threshold}" if mine.resolved_threshold is not None else ""
    prompts = recipe.student.prompts
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
        *_loading(train.student),
        'queries = model.encode_query(["what is a hard negative?"])',
        'passages = model.encode_document(["A hard negative is a passage that looks relevant but is not."])',
        "print(model.similarity(queries, passages))",
        "```",
        "",
        f"Longest input: {train.student.max_tokens} tokens. Prompts: query {prompts.query!r}, passage {prompts.passage!r}. Similarity: "
        f"{'MaxSim' if train.student.late_interaction else 'cosine'}.",
        *_instructions(prompts),
        "",
        "## Training",
        "",
        f"- Hard negatives: {mine.method}{threshold}, {mine.num_negatives} per (query, positive), sampling {mine.sampling}, "
        f"{_teachers(recipe)} (arXiv:2407.15831 §3.1).",
        *_surgery(train.student),
        *(line for stage in train.schedule for line in _stage(stage, recipe, alone=len(train.schedule) == 1)),
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


def _instructions(prompts: Prompts) -> list[str]:
    own = {name: text for name, text in prompts.named().items() if name not in ("query", "document")}
    if not own:
        return []
    return [
        "",
        "Prompts of single tasks (`prompt_name`):",
        "",
        *(f"- `{name}`: {text!r}" for name, text in own.items()),
    ]


def _teachers(recipe: Recipe) -> str:
    names = [t.name for t in recipe.mining_teachers]
    return f"teacher {names[0]}" if len(names) == 1 else f"teachers {', '.join(names)} ({recipe.mine.ensemble})"


def _loading(student: Student) -> list[str]:
    if student.latent_attention is not None:  # a module that sentence-transformers lacks: its class is in nvr_tasks
        return ["from pathlib import Path", "", "from nvr_tasks.models import load_folder", "",
                'model = load_folder(Path("<this folder>"), "cpu")']  # fmt: skip
    name = "MultiVectorEncoder" if student.late_interaction is not None else "SentenceTransformer"
    return [f"from sentence_transformers import {name}", "", f'model = {name}("<this folder>")']


def _surgery(student: Student) -> list[str]:
    done = {
        "attention in both directions": student.bidirectional,
        f"{student.pooling} pooling": student.pooling is not None,
        "prompt tokens attended to, not pooled": not student.pool_prompt,
    }
    said = [what for what, is_so in done.items() if is_so]
    if student.latent_attention is not None:
        said.append(f"latent attention ({student.latent_attention.latents} latents)")
    if student.lora is not None:
        said.append(f"LoRA, rank {student.lora.rank}, α {student.lora.alpha:g}, merged")
    return [f"- Student: {', '.join(said)}."] if said else []


def _stage(stage: TrainingStage, recipe: Recipe, *, alone: bool) -> list[str]:
    own = f"{stage.hard_negatives} mined per query"
    negatives = f"in-batch negatives and {own}" if stage.in_batch_negatives else own
    if stage.false_negatives is not None:
        rule = stage.false_negatives
        negatives += f", without those within a {rule.margin} margin of {rule.value:g} of the positive's teacher score"
    length = f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs:g} epochs"
    dims = f", Matryoshka dimensions {', '.join(map(str, stage.matryoshka_dims))}" if stage.matryoshka_dims else ""
    return [
        *(
            []
            if alone
            else [f"- Stage {stage.name}: {', '.join(stage.sources) or 'all sources'}, {stage.batches} batches."]
        ),
        f"- Loss: InfoNCE, τ {stage.temperature}, {negatives}{dims}.",
        f"- AdamW, learning rate {stage.learning_rate}, {stage.warmup_steps} warm-up steps, "
        f"{length} × {stage.batch_size}, {stage.dtype}, seed {recipe.seed}.",
    ]
