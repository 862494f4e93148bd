"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import click

from bench import __version__, completion, processes
from bench.errors import BenchError, Interrupted, UsageError, meant

#: what `bench run` evaluates when it is told nothing: the mixture, and the plain network beside it
DEFAULT_DEFENSES = "dwf,resnet18"

#: what a full disk, a quota or a file that may not grow says
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BUG = "this is a bug of ours; please report it with the lines above"

Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> None:
    """Runs the command line and exits: 0 done, 2 the user's mistake, 1 a bug of ours, 130 interrupted."""
    code, line = 0, ""
    # what a scheduler sends before it kills is what Ctrl-C is
    before = signal.signal(signal.SIGTERM, _interrupted)
    try:
        if any("\0" in word for word in sys.argv):
            raise UsageError("a word of the command holds a zero byte; no name and no path has one")
        if completion.ASKED in os.environ:
            sys.exit(completion.answer(commands, os.environ[completion.ASKED]))
        # not `commands(…)`: click would answer an interruption and a closed pipe in its own way
        with processes.joined(), commands.make_context("bench", sys.argv[1:]) as context:
            commands.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        code, line = 2, error.format_message().rstrip(".") + _meant(error)
        if isinstance(error, click.UsageError) and error.ctx is not None:
            line += f" (try `{error.ctx.command_path} --help`)"
    except BenchError as error:
        code, line = error.exit_code, str(error)
        if os.environ.get("BENCH_DEBUG"):
            traceback.print_exc()
    except (KeyboardInterrupt, click.Abort):
        code, line = (
            Interrupted.exit_code,
            "interrupted; what was finished is kept, the same command goes on from there",
        )
    except BrokenPipeError:
        # whoever read our output has heard enough; Python would complain once more when it empties its buffer
        _deafen(sys.stdout)
    except OSError as error:
        if error.errno not in FULL:
            traceback.print_exc()
            code, line = 1, BUG
        else:
            where = f" for {error.filename}" if error.filename else ""
            code, line = (
                2,
                f"no room{where}: {error.strerror}; free some, the same command goes on from what is kept",
            )
            _deafen(sys.stdout)
    except Exception:
        traceback.print_exc()
        code, line = 1, BUG
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    if line:
        # what libraries say may run over several lines
        print(f"bench: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


#: what `bench` alone says
FIRST = """\
bench run                                    train DWF and a ResNet-18 on digits, attack both: two minutes
bench run --plugin mine.py --defense mine    a defense of yours beside them; --checkpoint takes anybody's weights
bench list defenses                          what there is; also datasets, protocols, attacks
bench table                                  what was measured; `bench audit RUN` says what speaks against it
bench doctor                                 what this machine has; `bench --help` shows every command"""


def _meant(error: click.ClickException) -> str:
    """The nearest of an option's choices, which click itself tells of commands and options alone."""
    param = getattr(error, "param", None)
    given = re.search(r"'([^']*)' is not one of", error.format_message())
    if param is None or given is None or not isinstance(param.type, click.Choice):
        return ""
    return meant(given[1], [str(choice) for choice in param.type.choices])


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _deafen(stream: TextIO) -> None:
    """Lets what a stream still holds go nowhere, so that Python does not fail on it once more at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="bench")
@click.pass_context
def commands(context: click.Context) -> None:
    """Train defenses, attack them, and compare what is left.

    \b
    bench run                                   DWF on digits, trained and evaluated: the first two minutes
    bench run --defense dwf --dataset cifar10   the paper's protocol on CIFAR-10
    bench table --published                     measured beside published
    """
    if context.invoked_subcommand is None:
        click.echo(FIRST)
    elif processes.rank() and context.invoked_subcommand not in ("run", "train"):
        # nothing that several processes could do better than one
        context.exit()


results_option = click.option(
    "--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True, metavar="DIR"
)


def of_network(option: str, help: str) -> Callable[[Command], Command]:
    """An option that asks for a figure of one trained network."""
    return click.option(option, metavar="DEFENSE", help=help, shell_complete=completion.defense)


def asked(train_only: bool) -> Callable[[Command], Command]:
    """The options that `run` and `train` share, and those of `run` alone."""
    shared = [
        click.option(
            "--defense",
            default=None,
            metavar="NAME[,NAME…]",
            help="What to evaluate; see `bench list defenses`.",
            shell_complete=completion.defenses,
        ),
        click.option(
            "--dataset",
            default="digits",
            show_default=True,
            help="See `bench list datasets`.",
            shell_complete=completion.dataset,
        ),
        click.option(
            "--recipe",
            metavar="NAME",
            help="How it is trained: tiny, fast, paper, or what else the defense has. "
            "[default: tiny for digits, else fast]",
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A field of the defense's config."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of weights, order and starts."),
        click.option(
            "--seeds", type=int, default=1, show_default=True, help="How many seeds, counting from --seed."
        ),
        click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]"),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "tf32", "bf16"]),
            default="fp32",
            show_default=True,
            help="Of gradients; judging is fp32. tf32: on NVIDIA GPUs.",
        ),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            help="Where the datasets' files are. [default: ./data]",
        ),
        results_option,
        click.option(
            "--plugin",
            type=click.Path(path_type=Path),
            metavar="FILE.py",
            help="A file that registers defenses.",
        ),
        click.option("--yes", is_flag=True, help="Never ask."),
        click.option("--quiet", is_flag=True, help="No progress."),
    ]
    evaluating = [
        click.option(
            "--protocol",
            multiple=True,
            default=["dwf-paper"],
            show_default=True,
            metavar="NAME|FILE.toml",
            shell_complete=completion.protocol,
        ),
        click.option(
            "--attack",
            "attacks",
            multiple=True,
            metavar="NAME",
            help="A further column, such as autoattack or torchattacks:PGD.",
            shell_complete=completion.attack,
        ),
        click.option("--samples", type=int, metavar="N", help="The first N test images. [default: all]"),
        click.option("--eps", metavar="E", help="The radius, such as 8/255. [default: the dataset's]"),
        click.option("--checkpoint", metavar="PATH|hf_hub:NAME|URL", help="Weights in place of training."),
        click.option(
            "--weights",
            type=click.Choice(["best", "last"]),
            help="The epoch best on held-out images, or the last. [default: best]",
        ),
        click.option("--insist", is_flag=True, help="Evaluate a random model by single draws all the same."),
        click.option(
            "--batch-size",
            type=int,
            metavar="B",
            help="Images attacked at once. [default: 128, on a GPU 512]",
        ),
        click.option("--explain", is_flag=True, help="Print the plan and its cost, and do nothing."),
        click.option("--strict", is_flag=True, help="Exit with 2 unless every run is credible."),
        click.option("--json", "as_json", is_flag=True, help="Print the long table of these runs as JSON."),
    ]

    def add(command: Command) -> Command:
        for option in reversed(shared if train_only else [*shared[:2], *evaluating, *shared[2:]]):
            command = option(command)
        return command

    return add


@commands.command()
@asked(train_only=False)
def run(
    protocol: tuple[str, ...],
    attacks: tuple[str, ...],
    samples: int | None,
    eps: str | None,
    checkpoint: str | None,
    weights: Literal["best", "last"] | None,
    insist: bool,
    batch_size: int | None,
    explain: bool,
    strict: bool,
    as_json: bool,
    **shared: Any,
) -> None:
    """Train what has no weights yet, attack it, and print the table.

    A finished run is not run again; a stopped one goes on where it stopped.
    """
    from bench import pipeline
    from bench.session import prepare

    session = prepare(
        protocol=list(protocol),
        attacks=attacks,
        samples=samples,
        eps=eps,
        checkpoint=checkpoint,
        weights=weights,
        insist=insist,
        batch_size=batch_size,
        **_arguments(**shared),
    )
    if explain:
        if processes.rank() == 0:
            click.echo(pipeline.explain_session(session))
        return
    records = pipeline.run_session(session)
    if processes.rank():
        return
    from bench import plot, table
    from bench.long import frame, groups

    found = groups(records)
    doubtful = [record for record in records if record.verdict != "credible"]
    if as_json:
        click.echo(frame(found).to_json(orient="records", indent=2))
        _strict(strict, doubtful)
        return
    click.echo(table.render_groups(found, color=sys.stdout.isatty()).rstrip("\n"))
    drawn = plot.figures(session.results, session.results / "figures", datasets=[session.data.name])
    _say(f"figures: {', '.join(str(path) for path in drawn if path.suffix == '.png')}" if drawn else "")
    _say(f"records: {session.results / 'runs'}; `bench table` and `bench plot` show all of them")
    for record in records:
        codes = ", ".join(finding.code for finding in record.findings if finding.severity != "informs")
        name = f"{record.asked.defense}, {record.asked.protocol['name']}, seed {record.asked.seed}"
        more = f" ({codes}); `bench audit {record.asked.key}` says why" if codes else ""
        _say(f"audit: {name}: {record.verdict}{more}")
    _strict(strict, doubtful)


def _strict(strict: bool, doubtful: Sequence[Any]) -> None:
    if strict and doubtful:
        first = doubtful[0]
        raise UsageError(
            f"--strict: {len(doubtful)} run(s) are not credible, first {first.asked.defense} "
            f"({first.verdict}: {', '.join(f.code for f in first.findings if f.severity != 'informs')})"
        )


@commands.command()
@click.argument("run_", metavar="RUN")
@results_option
@click.option("--strict", is_flag=True, help="Exit with 2 unless the run is credible.")
@click.option("--json", "as_json", is_flag=True)
def audit(run_: str, results: Path, strict: bool, as_json: bool) -> None:
    """Say what speaks against believing a run.

    RUN is its folder, or any part of dataset/defense/protocol-key that only it has; a whole name goes before a part of one.
    """
    from bench.audit import kept as audits
    from bench.finding import verdict
    from bench.record import find, read, read_void

    folder = find(results, run_)
    record, void = read(folder), read_void(folder)
    found = audits.again(record) if record is not None else void.findings if void is not None else []
    come_to = verdict(found)
    click.echo(
        audits.as_json(found, come_to)
        if as_json
        else audits.as_text(found, come_to, "/".join(folder.parts[-3:]))
    )
    if not as_json and record is not None and record.audited is not None:
        cost = record.audited
        click.echo(
            f"probed {cost.images} images, {100 * cost.share:.1f} % of the passes that the outcomes stand for, {cost.seconds:.1f} s"
        )
    if strict and come_to != "credible":
        raise UsageError(f"--strict: the run is {come_to}")


@commands.command()
@click.argument("model", shell_complete=completion.defense)
@click.option(
    "--dataset",
    default="digits",
    show_default=True,
    help="Whose images it is shown.",
    shell_complete=completion.dataset,
)
@click.option("--checkpoint", metavar="PATH|hf_hub:NAME|URL", help="Weights in place of untrained ones.")
@click.option("--recipe", metavar="NAME", help="Whose settings it is built with, such as paper.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A field of the defense's config."
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the datasets' files are.")
@click.option("--plugin", type=click.Path(path_type=Path), metavar="FILE.py")
@click.option("--json", "as_json", is_flag=True)
def check(model: str, as_json: bool, settings: tuple[str, ...], **asked: Any) -> None:
    """See in seconds whether MODEL is what an attack can be run on: a function from pixels to logits.

    MODEL is a defense's name, or MODULE:FUNCTION.
    """
    from bench import pipeline
    from bench.audit import kept as audits
    from bench.finding import verdict
    from bench.session import prepare

    session = prepare(defense=[model], settings=dict(_setting(text) for text in settings), say=_say, **asked)
    for name, contract in pipeline.check_session(session):
        come_to = verdict(contract.findings)
        if as_json:
            click.echo(audits.as_json(contract.findings, come_to))
        else:
            facts = contract.facts
            click.echo(audits.as_text(contract.findings, come_to, name))
            click.echo(f"  {facts.randomness}, gives {facts.output}, {facts.passes} pass(es) a call")
        if come_to == "void":
            raise UsageError(f"{model} cannot be evaluated as it is")


@commands.command()
@asked(train_only=True)
@click.option(
    "--explain",
    is_flag=True,
    help="Print images/s and the time of each recipe, or of --recipe, and train nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="With --explain: as JSON.")
def train(explain: bool, as_json: bool, **shared: Any) -> None:
    """Train only; goes on where a stopped training stopped."""
    from bench import pipeline
    from bench.session import prepare

    if as_json and not explain:
        raise UsageError("--json belongs to --explain; training prints the checkpoints' paths")
    arguments = _arguments(**shared)
    session = prepare(**arguments)
    if explain and processes.rank():
        return
    if explain:
        rows = pipeline.explain_training(session, arguments["recipe"], arguments["settings"])
        click.echo(json.dumps(rows, indent=2) if as_json else pipeline.training_told(rows))
        return
    for path in pipeline.train_session(session):
        if processes.rank() == 0:
            click.echo(path)


@commands.command()
@results_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "markdown", "latex", "csv"]),
    default="text",
    show_default=True,
)
@click.option("--layout", type=click.Choice(["paper", "long"]), default="paper", show_default=True)
@click.option("--published", is_flag=True, help="What papers print, beside ours.")
@click.option(
    "--compare-to",
    metavar="DEFENSE",
    help="Mark what differs from this row on the same images (McNemar).",
    shell_complete=completion.defense,
)
@click.option("--per-class", is_flag=True, help="A column for each class, and the worst one.")
@click.option("--cost", is_flag=True, help="What each training cost, the cheapest first.")
@click.option("--columns", metavar="A,B", help="These alone, by heading, name or attack, in this order.")
@click.option("--transpose", is_flag=True, help="Attacks down the side, defenses across.")
@click.option("--best/--no-best", default=True, show_default=True, help="Set off the best of a column.")
@click.option("--std/--no-std", default=True, show_default=True, help="± over seeds.")
@click.option("--ci/--no-ci", default=False, show_default=True, help="95 % Wilson intervals in brackets.")
@click.option("--taxonomy", is_flag=True, help="Instead: how the defenses gate, route, train and activate.")
@click.option("--protocols", is_flag=True, help="Instead: the attack settings of every protocol.")
@click.option(
    "--recipes",
    is_flag=False,
    flag_value="all",
    metavar="[NAME]",
    help="Instead: the hyperparameters of every recipe, or of one, such as paper.",
)
@click.option("--standalone", is_flag=True, help="With --format latex: a whole document for pdflatex.")
@click.option(
    "--plugin", type=click.Path(path_type=Path), metavar="FILE.py", help="A file that registers defenses."
)
@click.option("--json", "as_json", is_flag=True, help="The long table as JSON.")
def table(
    results: Path,
    format_: str,
    layout: str,
    published: bool,
    compare_to: str | None,
    per_class: bool,
    cost: bool,
    columns: str | None,
    transpose: bool,
    best: bool,
    std: bool,
    ci: bool,
    taxonomy: bool,
    protocols: bool,
    recipes: str | None,
    standalone: bool,
    plugin: Path | None,
    as_json: bool,
) -> None:
    """Print what was measured; or what there is to measure: --taxonomy, --protocols, --recipes."""
    names = tuple(name.strip() for name in (columns or "").split(",") if name.strip())
    measured = {
        "--compare-to": compare_to is not None,
        "--per-class": per_class,
        "--cost": cost,
        "--ci": ci,
        "--no-std": not std,
        "--no-best": not best,
    }
    catalogued = {"--taxonomy": taxonomy, "--protocols": protocols, "--recipes": recipes is not None}
    if standalone and format_ != "latex":
        raise UsageError("--standalone makes a LaTeX document; add --format latex")
    if any(catalogued.values()):
        for option, given in {**measured, "--json": as_json, "--layout long": layout == "long"}.items():
            if given:
                raise UsageError(f"{option} is of what was measured; leave it out or leave the catalogue out")
        if sum(catalogued.values()) > 1:
            raise UsageError(
                f"{' and '.join(o for o, given in catalogued.items() if given)}: ask for one at a time"
            )
        text = _catalogue(taxonomy, protocols, recipes, published, plugin, names, transpose, format_)
    elif as_json:
        for option, given in {**measured, "--columns": bool(names), "--transpose": transpose}.items():
            if given:
                raise UsageError(f"--json has no place for {option}; take a format of the paper's layout")
        from bench.long import load_results

        click.echo(load_results(results).to_json(orient="records", indent=2))
        return
    else:
        from bench.table import Look, render

        text = render(
            results,
            format=format_,
            layout=layout,
            published=published,
            compare_to=compare_to,
            per_class=per_class,
            cost=cost,
            look=Look(transpose=transpose, columns=names, best=best, std=std, ci=ci),
            color=sys.stdout.isatty(),
        )
    if standalone:
        from bench.typeset import document

        text = document(text)
    click.echo(text.rstrip("\n"))


def _catalogue(
    taxonomy: bool,
    protocols: bool,
    recipes: str | None,
    published: bool,
    plugin: Path | None,
    columns: tuple[str, ...],
    transpose: bool,
    format_: str,
) -> str:
    from bench import catalogue, registry, sheet

    if plugin is not None:
        registry.load_plugin(plugin)
    if taxonomy:
        made = catalogue.taxonomy(beside=published)
    elif protocols:
        made = catalogue.attacks()
    else:
        made = catalogue.recipes(None if recipes == "all" else recipes)
    if columns:
        made = sheet.chosen(made, columns)
    return sheet.written(sheet.transposed(made) if transpose else made, format_)


@commands.command()
@click.argument("question", metavar="differences|routing|published|audit")
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True, metavar="DIR"
)
@click.option("--dataset", metavar="NAME", help="Of its runs alone.", shell_complete=completion.dataset)
@click.option("--protocol", metavar="NAME", help="Likewise.", shell_complete=completion.protocol)
@click.option(
    "--compare-to",
    metavar="DEFENSE",
    help="With differences: the one that all others are compared with.",
    shell_complete=completion.defense,
)
@click.option("--lines", metavar="DATASET", help="With published: whose numbers, if the images have none.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "markdown", "latex", "csv"]),
    default="text",
    show_default=True,
)
def read(
    question: str,
    results: Path,
    dataset: str | None,
    protocol: str | None,
    compare_to: str | None,
    lines: str | None,
    format_: str,
) -> None:
    """Say what finished runs come to, beyond their accuracies.

    \b
    differences  by how much one defense differs from every other on the same images
    routing      what a mixture's routing hides from PGD, and which expert does the work
    published    how far it is from what the DWF paper prints, and which radius would explain it
    audit        where the audit doubted a number, and whether it was right
    """
    from bench.long import groups
    from bench.reading import read as answer
    from bench.record import read_all
    from bench.sheet import written

    found = [
        group
        for group in groups(read_all(results))
        if dataset in (None, group.dataset) and protocol in (None, group.protocol)
    ]
    made = answer(question, found, compare_to=compare_to, lines=lines)
    click.echo("\n".join(written(one, format_) for one in made).rstrip("\n"))


@commands.command()
@click.argument("files", nargs=-1, required=True, metavar="TABLE.csv…", type=click.Path(path_type=Path))
@click.option("--strict", is_flag=True, help="Exit with 2 where something warns.")
@click.option("--json", "as_json", is_flag=True)
def lint(files: tuple[Path, ...], strict: bool, as_json: bool) -> None:
    """Say what speaks against a table of accuracies, anybody's; no model is needed.

    The rows of several files are joined. Understood are our own tables, a line per accuracy, and a line per
    defense under headings such as Clean, FGSM 0.01, PGD-20 (8/255), AutoAttack.
    """
    from bench import lint as rules
    from bench.accuracies import read
    from bench.finding import verdict

    given = read(files)
    for note in given.notes:
        _say(f"bench: {note}")
    found = rules.findings(given)
    if as_json:
        said = {"verdict": verdict(found), "findings": [finding.model_dump() for finding in found]}
        click.echo(json.dumps(said, indent=2, ensure_ascii=False))
    else:
        click.echo(rules.as_text(found, given))
    if strict and verdict(found) != "credible":
        raise UsageError(f"--strict: the table is {verdict(found)}")


@commands.command()
@click.argument("accuracies", nargs=-1, type=float, metavar="[PERCENT PERCENT]")
@click.option(
    "--discordant", type=float, metavar="PERCENT", help="Images that only one of the two gets right."
)
@click.option(
    "--defense",
    metavar="A,B",
    help="Measure that in two finished runs instead.",
    shell_complete=completion.defenses,
)
@click.option(
    "--dataset",
    default="digits",
    show_default=True,
    help="Of these runs.",
    shell_complete=completion.dataset,
)
@click.option(
    "--protocol",
    default="dwf-paper",
    show_default=True,
    help="Of these runs.",
    shell_complete=completion.protocol,
)
@click.option("--column", default="worst-case", show_default=True, help="Of their protocol.")
@results_option
@click.option("--alpha", type=float, default=0.05, show_default=True, help="The level of the test.")
@click.option("--power", type=float, default=0.8, show_default=True, help="How often it shall find it.")
@click.option("--json", "as_json", is_flag=True)
def power(
    accuracies: tuple[float, ...], defense: str | None, results: Path, as_json: bool, **asked: Any
) -> None:
    """Say how many images it takes to tell two rows apart, by McNemar's exact test.

    \b
    bench power 50.1 52.0                         two accuracies
    bench power 50.1 52.0 --discordant 12         which differ on 12 % of the images
    bench power --defense dwf,soe --dataset digits --protocol dwf-paper
    """
    from bench import compare

    answer = compare.asked(accuracies, defense, results, **asked)
    click.echo(json.dumps(answer.as_json(), indent=2, ensure_ascii=False) if as_json else answer)


@commands.command()
@results_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where to. [default: figures/ in the results folder]"
)
@click.option(
    "--curves", is_flag=True, help="Robust accuracy over FGSM's radius, PGD's steps, and the radius."
)
@click.option(
    "--calibration", is_flag=True, help="PGD over small radii: to which one a printed value belongs."
)
@click.option("--tradeoff", is_flag=True, help="Clean against worst-case accuracy, and the Pareto front.")
@click.option("--matrix", is_flag=True, help="Every defense under every attack, as a heat map.")
@of_network("--gallery", "Images, perturbations, and what a trained network says of them.")
@of_network("--gates", "A trained mixture's gate weights, clean against attacked.")
@of_network("--heatmaps", "Where each expert of a trained mixture looks: Grad-CAM.")
@click.option("--data", "data_only", is_flag=True, help="Write only the CSV behind each figure.")
@click.option(
    "--dataset",
    help="Whose runs, or of a trained network whose images. [default: all runs; digits]",
    shell_complete=completion.dataset,
)
@click.option(
    "--lines", metavar="DATASET", help="With --calibration: whose published values, if the images have none."
)
@click.option("--samples", type=int, metavar="N", help="Of a trained network: the first N test images.")
@click.option("--eps", metavar="E", help="With --gallery, --gates: the radius. [default: the dataset's]")
@click.option(
    "--checkpoint",
    metavar="PATH|hf_hub:NAME|URL",
    help="Of a trained network: weights in place of training's.",
)
@click.option(
    "--weights",
    type=click.Choice(["best", "last"]),
    help="Of a trained network: which epoch. [default: best]",
)
@click.option("--recipe", metavar="NAME", help="Of a trained network: as trained.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of a trained network: as trained."
)
@click.option("--seed", type=int, help="Of a trained network: as trained. [default: 0]")
@click.option("--device", metavar="auto|cpu|cuda[:i]", help="Of a trained network. [default: auto]")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Of a trained network: where the images are."
)
@click.option(
    "--plugin", type=click.Path(path_type=Path), metavar="FILE.py", help="A file that registers defenses."
)
def plot(
    results: Path,
    out: Path | None,
    gallery: str | None,
    gates: str | None,
    heatmaps: str | None,
    data_only: bool,
    dataset: str | None,
    lines: str | None,
    settings: tuple[str, ...],
    plugin: Path | None,
    **asked: Any,
) -> None:
    """Draw what was measured, as PNG, PDF and CSV: everything that the runs give, or what is asked for.

    \b
    bench plot                                  all that follows from records
    bench plot --tradeoff --matrix              two kinds of it
    bench plot --gallery dwf                    of one trained network; likewise --gates, --heatmaps
    """
    from bench import plot as plots
    from bench import registry

    kinds = [kind for kind in plots.KINDS if asked.pop(kind)]
    given = {name: value for name, value in asked.items() if value is not None}
    networks = {"gallery": gallery, "gates": gates, "heatmaps": heatmaps}
    of_one = [name for name, defense in networks.items() if defense is not None]
    if not of_one and (given or settings):
        options = ", ".join(
            "--" + name.replace("_", "-") for name in [*given, *(["set"] if settings else [])]
        )
        raise UsageError(
            f"{options} belong(s) to a figure of one trained network: --gallery, --gates or --heatmaps DEFENSE"
        )
    if len(of_one) > 1 or (of_one and kinds):
        asked_for = ", ".join(f"--{name}" for name in [*kinds, *of_one])
        raise UsageError(
            f"{asked_for}: a figure of one trained network is drawn alone; ask for one at a time"
        )
    if lines is not None and (of_one or (kinds and "calibration" not in kinds)):
        raise UsageError("--lines belongs to --calibration")
    if heatmaps is not None and "eps" in given:
        raise UsageError("--eps belongs to --gallery and --gates; heatmaps are of clean images")
    where = out or results / "figures"
    if of_one:
        from importlib import import_module

        from bench.session import prepare

        session = prepare(
            [str(networks[of_one[0]])],
            dataset or "digits",
            settings=dict(_setting(text) for text in settings),
            plugin=plugin,
            results=results,
            say=_say,
            **given,
        )
        drawn = import_module(f"bench.plot.{of_one[0]}").figure(session, where, data_only=data_only)
    else:
        if plugin is not None:
            registry.load_plugin(plugin)
        datasets = None if dataset is None else [dataset]
        drawn = plots.draw(
            results, where, kinds or plots.KINDS, datasets=datasets, lines=lines, data_only=data_only
        )
        if not drawn:
            raise UsageError(
                f"nothing to draw of {dataset!r} in {str(results)!r}; leave out --dataset to see all"
            )
    for path in drawn:
        click.echo(path)


@commands.command()
@results_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="The file. [default: report.html in the results folder]"
)
def report(results: Path, out: Path | None) -> None:
    """Write one HTML page of everything measured; it needs no network and no server."""
    from bench.report import write

    click.echo(write(results, out))


@commands.command()
@click.option(
    "--defense",
    default="resnet18,dwf",
    show_default=True,
    metavar="NAME[,NAME…]",
    help="Whose networks, untrained.",
    shell_complete=completion.defenses,
)
@click.option(
    "--dataset",
    default="digits",
    show_default=True,
    help="Whose images. Of cifar10, cifar100 and svhn no file is needed: noise stands for them.",
    shell_complete=completion.dataset,
)
@click.option(
    "--recipe",
    metavar="NAME|all",
    help="Whose network, and whose training is told of; or all trainings. [default: tiny for digits, else fast]",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A field of the defense's config."
)
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="Images attacked. [default: the test set]"
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the gradients that attacks follow.",
)
@click.option("--batch-size", type=int, metavar="B", help="Images at once. [default: 128, on a GPU 512]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the datasets' files are.")
@click.option(
    "--plugin", type=click.Path(path_type=Path), metavar="FILE.py", help="A file that registers defenses."
)
@click.option("--json", "as_json", is_flag=True)
def speed(
    recipe: str | None, settings: tuple[str, ...], samples: int | None, as_json: bool, **asked: Any
) -> None:
    """Measure what this machine does, and tell how long things will take.

    Its matrix rate; of each defense's network the images and gradients a second, and their share of that rate; the time of
    every protocol and of training. Nothing is trained and nothing is written.
    """
    from bench import speed as speeds
    from bench.session import prepare

    chosen = dict(_setting(text) for text in settings)
    every = recipe == "all"
    session = prepare(recipe=None if every else recipe, settings=chosen, say=_say, **asked)
    say = (lambda text: None) if as_json else click.echo
    found = speeds.measure(session, chosen, every_recipe=every, samples=samples, say=say)
    if as_json:
        click.echo(json.dumps(found, indent=2))


@commands.command("list")
@click.argument("what", type=click.Choice(["defenses", "datasets", "protocols", "attacks"]), required=False)
@click.option(
    "--plugin", type=click.Path(path_type=Path), metavar="FILE.py", help="A file that registers defenses."
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    metavar="DIR",
    help="Where it is looked up what is trained.",
)
@click.option("--json", "as_json", is_flag=True)
def list_(what: str | None, plugin: Path | None, results: Path, as_json: bool) -> None:
    """Print the names there are; of defenses alone their kind, paper, cost, and whether they are trained here.

    The cost is that of the recipe `fast`: forward-backward passes for each training image, and multiply-adds of a pass
    on CIFAR-10, in billions.
    """
    from bench import listing, registry

    if plugin is not None:
        registry.load_plugin(plugin)
    known = listing.everything(what, results)
    click.echo(json.dumps(known, indent=2, ensure_ascii=False) if as_json else listing.as_text(what, known))


@commands.command()
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the datasets' files are.")
@results_option
@click.option("--json", "as_json", is_flag=True)
def doctor(data_dir: Path | None, results: Path, as_json: bool) -> None:
    """Say what this machine has, where data, checkpoints and results are, and what would make it faster."""
    from bench import doctor as doctors

    health = doctors.examine(results, data_dir)
    click.echo(json.dumps(health.as_json(), indent=2) if as_json else doctors.as_text(health))


@commands.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_(shell: str) -> None:
    """Print what makes a shell complete commands, options and names.

    \b
    eval "$(bench completion bash)"                                in ~/.bashrc
    eval "$(bench completion zsh)"                                 in ~/.zshrc
    bench completion fish > ~/.config/fish/completions/bench.fish
    """
    click.echo(completion.script(commands, shell))


def _arguments(defense: str | None, settings: tuple[str, ...], yes: bool, **others: Any) -> dict[str, Any]:
    ask = None
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():

        def ask(question: str) -> bool:
            return click.confirm(question, default=True, err=True)

    return {
        **others,
        "defense": defense or DEFAULT_DEFENSES,
        "settings": dict(_setting(text) for text in settings),
        "say": _say,
        "ask": ask,
    }


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text!r} is not KEY=VALUE, such as --set width=32")
    return key.strip(), value


def _say(line: str) -> None:
    if line:
        click.echo(line, err=True)
