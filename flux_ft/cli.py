"""The command line: verbs, no logic. Words for people go to stderr, data to stdout. Loads without torch."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flux_ft import __version__, quiet_libraries
from flux_ft.errors import ConfigError, FluxFTError, first_line

quiet_libraries()

LARGEST_SEED = 2**63 - 1
OUT_OF_MEMORY = (
    "in training: `memory.recompute: full`, `optim.batch_size: 1`, smaller `data.max_pixels`, `memory.stream_blocks`, "
    "for full fine-tunes `optim.name: adafactor`; in drawing: a smaller --width and --height; and end other programs "
    "that use the GPU"
)

REPEAT_TAKES = {
    "repeat", "model", "model_parts", "redux", "lora", "image", "mask", "control_image", "preprocessed_image",
    "image_prompt", "control_lora", "output", "format", "storage", "stream", "vae_tiling", "compile", "device",
    "as_json",
}  # fmt: skip
"""Options of `generate` that mean something beside --repeat: files are looked through for what the picture names."""

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tune FLUX image models on your own GPU: a folder of pictures in, a LoRA out.",
)  # fmt: skip

bench = typer.Typer(no_args_is_help=True, help="Measure this machine, with a peer beside us in the same run.")
app.add_typer(bench, name="bench")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="the run file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="settings that replace the file's", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else there")]


def main() -> None:
    """Run the command line; every expected failure is one message and an exit code."""
    try:
        status = app(standalone_mode=False)  # typer turns its Exit, and Ctrl-C, into a returned code
        if status == 130:
            raise KeyboardInterrupt
        if isinstance(status, int) and status:
            sys.exit(status)
    except FluxFTError as error:
        _end(error)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped at once; what was not reported as saved is lost", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        kind = {cls.__name__ for cls in type(error).__mro__}
        if "ClickException" in kind:  # typer carries its own copy of click, so the class is told by name
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        from flux_ft.train import launch

        several = launch.is_one_of_several()
        if several and launch.is_lost_link(error):
            _end(FluxFTError(first_line(error)), lost_others=True)
        if "OutOfMemoryError" in kind:  # torch's; torch is not imported here
            _end(FluxFTError(f"the GPU's memory is full: {str(error).split('. ')[0]}", hint=OUT_OF_MEMORY))
        if isinstance(error, OSError):  # what no room foresaw: a disk that fills up or goes away in the middle
            where = f"{error.filename}: " if error.filename else ""
            hint = "see to the disk or the file, then run again"
            _end(FluxFTError(f"{where}{error.strerror or error}", hint=hint))
        if not several:
            raise
        traceback.print_exc()
        _end(
            FluxFTError(f"{type(error).__name__}: {first_line(error)}", hint="its traceback is above; please report it")
        )


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest whole checkpoint")] = False,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="go on though settings, data or software have changed")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs, a process each; of each machine, where NNODES is set", min=1)
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option(
            help="save and stop training before so long, as 3h50m; captions, cache and export are not cut short",
            metavar="TIME",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Carry out the run that a file describes; also `accelerate launch -m flux_ft train RUN.yaml`."""
    from flux_ft import log
    from flux_ft.train import launch, stops

    limit = stops.parse_duration(max_time) if max_time else math.inf
    words = ["train", str(run_file), *(overrides or ())]
    words += [*(["--gpus", str(gpus)] if gpus else []), *(["--max-time", max_time] if max_time else [])]
    if launch.is_wanted(gpus):
        _load(run_file, overrides, warn=False)  # what is wrong in it is told once, and before anything is started
        flags = {"--resume": resume, "--allow-drift": allow_drift, "--json": as_json}
        launch.launch(gpus or 1, [*words, *(flag for flag, given in flags.items() if given)])
        return
    loaded = _load(run_file, overrides)
    from flux_ft.families.ahead import read_model_ahead
    from flux_ft.families.registry import find_variant
    from flux_ft.infer.fit import host_bytes

    _, source = find_variant(loaded.config.model, loaded.config.model_parts)
    read_model_ahead(source, host_bytes())  # while the libraries are imported, which takes seconds
    from flux_ft.train.run import train as train_run

    gc.freeze()  # what is imported stays: else each collection looks through half a million objects
    elsewhere = launch.is_one_of_several() and not gpus  # started by a launcher whose own words we do not know
    command = "the same command again with --resume" if elsewhere else log.command(*words, "--resume")
    result = train_run(loaded.config, resume=resume, command=command, allow_drift=allow_drift, max_seconds=limit)
    _report(
        result.as_json(),
        f"done: {result.steps} steps in {result.train_seconds:.0f} s, loss {result.loss:.4f}; "
        f"see {result.folder / 'README.md'}",
        as_json,
    )


