"""PPO for language models: `algorithm` (the mathematics), `config`, `trainer`, and what it stands on."""
