"""The command line itself: verbs and near misses, the launcher that `--on` starts, what a wheel brings along."""

import logging
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers.trainer_utils import compare_trainer_and_checkpoint_args

from pipelines import __main__, launch
from pipelines.commands import init
from pipelines.commands.run_here import configure_logging
from pipelines.errors import SetupError

ROOT = Path(__file__).parents[2]


def python(*words, cwd=ROOT, timeout=120):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "word, hint",
    [
        ("chek", "did you mean check?"),
        ("plann", "did you mean plan?"),
        ("stat", "no verb 'stat'"),
        ("demo", "no verb 'demo'"),
    ],
)
def test_a_word_that_is_neither_verb_nor_file_is_not_read_as_a_recipe(word, hint, capsys):
    assert __main__.main([word, "recipe.yaml"]) == 2
    assert hint in capsys.readouterr().err


def test_a_recipe_needs_no_verb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plain").write_text("a recipe may have any name")
    assert [__main__.verb_of([word]) for word in ("no/such.yaml", "x.yml", "plain", "--redo")] == ["run"] * 4


def test_every_verb_teaches_with_examples():
    listed = {line.split()[1] for line in __main__.ABOUT.splitlines() if line.startswith("  pipelines ")}
    assert listed == set(__main__.VERBS)
    code = "import sys\nfrom pipelines.__main__ import VERBS, main\n"
    code += "for verb in VERBS:\n    print('===', verb)\n    sys.stdout.flush()\n"
    code += "    try: main([verb, '--help'])\n    except SystemExit as end: assert end.code == 0, verb\n"
    code, out, err = python("-c", code)
    assert code == 0, err
    for part in out.split("=== ")[1:]:
        verb = part.split()[0]
        assert f"usage: pipelines {verb}" in part and f"\n  pipelines {verb}" in part, part


def test_help_and_version_need_no_torch():
    code = "import sys\nfrom pipelines.__main__ import main\nmain(['--help']); main(['--version'])\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    assert python("-c", code)[0] == 0


# --- the launcher ---


