"""The page of one run."""

from __future__ import annotations

from ..numbers import scaled
from .charts import bars, dots
from .command import call, command
from .document import document, facts, paragraph, plots, section, tiles
from .markup import Markup, element, join
from .numbers import change, percent, power, seconds, short, whole
from .run import KINDS, Run, SiteRow, mapping, number, numbers, string
from .sites import site_plots, table

LONGEST_PHASES = 12


def page(run: Run) -> str:
    """HTML of one run; parts for which something is missing say so in a sentence."""
    sites = run.sites
    name = run.model.rstrip("/").rsplit("/", 1)[-1] or run.model
    return document(
        f"{name}: {run.method}",
        element("h1", f"{name}, {run.method}"),
        paragraph(headline(run), class_="faint"),
        tiles(figures(run, sites)),
        section("Asked and reached", facts(_asked(run) | _reached(run))),
        section("Plots", *_plots(run, sites)),
        section("Sites", table(sites) if sites else paragraph("grail.json lists no sites.")),
        section("Loading it", *_loading(run)),
        section("Reproducing it", *_reproducing(run)),
        section("Where and how it ran", *_ran(run)),
    )


def headline(run: Run) -> str:
    """What is left, and what it can do, in a sentence or two."""
    before, after = run.sizes("parameters")
    kept = f"{scaled(after)} of {scaled(before)} parameters are left. " if before and after is not None else ""
    measure = run.measure
    if measure is None:
        return f"{kept}It was not evaluated."
    told = ", ".join(f"{measure.shown(value)} {run.variant(name)}" for name, value in measure.values.items())
    return f"{kept}{measure.name.capitalize()} on {measure.data}: {told}."


def figures(run: Run, sites: list[SiteRow]) -> dict[str, tuple[str, str]]:
    """Name to (value, note): sizes, what the evaluation found, the mean error."""
    found = {}
    for name, unit in (("parameters", ""), ("bytes", "B"), ("macs", "")):
        before, after = run.sizes(name)
        if after is not None:
            title = {"bytes": "size on disk", "macs": "multiply-adds"}.get(name, name)
            note = f"of {scaled(before, unit)}, {change(before, after)}" if before is not None else ""
            found[title] = (scaled(after, unit), note)
    if (measure := run.measure) is not None:
        value = measure.values.get("compressed")
        if value is not None:
            others = (f"{run.variant(n)} {measure.shown(v)}" for n, v in measure.values.items() if n != "compressed")
            found[measure.name] = (measure.shown(value), ", ".join(others))
    repaired = [s for s in sites if s.error_before is not None and s.error_after is not None]
    if repaired:
        before, after = (sum(getattr(s, f"error_{n}") for s in repaired) / len(repaired) for n in ("before", "after"))
        of = ", of what is missing to the dense stream" if run.streams else ""
        found["mean error per site"] = (short(after, 3), f"{short(before, 3)} before repair{of}")
    return found


def _asked(run: Run) -> dict[str, object]:
    recipe = run.recipe
    calibration = mapping(run.grail.get("calibration"))
    source = mapping(run.grail.get("source"))
    sized = [
        f"{whole(number(calibration[key]))} {name}"
        for key, name in (("windows", "windows"), ("images", "images"), ("tokens", "tokens"))
        if number(calibration.get(key)) is not None
    ]
    text = mapping(run.grail.get("calibration_text"))
    options = ", ".join(f"{key}={value}" for key, value in mapping(recipe.get("set")).items())
    return {
        "model": _with_hash(run.model, source),
        "method": run.method + (f" ({options})" if options else ""),
        "ratio": _ratio(run),
        "calibration": _with_hash(", ".join([string(calibration.get("source")) or "", *sized]), calibration)
        if calibration
        else "none",
        "captions": _with_hash(
            f"{string(text.get('source')) or ''}, {whole(number(text.get('captions')))} captions", text
        )
        if text
        else None,
        "seed": whole(number(recipe.get("seed"))) if "seed" in recipe else None,
        "ridge": _ridge(recipe) if run.repaired else "no repair was asked for",
        "α": _alpha(run) if run.repaired and recipe.get("target") == "stream" else None,
        "sweeps": recipe.get("sweeps") if recipe.get("sweeps") != 1 else None,
    }


