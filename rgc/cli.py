"""What can be done from a shell? ``rgc compile``, ``inspect``, ``verify``, ``bench``, ``calibrate``, ``passes``...

Exit status: 0 done, 1 not equivalent (nothing is written) or a pass that is wrong, 2 bad input or usage, 130
interrupted. Every error is one line on stderr. What a command needs is imported when it runs, so that help and usage
errors come at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from rgc import __version__
from rgc.errors import InputError, RgcError
from rgc.interruption import Interruption
from rgc.limits import Limits, is_out_of_memory, process_within

DONE, NOT_EQUIVALENT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> None:
    """The console script: `run`, and one line also for an interrupt that strikes where nothing could catch it."""
    from rgc.cli_output import print_error

    interruption = Interruption()
    interruption.start()
    status, error = INTERRUPTED, None
    try:
        status, error = outcome(sys.argv[1:])
        interruption.stop()
    except BaseException:  # an interrupt, or whatever became of it amid imports and in code of other people
        interruption.stop()
        if not interruption.happened:
            raise
    if interruption.happened:
        status, error = INTERRUPTED, "interrupted"
    if error is not None:
        print_error(error)
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit status. Only our own bugs raise."""
    from rgc.cli_output import print_error

    try:
        status, error = outcome(arguments)
    except KeyboardInterrupt:
        status, error = INTERRUPTED, "interrupted"
    if error is not None:
        print_error(error)
    return status


def outcome(arguments: Sequence[str]) -> tuple[int, RgcError | str | None]:
    """Run one command line; the exit status, and what there is to say about it on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals, and stderr is for our errors
        try:
            # click's own main() would print an empty line of its own when interrupted.
            with cli.make_context("rgc", list(arguments)) as context:
                return cli.invoke(context) or DONE, None
        except click.exceptions.Exit as done:  # --help and --version
            return done.exit_code, None
        except click.ClickException as error:
            return BAD_INPUT, _usage_error(error)
        except InputError as error:
            return BAD_INPUT, error
        except RgcError as error:
            return NOT_EQUIVALENT, error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RecursionError):
                return BAD_INPUT, "the model is nested too deeply for PyTorch to walk through it"
            if is_out_of_memory(error):
                return BAD_INPUT, "that takes more memory than there is, or than --limit memory= allows"
            raise


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(
    invoke_without_command=True,
    context_settings=_SETTINGS,
    epilog="""\b
Examples:
  rgc compile model.pt --passes all
  rgc verify model.pt model.fused.pt2
  rgc passes fold_batchnorm

'rgc COMMAND --help' says more about each.""",
)
@click.version_option(__version__, message="rgc %(version)s")
@click.pass_context
def cli(context: click.Context) -> int | None:
    """Make a trained PyTorch model smaller without changing what it computes."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    return None


def _options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several option decorators as one, in the order in which --help lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_LOADING = (
    click.option(
        "--input", "inputs", multiple=True, metavar="SHAPE",
        help="What the model takes: 1x3x224x224; once per input, in order; name=1x16 by keyword; 1x16:int64 for "
        "integers. Default: the model's own example, or the size that timm or torchvision name.",
    ),
    click.option("--arch", metavar="MODULE:FACTORY", help="What makes the model that a state dict belongs to."),
    click.option("--trust", is_flag=True, help="Load also what can run code when it is loaded."),
    click.option(
        "--limit", "limits", multiple=True, metavar="NAME=NUMBER",
        help="The most that is taken: nodes (layers and operations), kernel (taps of a merged one), memory (4GiB), "
        "seconds (of rewriting). Once per limit.",
    ),
)  # fmt: skip
_PLUGIN = click.option(
    "--plugin", "plugins", multiple=True, metavar="FILE|MODULE", help="Add the passes of this Python file or module."
)
_OBJECTIVE = click.option(
    "--objective", type=click.Choice(["latency", "depth", "macs", "params"]), default="latency", show_default=True,
    help="What a merge has to improve.",
)  # fmt: skip
_TARGET = click.option(
    "--target", metavar="cpu|cuda|FILE.json",
    help="The machine whose costs say what pays: as rgc calibrate measured it, else by conservative figures.",
)  # fmt: skip
_EXPLAIN = click.option(
    "--explain", "where", metavar="WHERE",
    help="Say why a layer (layer1.0.conv1), each in a part (layer1.0) or a pair (conv1,conv2) is merged or not, "
    "what would have to change, and what it would gain.",
)  # fmt: skip
_LEVEL = click.option(
    "--verify", "level", type=click.Choice(["quick", "full"]), default="quick", show_default=True,
    help="How many inputs the proof draws.",
)  # fmt: skip
_DATA = click.option(
    "--data", metavar="FILE.pt|.npz",
    help="Inputs of your own for the proof, beside those that it draws: arguments of the model, by position or by "
    "name, with any number of samples along the first axis.",
)  # fmt: skip


