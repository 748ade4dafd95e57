"""`pipelines evaluate MODEL …`: what models are worth, with intervals, and against each other.

Seven measurements, each done where it is asked for; the stage of kind `evaluate` does the same inside a chain:

    text         loss per token, bits per byte, perplexity per token, word and byte of a text
    labelled     classifiers: accuracy, macro F1, Matthews correlation, and which classes are confused
    preferences  reward models, or policies of dpo or kto: accuracy per pair and per ranking, margin, calibration,
                 liking for length
    pairs        what a model writes for prompts or sources against given texts: BLEU, chrF, ROUGE; and the texts' loss
    tasks        tasks of lm-eval, with or without examples before each question
    prompts      answers to prompts, judged by a Python function, a reward model or a classifier
    rankings     win rates from people's rankings of answers by several models

Every figure has a 95 % bootstrap interval over its items (windows, rows, rankings, questions, prompts), but for BLEU
and chrF of pairs. Models see the same items, so differences and win rates are paired: their intervals come from
resampling the items, not the models' means.
"""

from __future__ import annotations

from pathlib import Path

from pipelines import files, launch
from pipelines.commands import command_line
from pipelines.commands.run_here import configure_logging
from pipelines.data import overlap, sources
from pipelines.errors import SetupError
from pipelines.evaluation.checks import problems
from pipelines.evaluation.figures import confusion, figures, matrices, named, table
from pipelines.evaluation.measure import measure
from pipelines.kinds import KINDS
from pipelines.recipe.sections import EvaluateSection
from pipelines.stages.evaluate import evaluation_files

EXAMPLES = """
pipelines evaluate runs/demo/base runs/demo/sft --text data/bay/corpus_validation.jsonl.gz
pipelines evaluate runs/demo/sft runs/demo/policy --prompts data/bay/heldout_prompts.jsonl --judge runs/demo/reward
pipelines evaluate runs/demo/sft --prompts data/bay/heldout_prompts.jsonl --judge runs/demo/reward --best-of 8
pipelines evaluate runs/demo/reviews --labelled data/bay/reviews_validation.jsonl --json figures.json
pipelines evaluate runs/demo/reward --preferences data/bay/rankings_validation.jsonl
pipelines evaluate Qwen/Qwen3-0.6B --tasks hellaswag --limit 200
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = command_line("evaluate", __doc__.partition(": ")[2], EXAMPLES)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="folders (runs/demo/sft) or hub ids; later over earlier"
    )
    parser.add_argument(
        "--text", help="a file with text (.txt, .jsonl with the column text, …); EOS after every row or line"
    )
    parser.add_argument("--running-text", action="store_true", help="read that file as one text, without any EOS")
    parser.add_argument("--labelled", help="classifiers: a file with text and label (name or id of a class)")
    parser.add_argument(
        "--preferences", help="reward, dpo or kto models: a file of pairs (chosen, rejected) or rankings"
    )
    parser.add_argument("--pairs", help="a file with prompt and completion, or source and target: BLEU, chrF, ROUGE")
    parser.add_argument("--tasks", nargs="+", help="lm-eval's names, or paths of task files (.yaml)")
    parser.add_argument("--shots", type=int, help="examples before each question (default: what the task says)")
    parser.add_argument("--limit", type=int, help="only so many questions of each task")
    parser.add_argument("--prompts", help="a file with the column prompt: every model answers, the judge judges")
    parser.add_argument(
        "--judge",
        help="package.module:function (prompt, answer) -> number, a reward model, a policy of dpo or kto, a classifier",
    )
    parser.add_argument("--label", help="of a classifier as judge or for preferences: whose log-odds are the score")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--best-of", type=int, metavar="N", help="what the best of 1, 2, 4, … N answers is worth")
    parser.add_argument("--oracle", metavar="JUDGE", help="with --best-of: a second judge of what the first picked")
    parser.add_argument("--temperature", type=float, help="0: the likeliest (default: 1 for prompts, 0 for pairs)")
    parser.add_argument("--response-length", type=int, default=128, help="longest answer in tokens")
    parser.add_argument("--keep-thoughts", action="store_true", help="what a model thinks is part of its answer")
    parser.add_argument("--rankings", help="people's rankings with the column models: win rates")
    parser.add_argument(
        "--max-length", type=int, help="window in tokens, or where texts are cut (default: where training did)"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--use-vllm", action="store_true", help="vLLM writes the answers to prompts and pairs")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="write the figures and intervals to this file too")
    args = parser.parse_args(argv)
    settings = {k: v for k, v in vars(args).items() if v is not None and k not in ("seed", "json")}
    if wrong := list(problems(settings)):
        raise SetupError("\n".join(f"{key}: {message}" for key, message, _ in wrong))

    for path in [*args.models, *([args.judge] if args.judge else [])]:
        files.refuse_edited(path)
    configure_logging()
    state = launch.start()
    short = {path: Path(path).name for path in args.models}
    names = short if len(set(short.values())) == len(short) else {path: path for path in short}
    values = measure({names[path]: path for path in args.models}, EvaluateSection(**settings), args.seed)
    found = figures(values)
    if state.is_main_process:
        print(table(found) + matrices(values))
        if shared := overlap.find(learned_from(args.models), evaluation_files(settings)):
            print(f"note: {overlap.note(shared)}")
        if args.json:
            tables = {f"{name}/labelled/confusion_matrix": of for name, of in confusion(values).items()}
            files.write_json(args.json, named(found) | tables)
    return 0


def learned_from(models: list[str]) -> list[overlap.Source]:
    """The data of the stages that made the folders `models`, and of those that they build on, by their records."""
    found, todo, seen = [], [Path(model) for model in models], set()
    while todo:
        folder = todo.pop()
        record = (files.read_json(folder / files.FINISHED) or {}).get("record") if folder not in seen else None
        seen.add(folder)
        if record is None or record.get("kind") not in KINDS:
            continue
        section, rows = record["sections"].get("data", {}), KINDS[record["kind"]].rows
        streamed = {"streaming": True} if section.get("streaming") else {}
        found += [({**source, **streamed}, rows) for source in sources.sources(section, "train")]
        todo += [folder.parent / name for name in record.get("parents", {})]
    return found
