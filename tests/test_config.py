"""Recipes: what loads, what is refused and with which words, and that the schema explains every setting."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nvr_tasks.config import Recipe
from nvr_tasks.errors import RecipeError
from nvr_tasks.recipe_files import json_schema, load_recipe, parse_recipe, shipped_recipes

Make = Callable[..., Recipe]


def refusal(make: Make, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        make(*overrides)
    return str(caught.value)


# ── what loads ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_is_what_it_says(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_the_recipes_of_the_readme_are_shipped() -> None:
    assert {"demo", "beir-small"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_resolved_recipe_is_the_same_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(yaml.safe_dump(recipe.dump()), name) == recipe


def test_loading_by_path_and_by_file_uri(tiny_file, tiny_recipe: Make) -> None:
    folder = tiny_file.parent / "a folder"
    folder.mkdir()
    moved = tiny_file.rename(folder / "tiny.yaml")
    assert load_recipe(str(moved)) == load_recipe(moved.as_uri()) == tiny_recipe()


def test_loading_from_s3(bucket: str, tiny_file, tiny_recipe: Make) -> None:
    from nvr_tasks.storage import open_storage

    open_storage(f"s3://{bucket}").put_file(tiny_file, "recipes/tiny.yaml")
    assert load_recipe(f"s3://{bucket}/recipes/tiny.yaml") == tiny_recipe()
    with pytest.raises(RecipeError, match=r"no recipe at s3://.*/absent\.yaml"):
        load_recipe(f"s3://{bucket}/recipes/absent.yaml")


def test_a_misspelt_recipe_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no recipe named 'demoo'.*Did you mean demo\?.*Shipped: .*beir-small"):
        load_recipe("demoo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "is list, expected a mapping"),
        ("", "is NoneType, expected a mapping"),
        ("a: &a [*a]", "nested too deeply, or within itself"),
        ("[" * 5000, "nested too deeply"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
            "aliases stand for",
        ),
    ],
)
def test_what_is_no_recipe_at_all(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, "mine.yaml")


@pytest.mark.parametrize("data", ["name: x".encode("utf-16"), b"name: \xff"])
def test_a_recipe_that_is_not_utf_8(tmp_path, data: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(data)
    with pytest.raises(RecipeError, match=r"recipe .*r\.yaml is not UTF-8 .*: save it as UTF-8 text"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_missing_file_names_it(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*absent\.yaml: No such file"):
        load_recipe(str(tmp_path / "absent.yaml"))


# ── unknown keys ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "key", "value", "near", "allowed"),
    [
        ("trian={}", "trian", "{}", "train", "data, description, embed, evaluate, gate"),
        ("mine.treshold=0.9", "mine.treshold", "0.9", "threshold", "num_negatives"),
        ("train.student.layer=3", "train.student.layer", "3", "layers", "lora, max_query_tokens, max_tokens, model"),
        ("embed.teachers.0.dtyp=float16", "embed.teachers.0.dtyp", "'float16'", "dtype", "max_tokens, model, name"),
        ("embed.teachers.0.prompts.querry=x", "embed.teachers.0.prompts.querry", "'x'", "query", "passage, query"),
        ("embed.teachers.0.model.pth=x", "embed.teachers.0.model.pth", "'x'", "path", "package, path, type"),
        ("data.sources.0.origin.url=x", "data.sources.0.origin.url", "'x'", "uri", "sha256, type, uri"),
        ("data.decontamination.strickt=true", "data.decontamination.strickt", "True", "strict", "pair_similarity"),
        ("register.modelname=x", "register.modelname", "'x'", "model_name", "experiment, model_name"),
    ],
)
def test_an_unknown_key_names_key_value_nearest_and_allowed(
    tiny_recipe: Make, override: str, key: str, value: str, near: str, allowed: str
) -> None:
    message = refusal(tiny_recipe, override)
    assert f"- {key}: unknown key (value {value})" in message
    assert f"Did you mean {near}?" in message
    assert allowed in message.split("Allowed here: ")[1]


def test_keys_of_the_other_kind_of_model_are_not_offered(tiny_recipe: Make) -> None:
    allowed = refusal(tiny_recipe, "embed.teachers.0.model.pth=x").split("Allowed here: ")[1]
    assert "repo" not in allowed
    assert "revision" not in allowed


def test_every_mistake_is_reported_at_once(tiny_recipe: Make) -> None:
    message = refusal(tiny_recipe, "mine.depht=1", "train.steps=0", "seed=-1")
    assert [key in message for key in ("mine.depht", "train.steps", "seed")] == [True] * 3


def test_no_setting_is_explained_in_terms_of_python() -> None:
    """Every section, list and mapping of the first two levels, given as one word."""
    schema = Recipe.model_json_schema(by_alias=True)
    names = [
        name if below is None else f"{name}.{below}"
        for name, node in schema["properties"].items()
        for below in (None, *schema["$defs"].get(node.get("$ref", "").rsplit("/", 1)[-1], {}).get("properties", {}))
    ]
    shapes = 0
    for name in names:
        try:
            load_recipe("demo", [f"{name}=word"])
        except RecipeError as error:
            said = str(error)
            assert not re.search(r"valid (tuple|dictionary|list)|instance of|object to", said), said
            shapes += bool(re.search(r"should be a (section|list|mapping), e\.g\. [\[{]", said))
    assert shapes > 15


# ── wrong values ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=0", "train.steps: 0 is not allowed: input should be greater than or equal to 1"),
        ("train.steps=many", "train.steps: 'many' is not allowed"),
        ("train.batch_size=1", "train.batch_size: 1 is not allowed"),
        ("train.learning_rate=.nan", "train.learning_rate: nan is not allowed"),
        ("train.max_grad_norm=.inf", "train.max_grad_norm: inf is not allowed"),
        ("mine.method=percpos", "mine.method: 'percpos' is not allowed: input should be 'perc_pos', 'margin_pos'"),
        ("embed.teachers.0.dtype=fp16", "embed.teachers.0.dtype: 'fp16' is not allowed: input should be 'float32'"),
        ("embed.teachers.0.model={type: zip}", "embed.teachers.0.model: {'type': 'zip'} is not allowed"),
        ("embed.teachers.0.model.package=../x", "embed.teachers.0.model.package: '../x' is not allowed"),
        ("embed.teachers=[]", "embed.teachers: [] is not allowed"),
        ("name=a b", "name: 'a b' is not allowed"),
        ("data.sources.0.origin={type: hf, repo: a/b, revision: main}", "revision: 'main' is not allowed"),
        ("data.sources.0.origin={type: hf, repo: a/b}", "revision: required, but missing"),
        ("gate.min_per_task={Docs: 2}", "gate.min_per_task.Docs: 2 is not allowed"),
        ("gate.min_per_task={SciFact: 0.1}", "gate.min_per_task names SciFact, which data.benchmark lacks"),
        ("gate.quick={tasks: [Doks]}", "gate.quick.tasks names Doks, which data.benchmark lacks; nearest: Docs"),
        ("gate.quick={tasks: [nano-beir]}", "gate.quick.tasks names NanoArguAnaRetrieval"),
        ("gate.quick={tasks: [Docs]}", "names every task of data.benchmark, so nothing would be left to score"),
        ("gate.quick={tasks: [Docs, Docs]}", "gate.quick.tasks must be unique; Docs appears twice"),
        ("gate.quick={tasks: []}", "gate.quick.tasks: [] is not allowed"),
        (
            "gate.quick.tasks=Docs",
            "gate.quick.tasks: 'Docs' is not allowed: input should be a list, e.g. [Docs] (Tasks of",
        ),
        (
            "gate.quick=Docs",
            "gate.quick: 'Docs' is not allowed: input should be a section, e.g. {tasks: […]}; its keys: counts",
        ),
        ("gate.min_per_task=[a]", "input should be a mapping, e.g. {NAME: …} (Floors of single tasks)"),
        ("train.stages=x", "input should be a list, e.g. [{steps: …}] (Stages"),
        ("gate.quick={tasks: [Docs], max_shortfall: null}", "could stop nothing: give one of both"),
        ("gate.quick={tasks: [Docs], margin: 1}", "gate.quick.margin: unknown key"),
        (
            "gate={alpha: 0.0005, resamples: 999}",
            "999 can show nothing at gate.alpha 0.0005: no p is below 0.001; ask for 2000",
        ),
        ("mine.teacher=other", "mine.teacher is 'other', but embed.teachers has minilm"),
        ("train.hard_negatives=9", "train.hard_negatives is 9 but mine.num_negatives is only 4"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(tiny_recipe: Make, override: str, said: str) -> None:
    assert said in refusal(tiny_recipe, override)


def test_a_bound_on_positives_wants_one_teacher_and_ceilings_of_each_row(tiny_recipe: Make) -> None:
    """It leaves rows out when their ceilings are set already, and is on one teacher's scale."""
    bound = "train.min_positive_score=0.3"
    assert tiny_recipe(bound, "mine.positive_policy=max").train.min_positive_score == 0.3
    assert "has no effect on ceilings while mine.positive_policy is min" in refusal(
        tiny_recipe, bound, "mine.positive_policy=min"
    )
    two = "embed.teachers=[{name: a, model: {type: tiny, architecture: bert}}, {name: b, model: {type: tiny, architecture: llama}}]"
    for ensemble in ("cross_sample", "intra_sample"):
        said = refusal(tiny_recipe, bound, two, f"mine={{teachers: [a, b], ensemble: {ensemble}, num_negatives: 4}}")
        assert "train.min_positive_score is on the scale of one teacher, but mine.teachers has a, b" in said