def _alpha(run: Run) -> str | None:
    """As asked for; of a search the candidates too, each with its perplexity."""
    found, told = run.grail.get("alpha_search"), []
    for one in map(mapping, found if isinstance(found, list) else ()):
        alpha, judged = number(one.get("alpha")), number(one.get("perplexity"))
        name = "by site" if alpha is None else short(alpha, 2)
        told.append(
            f"{name} {'' if judged is None else short(judged, 4)}{' (taken)' if one.get('taken') is True else ''}"
        )
    asked = run.recipe.get("alpha")
    return f"{asked}, perplexity on the deciding windows: {', '.join(told)}" if told else asked


def _with_hash(name: str, entry: dict) -> Markup:
    digest = string(entry.get("sha256"))
    told = element("code", f"sha256 {digest[:12]}…", class_="faint", title=digest) if digest else None
    return join(name, " " if told else None, told)


def _ridge(recipe: dict) -> str | None:
    value = recipe.get("ridge")
    shown = short(number(value)) if number(value) is not None else string(value)
    return shown and f"{shown}, {string(recipe.get('ridge_form')) or 'anchored'} form"


def _ratio(run: Run) -> str:
    """Asked and reached by kind, in either of the two ways in which grail.json has it."""
    recipe, told = run.recipe, []
    asked = {"heads": recipe.get("attn_ratio"), "channels": recipe.get("mlp_ratio")}
    asked["residual"] = recipe.get("residual_ratio")
    for kind, found in mapping(run.grail.get("ratio")).items():
        reached = number(mapping(found).get("reached")) if isinstance(found, dict) else number(found)
        own = number(found.get("asked")) if isinstance(found, dict) else number(asked.get(kind) or recipe.get("ratio"))
        if reached is not None:
            name = KINDS.get(kind, "overall, by parameters" if kind == "overall" else kind)
            told.append(f"{name} {percent(reached)}" + (f" (asked {percent(own)})" if own is not None else ""))
    if told:
        return "removed: " + "; ".join(told)
    overall = number(recipe.get("ratio"))
    return "not recorded" if overall is None else f"asked {percent(overall)}"


def _reached(run: Run) -> dict[str, object]:
    sites = run.sites
    raised, damped = (sum((getattr(site, of) or 0) > 0 for site in sites) for of in ("retries", "damping_retries"))
    measured = len(mapping(run.grail.get("allocation_raised")))
    conditions = [site.condition for site in sites if site.condition is not None]
    regional = run.grail.get("regional")
    norms = number(run.grail.get("repaired_norms"))
    parallel = number(run.grail.get("tensor_parallel"))
    return {
        "sites": f"{len(sites)}, of which {sum(s.before != s.after for s in sites)} were made narrower",
        "worst condition": power(max(conditions), 2) if conditions else None,
        "ridge raised": f"at {raised} of {len(sites)} sites, where the Gram matrix is singular" if raised else None,
        "damping raised": f"at {damped} of {len(sites)} sites, to select by a singular matrix" if damped else None,
        "raised to measure": f"at {measured} of {len(sites)} sites, the ridge or the damping" if measured else None,
        "trained afterwards": f"{len(regional)} layers" if isinstance(regional, list) and regional else None,
        "BatchNorms": f"{norms:.0f} estimated anew" if norms else None,
        "format": string(run.grail.get("format")),
        "class": string(run.grail.get("class_changed")),
        "tensor parallel": f"up to {parallel:.0f} processes" if parallel and parallel > 1 else None,
    }


def _plots(run: Run, sites: list[SiteRow]) -> list[Markup | None]:
    found = [evaluated(run), *site_plots(sites), *_time_and_memory(run)]
    missing = []
    if run.measure is None:
        missing.append("There was no evaluation, so that perplexity or accuracy is not shown.")
    if not any(site.error_after is not None for site in sites):
        missing.append("Nothing was repaired, so that there are no errors to show.")
    elif not any(site.effective_rank is not None for site in sites):
        missing.append("The effective rank was not recorded.")
    if run.ran is None:
        missing.append("There is no run.json, so that time and memory are not shown.")
    elif not _peaks(run):
        missing.append("Memory by phase is measured with --profile only.")
    return [plots(found), paragraph(" ".join(missing), class_="faint") if missing else None]


