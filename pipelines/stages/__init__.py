"""One module per kind of stage (the table is `pipelines.kinds`): `DEFAULTS`, `problems` and `run`, read top to
bottom.
"""