@pytest.mark.parametrize(
    "override",
    [
        "data.sources.0.origin.uri=https://u:hush@host/a.zip",
        "data.sources.0.origin.uri=https://hush@host/a.zip",
        "data.benchmark.0.origin.uri=s3://key:hush@bucket/set",
        "data.sources.0.origin.uri=https://host/a.zip?x=1&X-Amz-Signature=hush&X-Amz-Date=1",
        "data.sources.0.origin.uri=https://host/a.zip?sig=hush",
        "data.sources.0.origin.uri=https://host/a.zip?access_token=hush",
        "data.sources.0.origin={type: bier, uri: 'https://u:hush@host/a.zip'}",
        "data.sources.0.origin={type: beir, url: 'https://u:hush@host/a.zip'}",
        "data.sources.0.origin.uri.x=https://u:hush@host/a.zip",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(tiny_recipe: Make, override: str) -> None:
    said = refusal(tiny_recipe, override)
    assert "hush" not in said
    if "type" not in override and "uri.x" not in override:
        assert "origin.uri: " in said
        assert "carries credentials" in said
        assert "environment (AWS_*) or ~/.netrc" in said


@pytest.mark.parametrize("uri", ["https://host/a@b.zip?download=1", "/data/u:p@x", "s3://bucket/token=1/set", "data"])
def test_an_address_without_a_secret(tiny_recipe: Make, uri: str) -> None:
    assert tiny_recipe(f"data.sources.0.origin.uri={uri}").data.sources[0].origin.uri == uri


def test_names_that_appear_twice(tiny_recipe: Make) -> None:
    source = "{name: a, origin: {type: beir, uri: x}}"
    message = refusal(tiny_recipe, f"data.sources=[{source}, {source}]")
    assert "data.sources.name must be unique; a appears twice" in message


@pytest.mark.parametrize(
    ("method", "refused", "allowed"),
    [
        ("perc_pos", [0, -0.5, 1.01], [0.01, 0.95, 1]),
        ("margin_pos", [-0.01, 1.5], [0, 0.05, 1]),
        ("abs", [-1.01, 1.01], [-1, 0, 0.7, 1]),
        ("shifted", [0.5], []),
        ("naive", [0.5], []),
    ],
)
def test_thresholds_are_in_the_range_of_their_method(
    tiny_recipe: Make, method: str, refused: list[float], allowed: list[float]
) -> None:
    for threshold in refused:
        message = refusal(tiny_recipe, f"mine.method={method}", f"mine.threshold={threshold}")
        assert "threshold" in message
        assert str(threshold) in message
    for threshold in allowed:
        made = tiny_recipe(f"mine.method={method}", f"mine.threshold={threshold}")
        assert made.mine.resolved_threshold == threshold


@pytest.mark.parametrize(
    ("method", "default"), [("perc_pos", 0.95), ("margin_pos", 0.05), ("abs", 0.7), ("shifted", None), ("naive", None)]
)
def test_default_thresholds_are_the_papers(tiny_recipe: Make, method: str, default: float | None) -> None:
    assert tiny_recipe(f"mine.method={method}").mine.resolved_threshold == default


# ── overrides ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.steps=7", lambda r: r.train.steps == 7),
        ("train.steps=1e3", lambda r: r.train.steps == 1000),
        ("train.learning_rate=1e-4", lambda r: r.train.learning_rate == 1e-4),
        ("train.learning_rate=1.5E-3", lambda r: r.train.learning_rate == 1.5e-3),
        ("embed.teachers.0.max_tokens.query=20", lambda r: r.teacher.max_tokens.query == 20),
        ("embed.teachers.0.prompts.query='query: '", lambda r: r.teacher.prompts.query == "query: "),
        ("embed.teachers.0.prompts.query=a=b", lambda r: r.teacher.prompts.query == "a=b"),
        ('embed.teachers.0.name="1e5"', lambda r: r.teacher.name == "1e5"),
        ("description=nan", lambda r: r.description == "nan"),
        ("gate.min_per_task={Docs: 0.25}", lambda r: r.gate.min_per_task == {"Docs": 0.25}),
        ("train.student.layers=null", lambda r: r.train.student.layers is None),
        ("train.student.layers=", lambda r: r.train.student.layers is None),
        (" seed =3", lambda r: r.seed == 3),
    ],
)
def test_an_override_sets_one_value(tiny_recipe: Make, override: str, read: Callable[[Recipe], bool]) -> None:
    assert read(tiny_recipe(override))


