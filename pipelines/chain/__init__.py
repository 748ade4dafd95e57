"""Which stages run, and what a finished one leaves beside its weights."""
