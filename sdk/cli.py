"""The command `swiftvideo`. Errors of swiftvideo are one line on stderr; exit code 2 for wrong usage, 1 otherwise."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer
from rich.console import Console

from swiftvideo.runtime.errors import OutOfMemoryError, SwiftVideoError, UsageError
from swiftvideo.runtime.geometry import Policy

from .harmless import harmless
from .machine import version
from .parts import needing, silence_grpc
from .progress import say, telling
from .server.command import serve

app = typer.Typer(
    name="swiftvideo",
    help="Endless text-to-video whose prompt can change while it plays.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Bundle = Annotated[
    Path | None, typer.Option("--bundle", help="A bundle's folder; the embedded model if absent.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help="auto, onnxruntime, tensorrt or torch; see 'swiftvideo doctor'.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Of the CPU engine; all cores if absent.")
]
PolicyName = Annotated[
    str | None, typer.Option("--policy", help="swift, recache, keep or cut; the bundle's if absent.")
]

LoraAlpha = Annotated[
    float | None, typer.Option("--lora-alpha", help="Strength of the LoRA times its rank; its own if absent.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"swiftvideo {version()}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    out: Annotated[Path, typer.Option("--out", help="The MP4 file to write.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to show; repeat it.")] = None,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="When the next prompt starts: 4s, 1m30s, 500ms; repeat it."),
    ] = None,
    story: Annotated[
        Path | None,
        typer.Option("--story", help="A YAML file instead of --prompt and --at (docs/cli.md)."),
    ] = None,
    seconds: Annotated[
        str | None, typer.Option("--seconds", help="Length; 4 s after the last prompt if absent.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise; 0 if absent.")] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option("--contact-sheet", help="A PNG file with a row of frames per prompt.")
    ] = None,
    policy: PolicyName = None,
    bundle: Bundle = None,
    engine: EngineName = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    server: Annotated[
        str | None, typer.Option("--server", help="Let the server at HOST:PORT make it.")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", envvar="SWIFTVIDEO_TOKEN", help="Bearer token for --server.")
    ] = None,
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="For --server; if absent: TLS with PEM files, or with a token for another machine.",
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="PEM roots for --server; the system's if absent.")
    ] = None,
    client_certificate: Annotated[
        Path | None, typer.Option("--client-certificate", help="PEM chain for --server: mTLS.")
    ] = None,
    client_key: Annotated[
        Path | None, typer.Option("--client-key", help="PEM key of the client's certificate.")
    ] = None,
) -> None:
    """Make a video. Prompts take effect at chunk boundaries; Ctrl-C keeps what was made."""
    with telling(as_json) as bar:
        from .output import check_output
        from .story import override, read_story, story_from_options

        if story is not None and (prompt or at):
            raise UsageError("--story with --prompt or --at: use either the file or the options")
        if story is None and not prompt:
            raise UsageError("nothing to show: give --prompt or --story")
        if story is not None:
            told = override(read_story(story), seconds, seed, policy)
        else:
            told = story_from_options(prompt or [], at or [], seconds, seed or 0, policy)
        check_output(out, (".mp4",))
        if contact_sheet is not None:
            check_output(contact_sheet, (".png",))
        if server is not None:
            if bundle is not None or threads is not None or engine != "auto":
                raise UsageError("--bundle, --engine and --threads do not go with --server: leave them out")
            silence_grpc()
            with needing("serve", "--server"):
                from .client import Client
                from .generate_remote import generate_on

                with Client(
                    server, token, tls=tls, root=root, certificate=client_certificate, key=client_key
                ) as client:
                    report = generate_on(client, told, out, contact_sheet, bar.update)
        else:
            if any(value is not None for value in (tls, root, client_certificate, client_key)):
                raise UsageError(
                    "--tls, --root, --client-certificate and --client-key belong to --server: give that, too"
                )
            from .engines import open_pipeline
            from .generate import generate as work

            with open_pipeline(bundle, engine, threads) as pipeline:
                report = work(pipeline, told, out, contact_sheet, bar.update)
    say(report, as_json)
    if report.interrupted:
        raise typer.Exit(128 + report.interrupted)


@app.command()
def inspect(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle's folder; the embedded model if absent.")
    ] = None,
) -> None:
    """Print what is in a bundle."""
    from swiftvideo.runtime.pipeline import EMBEDDED

    from .inspect import show

    show(bundle or EMBEDDED, Console())


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder to write.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A folder with transformer/, vae/, text_encoder/ and a tokenizer.")
    ] = None,
    random: Annotated[
        str | None, typer.Option("--random", help="Random weights instead, such as wan2.1-t2v-1.3b.")
    ] = None,
    backbone: Annotated[
        Path | None, typer.Option("--backbone", help="Generator weights to use instead of transformer/.")
    ] = None,
    lora: Annotated[Path | None, typer.Option("--lora", help="A LoRA to merge into the backbone.")] = None,
    lora_alpha: LoraAlpha = None,
    height: Annotated[
        int | None, typer.Option("--height", help="Pixels; the checkpoint's if absent.")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels; the checkpoint's if absent.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32, fp16 or bf16; fp32 if absent.")] = None,
    full_text_encoder: Annotated[
        bool, typer.Option("--full-text-encoder", help="With --random: all of its layers, not two.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Also build TensorRT plans: h100, h200, rtx:sm89, ...; repeat it."),
    ] = None,
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Plans of standard layers alone; slower.")
    ] = False,
) -> None:
    """Turn a checkpoint into a bundle (needs torch). With --target alone, add plans to the bundle at --out."""
    from .exporting import export as work
    from .interrupts import cleaning_up

    with cleaning_up():
        work(
            checkpoint,
            out,
            random=random,
            backbone=backbone,
            lora=lora,
            lora_alpha=lora_alpha,
            height=height,
            width=width,
            dtype=dtype,
            full_text_encoder=full_text_encoder,
            overwrite=overwrite,
            targets=target,
            plugins=not no_plugins,
        )


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="What it was made from; the bundle's own weights if absent."),
    ] = None,
    backbone: Annotated[
        Path | None, typer.Option("--backbone", help="With --checkpoint: as given to export.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option("--lora", help="With --checkpoint: as given to export.")
    ] = None,
    lora_alpha: LoraAlpha = None,
    graph: Annotated[
        list[str] | None, typer.Option("--graph", help="Compare only this one; repeat it.")
    ] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
) -> None:
    """Compare a bundle with the torch reference on every engine, graph by graph (needs torch)."""
    from .exporting import verify as work

    work(
        bundle,
        checkpoint=checkpoint,
        backbone=backbone,
        lora=lora,
        lora_alpha=lora_alpha,
        graphs=graph or None,
        threads=threads,
        as_json=as_json,
    )


@app.command()
def doctor() -> None:
    """Say which engines can run here, and why the others cannot."""
    from .doctor import show

    show(Console())


@app.command()
def bench(
    bundle: Bundle = None,
    model: Annotated[
        str | None, typer.Option("--model", help="With --random: an architecture, such as wan2.1-t2v-1.3b.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights for --model: exported, measured, deleted.")
    ] = False,
    height: Annotated[int | None, typer.Option("--height", help="Pixels, with --random.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels, with --random.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, fp16 or bf16, with --random; bf16 if absent.")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=8, help="Measured chunks without a switch; 60 if absent.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="Instead of --chunks: so much video.")
    ] = None,
    policy: PolicyName = None,
    engine: EngineName = "auto",
    threads: Threads = None,
    memory_chunks: Annotated[
        int,
        typer.Option(
            "--memory-chunks",
            min=0,
            help="Compare memory at chunk 20 and at this one, which takes the most time; 0: do not.",
        ),
    ] = 400,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure speed per stage, the cost of a switch, work done beside the machine's limits, and memory."""
    from .bench import check_json, measure
    from .bench_model import measured_bundle
    from .bench_table import bar, show
    from .interrupts import cleaning_up

    if json_file is not None:
        check_json(json_file)
    with cleaning_up(), measured_bundle(bundle, model, random, height, width, dtype) as folder:
        chosen = cast(Policy | None, policy)
        with bar() as tell:
            result = measure(folder, chunks, chosen, engine, threads, memory_chunks, seconds, tell)
    show(result, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"{json_file}: figures")


app.command()(serve)


def main() -> None:
    """Entry point: errors of swiftvideo without a traceback."""
    try:
        app()
    except UsageError as error:
        _leave(2, error)
    except (SwiftVideoError, OSError) as error:  # of the system: no space for what is said, say
        _leave(1, error)
    except MemoryError as error:
        _leave(1, OutOfMemoryError(f"no memory ({error}): use a smaller model or resolution"))


def _leave(code: int, error: Exception) -> NoReturn:
    """End with `code` and a sentence on stderr, also where stdout or stderr takes nothing more."""
    with suppress(OSError):  # then the code alone says it
        typer.echo(f"swiftvideo: {harmless(error)}", err=True)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by who started us
        try:
            stream.flush()
        except OSError:  # from Python 3.14 on it is tried again at the exit, which would make the code 120
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    sys.exit(code)


if __name__ == "__main__":
    main()
