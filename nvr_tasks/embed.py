"""Embed every distinct query and passage of the data set with the teachers that mining uses.

Reads   dataset/<fp>
Writes  embeddings/<fp> per teacher and shard: vectors.npy (float32 [n, D], unit norm) and keys.npy (which text is which row)

Texts are divided over shards by hash, so a text belongs to exactly one. A text that this very teacher (weights,
prompt, longest input, dtype) has embedded before, in whichever data set, is copied, not embedded again. A killed
run goes on with the parts it finished.

Example  nvr embed --recipe beir-small --shard 0/2      (with several teachers also: --shard TEACHER:0/2)
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvr_tasks.artifacts import Artifact, Identity, fingerprint
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.media import refuse_unread, shown
from nvr_tasks.models import image_identity, load_teacher, model_identity, teacher_identity
from nvr_tasks.pipeline import Context, Inputs, Plan, StageResult, one, shard_index

if TYPE_CHECKING:
    from nvr_tasks.dataset import RetrievalData
    from nvr_tasks.encoding import Encoder
    from nvr_tasks.settings import Teacher
    from nvr_tasks.vectors import Keys, Vectors

VERSION = 1
BLOCK = 8192  # vectors in memory at a time

Texts = list[tuple[str, int]]  # (text, which of the teacher's requests it is embedded by)
Request = tuple[str, int]  # what is put before a text, and its longest input in tokens

log = logging.getLogger(__name__)


def plan(ctx: Context, inputs: Inputs) -> Plan:
    """One `embeddings` artefact per teacher and shard."""
    dataset = one(inputs, "dataset")
    return {
        "embeddings": [
            Identity("embeddings", VERSION, {"teacher": teacher_identity(t), "shard": s}, {"dataset": dataset})
            for t, s in _shards(ctx)
        ]
    }


def _shards(ctx: Context) -> list[tuple[Teacher, str]]:
    """What is to be embedded: (teacher, I/N), all of it or what the option `shard` names."""
    teachers, total = ctx.recipe.teachers, ctx.recipe.runtime.embed_shards
    chosen = ctx.options.get("shard")
    if chosen is None:
        return [(teacher, f"{index}/{total}") for teacher in teachers for index in range(total)]
    name, _, shard = chosen.rpartition(":")
    index = shard_index("embed", chosen, shard, total)
    if name and ctx.recipe.ablation is not None:  # those that only its variants put to work can be named, too
        variants = [ctx.recipe.varied(v.changes, ctx.recipe.seed) for v in ctx.recipe.ablation.rows]
        teachers = tuple(dict.fromkeys((*teachers, *(t for v in variants for t in v.teachers))))
    wanted = [t for t in teachers if name in ("", t.name)]
    if not wanted:
        raise RecipeError(
            f"--shard {chosen!r} is not allowed: {name} is no teacher at work in this recipe, which are "
            f"{', '.join(t.name for t in teachers)}"
        )
    return [(teacher, f"{index}/{total}") for teacher in wanted]


def build(ctx: Context, inputs: Inputs, plan: Plan) -> StageResult:
    """Embed the shards that are missing, one after the other; a model is loaded once, and only if it is needed."""
    from nvr_tasks.dataset import read_dataset

    clock = time.perf_counter()
    ctx.store.discard_finished("parts", "embeddings")
    data = read_dataset(ctx.store.fetch(ctx.store.open(one(inputs, "dataset"))))
    artifacts, at_work = [], list[_Teacher]()
    for teacher, group in itertools.groupby(zip(_shards(ctx), plan["embeddings"], strict=True), lambda p: p[0][0]):
        texts = _texts(data, teacher)
        model = _Teacher(ctx, teacher, data, texts.requests)
        artifacts += [ctx.store.find(i) or _embed_shard(ctx, i, texts, model) for _, i in group]
        model.encoder = None  # one model in memory at a time
        at_work.append(model)
    found = figures("embeddings", artifacts)
    embedded = sum(m.embedded for m in at_work)
    found |= {"embedded": embedded, "copied": found["texts"] - embedded}
    if seconds := sum(m.seconds for m in at_work):
        found["texts_per_s"] = round(sum(m.computed for m in at_work) / seconds, 1)
    log.info("embeddings ready in %.1f s", time.perf_counter() - clock)
    return StageResult("embed", {"embeddings": [a.uri for a in artifacts]}, found)


def figures(role: str, artifacts: list[Artifact]) -> dict[str, Any]:
    """Texts of all shards, and the teachers' dimensions unless no shard has a text; `embedded` says how many were new."""
    del role
    stats = [a.manifest.stats for a in artifacts]
    dims = sorted({s["dim"] for s in stats} - {0})
    told = {"dim": dims[0]} if len(dims) == 1 else {"dims": ", ".join(map(str, dims))} if dims else {}
    return {"texts": sum(s["texts"] for s in stats), "embedded": 0, **told}