@app.command()
def check(
    run_file: RunFile,
    overrides: Overrides = None,
    report: Annotated[
        Path | None, typer.Option(help="folder to write report.json and report.html into", metavar="DIR")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a run file and all its pictures, without a model; --report writes a page that shows them."""
    loaded = _load(run_file, overrides)
    from flux_ft.data.report import write_report
    from flux_ft.plan import check_run

    checked = check_run(loaded.config)
    written = write_report(checked.report, report, loaded.config.trigger_word) if report else ()
    words = "\n".join([checked.for_people(), *(f"wrote {path}" for path in written)])
    _report(checked.as_json() | {"report": [str(path) for path in written]}, words, as_json)


@app.command()
def plan(run_file: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tell what a run will need: memory by part, disk, time; and what else could be done, without loading a model."""
    loaded = _load(run_file, overrides)
    from flux_ft.train.planning import make_plan

    made = make_plan(loaded.config)
    _report(made.as_json(), made.for_people(), as_json, words_are_data=True)


@app.command()
def caption(
    run_file: RunFile,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu; chosen by itself if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Describe pictures without a caption, into the run folder's captions.jsonl; run again, it goes on."""
    loaded = _load(run_file, overrides)
    from flux_ft.train.captions import caption_run

    done = caption_run(loaded.config, device)
    folder = loaded.config.output_dir
    words = [f"caption   {one.file.name}: {one.caption}" for one in done.checked.report.samples[:10]]
    words.append(f"{done.written} captions written to {folder / 'captions.jsonl'}; correct them there if need be")
    captions = {one.file.name: one.caption for one in done.checked.report.samples}
    _report({"folder": str(folder), "written": done.written, "captions": captions}, "\n".join(words), as_json)


@app.command()
def cache(
    run_file: RunFile,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="read every entry, remove damaged ones, encode nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encode pictures and captions before training; with --verify, check what is encoded."""
    loaded = _load(run_file, overrides)
    from flux_ft.train import run

    done = run.check_cache(loaded.config) if verify else run.fill_cache(loaded.config)
    _report(done.as_json(), done.for_people(), as_json)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="what to draw; may be repeated")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="a file of prompts or requests instead: .txt, .jsonl or .csv", metavar="FILE")
    ] = None,
    repeat: Annotated[
        Path | None, typer.Option(help="draw this picture again, from what it says of itself", metavar="PICTURE")
    ] = None,
    task: Annotated[
        str, typer.Option(help="text-to-image, remix, fill, canny, depth, ultra or edit")
    ] = "text-to-image",
    model: Annotated[str | None, typer.Option(help="variant, folder, file or Hub id [default: flux1-dev]")] = None,
    model_parts: Annotated[str | None, typer.Option(help="where encoders come from if MODEL is one file")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:STRENGTH, -2 to 2; may be repeated")] = None,
    strength: Annotated[
        float | None, typer.Option(help="multiplies all LoRAs, 0 to 2; 0 is the base model [default: 1]")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="fill, edit: the picture")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="fill: white is drawn anew; else what is transparent in --image")
    ] = None,
    paste_back: Annotated[
        bool | None,
        typer.Option(
            "--paste-back/--no-paste-back", help="fill: the picture's own pixels outside the mask [default: yes]"
        ),
    ] = None,
    control_image: Annotated[Path | None, typer.Option(help="canny, depth: the picture to follow")] = None,
    preprocessed_image: Annotated[Path | None, typer.Option(help="canny, depth: its edges or depths instead")] = None,
    canny_low_threshold: Annotated[int | None, typer.Option(help="0 to 500 [default: 50]")] = None,
    canny_high_threshold: Annotated[int | None, typer.Option(help="0 to 500 [default: 200]")] = None,
    image_prompt: Annotated[Path | None, typer.Option(help="remix, ultra: a picture beside the words")] = None,
    image_prompt_strength: Annotated[float | None, typer.Option(help="0 to 1 [default: remix 0.5, ultra 0.1]")] = None,
    aspect_ratio: Annotated[str | None, typer.Option(help="ultra: 21:9 to 9:21 [default: 16:9]")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="ultra: less polish")] = False,
    negative_prompt: Annotated[str | None, typer.Option(help="what to keep away from; needs --true-cfg")] = None,
    true_cfg: Annotated[
        float | None, typer.Option(help="guidance against the negative prompt, 1 (off) to 20; twice the time")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="the first picture's seed; the next ones count on", min=0, max=LARGEST_SEED)
    ] = 0,
    count: Annotated[int, typer.Option(help="pictures a prompt", min=1)] = 1,
    width: Annotated[int | None, typer.Option(help="pixels", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="pixels", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="embedded guidance", min=0)] = None,
    x: Annotated[
        str | None, typer.Option("--x", help="sweep across, for example strength=0..1:5", metavar="NAME=VALUES")
    ] = None,
    y: Annotated[str | None, typer.Option("--y", help="sweep down", metavar="NAME=VALUES")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="further sweeps, a grid each", metavar="NAME=VALUES")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="sweep over a run's checkpoints", metavar="RUN")] = None,
    compare: Annotated[str | None, typer.Option(help="base: the base model's pictures beside the others")] = None,
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("pictures"),
    format: Annotated[str, typer.Option(help="png, jpg or webp")] = "png",
    grid: Annotated[
        bool, typer.Option("--grid", help="also write all pictures in labelled tables, grid-NNNNN.png")
    ] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="also write sheet.html, a page of all in the folder")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="draw only what is not in the folder yet")] = False,
    control_lora: Annotated[
        Path | None, typer.Option(help="for fill, canny or depth, instead of the known ones", metavar="FILE")
    ] = None,
    redux: Annotated[str | None, typer.Option(help="remix: folder or Hub id of Redux")] = None,
    depth_model: Annotated[
        str, typer.Option(help="depth: of Depth Anything V2: small, base, large, a folder or Hub id")
    ] = "large",
    merge: Annotated[bool, typer.Option("--merge", help="add LoRAs to the weights: faster steps, rounded")] = False,
    storage: Annotated[
        str | None, typer.Option(help="how weights are held: bf16, int8, fp8, nf4 [default: what fits]")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="blocks wait in host memory [default: what fits]")
    ] = None,
    vae_tiling: Annotated[
        bool | None, typer.Option("--vae-tiling/--no-vae-tiling", help="decode in tiles [default: what fits]")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="compile the blocks: slow start, faster steps")] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu; chosen by itself if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw pictures of any task, with any number of LoRAs: one, a batch, a sweep, or one drawn before again."""
    from flux_ft import log
    from flux_ft.infer.prompts import parse_lora
    from flux_ft.infer.records import require_suffix
    from flux_ft.infer.sweep import parse_axis

    if compare not in (None, "base"):
        raise ConfigError(f"`--compare {compare}` is not known", hint="--compare base")
    suffix = f".{format.removeprefix('.').lower()}"
    require_suffix(suffix)
    loras = tuple(parse_lora(text, "--lora") for text in lora or ())
    wishes: dict[str, Any] = {
        "depth_model": depth_model,
        "merge": merge,
        "storage": storage,
        "stream": stream,
        "vae_tiling": vae_tiling,
        "compile": compile,
    }
    if repeat is not None:
        from flux_ft.infer.draw import repeat as draw_again

        idle = {name for name in context.params if _is_given(context, name)} - REPEAT_TAKES
        if idle:
            raise ConfigError(
                f"--repeat draws what the picture says; --{min(idle).replace('_', '-')} has no effect beside it",
                hint="leave it out; to change something, draw anew with what the picture's .json says",
            )
        others = [image, mask, control_image, preprocessed_image, image_prompt, control_lora]
        files = [*(one.file for one in loras), *filter(None, others)]
        instead = {"model": model, "parts": model_parts, "redux": redux}
        again = draw_again(repeat, output, suffix, device, instead, files, **wishes)
        _report(again.as_json(), again.for_people(), as_json)
        return
    given = {
        "finetune_strength": strength, "image": image, "mask": mask, "control_image": control_image,
        "preprocessed_image": preprocessed_image, "canny_low_threshold": canny_low_threshold,
        "canny_high_threshold": canny_high_threshold, "image_prompt": image_prompt,
        "image_prompt_strength": image_prompt_strength, "aspect_ratio": aspect_ratio, "raw": raw or None,
        "paste_back": paste_back,
        "negative_prompt": negative_prompt, "true_cfg": true_cfg, "width": width, "height": height, "steps": steps,
        "guidance": guidance,
    }  # fmt: skip
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    fields |= {"task": task, "loras": loras}
    axes = (parse_axis(x) if x else None, parse_axis(y) if y else None, [parse_axis(text) for text in axis or ()])
    from flux_ft.infer import draw
    from flux_ft.infer.runner import Runner

    tables = draw.plan_tables(prompt or [], prompts, fields, seed, count, axes, checkpoints, base=compare is not None)
    runner = Runner(model or "flux1-dev", device=device, parts=model_parts, control=control_lora, redux=redux, **wishes)
    words = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    made = draw.draw_to_folder(
        runner, draw.Drawing(tables, suffix, grid, sheet, resume), output, go_on=log.command(*words)
    )
    _report(made.as_json(), made.for_people(), as_json)


@app.command()
def canny(
    image: Annotated[Path, typer.Argument(metavar="IN", help="a picture", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="a .png or .webp to write", show_default=False)],
    low: Annotated[int, typer.Option(help="weakest edge that goes on from a strong one", min=0, max=500)] = 50,
    high: Annotated[int, typer.Option(help="weakest strong edge", min=0, max=500)] = 200,
    as_json: AsJson = False,
) -> None:
    """Write a picture's edges, as the task canny sees them."""
    from flux_ft.infer.control import preprocess_file

    done = preprocess_file("canny", image, output, low=low, high=high)
    _report(done.as_json(), done.for_people(), as_json)


