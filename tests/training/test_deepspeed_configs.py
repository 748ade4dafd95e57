"""accelerate_configs/zero*.yaml, as DeepSpeed itself reads them: by Accelerate's launcher and plugin, transformers'
arguments and `DeepSpeedConfig`, on a simulated GPU; no process is started.
"""

import types
from pathlib import Path

import pytest
from simulated_gpu import simulated_gpu
from tiny_words import WORDS

from pipelines.recipe.recipe import load
from pipelines.training import arguments

CONFIGS = sorted((Path(__file__).parents[2] / "accelerate_configs").glob("zero*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def deepspeed():
    """Tests of this file are skipped where DeepSpeed is not installed."""
    return pytest.importorskip("deepspeed", reason="deepspeed is not installed (the extra `deepspeed`)")


def launched(path: Path) -> tuple[dict, int]:
    """`(environment, number of processes)` that `accelerate launch --config_file path` gives a script."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    command = ["--config_file", str(path), "--machine_rank", "0", "--main_process_ip", "127.0.0.1", "x.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    _, environment = prepare_deepspeed_cmd_env(args)
    return {k: v for k, v in environment.items() if k.startswith("ACCELERATE_")}, args.num_processes


def left_open(config, path="") -> list[str]:
    """Paths of what is still "auto"."""
    if not isinstance(config, dict):
        return [path] if config == "auto" else []
    return [found for key, value in config.items() for found in left_open(value, f"{path}.{key}".strip("."))]


@pytest.mark.parametrize("asked", [{}, {"fp16": True}, {"bf16": False}], ids=["silent", "fp16", "fp32"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_reads_what_the_recipe_and_the_file_say(recipe, write, tiny_gpt2, path, asked):
    from deepspeed.runtime import config as ds_config
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    rows = write("a.jsonl", [{"prompt": f"what is {w}", "completion": f"{w} is {w}"} for w in WORDS * 3])
    stage = {
        "kind": "sft",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": rows},
        "args": {"global_batch_size": 64, "per_device_train_batch_size": 2, "max_grad_norm": 0.5, **asked},
    }
    stage = load(recipe({"x": stage}))["x"]
    environment, world = launched(path)
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch, devices=8):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(64 // world // 2))  # as `build_args` does
        args, wrong = arguments.problems(stage, arguments.Hardware("cuda", world, deepspeed=True))
        assert not wrong
        patch.setattr(type(args), "world_size", world)
        plugin = args.deepspeed_plugin  # as Trainer goes on with it
        config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
        config.trainer_config_process(args)
        model = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=32))
        config.trainer_config_finalize(args, model, 100)  # raises where the file and the arguments are at odds
        unset_hf_deepspeed_config()
    assert not left_open(config.config)

    with pytest.MonkeyPatch.context() as patch:
        group = types.SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda *_: world)
        patch.setattr(ds_config, "dist", group)
        read = ds_config.DeepSpeedConfig(config.config)
    precision = "bf16" if not asked else "fp16" if "fp16" in asked else "fp32"
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert read.float16_config.enabled == (precision == "fp16")
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (64, 2)
    assert read.gradient_accumulation_steps == 64 // world // 2 == args.gradient_accumulation_steps
    assert read.gradient_clipping == 0.5
    zero, name = read.zero_config, path.stem
    assert zero.stage == int(name[4])
    assert zero.gather_16bit_weights_on_model_save == (zero.stage == 3)  # else a finished stage would have no weights
    assert plugin.zero3_init_flag == (zero.stage == 3)
    for offload in (zero.offload_optimizer, zero.offload_param):
        assert (offload is not None and offload.device == "cpu") == name.endswith("offload")
