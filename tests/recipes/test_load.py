"""Every shipped recipe loads; layers merge as documented; every mistake is named with its place and its remedy."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from loragraft.backbones.bases import list_bases
from loragraft.recipes.load import RecipeError, list_recipes, load_recipe, recipe_hash, recipe_to_dict

SHIPPED = Path(__file__).parents[2] / "recipes"


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_marketing_is_shipped_and_parents_are_not_listed() -> None:
    assert "marketing" in list_recipes()
    assert not any(name.startswith("_") for name in list_recipes())


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_teaches_its_command(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.sample.prompts, "a shipped recipe shows what it can do"
    text = (Path(__file__).parents[2] / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"accelerate launch train/lora.py --recipe {name}\n" in text


def test_five_line_recipe_for_a_folder(tmp_path: Path) -> None:
    path = _write(tmp_path, "mine.yaml", "extends: _base\ndata:\n  folder: ./photos\n  trigger: in my style\n")
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.data.folder == str(tmp_path / "photos")
    assert recipe.base == "pocket"


def test_the_example_in_the_base_recipe_is_a_recipe(tmp_path: Path) -> None:
    lines = (Path(__file__).parents[2] / "recipes" / "_base.yaml").read_text(encoding="utf-8").splitlines()
    first = lines.index("#   extends: _base")
    example = [line.removeprefix("#   ") for line in lines[first : first + 5]]
    recipe = load_recipe(_write(tmp_path, "mine.yaml", "\n".join(example)))
    assert recipe.data.folder == str(tmp_path / "my-photos")
    assert recipe.sample.prompts[0].startswith(recipe.data.trigger)


def test_layers_later_wins_and_lists_are_replaced(tmp_path: Path) -> None:
    _write(tmp_path, "parent.yaml", "name: p\ndata: {domain: marketing}\ntrain: {steps: 7, batch_size: 3}\n")
    child = _write(tmp_path, "child.yaml", "extends: ./parent.yaml\ntrain: {steps: 8}\noptim: {betas: [0.5, 0.6]}\n")
    recipe = load_recipe(child, ["train.seed=5", "optim.betas=[0.1, 0.2]", "optim.learning_rate=2e-4", "base=other"])
    assert (recipe.name, recipe.base) == ("child", "other")
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.seed) == (8, 3, 5)
    assert recipe.optim.betas == (0.1, 0.2)
    assert recipe.optim.learning_rate == 2e-4


def test_folder_replaces_domain_only_when_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"exactly one of data\.domain, data\.folder and data\.dataset"):
        load_recipe("marketing", ["data.folder=photos"])
    recipe = load_recipe("marketing", ["data.folder=photos", "data.domain=null"])
    assert recipe.data.folder == str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", r"unknown key 'train.stpes'; did you mean train.steps\?"),
        ("learning_rate=1", r"unknown key 'learning_rate'; did you mean optim.learning_rate\?"),
        ("zzzz=1", "a recipe has name, base"),
        ("train.steps=many", r"train.steps must be an integer, not 'many' \(text\)"),
        ("train.steps=true", r"train.steps must be an integer, not True \(boolean\)"),
        ("train.steps=1.5", "train.steps must be an integer, not 1.5"),
        ("train.steps=0", "override 'train.steps=0': train.steps must be at least 1, not 0"),
        ("optim.learning_rate=.nan", "optim.learning_rate must be greater than 0"),
        ("optim.betas=[0.9, 1.0]", "optim.betas must be at least 0 and below 1, not 1.0"),
        ("eval.images=1000001", "eval.images must be at least 0 and at most 1,000,000, not 1,000,001"),
        ("optim.learning_rate=1.0000001", "greater than 0 and at most 1, not 1.0000001"),
        ("optim.learning_rate=.nan", "greater than 0 and at most 1, not nan"),
        ("optim.betas=[0.9]", "optim.betas must be a list of 2 items"),
        ("optim.schedule=cosin", r"must be one of constant, cosine, linear, not 'cosin'; did you mean cosine\?"),
        ("sample.seed=9223372036854775808", "sample.seed must be at least 0 and at most 9,223,372,036,854,775,807"),
        ("sample.prompts=a", "sample.prompts must be a list"),
        ("sample.prompts=[1]", r"sample.prompts\[0\] must be text, not 1 \(integer\); put it in quotes"),
        ("adapter=3", "adapter is a block of keys"),
        ("data.resolution=100", "multiple of 16"),
        ("tracking.project=", "tracking.project must not be empty"),
        ("train.steps", "not of the form key=value"),
        ("train..steps=3", "not of the form key=value"),
        ("optim.betas=[0.9", "not valid YAML"),
    ],
)
def test_mistakes_in_overrides(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("marketing", [override])


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["base=flux1-dev", "data.resolution=512", "data.domain=null"], "override 'data.domain=null'"),
        (["data.count=8", "data.folder=photos"], "override 'data.folder=photos'"),
        (
            ["data.folder=photos", "data.domain=null", "data.dataset=rows.parquet"],
            "overrides 'data.folder=photos' and 'data.dataset=rows.parquet'",
        ),
        (["train.steps=3", "train.checkpointing=selective"], "override 'train.checkpointing=selective'"),
        (["train.patience=2", "train.validate_every=0"], "overrides 'train.patience=2' and 'train.validate_every=0'"),
        (["adapter.init=loftq", "numerics=16bit"], "overrides 'adapter.init=loftq' and 'numerics=16bit'"),
        (["sample.prompts=['{trigger}, blue']", "train.steps=3"], "override \"sample.prompts=['{trigger}, blue']\""),
        (
            ["data.resolutions=[128, 256]", "data.resolution=128"],
            "'data.resolutions=[128, 256]' and 'data.resolution=128'",
        ),
    ],
)
def test_what_contradicts_blames_the_overrides_that_said_it(overrides: list[str], blamed: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("marketing", overrides)
    assert f"{blamed}: " in str(caught.value)


def test_what_contradicts_in_files_blames_the_last_file(tmp_path: Path) -> None:
    _write(tmp_path, "parent.yaml", "extends: marketing\ntrain: {validate_every: 0}\n")
    child = _write(tmp_path, "child.yaml", "extends: ./parent.yaml\ntrain: {patience: 3}\n")
    with pytest.raises(RecipeError, match=r"child.yaml: train.patience counts validations"):
        load_recipe(child, ["train.steps=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", r"mine.yaml: unknown key 'trian'; did you mean train\?"),
        ("train: {steps: x}", "mine.yaml: train.steps must be an integer"),
        ("data: {domain: marketing}\ntrain: {steps: 0}", "mine.yaml: train.steps must be at least 1"),
        ("extends: _base", "mine.yaml: data needs exactly one of"),
        ("extends: marketng", r"mine.yaml: extends: unknown recipe 'marketng'; did you mean marketing\?"),
        ("extends: base", r"mine.yaml: extends: unknown recipe 'base'; did you mean _base\?"),
        ("extends: _base.yaml", r"extends: no recipe file .*; did you mean _base\?"),
        ("extends: ./", "is a folder: give the recipe's file"),
        ("extends: marketing\nname: ../elsewhere", "mine.yaml: name '../elsewhere' is a path"),
        ("extends: marketing\nname: summer! sale", "mine.yaml: name 'summer! sale' is none for an adapter"),
        ("extends: marketing\nname: -summer", "mine.yaml: name '-summer' is none for an adapter"),
        ("extends: [a, b]", "extends must be one recipe"),
        ("- a\n- b", "a recipe is a mapping"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "'train' is given twice"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(_write(tmp_path, "mine.yaml", text))


def test_a_file_in_another_encoding_is_named_and_a_byte_order_mark_is_none_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("extends: marketing\ndata: {trigger: größe}".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"mine.yaml is not UTF-8 text"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_bytes("\ufeffextends: marketing".encode())
    assert load_recipe(tmp_path / "mine.yaml").data.domain == "marketing"


def test_trigger_is_filled_in(tmp_path: Path) -> None:
    text = "data: {folder: '', trigger: sks mug, caption: 'a {trigger}'}\nsample: {prompts: ['{trigger}, blue', x]}"
    recipe = load_recipe(_write(tmp_path, "mine.yaml", text))
    assert (recipe.data.caption, recipe.sample.prompts) == ("a sks mug", ("sks mug, blue", "x"))
    with pytest.raises(
        RecipeError, match=r"mine.yaml: data.caption and sample.prompts say \{trigger\}, but data.trigger is"
    ):
        load_recipe(_write(tmp_path, "mine.yaml", text.replace("sks mug", "''")))


def test_a_data_set_on_disk_is_a_path_and_a_hub_name_is_not(tmp_path: Path) -> None:
    path = _write(tmp_path, "mine.yaml", "data: {dataset: ./mine.parquet}")
    recipe = load_recipe(path)
    assert recipe.data.dataset == str(tmp_path / "mine.parquet")
    assert recipe_to_dict(recipe, public=True)["data"]["dataset"] == "mine.parquet"
    named = load_recipe(path, ["data.dataset=someone/flowers"])
    assert named.data.dataset == "someone/flowers"
    assert recipe_to_dict(named, public=True)["data"]["dataset"] == "someone/flowers"


def test_circle_of_parents(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", "extends: ./b.yaml")
    path = _write(tmp_path, "b.yaml", "extends: ./a.yaml")
    with pytest.raises(RecipeError, match=r"circle: b.yaml -> a.yaml -> b.yaml"):
        load_recipe(path)


def test_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean marketing\?"):
        load_recipe("markting")
    _write(tmp_path, "mine.yaml", "")
    with pytest.raises(RecipeError, match=r"no recipe file .*mien.yaml; did you mean mine.yaml\?"):
        load_recipe(tmp_path / "mien.yaml")


def test_hash_is_stable_changes_with_content_and_ignores_the_place(tmp_path: Path) -> None:
    assert recipe_hash(load_recipe("marketing")) == recipe_hash(load_recipe("marketing", ["publish.to=/somewhere"]))
    assert recipe_hash(load_recipe("marketing")) != recipe_hash(load_recipe("marketing", ["train.seed=1"]))
    hashes = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        recipe = load_recipe(_write(tmp_path / place, "mine.yaml", "extends: _base\ndata: {folder: ./photos}"))
        hashes.add(recipe_hash(recipe))
        assert place not in json.dumps(recipe_to_dict(recipe, public=True))
    assert len(hashes) == 1


def test_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe("marketing", ["train.steps=9", "sample.prompts=[a, 'b: c']"])
    path = _write(tmp_path, "resolved.yaml", yaml.safe_dump(recipe_to_dict(recipe)))
    assert load_recipe(path) == recipe


def test_weights_on_disk_are_absolute_and_public_by_name_and_hub_names_stay(tmp_path: Path) -> None:
    (tmp_path / "models" / "dev").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text(
        "extends: marketing\nweights: {path: ./models/dev, encoders: nobody/FLUX.1-dev}\n"
    )
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.weights.path == str(tmp_path / "models" / "dev")
    assert recipe.weights.encoders == "nobody/FLUX.1-dev"
    assert recipe_to_dict(recipe, public=True)["weights"]["path"] == "dev"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("weights: {random: true, path: x}", "exclude each other"),
        ("weights: {encoders: x}", "goes with the transformer that weights.path names"),
        ("weights: {pth: x}", "did you mean weights.path"),
    ],
)
def test_weights_that_contradict_each_other_are_refused(tmp_path: Path, override: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: marketing\n{override}\n")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(tmp_path / "mine.yaml")


def test_naming_a_base_sets_its_defaults_below_what_stands_beside_it(tmp_path: Path) -> None:
    plain, large = load_recipe("marketing"), load_recipe("marketing", ["base=flux1-dev"])
    assert (plain.train.batch_size, large.train.batch_size) == (16, 1)
    assert large.optim.learning_rate == 2e-4 and large.train.checkpointing == "block"
    assert large.sample.prompts == plain.sample.prompts
    for order in (["train.batch_size=2", "base=flux1_dev"], ["base=flux1_dev", "train.batch_size=2"]):
        assert load_recipe("marketing", order).train == dataclasses.replace(large.train, batch_size=2)
    (tmp_path / "mine.yaml").write_text("extends: marketing\nbase: flux1-dev\ntrain: {steps: 7}\n")
    mine = load_recipe(tmp_path / "mine.yaml")
    assert mine.train == dataclasses.replace(large.train, steps=7)
    assert load_recipe(tmp_path / "mine.yaml", ["optim.learning_rate=1e-5"]).optim.learning_rate == 1e-5


def test_a_resolved_recipe_of_a_large_base_comes_back_as_it_was(tmp_path: Path) -> None:
    recipe = load_recipe("marketing", ["base=flux1-dev", "train.batch_size=3", "sample.guidance=2"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("_on-*.yaml")), ids=lambda file: file.stem)
def test_the_defaults_of_every_base_fit_the_domains(file: Path) -> None:
    base = file.stem.removeprefix("_on-")
    assert base in list_bases(), "defaults of a base that there is not"
    for name in ("marketing", "design"):
        recipe = load_recipe(name, [f"base={base}", "weights.random=true"])
        assert recipe.base == base
        assert recipe.sample.guidance == yaml.safe_load(file.read_text())["sample"]["guidance"]
