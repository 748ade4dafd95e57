"""From sources to checked, encoded rows."""
