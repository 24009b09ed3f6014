"""Recipe files: what `grail compress` was asked, written beside its result, and grids of such runs for `grail run`."""