@dataclass(frozen=True)
class _Texts:
    """Distinct texts with their keys; `request_of` says which of `requests` each is embedded by."""

    requests: list[Request]
    texts: list[str]
    request_of: list[int]
    keys: Keys


def _texts(data: RetrievalData, teacher: Teacher) -> _Texts:
    import numpy as np

    from nvr_tasks.vectors import text_keys

    prompts = teacher.prompts.of_sources(data.queries["source"])
    queries = list(dict.fromkeys(zip(data.queries["text"], prompts, strict=True)))
    passages = list(dict.fromkeys(data.passages()))
    requests = [(prompt, teacher.max_tokens.query) for prompt in dict.fromkeys(prompts)]
    number = {prompt: i for i, (prompt, _) in enumerate(requests)}
    requests.append((teacher.prompts.passage, teacher.max_tokens.passage))
    texts = [text for text, _ in queries] + passages
    request_of = [number[prompt] for _, prompt in queries] + [len(requests) - 1] * len(passages)
    keys = np.concatenate(
        [
            text_keys(texts[: len(queries)], [prompt for _, prompt in queries], teacher.max_tokens.query),
            text_keys(passages, *requests[-1]),
        ]
    )
    # Where prompt and length are the same for both, a query that is also a passage is one text.
    _, first = np.unique(keys, axis=0, return_index=True)
    return _Texts(requests, [texts[i] for i in first], [request_of[i] for i in first], keys[first])


