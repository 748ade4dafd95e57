"""Human feedback: `rank` (the verb), `page` (what a browser talks to), `store` (the judgements), `results` (what they say)."""