@cli.command(
    "compile",
    short_help="Make a smaller, equal model and write it.",
    epilog="""\b
Examples:
  rgc compile model.pt
  rgc compile model.pt --passes all,-collapse --input 1x3x224x224
  rgc compile model.pt --output model.onnx --report report.json
  rgc compile weights.safetensors --arch torchvision.models:resnet18
  rgc compile model.pt --data inputs.pt --bisect
  rgc compile model.pt --save-plan plan.json
  rgc compile next_checkpoint.pt --plan plan.json
  rgc compile zoo:repvgg_a0 --objective depth --format python""",
)
@click.argument("model")
@click.option(
    "--passes",
    default="default",
    show_default=True,
    metavar="NAMES",
    help="'default' (exact for any input size), 'all' (also what holds at the example's size only), or names; "
    "separated by commas; -NAME takes one away.",
)
@_options(_OBJECTIVE, _TARGET)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "float64"]),
    help="The dtype of the result. Default: the model's own.",
)
@click.option("--output", metavar="PATH", help="Where to write; .pt2, .onnx or / chooses the format.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["pt2", "onnx", "python"]),
    help="What to write. Default: what --output ends as, else pt2.",
)
@click.option("--report", metavar="FILE.json", help="Write the report here as well.")
@_options(_LEVEL)
@click.option("--strict", is_flag=True, help="Stop at the first rewrite whose check fails, instead of undoing it.")
@_options(_DATA)
@click.option(
    "--bisect",
    "bisects",
    is_flag=True,
    help="Write nothing, but name the rewrite with which the result begins to differ on --data, if it does.",
)
@click.option(
    "--plan",
    metavar="FILE.json",
    help="Take the decisions of an earlier compilation, which --save-plan wrote, for other weights of the same model.",
)
@click.option("--save-plan", metavar="FILE.json", help="Write the decisions here as well, for --plan.")
@_options(_EXPLAIN, *_LOADING, _PLUGIN)
def compile_command(
    model: str,
    passes: str,
    objective: Any,
    target: str | None,
    dtype: str | None,
    output: str | None,
    format_: str | None,
    report: str | None,
    level: Any,
    strict: bool,
    data: str | None,
    bisects: bool,
    plan: str | None,
    save_plan: str | None,
    where: str | None,
    inputs: tuple[str, ...],
    arch: str | None,
    trust: bool,
    limits: tuple[str, ...],
    plugins: tuple[str, ...],
) -> int:
    """Merge what is linear in MODEL, prove the result equal, and write it.

    MODEL is a file of torch.save (.pt, .pth), a state dict (also .safetensors) with --arch, or zoo:NAME. The result
    goes to --output, or beside MODEL as MODEL.fused.pt2. Nothing is written unless the result was proved equal.

    With --bisect nothing is written; the exit status is 1 if the result differs from MODEL on --data.
    """
    import torch

    from rgc.cli_files import load_original, write
    from rgc.cli_options import Destination, chosen_passes, example_for, load_plugin, parse_inputs
    from rgc.cli_output import console, print_written, progress
    from rgc.compiler import Plan, bisect, compile
    from rgc.explainer import explain
    from rgc.subject import require_eval

    if bisects:
        _require_left_out("--bisect", "output", "format_", "report", "strict", "plan", "save_plan", "where")
        if data is None:
            raise InputError("--bisect: say with --data FILE on which inputs")
    if plan is not None:
        _require_left_out(
            "--plan", "passes", "objective", "target", "dtype", "level", "strict", "data", "where", "inputs"
        )  # fmt: skip
    specs, most = parse_inputs(inputs), _held_to(limits)
    destination = Destination.of(model, output, format_, report, save_plan)
    rows = None if data is None else _read_data(data, most)
    if plan is not None:
        own = [each for plugin in plugins for each in load_plugin(plugin)]
        with progress(f"loading {model}"):
            original = load_original(model, arch, trust, most)
        decided = Plan.load(plan, original, own)
        with progress(f"compiling {type(original).__name__}"):
            compiled = decided.apply(original.state_dict())
        with progress(f"writing {destination.artifact}"):
            written = write(compiled, destination, model)
        console().print(compiled.report)
        print_written(console(), written)
        return DONE
    chosen = chosen_passes(passes, plugins)
    with progress(f"loading {model}"):
        original = load_original(model, arch, trust, most)
    require_eval(original)
    example = example_for(original, specs)
    kind = None if dtype is None else getattr(torch, dtype)
    if bisects:
        with progress(f"comparing {type(original).__name__} on {data}"):
            found = bisect(
                original, example, rows, passes=chosen, objective=objective, target=target, dtype=kind, verify=level,
                limits=most,
            )  # fmt: skip
        console().print(found)
        return DONE if found.equal else NOT_EQUIVALENT
    explained = None
    if where is not None:  # first, so that a misspelt name is found before the work is done
        with progress(f"looking at {where}"):
            explained = explain(original, example, where, passes=chosen, objective=objective, target=target)
    with progress(f"compiling {type(original).__name__}"):
        compiled = compile(
            original, example, passes=chosen, objective=objective, target=target,
            dtype=kind, verify=level, strict=strict, limits=most, data=rows,
        )  # fmt: skip
    with progress(f"writing {destination.artifact}"):
        written = write(compiled, destination, model)
    out = console()
    out.print(compiled.report)
    if explained is not None:
        out.print("", explained, "", sep="\n")
    print_written(out, written)
    return DONE