@pytest.fixture
def launcher(monkeypatch):
    """`launcher(words)` -> the command line that Accelerate's launcher was given, on a machine with 4 GPUs."""
    from accelerate.commands import launch as theirs

    lines = []
    monkeypatch.setattr(theirs, "launch_command", lambda args: lines.append(args))
    monkeypatch.setattr(launch, "available", lambda: 4)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    for name in (launch.ASKED, "PET_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*words):
        assert __main__.main(["run", "r.yaml", *words]) == 0
        return lines.pop()

    return run


@pytest.mark.parametrize(
    "words, file, processes",
    [
        ([], "ddp", 4),
        (["--gpus", "2"], "ddp", 2),
        (["--gpus", "1"], "single_gpu", 1),
        (["--on", "fsdp2"], "fsdp2", 4),
        (["--on", "zero3", "--gpus", "3"], "zero3", 3),
        (["--on", "cpu_2"], "cpu_2", 2),
        (["--on", "accelerate_configs/cpu.yaml"], "cpu", 1),
    ],
)
def test_on_names_a_configuration(launcher, words, file, processes):
    line = launcher(*words, "sft", "output_dir=x", "--redo", "sft")
    assert Path(line.config_file).stem == file and line.num_processes == processes
    assert line.module and line.training_script == "pipelines"
    assert line.training_script_args == ["r.yaml", "sft", "output_dir=x", "--redo", "sft"]
    assert os.environ[launch.ASKED] == str(processes)  # a launcher that starts fewer is found out


@pytest.mark.parametrize(
    "words, hint",
    [
        (["--on", "fsdp"], "did you mean fsdp2"),
        (["--on", "accelerate_configs/zero33.yaml"], "did you mean accelerate_configs/zero3.yaml"),
        (["--gpus", "8"], "4 GPUs are here"),
        (["--gpus", "0"], "must be 1 or more"),
        (["--on", "cpu_2", "--gpus", "2"], "runs on CPUs"),
        (["--on", "ddp_multi"], "--machine_rank N"),
    ],
)
def test_what_cannot_be_launched_is_said(launcher, capsys, words, hint):
    assert __main__.main(["run", "r.yaml", *words]) == 2
    assert hint in capsys.readouterr().err


def test_a_launched_process_starts_no_launcher(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert __main__.main(["run", "r.yaml", "--on", "ddp"]) == 2
    assert "one started this process" in capsys.readouterr().err


def test_no_gpu_is_said_before_anything_starts(monkeypatch):
    monkeypatch.setattr(launch, "available", lambda: 0)
    with pytest.raises(SetupError, match="no GPUs are here .*cpu_2"):
        launch.launch("ddp", None, ["r.yaml"])


# --- what comes with the package ---


def test_the_packages_of_the_wheel_are_those_of_the_tree():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent for p in (ROOT / "pipelines").rglob("*.py")}
    own = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    mapped = told["package-dir"]
    assert set(told["packages"]) == own | set(mapped), "pyproject.toml, [tool.setuptools] packages"
    assert all((ROOT / folder).is_dir() for folder in mapped.values())


def test_init_copies_a_recipe_and_the_data_it_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["init"]) == 0 and "demo" in capsys.readouterr().out
    assert __main__.main(["init", "demo"]) == 0
    told = capsys.readouterr().out
    recipe = yaml.safe_load(Path("demo.yaml").read_text())
    named = [p for p in _paths(recipe) if p.startswith("data/")]
    assert named and all(Path(p).is_file() and p in told for p in named)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module, function in (p.split(":") for p in _paths(recipe) if p.startswith("data.") and ":" in p):
        monkeypatch.delitem(sys.modules, module, raising=False)
        assert Path(*module.split(".")).with_suffix(".py").is_file() and function
    assert __main__.main(["init", "demo"]) == 2 and "is here already" in capsys.readouterr().err
    assert __main__.main(["init", "demmo"]) == 2 and "did you mean demo" in capsys.readouterr().err
    assert __main__.main(["init", "demo", "--as", "deep/mine.yaml"]) == 0 and Path("deep/mine.yaml").is_file()


def _paths(value):
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [path for item in items for path in _paths(item)]


def test_every_recipe_begins_with_what_it_is_for():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert len(init._headline(path)) > 20, path


def test_env_names_what_a_bug_report_needs(capsys):
    assert __main__.main(["env"]) == 0
    told = capsys.readouterr().out
    for word in ("finetune-pipelines", "torch", "transformers", "python", "gpu", "[deepspeed]", "cores"):
        assert word in told
    assert str(Path.home()) not in told


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder(tmp_path):
    """Built, unpacked where nothing else is: the recipes and launch configurations are there and are used."""
    source = tmp_path / "source"  # building leaves files beside pyproject.toml
    for name in ("pyproject.toml", "README.md", "LICENSE", "pipelines", "recipes", "accelerate_configs", "data"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheel"), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site")}

    def pipelines(*words):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *words],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "demo" in pipelines("init")
    pipelines("init", "demo")
    assert "no problems" in pipelines("check", "demo.yaml")
    code = "from pipelines import launch; print(launch.config_file('cpu_2'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True)
    assert str(tmp_path / "site") in done.stdout


def test_a_fraction_of_steps_is_no_change_of_settings():
    """A resumed run whose recipe says `eval_steps: 0.1`; the Trainer's state holds the steps that it came to."""
    configure_logging()
    log, heard = logging.getLogger("transformers.trainer_utils"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    log.addHandler(handler)
    try:
        args = SimpleNamespace(eval_steps=0.1, per_device_train_batch_size=2, n_gpu=1)
        state = SimpleNamespace(eval_steps=11, train_batch_size=2)
        compare_trainer_and_checkpoint_args(args, state)
        log.warning("another")
    finally:
        log.removeHandler(handler)
    assert heard == ["another"]
