"""A verb: what all commands have in common. Its function returns a `VerbResult`, which is printed as text or JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import click

from quant2e.cli.in_options import in_options
from quant2e.cli.inputs.arguments import OutputFiles, refuse_overwriting
from quant2e.stages import interrupts_that_last, quiet_progress

_COMMON = (
    click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object on stdout, and nothing else there."),
    click.Option(["-q", "--quiet"], is_flag=True, help="Show no progress (nor does QUANT2E_PROGRESS=0)."),
    click.Option(["-v", "--verbose"], is_flag=True, help="Print log lines of every stage, and warnings, on stderr."),
    click.Option(["--traceback"], is_flag=True, help="Print the Python traceback of an error."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerbResult:
    """What a verb has to tell. ``text``: for people; ``data``: the same as plain data, for ``--json``.

    ``failure``: why the exit code is not 0, though there is something to tell; empty when all is well. ``interrupted``:
    it is that of Ctrl-C then, which ended the work early.
    """

    text: str
    data: Mapping[str, Any]
    failure: str = ""
    interrupted: bool = False


class Failure(click.ClickException):
    """A sentence for people, and exit code 1."""

    def __init__(self, message: str, verb: str) -> None:
        super().__init__(message)
        self.verb = verb

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"quant2e {self.verb}: {self.message}", file=file, err=file is None)


class Stopped(Failure):
    """The same of what Ctrl-C ended, with the exit code that shells give it."""

    exit_code = 130


class Verb(click.Command):
    """A command whose function returns a `VerbResult`. ``example``: shown as it is at the end of its help."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._example = example
        self.params += _COMMON

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n{self._example.strip()}\n")

    def invoke(self, ctx: click.Context) -> int:
        as_json, quiet, verbose, traceback = (ctx.params.pop(name) for name in _NAMES)
        refuse_overwriting(self.params, ctx.params)
        files, name = OutputFiles(self.params, ctx.params), self.name or ""
        try:
            with interrupts_that_last(), _process(as_json=as_json, quiet=quiet, verbose=verbose):
                outcome = super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt as error:
            raise Stopped(f"stopped by Ctrl-C{files.written()}", name) from error
        except Exception as error:
            if traceback:
                raise
            raise Failure(f"{in_options(_sentence(error), self.params)}{files.written()}", name) from error
        assert isinstance(outcome, VerbResult)
        click.echo(json.dumps(outcome.data, indent=2, allow_nan=False) if as_json else outcome.text)
        if outcome.failure:
            raise (Stopped if outcome.interrupted else Failure)(outcome.failure, name)
        return 0


_NAMES = tuple(str(option.name) for option in _COMMON)


def _sentence(error: Exception) -> str:
    """What is said of an error: its own words where it is one of ours or of the system, else that it is a defect."""
    from quant2e.errors import Quant2eError

    if isinstance(error, Quant2eError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    said = " ".join(str(error).split()) or "no message"
    return f"failed with {type(error).__name__}: {said} (--traceback shows where)"


@contextlib.contextmanager
def _process(*, as_json: bool, quiet: bool, verbose: bool) -> Iterator[None]:
    """Stdout is kept for the JSON; libraries' warnings are hidden, or shown with the log lines of ours."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    ours, theirs = logging.getLogger("quant2e"), logging.getLogger("torch")
    levels = ours.level, theirs.level
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(quiet_progress())
        if as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        if verbose:
            ours.addHandler(handler)
            ours.setLevel(logging.INFO)
        else:
            warnings.simplefilter("ignore")
            theirs.setLevel(logging.ERROR)
        try:
            yield
        finally:
            ours.removeHandler(handler)
            ours.setLevel(levels[0])
            theirs.setLevel(levels[1])


def verb(name: str, *, example: str) -> Callable[[Callable[..., VerbResult]], Verb]:
    """Decorates the function of a verb; the first line of its docstring is what the list of verbs says of it."""
    return click.command(name, cls=Verb, example=example)