@cli.command(
    "inspect",
    short_help="Print the graph of a model, or explain a layer.",
    epilog="""\b
Examples:
  rgc inspect model.pt
  rgc inspect model.pt --passes fold_batchnorm,merge_branches
  rgc inspect zoo:reducenet20 --passes all --objective depth
  rgc inspect model.pt --explain layer1.0.conv1,layer1.0.conv2""",
)
@click.argument("model")
@click.option("--passes", metavar="NAMES", help="Show the graph after these passes, named as in rgc compile.")
@_options(_EXPLAIN, _OBJECTIVE, _TARGET, *_LOADING, _PLUGIN)
def inspect_command(
    model: str,
    passes: str | None,
    where: str | None,
    objective: Any,
    target: str | None,
    inputs: tuple[str, ...],
    arch: str | None,
    trust: bool,
    limits: tuple[str, ...],
    plugins: tuple[str, ...],
) -> None:
    """Print the graph that rgc sees in MODEL, each value with its layer and its source line.

    With --explain, say instead what the passes (by default those of rgc compile) make of one layer, and why.
    """
    from rgc.cli_files import load_original
    from rgc.cli_options import chosen_passes, example_for, parse_inputs
    from rgc.cli_output import console, print_trace, progress
    from rgc.compiler import trace
    from rgc.explainer import explain
    from rgc.subject import require_eval

    specs, most = parse_inputs(inputs), _held_to(limits)
    if where is not None and passes is None:
        passes = "default"
    if passes is None and plugins:
        raise InputError("--plugin: say with --passes which passes to show, e.g. --passes default")
    chosen = [] if passes is None else chosen_passes(passes, plugins)
    with progress(f"loading {model}"):
        original = load_original(model, arch, trust, most)
    require_eval(original)
    example = example_for(original, specs)
    if where is not None:
        with progress(f"looking at {where}"):
            explained = explain(original, example, where, passes=chosen, objective=objective, target=target)
        console().print(explained)
        return
    with progress(f"tracing {type(original).__name__}"):
        traced = trace(original, example, passes=chosen, objective=objective, target=target, limits=most)
    print_trace(console(), type(original).__name__, traced)


