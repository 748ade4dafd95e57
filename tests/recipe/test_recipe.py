"""A recipe's mistakes are all found at once, each with its line, key, value and fix."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.recipe import recipe as recipe_recipe
from pipelines.recipe.problems import RecipeError

ROWS = [{"prompt": f"what is {i}", "completion": "a fish"} for i in range(20)]


def load(path, *overrides, **kwargs):
    return recipe_recipe.load(path, list(overrides), **kwargs)


def messages(path, *overrides) -> str:
    with pytest.raises(RecipeError) as error:
        load(path, *overrides)
    return str(error.value)


def stages(train, **args):
    return {"sft": {"kind": "sft", "model": {"model_name_or_path": "gpt2"}, "data": {"train": train}, "args": args}}


def test_a_good_recipe_loads_with_typed_values(recipe, write):
    path = recipe(stages(write("a.jsonl", ROWS), learning_rate="2e-5", num_train_epochs=2))
    stage = load(path)["sft"]
    assert stage.sections["args"] == {"learning_rate": 2e-5, "num_train_epochs": 2.0}
    assert stage.folder.name == "sft"


def test_scientific_notation_is_a_number(tmp_path, write):
    data = write("a.jsonl", ROWS)
    path = tmp_path / "r.yaml"
    path.write_text(
        f"stages:\n  sft:\n    kind: sft\n    model: {{model_name_or_path: gpt2}}\n    data: {{train: {data}}}\n"
        "    args: {learning_rate: 2e-5, weight_decay: 1E-2, max_grad_norm: .5}\n"
    )
    assert load(path)["sft"].sections["args"] == {"learning_rate": 2e-5, "weight_decay": 0.01, "max_grad_norm": 0.5}


def test_all_problems_of_all_stages_at_once_with_lines(tmp_path, write):
    data = write("a.jsonl", ROWS)
    path = tmp_path / "r.yaml"
    path.write_text(
        "seeds: 1\n"
        "stages:\n"
        "  base:\n"
        "    kind: pretrain\n"
        "    model: {config: {model_type: gpt2, n_layers: 2}}\n"
        f"    data: {{train: {data}}}\n"
        "  sft:\n"
        "    kind: sft\n"
        "    model: {model_name_or_path: stage:bas}\n"
        "    data: {train: nowhere.jsonl}\n"
        "    args:\n"
        "      learning_rat: 1e-5\n"
        "      num_train_epochs: three\n"
        "      output_dir: x\n"
        "      evaluation_strategy: steps\n"
        "  last: {kind: pp0}\n"
    )
    text = messages(path)
    for expected in [
        "seeds",
        "did you mean seed?",
        "n_layers = 2",
        "did you mean n_layer?",
        "needs a tokenizer",
        "`stage:bas` names no earlier stage (did you mean base?)",
        "nowhere.jsonl",
        "no such file",
        "line 12",
        "did you mean learning_rate?",
        "'three'",
        "must be a number",
        "top-level `output_dir`",
        "use eval_strategy",
        "did you mean ppo?",
    ]:
        assert expected in text, expected
    assert len(text.splitlines()) > 18


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n  a: {kind: sft}\n  a: {kind: sft}\n")
    assert "line 3" in messages(path) and "duplicate key" in messages(path)


@pytest.mark.parametrize("text, words", [("a: [", "not YAML"), ("", "empty"), ("- 1\n", "mapping")])
def test_files_that_are_no_recipes(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert words in messages(path)


def test_overrides_change_values_and_say_where_they_come_from(recipe, write):
    path = recipe(stages(write("a.jsonl", ROWS)))
    assert load(path, "stages.sft.args.learning_rate=1e-4")["sft"].sections["args"]["learning_rate"] == 1e-4
    assert load(path, "output_dir=elsewhere")["sft"].folder == Path("elsewhere/sft")
    assert load(path, "stages.sft.model.model_name_or_path=Qwen/Qwen3-0.6B")
    text = messages(path, "stages.sft.args.learning_rat=1")
    assert "command line" in text and "did you mean learning_rate?" in text
    assert "did you mean sft?" in messages(path, "stages.sfd.args.learning_rate=1")


def test_only_earlier_stages_can_be_named(recipe, write):
    data = write("a.jsonl", ROWS)
    both = {
        "one": {"kind": "sft", "model": {"model_name_or_path": "stage:two"}, "data": {"train": data}},
        "two": {"kind": "sft", "model": {"model_name_or_path": "gpt2"}, "data": {"train": data}},
    }
    assert "names no earlier stage" in messages(recipe(both))


def test_a_folder_without_a_model_is_found(recipe, write, tmp_path):
    (tmp_path / "empty").mkdir()
    text = messages(recipe(stages(write("a.jsonl", ROWS))), f"stages.sft.model.model_name_or_path={tmp_path / 'empty'}")
    assert "holds no model" in text


def test_settings_that_would_be_ignored_are_refused(recipe, write):
    text = messages(recipe(stages(write("a.jsonl", ROWS), assistant_only_loss=True, packing_strategy="wrapped")))
    assert "args.assistant_only_loss" in text and "args.packing_strategy" in text


def test_a_chat_template_that_is_not_there_is_said_before_training(recipe, write):
    text = messages(recipe(stages(write("a.jsonl", ROWS))), "stages.sft.model.chat_template=chatlm")
    assert "model.chat_template = 'chatlm'" in text and "did you mean chatml?" in text
    assert "nor a file" in messages(
        recipe(stages(write("a.jsonl", ROWS))), "stages.sft.model.chat_template=no/such.jinja"
    )


def test_two_ways_to_say_the_batch_size_are_refused(recipe, write):
    text = messages(recipe(stages(write("a.jsonl", ROWS), global_batch_size=8, gradient_accumulation_steps=4)))
    assert "args.gradient_accumulation_steps = 4" in text and "give one of the two" in text


def test_settings_of_adapters_are_never_ignored(recipe, write):
    text = messages(
        recipe(stages(write("a.jsonl", ROWS))), "stages.sft.model.lora_r=8", "stages.sft.model.load_in_4bit=true"
    )
    assert "model.lora_r = 8" in text and "`use_peft: true`" in text and "model.load_in_4bit" in text


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("**/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_checks(path):
    """But for data that its header says to put into downloads/, where that is not there."""
    try:
        assert load(path).stages
    except RecipeError as error:
        missing = [p for p in error.problems if str(p.value).startswith("downloads/") and "no such file" in p.message]
        assert missing == error.problems, error
        assert "downloads" in path.read_text().partition("output_dir")[0]


def test_check_is_quick_and_help_needs_no_torch(recipe, write, tiny_gpt2):
    stage = stages(write("a.jsonl", ROWS))["sft"] | {"model": {"model_name_or_path": str(tiny_gpt2)}}
    path = recipe({f"s{i}": stage for i in range(7)})
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "pipelines", "check", str(path)], capture_output=True, text=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "7 stages, no problems" in done.stdout, done.stderr
    seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    assert seconds < 15  # the bar is 5 s for eleven stages on an idle machine: benchmarks/overhead.py measures it
    code = "import sys; sys.argv = ['pipelines', '--help']\nimport pipelines.__main__ as m\ntry: m.entry()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_bad_recipes_end_with_exit_code_2(recipe, write):
    path = recipe(stages(write("a.jsonl", ROWS), learning_rat=1))
    done = subprocess.run([sys.executable, "-m", "pipelines", "check", str(path)], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean learning_rate?" in done.stderr and "Traceback" not in done.stderr


def test_an_override_does_not_reach_a_stage_that_shares_the_section_by_an_alias(tmp_path, write):
    data = write("a.jsonl", ROWS)
    path = tmp_path / "r.yaml"
    path.write_text(
        f"stages:\n  a: {{kind: sft, model: {{model_name_or_path: gpt2}}, data: &d {{train: {data}}}, args: &args "
        f"{{max_steps: 3}}}}\n"
        "  b: {kind: sft, model: {model_name_or_path: gpt2}, data: *d, args: *args}\n"
    )
    loaded = load(path, "stages.a.args.max_steps=5")
    assert loaded["a"].sections["args"] == {"max_steps": 5} and loaded["b"].sections["args"] == {"max_steps": 3}


@pytest.mark.parametrize("words", [["status"], ["keys", "rank"]], ids=" ".join)
def test_a_reader_that_has_had_enough_is_no_error(words, recipe, write):
    """`| head`: the pipe is closed before anything is written into it."""
    words = [*words, recipe(stages(write("a.jsonl", ROWS)))] if words == ["status"] else words
    command, root = [sys.executable, "-m", "pipelines", *words], Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
