"""The command line: parse, one call, show. Here `grail compress` and `grail plan`, in commands.py the others.

Exit codes: 0 done, 2 bad input, 75 interrupted but resumable, 130 interrupted with nothing kept, 1 a bug of ours.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__, completion
from .arguments import print_recipe_of, requested, with_options_of
from .commands import COMMANDS
from .errors import GrailError
from .guard import OneSentence, guarded, outside_of_commands, start
from .modules.terminal import show_network
from .shared import Json, Quiet, Verbose, results, write_json
from .streams import settle
from .terminal import show_plan, show_profile, show_report

if TYPE_CHECKING:
    from .progress import Progress
    from .request import Request

EXIT_CODES = (
    "Exit codes: 0 done; 2 bad input, one sentence says what to mend; 75 interrupted, the same command with --resume "
    "goes on; 130 interrupted with nothing kept; 1 a bug of ours."
)

app = typer.Typer(
    name="grail",
    cls=OneSentence,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained network narrower and repair it in closed form: no training, no labels, one command.",
    epilog=EXIT_CODES,
)

OF_THE_COMMAND = {"as_json", "quiet", "verbose", "print_recipe"}
"""What decides nothing of a run."""
UNNAMED = "grail-output"
"""Where `grail plan` looks for room on disk when no folder is named."""

_ask = typer.Option
_widths = functools.partial(typer.Option, rich_help_panel="What goes")
_data = functools.partial(typer.Option, rich_help_panel="Calibration and evaluation text")
_repair = functools.partial(typer.Option, rich_help_panel="Repair")
_vision = functools.partial(typer.Option, rich_help_panel="Vision")
_machine = functools.partial(typer.Option, rich_help_panel="Machine and files")


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"grail {__version__}")
        raise typer.Exit()


@app.command()
@guarded
def compress(
    model: Annotated[
        str,
        _ask("--model", help="A folder, an alias (llama-2-7b, ...), a hub name, {timm,torchvision,open_clip}/NAME."),
    ],
    output: Annotated[str, _ask("--output", "-o", help="Folder for the smaller checkpoint.")],
    method: Annotated[
        str, _ask("--method", autocompletion=completion.method, help="How units are chosen; see `grail methods`.")
    ] = "wanda-sp",
    ratio: Annotated[float, _ask("--ratio", help="Share of each site's heads and MLP channels to remove.")] = 0.3,
    attn_ratio: Annotated[float | None, _widths("--attn-ratio", help="The share for heads, if it differs.")] = None,
    mlp_ratio: Annotated[
        float | None, _widths("--mlp-ratio", help="The share for MLP channels, if it differs.")
    ] = None,
    gqa: Annotated[
        str,
        _widths(
            "--gqa",
            autocompletion=completion.choice("gqa"),
            help="query: as many query heads of every KV group; group: whole groups.",
        ),
    ] = "query",
    round_to: Annotated[
        int | None, _widths("--round-to", help="Kept MLP widths are a multiple of this (64 from 2048 on).")
    ] = None,
    head_multiple: Annotated[
        int, _widths("--head-multiple", help="Kept head counts are a multiple of this (tensor parallel).")
    ] = 1,
    set: Annotated[list[str], _widths("--set", help="A method's own option, key=value; repeatable.")] = [],  # noqa: B006
    calibration: Annotated[
        str,
        _data(
            "--calibration",
            autocompletion=completion.text,
            help="builtin, docstrings, wikitext2, c4, .txt, .jsonl, .safetensors, a+b; images: folder, .npz, hf:NAME.",
        ),
    ] = "builtin",
    samples: Annotated[int, _data("--samples", help="Calibration windows, at random offsets.")] = 128,
    seq_len: Annotated[
        int | None, _data("--seq-len", help="Tokens per window (2048; builtin: 512; at most the model's positions).")
    ] = None,
    seed: Annotated[int, _data("--seed", help="Seed of the offsets and of `random`.")] = 0,
    eval: Annotated[
        str | None,
        _data(
            "--eval",
            autocompletion=completion.evaluated,
            help="Held-out data for perplexity, or none (the source's own, below 1 B parameters).",
        ),
    ] = None,
    compare_pruned: Annotated[
        bool, _data("--compare-pruned", help="Also evaluate the same pruning without repair.")
    ] = False,
    allocation: Annotated[
        str | None,
        _widths(
            "--allocation",
            autocompletion=completion.choice("allocation"),
            help="How much goes where: uniform, global, log or, of language models, error (the method's own).",
        ),
    ] = None,
    compensate: Annotated[
        bool, _repair("--compensate/--no-compensate", help="Repair each site in closed form.")
    ] = True,
    target: Annotated[
        str | None,
        _repair(
            "--target",
            autocompletion=completion.target,
            help="stream (default): each site also makes up for those before it; hidden: each on its own. "
            "Vision: stream (default), dense or own.",
        ),
    ] = None,
    alpha: Annotated[
        str,
        _repair(
            "--alpha",
            help="With --target stream, the share that is made up for, 0 to 1, or auto (by site); search: five whole "
            "runs, perplexity decides.",
        ),
    ] = "auto",
    sweeps: Annotated[
        int, _repair("--sweeps", help="With --target stream, how often a site is solved, each time for what is left.")
    ] = 1,
    ridge: Annotated[
        str | None,
        _repair("--ridge", help="Ridge, relative to the mean of the Gram matrix's diagonal (0.001; stream: auto)."),
    ] = None,
    bias: Annotated[
        bool | None, _repair("--bias/--no-bias", help="Fit a bias along with the weights (the method's own choice).")
    ] = None,
    ridge_form: Annotated[
        str,
        _repair(
            "--ridge-form",
            autocompletion=completion.choice("ridge_form"),
            help="anchored (shrinks to pruning) or paper (to zero).",
        ),
    ] = "anchored",
    strict: Annotated[
        bool, _repair("--strict", help="Stop with an error where a ridge would have to be raised.")
    ] = False,
    device: Annotated[str, _machine("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str | None,
        _machine(
            "--dtype",
            autocompletion=completion.choice("dtype"),
            help="Compute dtype (float32 on CPU, as stored on GPU).",
        ),
    ] = None,
    output_dtype: Annotated[
        str | None,
        _machine(
            "--output-dtype",
            autocompletion=completion.choice("output_dtype"),
            help="Dtype of the written weights (as stored).",
        ),
    ] = None,
    format: Annotated[
        str,
        _machine(
            "--format",
            autocompletion=completion.choice("format"),
            help="auto, uniform (plain), grail (widths per layer), padded (old widths, zeros).",
        ),
    ] = "auto",
    overwrite: Annotated[bool, _machine("--overwrite", help="Replace a non-empty output folder.")] = False,
    resume: Annotated[
        bool, _machine("--resume", help="Go on with an interrupted run of the same command, if there is one.")
    ] = False,
    store: Annotated[
        str,
        _machine(
            "--store",
            autocompletion=completion.choice("store"),
            help="Where activations lie between layers: memory, disk (can be resumed), auto.",
        ),
    ] = "auto",
    memory: Annotated[
        str | None, _machine("--memory", help="Budget of resident memory, such as 4GB; refused if it cannot be kept.")
    ] = None,
    profile: Annotated[bool, _machine("--profile", help="Also print where time and memory went.")] = False,
    calibration_text: Annotated[
        str | None, _vision("--calibration-text", help="Captions for a text tower, a .txt or .jsonl file.")
    ] = None,
    weights: Annotated[
        str | None, _vision("--weights", help="Weights of timm/NAME, torchvision/NAME, ...: a .safetensors file.")
    ] = None,
    model_option: Annotated[
        list[str], _vision("--model-option", help="For the library's factory, such as img_size=98; repeatable.")
    ] = [],  # noqa: B006
    repair: Annotated[bool, _vision("--repair", help="Estimate BatchNorm statistics anew afterwards.")] = False,
    one_shot: Annotated[bool, _vision("--one-shot", help="Look at the dense network alone.")] = False,
    batch: Annotated[int, _vision("--batch", help="Images at once.")] = 64,
    residual_ratio: Annotated[
        float, _vision("--residual-ratio", help="The share for residual streams (ResNets), 0 by default.")
    ] = 0.0,
    print_recipe: Annotated[
        bool, _machine("--print-recipe", help="Only write the recipe that `grail run` takes, to stdout.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Remove a share of a model's heads and channels, and repair every block in closed form.

    Example: grail compress --model smollm2-135m --method wanda-sp --ratio 0.3 --compare-pruned --output small
    """
    asked = {k: v for k, v in locals().items() if k not in OF_THE_COMMAND}
    progress = start(quiet, verbose)
    wanted = requested(asked)
    if print_recipe:
        return print_recipe_of(wanted, as_json)
    if wanted.recipe.resume and _stays(wanted, progress, as_json):
        return
    report = wanted.carry_out(progress)
    if report is None:
        return  # another process of this run reports
    if as_json:
        write_json(report.to_json() | {"output": report.output, "run": report.run_json()})
        return
    (show_network if wanted.vision else show_report)(report, results())
    if profile:
        show_profile(report, results())