@cli.command(
    "verify",
    short_help="Compare an artifact with its original.",
    epilog="""\b
Examples:
  rgc verify model.pt model.fused.pt2
  rgc verify model.pt model.onnx --input 1x3x224x224 --verify full
  rgc verify model.pt model.fused.pt2 --data inputs.npz
  rgc verify model.pt model.onnx --certificate model.onnx.certificate.json
  rgc verify zoo:reducenet20 reducenet20.fused/ --trust""",
)
@click.argument("original")
@click.argument("artifact")
@click.option(
    "--certificate",
    "certificate",
    metavar="FILE",
    help="Check as well that ORIGINAL and every file of ARTIFACT are those of this certificate, on its inputs.",
)
@_options(_LEVEL, _DATA, *_LOADING)
def verify_command(
    original: str,
    artifact: str,
    certificate: str | None,
    level: Any,
    data: str | None,
    inputs: tuple[str, ...],
    arch: str | None,
    trust: bool,
    limits: tuple[str, ...],
) -> int:
    """Compare ARTIFACT (.pt2, .onnx or a folder) with its ORIGINAL; exit status 0 if they are equal, 1 if not.

    An .onnx runs in onnxruntime. A folder holds Python code, so it takes --trust, and so does a .pt2 unless it is found
    to carry nothing that runs when it is loaded. Without --input the inputs are those of the certificate, if given.
    Which rewrite is to blame for a difference on --data, rgc compile says with --bisect.
    """
    from pathlib import Path

    from rgc.artifact import choose_format
    from rgc.artifact_check import compare
    from rgc.certificate import certificate_of
    from rgc.certified import Evidence
    from rgc.cli_files import load_artifact, load_original
    from rgc.cli_options import example_for, parse_inputs
    from rgc.cli_output import console, print_evidence, print_note, print_verification, progress
    from rgc.data import samples_of
    from rgc.subject import require_eval

    specs, most = parse_inputs(inputs), _held_to(limits)
    rows = None if data is None else _read_data(data, most)
    evidence = None if certificate is None else Evidence.of(certificate, artifact)
    with progress(f"loading {artifact}"):
        loaded = load_artifact(artifact, trust, most)
    with progress(f"loading {original}"):
        model = load_original(original, arch, trust, most)
    require_eval(model)
    with progress("comparing"):
        if evidence is not None:
            evidence = evidence.checked(original, model, loaded)
        own = None if specs or evidence is None else evidence.example
        example = own or example_for(model, specs)
        samples = () if rows is None else samples_of(rows, example, model)
        found = compare(model, loaded, example, level=level, samples=samples)
    beside = certificate_of(Path(artifact), choose_format(artifact))
    if evidence is not None and found.equal:
        print_evidence(console(), evidence)
    elif evidence is None and found.equal and beside.is_file():
        print_note(console(), f"not held against its certificate; add --certificate {beside}")
    print_verification(console(), found)
    return DONE if found.equal else NOT_EQUIVALENT