def _embed_shard(ctx: Context, identity: Identity, texts: _Texts, teacher: _Teacher) -> Artifact:
    import numpy as np

    from nvr_tasks.vectors import allocate, load_vectors, sort_order

    index, total = (int(x) for x in identity.config["shard"].split("/"))
    mine = np.flatnonzero(np.ascontiguousarray(texts.keys[:, :8]).view(">u8").reshape(-1) % total == index)
    mine = mine[sort_order(texts.keys[mine])]
    keys = texts.keys[mine]
    reuse_key = f"refs/embeddings/{fingerprint('vectors', VERSION, _weights(teacher.teacher), {})}"
    known, todo = _known_vectors(ctx, reuse_key, keys)
    # Longest first: padding stays small, and a batch that does not fit memory fails at once.
    lengths = np.array([len(texts.texts[mine[i]]) for i in todo], dtype=np.int64)
    todo = todo[np.argsort(-lengths, kind="stable")]
    size = ctx.recipe.runtime.embed_part_texts
    parts = [todo[start : start + size] for start in range(0, len(todo), size)]
    log.info(
        "shard %d/%d: %s texts, %s to embed, %s known",
        index,
        total,
        f"{len(mine):,}",
        f"{len(todo):,}",
        f"{len(mine) - len(todo):,}",
    )

    progress = _Progress(total=int(lengths.sum()))
    unfinished = f"parts/{identity.fingerprint}"

    def blocks() -> Iterator[tuple[Any, Vectors]]:
        """All vectors of the shard, a part at a time, with their rows."""
        for folder, there, here in known:
            source = load_vectors(folder)
            for start in range(0, len(here), BLOCK):
                yield here[start : start + BLOCK], source[there[start : start + BLOCK]]
        chosen = [[(texts.texts[mine[i]], texts.request_of[mine[i]]) for i in part] for part in parts]
        for number, part in enumerate(parts):
            part_key = f"{unfinished}/{fingerprint('part', VERSION, keys[part].tobytes().hex(), {})}.npy"
            yield part, teacher.part(part_key, chosen[number], chosen[number + 1 : number + 2])
            progress.step(sum(len(t) for t, _ in chosen[number]), f"part {number + 1}/{len(parts)}")

    def write(folder: Path) -> dict[str, Any]:
        path = folder / "vectors.npy"
        vectors: np.memmap[Any, np.dtype[np.float32]] | None = None
        for rows, values in blocks():
            if vectors is None:
                vectors = allocate(path, (len(keys), values.shape[1]))
            vectors[rows] = values
        if vectors is None:
            vectors = allocate(path, (0, 0))
        _refuse_broken(vectors, [texts.texts[i] for i in mine], teacher.teacher.name)
        vectors.flush()
        np.save(folder / "keys.npy", keys)
        # First the record, which counts for nothing without its artefact: killed in between, a retry would find the
        # artefact and never write it.
        record = {"uri": ctx.store.uri(identity.kind, identity.fingerprint)}
        ctx.store.write_record(f"{reuse_key}/{identity.fingerprint}.json", record)
        dim = vectors.shape[1]
        return {
            "texts": len(keys),
            "embedded": len(todo),
            "dim": dim,
            "teacher": teacher.teacher.name,
        }

    artifact = ctx.store.publish(identity, write)
    ctx.store.storage.delete(unfinished)
    return artifact


def _weights(teacher: Teacher) -> dict[str, Any]:
    """What vectors depend on beside their key (which holds prompt, length and text)."""
    return {"model": model_identity(teacher.model), "dtype": teacher.dtype, **image_identity(teacher)}


def _known_vectors(ctx: Context, reuse_key: str, keys: Keys) -> tuple[list[tuple[Path, Any, Any]], Any]:
    """What earlier artefacts hold of this teacher: (folder, rows there, rows here) of each, and the rows still to embed."""
    import numpy as np

    from nvr_tasks.vectors import find_rows, load_keys

    missing = np.arange(len(keys))
    found: list[tuple[Path, Any, Any]] = []
    for record_key in ctx.store.storage.list(reuse_key):
        uri = ctx.store.uri("embeddings", Path(record_key).stem)
        artifact = ctx.store.get("embeddings", Path(record_key).stem)
        if artifact is None:
            continue  # deleted since: its texts are embedded again
        if len(missing) == 0:
            break
        at = find_rows(load_keys(ctx.store.fetch(artifact, only=("keys.npy",))), keys[missing])
        hit = at >= 0
        if not hit.any():
            continue
        log.info("copying %s vectors from %s", f"{int(hit.sum()):,}", uri)
        found.append((ctx.store.fetch(artifact), at[hit], missing[hit]))
        missing = missing[~hit]
    return found, missing


