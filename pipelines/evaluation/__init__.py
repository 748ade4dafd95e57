"""What models are worth, with intervals."""
