"""`pipelines sweep RECIPE KEY=a,b,c …`: a run for every combination of values, then one table of what came out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipelines import errors, files, launch
from pipelines.chain import chain, points
from pipelines.commands import command_line, run_here, split_words
from pipelines.errors import ChainError, SetupError, StorageError
from pipelines.kinds import KINDS
from pipelines.planning.dialogue_rows import check_dialogues
from pipelines.recipe import recipe
from pipelines.recipe.problems import Problem, RecipeError
from pipelines.recipe.stage import Recipe
from pipelines.recipe.yaml_with_lines import parse, split_values
from pipelines.report import run_folder, sweeps
from pipelines.report.run_folder import Seen
from pipelines.training.best_checkpoint import lower_is_better

ABOUT = """\
Run a recipe with every combination of some values, and compare what comes out.

KEY=a,b,c is swept; KEY=a, with one value, holds for all points. Every point is a run of its own, as `pipelines run`
would make it, in output_dir/sweep/KEYS/VALUES. Stages that no value changes are trained once, in the recipe's own
output_dir (in the first point, where that holds others). What was finished before with the same settings is linked
instead of trained again. All points are checked before the first one starts. The same command goes on after a stop or a
kill: finished points are skipped, the one that was begun is resumed, failed ones are tried again.

Ends with a table, best first, and sweep.json and sweep.html in output_dir/sweep/KEYS; the report of output_dir shows it
too. Stages named behind the recipe are trained with what they build on, and no others. A value with a comma or brackets
stands in quotes or brackets: 'KEY=[0.9, 0.95],[0.9, 0.99]'. `seed` is a key like any other; means over it are shown.
Exit codes: 0 all points finished, 1 some failed, 2 the recipe, data or command is wrong, 130 stopped.
"""
EXAMPLES = """
pipelines sweep recipes/demo.yaml policy stages.policy.args.kl_coef=0.03,0.07,0.15
pipelines sweep recipes/demo.yaml sft stages.sft.args.learning_rate=3e-4,6e-4,1e-3 seed=1,2,3
pipelines sweep recipes/demo.yaml reward --metric reward/accuracy stages.reward.args.num_train_epochs=3,5
pipelines sweep recipes/demo.yaml policy --random 8 seed=1,2,3 stages.policy.args.kl_coef=0.03,0.07,0.15,0.3
pipelines sweep recipes/qwen3_rlhf.yaml --on fsdp2 --gpus 4 stages.policy.args.learning_rate=1e-6,3e-6
"""


@dataclass
class Plan:
    """What a sweep will do: checked recipes, one for each point, and what of them differs."""

    file: str
    names: list[str]  # stages as the command names them; empty: all
    stages: list[str]  # these and what they build on
    fixed: list[str]  # overrides that hold for all
    base: Recipe  # the recipe itself
    settings: list[dict[str, str]]  # of each point: key -> value as written
    recipes: list[Recipe]  # of each point
    varied: list[str]  # stages that are not the same in all points

    @property
    def shared(self) -> list[str]:
        return [name for name in self.stages if name not in self.varied]

    @property
    def folder(self) -> Path:
        return self.recipes[0].output_dir.parent

    def words(self, i: int | None) -> list[str]:
        """The command line of point `i`, or of the recipe's own run (None), behind `pipelines run`."""
        if i is None:
            return [self.file, *self.shared, *self.fixed]
        names = self.stages if self.names else []  # `run` wants those that they build on named, too
        return [self.file, *names, *overrides(self.fixed, self.settings[i], self.recipes[i].output_dir)]


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = command_line("sweep", ABOUT, EXAMPLES)
    parser.add_argument("recipe", help="a YAML file; see recipes/")
    parser.add_argument("words", nargs="+", metavar="STAGE | KEY=a,b,c", help="stages (default: all); keys and values")
    parser.add_argument("--metric", metavar="STAGE/METRIC", help="what to compare (default: of the last stage)")
    parser.add_argument("--better", choices=("higher", "lower"), help="what is better, of a --metric that does not say")
    parser.add_argument("--random", type=int, metavar="N", help="N of the combinations, the same ones every time")
    parser.add_argument("--on", metavar="NAME", help="as in `pipelines run`, for every point")
    parser.add_argument("--gpus", type=int, metavar="N", help="as in `pipelines run`, for every point")
    args = parser.parse_intermixed_args(argv)
    if launch.launched():
        raise SetupError(
            "a sweep starts the processes of its points itself: call it without a launcher, with --on NAME"
        )
    hardware = [*(["--on", args.on] if args.on else []), *(["--gpus", str(args.gpus)] if args.gpus is not None else [])]
    if hardware:
        launch.processes(args.on, args.gpus)
    run_here.configure_logging()
    plan = prepare(args.recipe, args.words, args.random)
    check_metric(plan, args.metric, args.better)
    with files.lock(plan.folder, True) as writable:
        if not writable:
            raise StorageError(f"{plan.folder} cannot be written to: change its rights, or choose another output_dir=…")
        survey(plan)
        return run(plan, args.metric, args.better == "lower", hardware)


