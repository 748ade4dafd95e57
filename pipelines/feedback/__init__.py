"""Human feedback: `server` (what a browser talks to), `store` (the judgements), `results` (what they say)."""