def test_later_overrides_win(tiny_recipe: Make) -> None:
    assert tiny_recipe("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "is not of the form key.path=value"),
        ("=3", "is not of the form key.path=value"),
        ("train..steps=3", "is not of the form key.path=value"),
        ("train.=3", "is not of the form key.path=value"),
        ("embed.teachers.1.name=x", "'1' is not an index of a list of 1"),
        ("embed.teachers.first.name=x", "'first' is not an index of a list of 1"),
        ("embed.teachers.².name=x", "'²' is not an index of a list of 1"),
        ("name.x=1", "name is a value, not a group of settings"),
        ("name.x.y=1", "lies below a value"),
        ("gate={", "the value is not YAML"),
    ],
)
def test_a_bad_override_is_refused(tiny_recipe: Make, override: str, said: str) -> None:
    message = refusal(tiny_recipe, override)
    assert said in message
    assert override in message


def test_an_override_changes_nothing_else_that_yaml_shares_by_reference(tiny_recipe: Make) -> None:
    shared = yaml.safe_dump(tiny_recipe().dump(), default_flow_style=None)
    tree = yaml.safe_load(shared)
    tree["data"]["benchmark"][0]["origin"] = tree["data"]["sources"][0]["origin"]
    text = yaml.safe_dump(tree)
    assert "*id" in text  # an anchor and an alias, as in demo.yaml
    made = parse_recipe(text, "shared", ["data.sources.0.origin.uri=elsewhere"])
    assert made.data.sources[0].origin.uri == "elsewhere"
    assert made.data.benchmark[0].origin.uri == "docs"


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_recipe_is_frozen(tiny_recipe: Make) -> None:
    recipe = tiny_recipe()
    for model, name in ((recipe, "seed"), (recipe.mine, "depth"), (recipe.embed.teachers[0], "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, name, 1)
    assert isinstance(recipe.embed.teachers, tuple)


KEYWORDS = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for name, child in node.items():
            if name not in ("default", "const", "enum", "examples"):
                yield from _nodes(child)
    elif isinstance(node, list):
        for child in node:
            yield from _nodes(child)


def test_the_schema_is_a_json_schema() -> None:
    schema = json.loads(json_schema())
    for node in _nodes(schema):
        if isinstance(node.get("type"), str):
            assert node["type"] in KEYWORDS
        if "$ref" in node and isinstance(node["$ref"], str):
            head, _, name = node["$ref"].rpartition("/")
            assert head == "#/$defs"
            assert name in schema["$defs"]
        if isinstance(node.get("required"), list):
            assert set(node["required"]) <= set(node["properties"])
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for name in shipped_recipes():
        validator.validate(load_recipe(name).dump())
    with pytest.raises(Exception, match="trian"):
        validator.validate(load_recipe("demo").dump() | {"trian": 1})


def test_every_setting_has_a_description() -> None:
    schema = json.loads(json_schema())
    without = []
    for owner, definition in {"Recipe": schema, **schema["$defs"]}.items():
        assert definition.get("description"), f"{owner} has no docstring"
        assert definition.get("additionalProperties") is False, f"{owner} is open"
        for name, node in definition.get("properties", {}).items():
            group = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
            if not (node.get("description") or group.get("description")):
                without.append(f"{owner}.{name}")
    assert not without, f"fields without a description: {', '.join(without)}"


@pytest.mark.parametrize(
    ("overrides", "threshold"),
    [
        ([], 0.8),
        (["mine.method=margin_pos"], 0.05),
        (["mine.method=abs"], 0.7),
        (["mine.method=perc_pos"], 0.8),
        (["mine.method=margin_pos", "mine.threshold=0.1"], 0.1),
        (["mine.threshold=0.1", "mine.method=margin_pos"], 0.1),
        (["mine.threshold=0.9"], 0.9),
    ],
)
def test_another_method_starts_from_its_own_threshold(overrides: list[str], threshold: float) -> None:
    """The recipe's 0.8 is a share; as a margin it would leave nothing to mine."""
    assert load_recipe("beir-small").mine.threshold == 0.8
    assert load_recipe("beir-small", overrides).mine.resolved_threshold == threshold


def recipe_with(mine: str) -> str:
    tree = yaml.safe_load((resources.files("nvr_tasks.recipes") / "demo.yaml").read_text())
    tree["mine"] = yaml.safe_load(mine)
    return yaml.safe_dump(tree)


@pytest.mark.parametrize(
    ("mine", "overrides", "method", "threshold"),
    [
        ("{threshold: 0.9}", ["mine.method=perc_pos"], "perc_pos", 0.9),  # the default, spelt out
        ("{threshold: 0.9}", ["mine.method=abs"], "abs", 0.7),
        ("{}", ["mine={threshold: 0.5}", "mine.method=abs"], "abs", 0.5),
        ("{}", ["mine.method=abs", "mine={method: abs, threshold: 0.5}"], "abs", 0.5),
        ("{}", ["mine.method=abs", "mine={threshold: 0.5}"], "perc_pos", 0.5),
        ("{threshold: 0.9}", ["mine.method=abs", "mine=null"], None, None),
    ],
)
def test_whose_threshold_it_is(mine: str, overrides: list[str], method: str | None, threshold: float | None) -> None:
    if method is None:
        with pytest.raises(RecipeError, match="mine: None is not allowed"):
            parse_recipe(recipe_with(mine), "x", overrides)
        return
    made = parse_recipe(recipe_with(mine), "x", overrides).mine
    assert (made.method, made.resolved_threshold) == (method, threshold)


def test_merged_and_shared_mappings_are_no_double_keys() -> None:
    text = "x: &a {q: 1}\np:\n  q: &b {<<: *a, q: 2}\n  c: {<<: *b}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "x.yaml")
    assert "twice" not in str(caught.value)
    assert "unknown key" in str(caught.value)


def test_a_key_that_comes_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="seed is there twice") as caught:
        parse_recipe("name: x\nseed: 1\ndata: {}\nseed: 2\n", "x.yaml")
    assert "line 4" in str(caught.value)


@pytest.mark.parametrize("override", ["train.steps=true", "seed=yes", "runtime.device=off"])
def test_yes_is_no_number_and_no_text(override: str) -> None:
    with pytest.raises(RecipeError, match="but it is no yes-or-no setting"):
        load_recipe("demo", [override])


def test_a_wrong_item_of_a_list_is_one_error() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", ["data.sources.0.origin.min_words=0"])
    assert str(caught.value).count("\n") == 1, caught.value
