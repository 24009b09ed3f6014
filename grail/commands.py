"""The shorter commands, of which `run` is in recipes/. Each is one call, and what is shown of it."""

from __future__ import annotations

from typing import Annotated

import typer

from . import completion
from .errors import GrailError
from .guard import guarded, start
from .modules.terminal import show_accuracy
from .recipes.command import run_command
from .shared import Json, Quiet, Verbose, results, write_json
from .terminal import show_evaluation

VISION_EVAL = ("weights", "model_option", "classes", "templates", "probe")


@guarded
def evaluate_command(
    path: Annotated[str, typer.Argument(help="A folder (of grail or not), an alias or a hub name.")],
    data: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.evaluated,
            help="Evaluation data (what grail.json records), or none: no perplexity.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="At most so many windows.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    against: Annotated[str | None, typer.Option(help="A second model to show beside it.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Also tasks of lm-eval, with commas: piqa,hellaswag; needs grail-compress[eval].")
    ] = None,
    tasks_folder: Annotated[
        str | None,
        typer.Option(
            "--tasks-folder", help="--tasks: a folder with descriptions (.yaml) of your own; runs their code."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="--tasks: so many questions of each.")] = None,
    shots: Annotated[int | None, typer.Option(help="--tasks: worked examples before each question.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure tokens per second and memory.")] = False,
    prompt: Annotated[str | None, typer.Option(help="Also show a short greedy continuation.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.choice("dtype"), help="Compute dtype (as recorded; else float32 on CPU)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    weights: Annotated[str | None, typer.Option(help="Weights of timm/NAME, ...: a .safetensors file.")] = None,
    model_option: Annotated[list[str], typer.Option(help="For its factory, such as img_size=98; repeatable.")] = [],  # noqa: B006
    classes: Annotated[str | None, typer.Option(help="Zero-shot: names of the classes, a file, one to a line.")] = None,
    templates: Annotated[str | None, typer.Option(help="Zero-shot: sentences with {} for the name, a file.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Also a linear classifier on the features of images.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure perplexity, one layer in memory at a time (--tasks, --speed and --prompt load whole models), or accuracy.

    Example: grail eval small --against smollm2-135m --tasks piqa,hellaswag --limit 200 --speed
    """
    asked = {k: v for k, v in locals().items() if k not in {"path", "as_json", "quiet", "verbose"}}
    progress = start(quiet, verbose)
    from .modules.command import evaluate_network
    from .modules.names import is_network

    if is_network(path):
        found = evaluate_network(path, asked)
        if as_json:
            write_json(found)
        else:
            show_accuracy(found, results())
        return
    for name in VISION_EVAL:
        if asked.pop(name):
            raise GrailError(f"--{name.replace('_', '-')} is for timm/NAME, torchvision/NAME and open_clip/NAME")
    from .evaluate import evaluate

    found = evaluate(path, **asked, progress=progress)
    if as_json:
        write_json(found)
    else:
        show_evaluation(found, results())


@guarded
def convert_command(
    path: Annotated[str, typer.Argument(help="A folder that grail wrote, or any of a supported family.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the converted checkpoint.")],
    to: Annotated[
        str,
        typer.Option("--to", autocompletion=completion.one_of(*completion.FORMATS), help="uniform, grail or padded."),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty output folder.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write a compressed checkpoint in another format: the same network, the same logits."""
    start(quiet, verbose)
    from .convert import convert

    found = convert(path, output, to=to, overwrite=overwrite)
    if as_json:
        write_json(found)
    else:
        for key in ("format", "parameters", "loads_with", "output"):
            typer.echo(f"{key.replace('_', ' '):12} {found[key]}")


@guarded
def export_command(
    path: Annotated[str, typer.Argument(help="A folder that grail compress wrote; gguf: any LLaMA-style checkpoint.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The file to write.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            autocompletion=completion.one_of(*completion.EXPORTS),
            help="gguf (language models); onnx, torch-export (vision).",
        ),
    ] = "onnx",
    tower: Annotated[
        str | None,
        typer.Option(autocompletion=completion.one_of(*completion.TOWERS), help="Of a CLIP: images or text."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.one_of(*completion.STORED),
            help="gguf: float32, float16, bfloat16 or q8_0 (that of the checkpoint).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write a language model as GGUF for llama.cpp, or a vision network as ONNX or as a torch.export program, and
    compare what was written.

    Example: grail export small --to gguf --output small.gguf --dtype float16
    """
    start(quiet, verbose)
    if to == "gguf":
        if tower is not None:
            raise GrailError("--tower is for a CLIP")
        from .serving.gguf import export_gguf

        found = export_gguf(path, output, dtype=dtype, overwrite=overwrite)
    else:
        if dtype is not None:
            raise GrailError("--dtype goes with --to gguf")
        from .modules.export import export_folder

        found = export_folder(path, to, output, tower=tower, overwrite=overwrite)
    if as_json:
        write_json({"schema_version": 1} | found)
    else:
        for key, value in found.items():
            typer.echo(f"{key:12} {value}")


@guarded
def soup_command(
    inputs: Annotated[
        list[str], typer.Argument(help="Checkpoints of one architecture: all .safetensors files, or all folders.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="A .safetensors file, or a folder for folders.")],
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Best first, then each that does not lower the score on --data.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="--greedy: labelled images, or text for folders (as in `grail eval`).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="--greedy: at most so many images or windows.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="--greedy on files: their network, timm/NAME or its like.")
    ] = None,
    model_option: Annotated[
        list[str], typer.Option("--model-option", help="For the library's factory, such as img_size=98; repeatable.")
    ] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="--greedy: auto, cpu, cuda, cuda:1, ...")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Average checkpoints of one architecture (a model soup), to be compressed afterwards.

    BatchNorm's running statistics are averaged as they are; `grail compress --repair` estimates them anew.

    Example: grail soup a.safetensors b.safetensors c.safetensors --output soup.safetensors
    """
    progress = start(quiet, verbose)
    from .modules.command import factory_options
    from .soup import soup
    from .soup.terminal import show_soup

    asked = {"greedy": greedy, "data": data, "samples": samples, "model": model, "device": device}
    found = soup(
        inputs, output, **asked, model_options=factory_options(model_option), overwrite=overwrite, progress=progress
    )
    if as_json:
        write_json(found)
    else:
        show_soup(found, results())


@guarded
def report_command(
    folders: Annotated[list[str], typer.Argument(help="Folders that grail compress wrote; several are compared.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The page (FOLDER/report.html; of several report.html in this folder)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write report.html of a folder, whenever it was written, or one that compares several.

    Example: grail report small smaller smallest --output sizes.html
    """
    start(quiet, verbose)
    from .page import write_report

    found = write_report(folders, output, overwrite=overwrite)
    if as_json:
        write_json(found)
    else:
        typer.echo(found["output"])


@guarded
def push_command(
    path: Annotated[str, typer.Argument(help="A folder that grail compress wrote.")],
    repo: Annotated[str, typer.Argument(help="Its name on the hub, OWNER/NAME; created where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is for its owner alone.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be sent.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Upload a result to the Hugging Face hub, with its model card, behind the hub's own login (`hf auth login`).

    Example: grail push small me/llama-2-5b --private
    """
    start(quiet, verbose)
    from .serving.push import push

    found = push(path, repo, private=private, message=message, dry_run=dry_run)
    if as_json:
        write_json(found)
        return
    for file in found["files"]:
        typer.echo(f"{file['bytes']:>15,}  {file['name']}")
    typer.echo(f"would go to {found['url']}" if dry_run else found["url"])


@guarded
def methods_command(
    name: Annotated[
        str | None, typer.Argument(autocompletion=completion.method, help="Show one method with its options.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or one method's own options (for --set)."""
    from .selectors import methods, selector_class

    chosen = methods() if name is None else {name: selector_class(name)}
    described = {key: cls.describe() for key, cls in chosen.items()}
    if as_json:
        write_json({"schema_version": 1, "methods": described})
        return
    for key, entry in described.items():
        typer.echo(f"{key:12} {entry['summary']}")
        if name is not None:
            typer.echo(f"{'source':12} {entry['source']}")
            typer.echo(f"{'needs':12} {', '.join(entry['needs']) or 'no data'}")
            typer.echo(f"{'allocation':12} {entry['allocation']}")
            for option, default in entry["options"].items():
                typer.echo(f"{'--set':12} {option}={default}")


COMMANDS = {
    "run": run_command,
    "eval": evaluate_command,
    "convert": convert_command,
    "export": export_command,
    "report": report_command,
    "push": push_command,
    "soup": soup_command,
    "methods": methods_command,
}