def _stays(wanted: Request, progress: Progress, as_json: bool) -> bool:
    """Whether a job that was started once more finds its result there; then it is told."""
    from .recipes.batch import finished_result, speaks

    kept = finished_result(wanted)
    if kept is None:
        return False
    progress.say(f"{wanted.recipe.output} is finished and stays as it is")
    if as_json and speaks():
        write_json(kept | {"output": wanted.recipe.output})
    return True


@app.command("plan")
@guarded
@with_options_of(compress, without={"print_recipe"}, output=None)
def plan_command(**options: object) -> None:
    """What `grail compress` of a language model would do and need: no weights are loaded, nothing is written.

    The arguments are the same. Vision networks are held in memory as a whole, and have no plan.

    Example: grail plan --model llama-2-7b --calibration text.jsonl --memory 6GB
    """
    as_json, quiet, verbose = (options.pop(name) for name in ("as_json", "quiet", "verbose"))
    progress = start(quiet, verbose)
    from .modules.names import is_network

    if is_network(options["model"]):
        raise GrailError("grail plan is for language models; a vision network is held in memory as a whole")
    wanted = requested(options | {"output": options["output"] or UNNAMED})
    from .run import plan

    found = plan(wanted.recipe, progress)
    if as_json:
        write_json(found.to_json())
    else:
        show_plan(found.to_json(), results())


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry point of the console script."""
    settle()
    # read when torch is loaded: threads that spin between two operations take the cores of whatever else runs there
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with outside_of_commands():
        app(prog_name="grail")  # also as `python -m grail`, so that messages and completion know it by one name