def evaluated(run: Run) -> Markup | None:
    """The plot of what the evaluation found."""
    measure = run.measure
    if measure is None:
        return None
    rows = [(run.variant(name), value, measure.shown(value)) for name, value in measure.values.items()]
    if measure.name == "accuracy":
        rows = [(name, 100 * value, shown) for name, value, shown in rows]
        return dots("Accuracy", f"top 1 in percent, on {measure.data}", rows, log=False)
    return dots("Perplexity", f"on {measure.data}, logarithmic; lower is better", rows, log=True)


def _time_and_memory(run: Run) -> list[Markup | None]:
    ran = mapping(run.ran)
    profile = mapping(ran.get("profile"))
    inner = {str(name): t for name, e in profile.items() if (t := number(mapping(e).get("seconds"))) is not None}
    return [
        bars("Time by phase", "seconds of the whole run", _timed(numbers(ran.get("seconds")))),
        bars("Time within the passes", "background threads overlap with the others", _timed(inner), slot=3),
        bars("Memory by phase", "most that was resident, whole process", [
            (name, peak, scaled(peak, "B")) for name, peak in _largest(_peaks(run))
        ], slot=4),
    ]  # fmt: skip


def _timed(found: dict[str, float]) -> list[tuple[str, float, str]]:
    return [(name, value, seconds(value)) for name, value in _largest(found)]


def _largest(found: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(found.items(), key=lambda entry: -entry[1])[:LONGEST_PHASES]


def _peaks(run: Run) -> dict[str, float]:
    profile = mapping(mapping(run.ran).get("profile"))
    found = {str(name): number(mapping(entry).get("peak_memory_bytes")) for name, entry in profile.items()}
    return {name: peak for name, peak in found.items() if peak}


def _loading(run: Run) -> list[Markup]:
    loads = string(run.grail.get("loads_with"))
    if run.vision:
        code = f"import grail\n\nmodel = grail.load({run.folder!r})"
        own = "A network of your own class is given along: grail.load(folder, module=the_original_module)."
        return [element("pre", code), paragraph(own, class_="faint") if run.from_python else join()]
    trust = ", trust_remote_code=True" if run.grail.get("format") == "grail" else ""
    code = (
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({run.folder!r}{trust})"
    )
    told = f"Opens with {loads}." if loads else "What opens it was not recorded."
    return [element("pre", code), paragraph(told, class_="faint")]


def _reproducing(run: Run) -> list[Markup]:
    versions = ", ".join(f"{name} {value}" for name, value in mapping(run.grail.get("versions")).items())
    told = paragraph(f"Made with {versions}." if versions else "The versions were not recorded.", class_="faint")
    if not run.recipe:
        return [paragraph("The recipe was not recorded, so that no command can be given.")]
    if (shown := command(run)) is not None:
        return [element("pre", shown), told]
    reason = "It was started from Python with a network or data held in memory, which no command can name; the call was"
    return [paragraph(f"{reason}, up to these:"), element("pre", call(run)), told]


def _ran(run: Run) -> list[Markup]:
    ran = run.ran
    if ran is None:
        return [paragraph("There is no run.json in the folder, so that nothing is known of the machine and the times.")]
    spent = numbers(ran.get("seconds"))
    planned = mapping(ran.get("planned"))
    reopened = mapping(ran.get("reopened"))
    peak, expected = number(ran.get("peak_memory_bytes")), number(mapping(planned.get("memory_bytes")).get("peak"))
    difference = number(reopened.get("logit_difference"))
    return [
        facts(
            {
                "time": seconds(sum(spent.values())) if spent else None,
                "expected time": seconds(number(mapping(planned.get("seconds")).get("total"))) if planned else None,
                "peak memory": scaled(peak, "B") + (f", expected {scaled(expected, 'B')}" if expected else "")
                if peak is not None
                else None,
                "processes": whole(number(planned.get("processes"))) if planned.get("processes") else None,
                "opened again": f"logits differ by {short(difference, 2)}, {reopened.get('how')}"
                if difference is not None
                else None,
                "platform": string(ran.get("platform")),
            }
        )
    ]