@cli.command(
    "bench",
    short_help="Measure whether an artifact is faster.",
    epilog="""\b
Examples:
  rgc bench model.pt model.fused.pt2
  rgc bench model.pt model.fused.pt2 --batch 1,64 --threads 1,4 --runtimes eager
  rgc bench model.pt model.onnx --seconds 60 --report times.json
  rgc bench model.pt model.fused.pt2 --device cuda --dtype float16 --channels-last --cuda-graphs""",
)
@click.argument("original")
@click.argument("compiled")
@click.option(
    "--runtimes",
    default="eager,torch.compile,onnxruntime",
    show_default=True,
    metavar="NAMES",
    help="Where both are run.",
)
@click.option("--batch", metavar="N[,N...]", help="Batch sizes. Default: that of the example.")
@click.option("--threads", metavar="N[,N...]", help="Numbers of threads. Default: as PyTorch chooses.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "float64"]),
    help="What both are cast to. Default: each one's own.",
)
@click.option("--channels-last", is_flag=True, help="Keep weights and images in that memory format.")
@click.option("--device", help="cpu or cuda. Default: cpu.")
@click.option("--cuda-graphs", is_flag=True, help="Replay each call as one launch.")
@click.option("--pairs", type=int, default=15, show_default=True, help="How many pairs are measured at least.")
@click.option(
    "--seconds",
    type=float,
    default=20.0,
    show_default=True,
    help="For how long pairs are added, for each setting, while the interval is wide.",
)
@click.option("--report", metavar="FILE.json", help="Write all numbers here as well.")
@_options(*_LOADING)
def bench_command(
    original: str,
    compiled: str,
    runtimes: str,
    batch: str | None,
    threads: str | None,
    dtype: str | None,
    channels_last: bool,
    device: str | None,
    cuda_graphs: bool,
    pairs: int,
    seconds: float,
    report: str | None,
    inputs: tuple[str, ...],
    arch: str | None,
    trust: bool,
    limits: tuple[str, ...],
) -> None:
    """Run ORIGINAL and COMPILED in turn and compare their times.

    ORIGINAL is what rgc compile takes, COMPILED what it wrote (.pt2, .onnx or a folder) or another model. The ratio
    comes with an interval, and it is the interval that says whether COMPILED is faster. An .onnx is run in onnxruntime
    only. A folder holds Python code, so it takes --trust.
    """
    import torch

    from rgc.cli_files import load_compiled, load_original, write_text
    from rgc.cli_options import example_for, json_path, parse_counts, parse_inputs
    from rgc.cli_output import console, progress
    from rgc.measurement import bench

    specs, batches, counts = parse_inputs(inputs), parse_counts("--batch", batch), parse_counts("--threads", threads)
    place, most = json_path("--report", report), Limits.parse(limits)
    with progress(f"loading {compiled}"):
        candidate = load_compiled(compiled, trust, most)
    with progress(f"loading {original}"):
        model = load_original(original, arch, trust, most)
    with progress("measuring") as say:
        found = bench(
            model, candidate, example_for(model, specs), batch_sizes=batches, threads=counts,
            dtype=None if dtype is None else getattr(torch, dtype), channels_last=channels_last, device=device,
            runtimes=[name.strip() for name in runtimes.split(",")],
            pairs=pairs, seconds=seconds, cuda_graphs=cuda_graphs, names=(original, compiled), on_progress=say,
        )  # fmt: skip
    if place is not None:
        write_text(place, found.to_json() + "\n")
    console().print(found)


@cli.command(
    "calibrate",
    short_help="Measure this machine, so that merges are planned for it.",
    epilog="""\b
Examples:
  rgc calibrate
  rgc calibrate --threads 1
  rgc calibrate --target cuda --dtype float16
  rgc calibrate --output server.json    # for rgc compile --target server.json""",
)
@click.option("--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What to measure.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="In which dtype.",
)
@click.option("--threads", metavar="N", help="With how many threads. Default: as PyTorch chooses.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 600),
    default=150.0,
    show_default=True,
    help="For how long noisy measurements are repeated.",
)
@click.option("--output", metavar="FILE.json", help="Where to write. Default: the user's cache, where compile looks.")
def calibrate_command(target: str, dtype: str, threads: str | None, seconds: float, output: str | None) -> None:
    """Measure how fast this machine runs layers of every kind and size, in under three minutes.

    rgc compile --target cpu (or cuda) then plans with these figures, for models of that dtype, run with as many
    threads, by this version of PyTorch. Let nothing else run meanwhile.
    """
    import torch

    from rgc.calibrate import calibrate
    from rgc.calibration import cache_folder
    from rgc.cli_options import json_path, parse_counts
    from rgc.cli_output import console, print_calibration, progress_bar

    place = json_path("--output", output)
    counts = parse_counts("--threads", threads) or (torch.get_num_threads(),)
    if len(counts) > 1:
        raise InputError(f"--threads {threads}: one number at a time")
    before = torch.get_num_threads()
    torch.set_num_threads(counts[0])
    try:
        with progress_bar() as on_progress:
            made = calibrate(target, getattr(torch, dtype), seconds=seconds, on_progress=on_progress)
    finally:
        torch.set_num_threads(before)
    path = place or cache_folder() / made.key.file_name
    made.save(path)
    print_calibration(console(), made, path)


