"""Networks that are held in memory: narrowed in place, block by block."""