# --- which points, and whether they can be run ---


def prepare(file: str, words: Sequence[str], draw: int | None = None) -> Plan:
    """The points of `KEY=a,b,c …`, every one checked as `pipelines check` does. Raises `SetupError`; starts nothing."""
    names, assigned = split_words(list(words))
    fixed, swept = read_keys(assigned)
    if not swept:
        raise SetupError("nothing to sweep: give a key several values, as in stages.sft.args.learning_rate=1e-4,2e-4")
    base = recipe.load(file, fixed, ask_hub=True)
    check_dialogues(base)
    for name in names:
        base[name]  # raises for a name that is no stage
    if sweeps.FOLDER in [stage.name for stage in base.stages]:
        raise SetupError(f"{file}: a stage is called {sweeps.FOLDER!r}, as the folder of sweeps is: rename the stage")
    root = base.output_dir / sweeps.FOLDER / points.folder_name(map(points.short, swept))
    settings = points.product(swept, draw)
    recipes, problems, looked = [], {}, [but_args(base)]
    for one in settings:
        folder = root / points.folder_name(one.values())
        try:
            recipes.append(recipe.load(file, overrides(fixed, one, folder), ask_hub=True))
            if but_args(recipes[-1]) not in looked:  # it may have to train a tokenizer
                check_dialogues(recipes[-1])
                looked.append(but_args(recipes[-1]))
        except RecipeError as error:
            for problem in error.problems:
                problems.setdefault((problem.path, problem.message), []).append((one, problem))
    if problems:
        raise RecipeError(Path(file), [merged(found, len(settings)) for found in problems.values()])
    stages = points.needed([base, *recipes], names)
    numbers = points.variants([base, *recipes], stages)
    differing = {name for name, of in zip(stages, zip(*numbers, strict=True), strict=True) if len(set(of)) > 1}
    varied = set().union(*(chain.with_children(one, differing) for one in [base, *recipes]))
    first: dict[tuple, int] = {}
    for i, of in enumerate(numbers[1:]):
        if (j := first.setdefault(of, i)) != i:
            raise SetupError(
                f"{described(settings[j])} and {described(settings[i])} would train the same: the keys in which they "
                f"differ change nothing that {', '.join(stages)} learn"
            )
    return Plan(file, names, stages, fixed, base, settings, recipes, [name for name in stages if name in varied])


def but_args(one: Recipe) -> list[dict]:
    """The sections that templates, tokenizers and rows come from: points that differ in `args` have the same."""
    return [{key: section for key, section in stage.sections.items() if key != "args"} for stage in one.stages]