class _Teacher:
    """A teacher, loaded at the first text that needs it; finished parts are kept in storage."""

    def __init__(self, ctx: Context, teacher: Teacher, data: RetrievalData, requests: list[Request]) -> None:
        self.ctx, self.teacher, self.data, self.requests = ctx, teacher, data, requests
        self.encoder: Encoder | None = None
        self.embedded = 0  # texts new to this teacher, computed now or by an earlier, killed run
        self.computed = 0  # texts computed now, in `seconds`
        self.seconds = 0.0

    def part(self, key: str, texts: Texts, upcoming: list[Texts]) -> Vectors:
        """Vectors of one part, from storage when an earlier, killed run left them there. Shape [n, D].

        `upcoming` are parts that will be asked for next; they are tokenised meanwhile.
        """
        import io

        import numpy as np

        data = self.ctx.store.storage.get_bytes(key)
        if data is not None:
            try:
                left: Vectors = np.load(io.BytesIO(data), allow_pickle=False)
            except (ValueError, EOFError):
                left = np.zeros((0, 0), np.float32)
            if len(left) == len(texts):
                self.embedded += len(texts)
                return left
            log.warning("%s is damaged; embedding its texts again", key)
        clock = time.perf_counter()
        vectors = self._encode(texts, upcoming)
        # Before the part is kept, since a kept part is never made again.
        _refuse_broken(vectors, [text for text, _ in texts], self.teacher.name)
        self.seconds += time.perf_counter() - clock
        self.computed += len(texts)
        self.embedded += len(texts)
        buffer = io.BytesIO()
        np.save(buffer, vectors)
        self.ctx.store.storage.put_bytes(key, buffer.getvalue())
        return vectors

    def _encode(self, texts: Texts, upcoming: list[Texts]) -> Vectors:
        import numpy as np

        encoder = self._encoder()
        for part in upcoming:
            for _, request in self._by_request(part):
                encoder.prepare(*request)
        found = [(rows, encoder.encode(*request)) for rows, request in self._by_request(texts)]
        vectors: Vectors = np.empty((len(texts), found[0][1].shape[1]), np.float32)
        for rows, values in found:
            vectors[rows] = values
        return vectors

    def _by_request(self, texts: Texts) -> list[tuple[list[int], tuple[list[str], str, int]]]:
        """Texts that are embedded alike: their rows among some, and texts, prompt and longest input."""
        rows_of: dict[int, list[int]] = {}
        for row, (_, request) in enumerate(texts):
            rows_of.setdefault(request, []).append(row)
        return [
            (rows, ([texts[i][0] for i in rows], *self.requests[request])) for request, rows in sorted(rows_of.items())
        ]

    def _encoder(self) -> Encoder:
        if self.encoder is None:
            import torch

            from nvr_tasks.encoding import Encoder

            runtime = self.ctx.recipe.runtime
            model = load_teacher(self.teacher, runtime)
            if self.data.files is not None:
                refuse_unread(f"teacher {self.teacher.name}", model, self.data.seen())
            shard = self.ctx.options.get("shard")
            if shard is not None and model.device.type == "cuda":  # tasks of other shards want the other GPUs
                model.to(f"cuda:{int(re.split('[:/]', shard)[-2]) % torch.cuda.device_count()}")
            self.encoder = Encoder(
                model,
                getattr(torch, self.teacher.dtype),
                runtime.embed_batch_tokens or None,
                every_gpu=shard is None,
                files=self.data.files,
            )
        return self.encoder


def _refuse_broken(vectors: Vectors, texts: list[str], name: str) -> None:
    import numpy as np

    from nvr_tasks.vectors import UNIT_TOLERANCE

    for start in range(0, len(vectors), BLOCK):
        norms = np.linalg.norm(vectors[start : start + BLOCK], axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) < UNIT_TOLERANCE))  # NaN and infinite rows fail this, too
        if len(bad):
            text = texts[start + int(bad[0])]
            raise NvrError(
                f"teacher {name} gave no usable vector for {len(bad):,} texts (norm {norms[bad[0]]}), the first: {shown(text)[:80]!r}; "
                "its weights are damaged or the dtype overflows: check the model, or set its dtype to float32"
            )


class _Progress:
    """Rate and time left, over characters, since texts differ in length."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def step(self, characters: int, label: str) -> None:
        self.done += characters
        seconds = time.perf_counter() - self.start
        left = seconds * (self.total - self.done) / max(self.done, 1)
        log.info(
            "%s: %.0f %% · %.0f characters/s · %.0f s left",
            label,
            100 * self.done / max(self.total, 1),
            self.done / max(seconds, 1e-9),
            left,
        )