@cli.command(
    "passes",
    short_help="List and explain the passes.",
    epilog="""\b
Examples:
  rgc passes
  rgc passes merge_branches
  rgc passes merge_branches --prove
  rgc passes --plugin my_passes.py""",
)
@click.argument("name", required=False)
@click.option(
    "--prove", "proves", is_flag=True,
    help="Try whether it is a law: on random integers, with arithmetic that does not round (some seconds a pass).",
)  # fmt: skip
@_options(_PLUGIN)
def passes_command(name: str | None, proves: bool, plugins: tuple[str, ...]) -> None:
    """List the passes; with NAME, show what one states, matches, refuses, fires on and leaves alone.

    With --prove, also how probably a wrong pass would have stood its trial. Exit status 1 if one is wrong.
    """
    from rgc.cli_options import load_plugin
    from rgc.cli_output import console, print_law, print_laws, print_pass, print_passes, progress
    from rgc.passbook import resolve
    from rgc.passes import ALL, DEFAULT, OPT_IN

    added = {each.name: each for plugin in plugins for each in load_plugin(plugin)}
    known = {each.name: each for each in (*ALL, *OPT_IN)} | added
    chosen = list(known.values()) if name is None else [known[name] if name in known else resolve([name])[0][0]]
    laws = []
    if proves:
        from rgc.laws import prove

        with progress("proving") as say:
            for each in chosen:
                say(each.name)
                laws.append(prove(each))
    if name is not None:
        print_pass(console(), chosen[0])
        print_law(console(), *laws)
    elif proves:
        print_laws(console(), laws)
    else:
        print_passes(console(), chosen, {"default": DEFAULT, "all": ALL})


@cli.command(
    "test",
    short_help="Try a pass of your own, and say what is wrong with it.",
    epilog="""\b
Examples:
  rgc test my_passes.py
  rgc test my_passes.py --examples 400
  rgc test package.my_passes --no-mutation""",
)
@click.argument("source", metavar="FILE|MODULE")
@click.option(
    "--examples",
    type=click.IntRange(0, 100_000),
    default=40,
    show_default=True,
    metavar="N",
    help="How many random models are compiled with each pass, and at most how many like each of its examples.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which ones: the same seed draws the same models.")
@click.option("--no-mutation", is_flag=True, help="Plant no faults in the source of the passes.")
def test_command(source: str, examples: int, seed: int, no_mutation: bool) -> int:
    """Try the passes in FILE or MODULE; exit status 0 if nothing is wrong with them, 1 if something is.

    Their own examples have to hold, models like these and random ones have to stay equal, and faults that are planted
    in the source have to be noticed by the examples. What is wrong is told with a program that shows it. This runs the
    code of FILE. docs/writing_a_pass.md builds a pass in this way.
    """
    from rgc.cli_options import load_plugin
    from rgc.cli_output import console, print_examination, progress
    from rgc.examination import examine, own_passes

    passes = own_passes(load_plugin(source, option=""))
    out, is_wrong = console(), False
    for each in passes:
        with progress(f"testing {each.name}") as say:
            found = examine(each, models=examples, mutation=not no_mutation, seed=seed, progress=say)
        print_examination(out, found)
        is_wrong = is_wrong or not found.ok
    return NOT_EQUIVALENT if is_wrong else DONE


def _read_data(path: str, most: Limits) -> Any:
    from rgc.data_file import read_data

    return read_data(Path(path), most)


def _require_left_out(option: str, *names: str) -> None:
    """`InputError` for what is given beside ``option`` and contradicts it; names are those of the parameters."""
    context = click.get_current_context()
    given = [each for each in context.command.params if each.name in names]
    for each in given:
        if context.get_parameter_source(each.name or "") is not click.core.ParameterSource.DEFAULT:
            raise InputError(f"{option}: leave {each.opts[0]} out, which has no meaning beside it")


def _held_to(limits: Sequence[str]) -> Limits:
    """What ``--limit`` says; until the command ends the process is held to the memory in it."""
    most = Limits.parse(limits)
    click.get_current_context().with_resource(process_within(most.memory))
    return most


def _usage_error(error: click.ClickException) -> str:
    """click's message, and where to read on."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = "rgc" if context is None else context.command_path
    return f"{error.format_message().rstrip('.')} (see {path} --help)"