def read_keys(assigned: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`(overrides with one value, the values of the keys that have several)`. Raises `SetupError`."""
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    for word in assigned:
        key, _, text = word.partition("=")
        values = split_values(text)
        if values is None:
            raise SetupError(
                f"{word}: these are no values with commas between them, as in {key or 'KEY'}=1,2,3; a value that holds "
                "a comma, a bracket or a colon stands in quotes"
            )
        if key in swept or any(one.partition("=")[0] == key for one in fixed):
            raise SetupError(f"{key}: given twice; write all its values behind one, {key}=a,b,c")
        if len(values) == 1:
            fixed.append(word)
            continue
        if key in ("output_dir", "stages"):
            raise SetupError(f"{key} cannot be swept: it has one value for all points")
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise SetupError(f"{key}: the value {twice[0]} stands there twice")
        swept[key] = values
    return fixed, swept


def overrides(fixed: Sequence[str], settings: dict[str, str], folder: Path) -> list[str]:
    """The overrides of a point, its output folder last."""
    fixed = [one for one in fixed if not one.startswith("output_dir=")]
    quoted = yaml.safe_dump(str(folder), default_style='"', width=10_000, allow_unicode=True).strip()
    return [*fixed, *(f"{key}={value}" for key, value in settings.items()), f"output_dir={quoted}"]


def described(settings: dict[str, str]) -> str:
    """A point in words: "policy.kl_coef=0.1 seed=2"."""
    return " ".join(f"{points.short(key)}={value}" for key, value in settings.items())


def merged(found: list[tuple[dict[str, str], Problem]], count: int) -> Problem:
    """One problem for what is wrong in several points: once, with the values, or with the first point that has it."""
    settings, problem = found[0]
    others = list(dict.fromkeys(repr(p.value) for _, p in found if repr(p.value) != repr(problem.value)))
    if problem.path in settings and others:
        problem.message += f" (so with {', '.join(others[:5])}{', …' * (len(others) > 5)})"
    elif problem.path not in settings and len(found) < count:
        problem.message += f" (in {described(settings)}{', and others' * (len(found) > 1)})"
    return problem


def survey(plan: Plan) -> None:
    """Link what is there already. Raises `ChainError` with every reason why a point cannot be run."""
    busy = [str(one.output_dir) for one in [plan.base, *plan.recipes] if files.busy(one.output_dir)]
    if busy:
        raise ChainError(f"a run is still working in {busy[0]}: wait for it, or stop it; then give this command again")
    refused = []
    for one in plan.recipes:
        link(plan, one)
        refused += [f"{one.output_dir}: {line}" for line in chain.survey(one, plan.stages)[1]]
    if refused:
        raise ChainError("\n".join([*refused, "Or move the folder of a point away: the sweep then makes it again."]))


def link(plan: Plan, one: Recipe) -> None:
    """Link what a point needs and the recipe's own run, or any point of any of its sweeps, has finished."""
    homes = [plan.base.output_dir, *sorted(plan.base.output_dir.glob(f"{sweeps.FOLDER}/*/*/"))]
    points.link_finished(one, plan.stages, homes)


# --- running them ---


def run(plan: Plan, metric: str | None, lower: bool, hardware: Sequence[str]) -> int:
    """Run what is due, one run after the other; writes the results after each. Returns the exit code.

    `lower`: whether a metric that does not say what is better is better when it is lower.
    """
    failed: dict[int, str] = {}

    missing = [name for name in plan.shared if not (plan.recipes[0][name].folder / files.FINISHED).is_file()]
    if missing and (other := chain.survey(plan.base, plan.shared)[1]):
        print(f"{', '.join(missing)}: the first point makes what all need, for {plan.base.output_dir} has others:")
        print("".join(f"  {line}\n" for line in other), end="", flush=True)
    elif missing:
        print(f"for all points, in {plan.base.output_dir}: {', '.join(missing)}", flush=True)
        code, why, stopped = start([*plan.words(None), *hardware])
        if code:
            launch.last_words(f"no point was started: {why}")
            return 130 if stopped else max(code, 1)  # below 0: killed
    for i, one in enumerate(plan.recipes):
        title = f"[{i + 1} of {len(plan.recipes)}] {described(plan.settings[i])}"
        try:
            link(plan, one)
            if all(step.action == "finished" for step in chain.plan(one, plan.stages)):
                print(f"{title}: finished, skipped ({one.output_dir})", flush=True)
                continue
            print(f"{title}: {one.output_dir}", flush=True)
            code, why, stopped = start([*plan.words(i), *hardware])
        except SetupError as error:  # another process changed something since the survey
            code, why, stopped = 2, str(error), False
        if stopped:
            sweeps.write(plan.folder, results(plan, metric, lower, failed))
            launch.last_words(f"stopped in {described(plan.settings[i])}; the same command goes on from there")
            return 130
        if code:
            failed[i] = why
            print(f"{title}: failed: {why}", flush=True)
        sweeps.write(plan.folder, results(plan, metric, lower, failed))
    found = results(plan, metric, lower, failed)
    sweeps.write(plan.folder, found)
    if (plan.base.output_dir / files.CHAIN).is_file():
        run_here.draw(plan.base.output_dir)
    print(shown(plan, found), flush=True)
    if missing := without_metric(plan, found, metric):
        raise SetupError(missing)
    return 1 if failed else 0


def start(words: Sequence[str]) -> tuple[int, str, bool]:
    """`pipelines run WORDS` in a process of its own: `(exit code, why it failed, whether it was stopped)`."""
    return launch.run_apart([sys.executable, "-m", "pipelines", "run", *words])


# --- what came out ---


def check_metric(plan: Plan, metric: str | None, better: str | None) -> None:
    """Raise `SetupError` for a `--metric` of a stage that no key decides, or where it is not known what is better."""
    if metric is None:
        if better:
            raise SetupError(f"--better {better} is for a --metric: what is better of the default one is known")
        return
    stage, _, name = metric.partition("/")
    if stage in plan.shared:
        raise SetupError(f"--metric {metric}: no key changes {stage}, it is the same in all points")
    if stage not in plan.varied or not name:
        near = errors.meant(stage, plan.varied) if stage not in plan.varied else ""
        raise SetupError(f"--metric {metric}: give STAGE/METRIC, with one of the stages {', '.join(plan.varied)}{near}")
    known = lower_is_better(name)
    if known is None and better is None:
        raise SetupError(f"--metric {metric}: is it better when higher or lower? Say --better higher or --better lower")
    if known is not None and better and known != (better == "lower"):
        raise SetupError(f"--better {better}: {name} is better when {'lower' if known else 'higher'}; drop --better")


def results(plan: Plan, metric: str | None, lower: bool, failed: dict[int, str]) -> sweeps.Sweep:
    """What the folders of the points hold now."""
    found = sweeps.Sweep(
        recipe=Path(plan.file).name if Path(plan.file).is_absolute() else plan.file,
        keys=[points.short(key) for key in plan.settings[0]],
        shared=plan.shared,
    )
    runs = [{s.name: s for s in look(one) if s.name in plan.stages} for one in plan.recipes]
    found.shared_seconds = sum(max(s[name].seconds if name in s else 0 for s in runs) for name in plan.shared)
    stage, name = metric.split("/", 1) if metric else default_metric(plan, runs)
    found.metric = f"{stage}/{name}" if name else ""
    found.lower_is_better = lower if (known := lower_is_better(name)) is None else known
    spent: dict[Path, float] = {}
    for i, seen in enumerate(runs):
        row = sweeps.Row(
            plan.recipes[i].output_dir.name,
            {points.short(key): parse(text, {}, []) for key, text in plan.settings[i].items()},
        )
        if all(name in seen and seen[name].state == "finished" for name in plan.stages):
            row.state = "finished"
        elif i in failed:
            row.state, row.error = "failed", failed[i]
        row.seconds = sum(seen[name].seconds for name in plan.varied if name in seen)
        spent |= {(plan.recipes[i].output_dir / name).resolve(): one.seconds for name, one in seen.items()}
        if row.state == "finished":
            row.metric = sweeps.measured(seen[stage]).get(name) if stage in seen else None
            below = points.needed([plan.recipes[i]], [stage]) if stage else []  # its own KL, or of what it is built on
            kls = [value for one in below if (value := sweeps.kl_of(seen[one])) is not None]
            row.kl = kls[-1] if kls else None
        found.points.append(row)
    found.spent = sum(spent.values())
    return found


def look(one: Recipe) -> list[Seen]:
    """The stages of a run, none where nothing was started."""
    return run_folder.read(one.output_dir) if any(one.output_dir.glob("*/*.json")) else []


def default_metric(plan: Plan, runs: list[dict[str, Seen]]) -> tuple[str, str]:
    """`(stage, metric)`: the headline of the last stage that the keys decide and that has one; empty without any."""
    for stage in reversed(plan.varied):
        for seen in runs:
            values = sweeps.measured(seen[stage]) if stage in seen else {}
            for key, _ in KINDS[plan.base[stage].kind].headline:
                if key in values:
                    return stage, key
    return "", ""


def without_metric(plan: Plan, found: sweeps.Sweep, metric: str | None) -> str:
    """Why finished points have no metric; empty where they have one."""
    lacking = [i for i, row in enumerate(found.points) if row.state == "finished" and row.metric is None]
    if not lacking:
        return ""
    if metric is None and not found.metric:
        return "no stage of the sweep has a headline metric: name one with --metric STAGE/METRIC"
    stage, name = found.metric.split("/", 1)
    seen = next(s for s in look(plan.recipes[lacking[0]]) if s.name == stage)
    known = sorted(sweeps.measured(seen))
    return (
        f"{stage} has no metric {name!r}{errors.meant(name, known)}; it has {', '.join(known)}. The same command with "
        "another --metric trains nothing again"
    )


def shown(plan: Plan, found: sweeps.Sweep) -> str:
    """The results for the terminal."""
    lines = [sweeps.text_table(*sweeps.table(found))]
    head, rows = sweeps.over_seeds(found)
    if rows:
        lines.append(sweeps.text_table(head, rows))
    lines += [f"{row.name}: {row.error}" for row in found.points if row.state == "failed"]
    return "\n".join([*lines, sweeps.costs(found), f"{plan.folder / sweeps.PAGE}"])
