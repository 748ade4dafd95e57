"""Runs benchmarks/real_data.yaml (every stage on real data) or another recipe, and prints what came out of it.

    python benchmarks/real_data.py --data FOLDER --encoder FOLDER_OR_HUB_ID [STAGE …] [KEY=VALUE …]
    python benchmarks/real_data.py --data FOLDER --recipe ppo_imdb.yaml --output runs/ppo_imdb

The recipe's header lists the files that FOLDER must hold. The encoder is any BERT-style model. Runs through
`accelerate launch`; what is finished is skipped, so the command can be given again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from pipelines.data import mixing
from pipelines.generation.decode import generate
from pipelines.models import chat_template

HERE = Path(__file__).resolve().parent
SHOWN = {
    "pretrain": ["eval_loss", "eval_perplexity", "parameters"],
    "mlm": ["eval_loss", "eval_accuracy", "masked_accuracy"],
    "sft": ["eval_loss", "eval_perplexity"],
    "reward": ["accuracy", "margin", "calibration_error", "pairs"],
    "ppo": ["eval_score", "eval_kl", "eval_ref_perplexity", "eval_length", "eval_eos_rate"],
    "classify": ["eval_accuracy", "eval_f1_macro", "eval_matthews"],
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", help="for recipes that say ENCODER")
    parser.add_argument("--recipe", default="real_data.yaml", help="a file beside this one")
    parser.add_argument("--output", type=Path, default=Path("runs/real_data"))
    parser.add_argument("--config_file", help="of accelerate, e.g. accelerate_configs/cpu_2.yaml")
    args, words = parser.parse_known_args()

    args.output.mkdir(parents=True, exist_ok=True)
    recipe = args.output / "recipe.yaml"
    text = (HERE / args.recipe).read_text().replace("DATA/", f"{args.data}/")
    if "ENCODER}" in text and not args.encoder:
        parser.error(f"{args.recipe} needs --encoder")
    recipe.write_text(text.replace("ENCODER}", f"{args.encoder}}}"))
    launcher = str(Path(sys.executable).parent / "accelerate")
    config = ["--config_file", args.config_file] if args.config_file else []
    command = [launcher, "launch", *config, "-m", "pipelines", str(recipe), f"output_dir={args.output}", *words]
    data = {"REAL_DATA": str(args.data.resolve())}  # for film_judge.py
    code = subprocess.run(command, cwd=HERE.parent, env=os.environ | data).returncode
    for path in sorted(args.output.glob("*/stage.json"), key=lambda p: p.stat().st_mtime):
        record = json.loads(path.read_text())
        metrics = record["metrics"]
        shown = "  ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN.get(record["kind"], []) if k in metrics)
        print(f"  {record['stage']:<12} {record['kind']:<9} {record['seconds']:>7.0f} s   {shown}")
        curve = [json.loads(line) for line in open(path.parent / "history.jsonl")]
        losses = [(e["step"], e["eval_loss"]) for e in curve if "eval_loss" in e]
        if losses:
            print(f"{'':25}validation loss: " + "  ".join(f"{step}: {loss:.3f}" for step, loss in losses))
        for e in curve:
            if "eval_ref_perplexity" in e:
                print(
                    f"{'':25}update {e['step']:>4}: held-out score {e['eval_score']:.3f}, KL {e['eval_kl']:.2f}, "
                    f"perplexity under the reference {e['eval_ref_perplexity']:.1f}"
                )
    samples(args.output)
    sys.exit(code)


def samples(run: Path) -> None:
    """What the finished models of the chain write: ten prompts of the held-out tenth, temperature 0.7."""
    import yaml

    sys.path.insert(0, str(HERE.parent))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    held_out = mixing.load(recipe["stages"]["policy"]["data"], "prompts", recipe["seed"])[1]
    prompts = [row["prompt"] for row in held_out[:10]]
    for name in ("base", "sft", "policy"):
        if not (run / name / "stage.json").is_file():
            continue
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        model = AutoModelForCausalLM.from_pretrained(run / name).eval()
        ids, _ = generate(
            model,
            [chat_template.encode_prompt(tokenizer, p) for p in prompts],
            max_new_tokens=64,
            eos_token_ids=[tokenizer.eos_token_id],
            seeds=[(0, i) for i in range(len(prompts))],
            temperature=0.7,
            top_k=0,
            top_p=1.0,
            batch_size=16,
        )
        print(f"\n  {name} answers")
        for prompt, text in zip(prompts, tokenizer.batch_decode(ids, skip_special_tokens=True)):
            said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            print(f"    {' '.join(said.split())[:70]!r}: {' '.join(text.split())[:160]}")


if __name__ == "__main__":
    main()