@app.command()
def depth(
    image: Annotated[Path, typer.Argument(metavar="IN", help="a picture", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="a .png or .webp to write", show_default=False)],
    model: Annotated[str, typer.Option(help="of Depth Anything V2: small, base, large, a folder or Hub id")] = "large",
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu; chosen by itself if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a picture's depths, white where near, as the task depth sees them."""
    from flux_ft.infer.control import preprocess_file
    from flux_ft.infer.runner import pick_device

    done = preprocess_file("depth", image, output, model=model, device=pick_device(device)[0])
    _report(done.as_json(), done.for_people(), as_json)


@app.command()
def quickstart(
    output: Annotated[
        Path | None, typer.Option(help="a new folder for everything it makes [default: runs/quickstart, -2, -3 …]")
    ] = None,
    iterations: Annotated[int, typer.Option(help="training steps", min=1)] = 600,
    seed: Annotated[int, typer.Option(help="seed of pictures and training", min=0, max=LARGEST_SEED)] = 0,
    as_json: AsJson = False,
) -> None:
    """The whole job on the built-in flux-tiny: pictures, training, before and after, scores."""
    from flux_ft import quickstart as job

    folder = output or job.free_folder(Path("runs/quickstart"))
    summary = job.quickstart(folder, iterations, seed)
    _report(summary, job.summary_for_people(summary, folder), as_json)


@app.command()
def extract(
    base: Annotated[str, typer.Option(help="the model it was tuned from: variant, folder, file or Hub id")],
    tuned: Annotated[str, typer.Option(help="the tuned model: folder, file or Hub id")],
    output: Annotated[Path, typer.Option(help="the LoRA to write; a report goes beside it")],
    rank: Annotated[
        str | None, typer.Option(help="1 to 1024, or auto: as many directions as stand out of rounding noise")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="instead of a rank: share of the squared change to keep", min=0, max=1)
    ] = None,
    budget_mb: Annotated[float | None, typer.Option(help="instead of a rank: size of the kohya file in MB")] = None,
    format: Annotated[str, typer.Option(help="kohya (ComfyUI and the rest) or diffusers")] = "kohya",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "bf16",
    exact: Annotated[bool, typer.Option("--exact", help="exact instead of randomised SVD: far slower")] = False,
    leftovers: Annotated[
        bool, typer.Option("--leftovers", help="also write what no LoRA holds, as .diff keys in a file of its own")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; chosen by itself if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Take a LoRA out of a tuned model: what it learned beyond its base. Killed, it goes on when called again."""
    if rank is None and energy is None and budget_mb is None:
        rank = "32"
    from flux_ft.adapters.jobs import extract_files

    done = extract_files(
        base, tuned, _rank(rank), output, format=format, dtype=dtype, energy=energy, budget_mb=budget_mb, exact=exact,
        device=device, leftovers=leftovers,
    )  # fmt: skip
    _report(done.as_json(), done.for_people(), as_json)


@app.command()
def resize(
    lora: Annotated[Path, typer.Argument(metavar="FILE", help="the LoRA", show_default=False)],
    output: Annotated[Path, typer.Option(help="the smaller LoRA to write")],
    rank: Annotated[int | None, typer.Option(help="largest rank of a module", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="instead of a rank: share of the squared change to keep", min=0, max=1)
    ] = None,
    format: Annotated[str, typer.Option(help="kohya or diffusers")] = "kohya",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "bf16",
    as_json: AsJson = False,
) -> None:
    """Write a LoRA again with fewer directions, those kept that matter most."""
    from flux_ft.adapters.jobs import resize_file

    done = resize_file(lora, output, rank=rank, energy=energy, format=format, dtype=dtype)
    words = (
        f"wrote {output} ({done.size_bytes / 1e6:.1f} MB): rank {done.ranks[0]} to {done.ranks[1]}, "
        f"no module lost more than {done.worst_loss:.1%} of its change"
    )
    _report(done.as_json(), words, as_json)


@app.command()
def merge(
    lora: Annotated[list[str], typer.Option(help="FILE or FILE:STRENGTH; may be given several times")],
    output: Annotated[Path, typer.Option(help="a LoRA; with --base a new folder, or a file where the base is one")],
    base: Annotated[
        str | None, typer.Option(help="merge into this model instead: variant, folder, file or Hub id")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="largest rank of the LoRA; else ranks add up", min=1)] = None,
    format: Annotated[str | None, typer.Option(help="of the LoRA: kohya (unless said), diffusers or comfy")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16, or as the base is, unless given")] = None,
    as_json: AsJson = False,
) -> None:
    """Write several LoRAs as one; or, with --base, a base model with LoRAs merged into its weights."""
    adapters = [_adapter(text) for text in lora]
    if base is None:
        from flux_ft.adapters.combine import combine_files

        combined = combine_files(adapters, output, rank, format=format or "kohya", dtype=dtype or "bf16")
        _report(combined.as_json(), combined.for_people(), as_json)
        return
    if rank is not None or format is not None:
        raise ConfigError("--rank and --format are of a LoRA, and --base gives a model", hint="leave them out")
    from flux_ft.adapters.jobs import merge_file

    done = merge_file(base, adapters, output, dtype=dtype)
    _report(done.as_json(), done.for_people(), as_json)


@app.command()
def convert(
    lora: Annotated[Path, typer.Argument(metavar="IN", help="a LoRA of any flavour", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="the file to write", show_default=False)],
    format: Annotated[
        str, typer.Option(help="kohya (ComfyUI and the rest), diffusers, comfy, or bfl for control LoRAs")
    ] = "kohya",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; as it is unless given")] = None,
    blocks_only: Annotated[
        bool, typer.Option("--blocks-only", help="leave out what lies outside the blocks, which some tools drop")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a LoRA in another layout, with the same effect; the new file is read back and compared."""
    from flux_ft import log
    from flux_ft.adapters.convert import convert_file

    done = convert_file(lora, output, format=format, dtype=dtype, blocks_only=blocks_only)
    for warning in done.warnings:
        log.warn(warning)
    _report(done.as_json(), done.for_people(), as_json)


@app.command()
def inspect(
    lora: Annotated[Path, typer.Argument(metavar="FILE", help="a LoRA of any origin", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Say what a LoRA file is: model, flavour, ranks, strength, where it acts, and what looks wrong."""
    from flux_ft.adapters.inspect import inspect_file

    found = inspect_file(lora)
    _report(found.as_json(), found.for_people(), as_json, words_are_data=True)


@app.command()
def verify(
    lora: Annotated[Path, typer.Argument(metavar="FILE", help="a LoRA of any origin", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(help="compare with this file, as after a conversion", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load a LoRA through the installed diffusers and compare, matrix by matrix. Exit code 1 when it does not hold."""
    from flux_ft.adapters.verify import verify_file

    found = verify_file(lora, against)
    _report(found.as_json(), found.for_people(), as_json, words_are_data=True)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="a LoRA", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="another", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare two LoRAs of any flavours in their effect, and in their headers."""
    from flux_ft.adapters.compare import diff_files

    found = diff_files(first, second)
    _report(found.as_json(), found.for_people(), as_json, words_are_data=True)


@app.command()
def export(
    preview: Annotated[Path, typer.Option(help="a picture of `generate`, or a run folder", metavar="PNG|RUN")],
    pack: Annotated[Path, typer.Option(help="a new or empty folder", metavar="DIR")],
    loras: Annotated[
        list[Path] | None, typer.Argument(metavar="[LORA…]", help="what it was drawn with", show_default=False)
    ] = None,
    prompt: Annotated[int, typer.Option(help="of a run folder: which preview prompt, from 0", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a pack that draws a preview again elsewhere: LoRA, ComfyUI workflow, diffusers script, the picture."""
    from flux_ft.infer.pack import pack_preview

    done = pack_preview(preview, loras or [], pack, prompt=prompt)
    _report(done.as_json(), done.for_people(), as_json)


@bench.command("extract")
def bench_extract(
    rank: Annotated[int, typer.Option(help="rank of the extracted LoRA", min=1)] = 32,
    as_json: AsJson = False,
) -> None:
    """LoRA extraction at FLUX.1's matrix shapes: ours beside exact SVDs of the same matrices."""
    from flux_ft.bench.extract import bench_extraction, summary_for_people

    result = bench_extraction(rank)
    _report(result, summary_for_people(result), as_json, words_are_data=True)


@bench.command("infer")
def bench_infer(
    full: Annotated[bool, typer.Option("--full", help="FLUX.1-dev's size with random weights; takes a GPU")] = False,
    steps: Annotated[int | None, typer.Option(help="denoising steps a picture", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="pictures of each kind", min=1)] = 3,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="compiled blocks too")] = True,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu; chosen by itself if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Seconds a picture by how weights are held, beside the diffusers pipeline in the same run."""
    from flux_ft.bench.infer import bench_infer

    result = bench_infer(full, steps=steps, repeats=repeats, compiled=compiled, device=device)
    _report(result.as_json(), result.for_people(), as_json, words_are_data=True)


@bench.command("train")
def bench_train(
    settings: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="FLUX.1-dev's size with random weights; takes a GPU")] = False,
    cells: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND-SIDE-bBATCH-RECOMPUTE, such as lora-1024-b1-full, and behind it -nf4, -fp8compute, -24gb; "
            "or `quickstart`; `targets` is all that have a target; may be given several times"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="timed steps of each cell", min=1)] = 10,
    order: Annotated[
        str, typer.Option(help="sides: ours, `ours key=value`, A (the peer's example), B (the peer tuned)")
    ] = "A,ours,B,ours,A",
    ablate: Annotated[
        bool, typer.Option("--ablate", help="instead of peers: ours, and ours with each optimisation switched off")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="also write where ours spends its time, by kind of work")
    ] = False,
    output: Annotated[Path, typer.Option(help="folder for train.json and train.png", metavar="DIR")] = Path(
        "bench-train"
    ),
    as_json: AsJson = False,
) -> None:
    """Seconds a training step beside diffusers + peft + accelerate, which must compute the same. Exit code 1 if not."""
    from flux_ft.bench.train import ABLATION, bench_train

    turns = ABLATION if ablate else order.split(",")
    result = bench_train(full, cells or (), output, steps=steps, order=turns, settings=settings or (), profile=profile)
    _report(result.as_json(), result.for_people(), as_json, words_are_data=True)
    if not result.ok:
        raise typer.Exit(1)


@bench.command("job")
def bench_job(
    settings: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="FLUX.1-dev's size with random weights; takes a GPU")] = False,
    model: Annotated[str | None, typer.Option(help="a model to train instead of random weights")] = None,
    iterations: Annotated[int, typer.Option(help="steps", min=1)] = 300,
    pictures: Annotated[int, typer.Option(help="made-up pictures of 1 MP", min=1)] = 20,
    output: Annotated[Path, typer.Option(help="a new or empty folder", metavar="DIR")] = Path("bench-job"),
    as_json: AsJson = False,
) -> None:
    """A whole run in a process of its own: seconds to the first step, of a step, and to the LoRA's file."""
    from flux_ft.bench.job import bench_job, summary_for_people

    result = bench_job(full, output, model=model, iterations=iterations, pictures=pictures, settings=settings or ())
    _report(result, summary_for_people(result), as_json, words_are_data=True)


@bench.command("full")
def bench_full(
    output: Annotated[Path, typer.Option(help="a new or empty folder", metavar="DIR")] = Path("bench-full"),
    seed: Annotated[int, typer.Option(help="seed of pictures, prompts and training", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """The quickstart's concept by a full fine-tune, by LoRAs taken out of it, and by a LoRA trained as such: scored."""
    from flux_ft.bench.full import bench_full, summary_for_people

    result = bench_full(output, seed)
    _report(result, summary_for_people(result), as_json, words_are_data=True)


@bench.command("precision")
def bench_precision(
    output: Annotated[Path, typer.Option(help="a new or empty folder", metavar="DIR")] = Path("bench-precision"),
    model: Annotated[str, typer.Option(help="the base; any but flux-tiny needs --data")] = "flux-tiny",
    data: Annotated[Path | None, typer.Option(help="folder of pictures with captions", metavar="DIR")] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16, int8, fp8, nf4 or 'fp8 compute', may be given several times; all unless given"),
    ] = None,
    iterations: Annotated[int, typer.Option(help="steps of each training", min=1)] = 300,
    seed: Annotated[int, typer.Option(help="seed of pictures, prompts and training", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """What a base in fewer bytes costs: its loss, and what a LoRA learns on it, beside one in full precision."""
    from flux_ft.bench.precision import bench_precision, summary_for_people

    result = bench_precision(output, model=model, data=data, iterations=iterations, seed=seed, bases=base or ())
    _report(result, summary_for_people(result), as_json, words_are_data=True)


@bench.command("data")
def bench_data(
    pictures: Annotated[
        Path | None, typer.Option(help="folder of photographs; without one, made-up pictures are used", metavar="DIR")
    ] = None,
    megapixels: Annotated[float, typer.Option(help="size that the photographs are brought to", min=0.1)] = 12.0,
    repeats: Annotated[int, typer.Option(help="rounds of each side, taken in turns", min=1)] = 5,
    as_json: AsJson = False,
) -> None:
    """JPEG files to 1 MP pixels: ours beside Pillow's full decoding and Lanczos, in pictures per second and PSNR."""
    from flux_ft.bench.data import bench_pictures, summary_for_people

    result = bench_pictures(pictures, megapixels, repeats)
    _report(result, summary_for_people(result), as_json, words_are_data=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of run files, for editors."""
    from flux_ft.config import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models that are known by name."""
    from flux_ft.families.registry import VARIANTS

    rows = [
        {"name": v.name, "source": v.source, "licence": v.license, "distilled": v.distilled, "summary": v.summary}
        for v in VARIANTS.values()
    ]
    words = [f"{row['name']:<14} {row['source']:<36} {row['summary']} ({row['licence']})" for row in rows]
    _report({"models": rows}, "\n".join(words), as_json, words_are_data=True)


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="a run folder that --bundle tells of too", show_default=False)
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="try by repetition whether the GPU's bits repeat")] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="write a ZIP for bug reports, free of secrets and paths", metavar="FILE.zip")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, device, memory, disk, Hub login. Exit code 1 when something must be mended."""
    from flux_ft.bundle import write_bundle
    from flux_ft.doctor import examine, examine_gpus

    if run is not None and bundle is None:
        raise ConfigError(f"`{run}` is read for a bundle only", hint="add --bundle FILE.zip, or leave it out")
    findings = examine() + (examine_gpus() if gpu else [])
    words = [one.for_people() for one in findings]
    data: dict[str, Any] = {"findings": [one.as_json() for one in findings]}
    if bundle is not None:
        written = write_bundle(bundle, findings, run)
        data["bundle"], words = written.as_json(), [*words, "", written.for_people()]
    _report(data, "\n".join(words), as_json, words_are_data=True)
    if not all(one.ok for one in findings):
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line, even at its default's value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _load(run_file: Path, overrides: list[str] | None, warn: bool = True) -> Any:
    from flux_ft import log
    from flux_ft.runfile import load_run

    loaded = load_run(run_file, overrides or ())
    warn = warn and run_file.resolve().parent != loaded.config.output_dir.resolve()
    for warning in loaded.warnings if warn else ():
        log.warn(warning)
    return loaded


def _rank(text: str | None) -> Any:
    """A whole number, "auto" or None."""
    if text in (None, "auto"):
        return text
    try:
        return int(str(text))
    except ValueError:
        raise ConfigError(f"`--rank {text}` is not a rank", hint="write a whole number, or auto") from None


def _adapter(text: str) -> Any:
    """FILE or FILE:STRENGTH. A drive letter's colon is no strength."""
    from flux_ft.types import AppliedAdapter

    file, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists() or len(file) == 1:
        return AppliedAdapter(Path(text))
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"`--lora {text}`: {strength!r} is not a strength", hint="write FILE:0.8, or FILE alone for 1"
        )
    return AppliedAdapter(Path(file), value)


def _report(data: dict[str, Any], words: str, as_json: bool, words_are_data: bool = False) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes, the first speaks for all
    if as_json:
        print(json.dumps(data))  # ASCII: a pipe on Windows may not take more
    elif words_are_data:
        print(words)
    else:
        print(words, file=sys.stderr)


def _end(error: FluxFTError, lost_others: bool = False) -> NoReturn:
    """Tell a failure, once of several processes, and leave with its exit code."""
    from flux_ft.train import launch

    if launch.is_one_of_several():
        launch.end_process(error, _tell, lost_others)
    _tell(error)
    sys.exit(error.exit_code)


def _tell(error: FluxFTError, who: str = "") -> None:
    label = "stopped" if error.exit_code == 130 else "error"
    print(f"{who}{label}: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"\nhint: {error.hint}", file=sys.stderr)
