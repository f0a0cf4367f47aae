"""The command line: verbs, no logic. Words for people go to stderr, data to stdout. Loads without torch."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flux_ft import __version__
from flux_ft.errors import ConfigError, FluxFTError

# Progress bars and notices of the libraries would drown ours; a user's own setting wins.
for _name, _value in {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import of a CPU kernel that nobody asked for

LARGEST_SEED = 2**63 - 1
OUT_OF_MEMORY = (
    "in training: `memory.recompute: full`, `optim.batch_size: 1`, smaller `data.max_pixels`, `memory.stream_blocks`, "
    "for full fine-tunes `optim.name: adafactor`; in drawing: a smaller --width and --height; and end other programs "
    "that use the GPU"
)

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
        _tell(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped at once; what was not reported as saved is lost", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # what no room foresaw: a disk that fills up or goes away in the middle
        where = f"{error.filename}: " if error.filename else ""
        _tell(FluxFTError(f"{where}{error.strerror or error}", hint="see to the disk or the file, then run again"))
        sys.exit(1)
    except Exception as error:
        kind = {cls.__name__ for cls in type(error).__mro__}
        if "ClickException" in kind:  # typer carries its own copy of click, so the class is told by name
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if "OutOfMemoryError" not in kind:  # torch's; torch is not imported here
            raise
        _tell(FluxFTError(f"the GPU's memory is full: {str(error).split('. ')[0]}", hint=OUT_OF_MEMORY))
        sys.exit(1)


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest whole checkpoint")] = False,
    as_json: AsJson = False,
) -> None:
    """Carry out the run that a file describes; also `accelerate launch -m flux_ft train RUN.yaml`."""
    loaded = _load(run_file, overrides)
    from flux_ft import log
    from flux_ft.train.run import train as train_run

    command = log.command("train", str(run_file), *(overrides or ()), "--resume")
    result = train_run(loaded.config, resume=resume, command=command)
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
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="what to draw; may be given several times")],
    model: Annotated[str, typer.Option(help="variant, folder, .safetensors file or Hub id")] = "flux1-dev",
    model_parts: Annotated[str | None, typer.Option(help="where encoders come from if MODEL is one file")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:STRENGTH; may be given several times")] = None,
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("pictures"),
    seed: Annotated[
        int, typer.Option(help="the first picture's seed; the next ones count on", min=0, max=LARGEST_SEED)
    ] = 0,
    count: Annotated[int, typer.Option(help="pictures a prompt", min=1)] = 1,
    width: Annotated[int | None, typer.Option(help="pixels", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="pixels", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="embedded guidance", min=0)] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="also write all pictures in one labelled grid-NNNNN.png")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu; chosen by itself if not given")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw pictures, with any number of LoRAs."""
    adapters = [_adapter(text) for text in lora or ()]
    from flux_ft.infer.draw import Drawing, draw_to_folder

    drawing = Drawing(tuple(prompt), seed, count, width, height, steps, guidance, grid)
    made = draw_to_folder(model, adapters, drawing, output, device, model_parts)
    _report({"pictures": [str(path) for path in made.pictures], "grid": str(made.grid) if made.grid else None},
            f"wrote {len(made.pictures)} pictures to {output}", as_json)  # fmt: skip


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
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, device, memory, disk, Hub login. Exit code 1 when something must be mended."""
    from flux_ft.doctor import examine

    findings = examine()
    words = [f"{'ok     ' if one.ok else 'PROBLEM'} {one.name}: {one.detail}" for one in findings]
    _report({"findings": [vars(one) for one in findings]}, "\n".join(words), as_json, words_are_data=True)
    if not all(one.ok for one in findings):
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _load(run_file: Path, overrides: list[str] | None) -> Any:
    from flux_ft import log
    from flux_ft.runfile import load_run

    loaded = load_run(run_file, overrides or ())
    for warning in loaded.warnings if run_file.resolve().parent != loaded.config.output_dir.resolve() else ():
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


def _tell(error: FluxFTError) -> None:
    label = "stopped" if error.exit_code == 130 else "error"
    print(f"{label}: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"\nhint: {error.hint}", file=sys.stderr)
