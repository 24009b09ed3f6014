"""How a report shows itself at a prompt and in a notebook; the same for language models and for networks in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .page.run import Run


class Readable:
    """A report; `to_json` says all that is shown, `output` where the result lies (None: in memory alone)."""

    output: str | None

    def to_json(self) -> dict[str, Any]:
        """grail.json."""
        raise NotImplementedError

    def summary(self) -> str:
        """A few lines of text: model, method, sizes before and after, perplexity or accuracy where it was evaluated,
        mean error per site before and after the repair, where it was written to."""
        from .page.short import summary

        told = summary(self._run())
        return told if self.output is None else f"{told}\nwritten to {self.output}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n{self.summary()}"

    def _repr_html_(self) -> str:
        """For notebooks: the figures, the plots and the table of the sites, without a script."""
        from .page.short import fragment

        return fragment(self._run())

    def _run(self) -> Run:
        from .page.run import Run

        return Run(self.output or "", self.to_json())
