"""Model soups: several checkpoints of one architecture averaged into one (Wortsman et al., ICML 2022)."""

from .run import soup

__all__ = ["soup"]
