"""The windows that a run calibrates and evaluates on: what was asked for, what may be too little, what is warned of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .calibration import Windows, evaluation_windows, load_calibration
from .calibration.lengths import beyond_positions, default_length, longest_of
from .calibration.mixture import TOKENISED, absolute, parts_of
from .errors import GrailError
from .recipe import TRIAL_SHARE, Recipe

if TYPE_CHECKING:
    from .session import Session

EVALUATED_BY_DEFAULT = 10**9
OVERLAPPING = 2
"""How often a token of the text is used, from which on it is said."""


def calibration_windows(session: Session) -> Windows:
    """Those asked for; session.recipe aims at the stream no longer where none can be spared to choose by. Raises
    GrailError where that cannot be, and for weights that a method has no use for."""
    recipe = session.recipe
    windows = load_calibration(
        recipe.calibration,
        lambda: session.tokenizer,
        session.model.config.vocab_size,
        samples=recipe.samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        trial=recipe.spare_windows,
        chooses=recipe.chooses,
        memory=recipe.memory,
        longest=longest_of(session.model.config),
    )
    if recipe.chooses and windows.trial is None:
        recipe = _site_by_site(session, windows)
    if windows.weights is not None and (session.job.affine or session.uses_means):
        what = "--bias" if session.job.affine else f"--method {recipe.method}"
        raise GrailError(f"{windows.source}: weights of tokens are not offered with {what}; leave one of them out")
    if beyond := beyond_positions(windows.ids.shape[1], session.model.config):
        session.progress.warn(f"--calibration {windows.source}: {beyond}")
    widest = max(site.units.width for site in session.job.sites if session.job.changes(site))
    different = windows.different
    if different < widest:
        session.progress.warn(
            f"{different:,} different calibration tokens for {widest:,} channels: the Gram matrix is singular, and "
            f"the errors on this text say little of other text; use more"
        )
    elif windows.tokens > OVERLAPPING * different:
        session.progress.warn(
            f"--calibration {windows.source} has only {different:,} tokens for windows of {windows.tokens:,}: they "
            f"overlap; fewer --samples give nearly the same sooner, more text gives more"
        )
    if isinstance(recipe.calibration, Tensor) and len(recipe.calibration) > recipe.samples + recipe.trial_windows:
        session.progress.warn(f"{len(recipe.calibration)} windows were given, samples={recipe.samples} are used")
    return windows


def _site_by_site(session: Session, windows: Windows) -> Recipe:
    """The recipe where no windows can be spared to choose by. Raises GrailError when --target stream was wanted."""
    length = windows.ids.shape[1]
    none = (
        f"--calibration {windows.scarce} has no window of {length} tokens to spare (of {TRIAL_SHARE} it is one, at "
        f"the end, where that counts)"
    )
    if session.recipe.wants_target:
        raise GrailError(
            f"{none}, and --target stream needs some to choose alpha and ridge by; give more text, or numbers for "
            f"--alpha and --ridge"
        )
    session.progress.warn(f"{none} and choose alpha and ridge by: taking --target hidden")
    session.recipe = session.job.recipe = session.recipe.site_by_site()
    return session.recipe


def evaluated_windows(session: Session) -> Windows | None:
    """Evaluation windows: those asked for, or by default the held-out part of the calibration text."""
    asked, given = session.recipe.eval, session.recipe.calibration
    if asked == "none":
        return None
    if asked is None:
        tokenised = not isinstance(given, str) or any(p.endswith(TOKENISED) for p in parts_of(given))
        if tokenised or session.parameters >= EVALUATED_BY_DEFAULT:
            return None
        if not session.has_tokenizer:
            named = session.recipe.called or session.located.folder
            session.progress.warn(f"{named} has no tokenizer: no evaluation (name token ids with --eval)")
            return None
    source = absolute(asked or given)
    session.warn_of_seen(source)
    stored = any(part.endswith(TOKENISED) for part in parts_of(source))  # whose windows are cut already
    least = default_length(source, longest_of(session.model.config))
    length = session.recipe.seq_len or (session.windows.ids.shape[1] if session.windows and not stored else least)
    found = evaluation_windows(
        source,
        lambda: session.tokenizer,
        session.model.config.vocab_size,
        seq_len=session.recipe.seq_len if stored else length,
        held_out=session.held_out(source),
        longest=longest_of(session.model.config),
    )
    if found is None and asked is not None:
        raise GrailError(f"--eval {asked} holds less than one window of {length} tokens")
    if found is None:
        session.progress.warn(
            f"the part of {given} that is held out holds less than one window of {length} tokens: no evaluation; "
            f"give more text, a smaller --seq-len, or other text with --eval"
        )
    return found
