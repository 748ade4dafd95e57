"""Packing, packed attention, the fused head: exact and fast."""
