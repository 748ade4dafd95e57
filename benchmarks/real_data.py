"""Runs benchmarks/real_data.yaml, every stage on real data, and prints what came out of it.

    python benchmarks/real_data.py --data FOLDER --encoder FOLDER_OR_HUB_ID [STAGE …] [KEY=VALUE …]

The recipe's header lists the files that FOLDER must hold. The encoder is any BERT-style model. Runs through
`accelerate launch`; what is finished is skipped, so the command can be given again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHOWN = {
    "pretrain": ["eval_loss", "eval_perplexity", "parameters"],
    "mlm": ["eval_loss", "eval_accuracy", "masked_accuracy"],
    "sft": ["eval_loss", "eval_perplexity"],
    "reward": ["accuracy", "margin", "calibration_error", "pairs"],
    "ppo": ["eval_score", "eval_kl", "eval_length", "eval_eos_rate"],
    "classify": ["eval_accuracy", "eval_f1_macro", "eval_matthews"],
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/real_data"))
    args, words = parser.parse_known_args()

    args.output.mkdir(parents=True, exist_ok=True)
    recipe = args.output / "recipe.yaml"
    text = (HERE / "real_data.yaml").read_text().replace("DATA/", f"{args.data}/").replace("ENCODER}", f"{args.encoder}}}")
    recipe.write_text(text)
    launcher = str(Path(sys.executable).parent / "accelerate")
    command = [launcher, "launch", "-m", "pipelines", str(recipe), f"output_dir={args.output}", *words]
    code = subprocess.run(command, cwd=HERE.parent).returncode
    for path in sorted(args.output.glob("*/stage.json"), key=lambda p: p.stat().st_mtime):
        record = json.loads(path.read_text())
        metrics = record["metrics"]
        shown = "  ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN.get(record["kind"], []) if k in metrics)
        print(f"  {record['stage']:<12} {record['kind']:<9} {record['seconds']:>7.0f} s   {shown}")
        curve = [json.loads(line) for line in open(path.parent / "history.jsonl")]
        losses = [(e["step"], e["eval_loss"]) for e in curve if "eval_loss" in e]
        if losses:
            print(f"{'':25}validation loss: " + "  ".join(f"{step}: {loss:.3f}" for step, loss in losses))
    sys.exit(code)


if __name__ == "__main__":
    main()
