"""PPO for language models: `algorithm` (the mathematics), `rollout` (sampling), `config` and `trainer`."""
