"""The program itself: how it ends, and how it says what is going on."""

from __future__ import annotations

import errno
import io
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import HowYouSeeMeError
from ..files import EXPLANATIONS, is_address

_VERBOSE = "howyouseeme.verbose"

Command = Callable[[Callable[..., Any]], Callable[..., Any]]


#: The commands that make pictures.
_DRAWING = frozenset({"demo", "detect", "explain", "propose", "track", "watch"})


class _Terminated(KeyboardInterrupt):
    """A signal that ends the program, from which it ends as it does from Ctrl-C."""


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, which would end us amid a file, be an error as Ctrl-C is."""

    def stop(*_: object) -> None:
        raise _Terminated

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Tell users what they are warned of, and not where in the code that is."""
    usual = warnings.showwarning

    def tell_of(message: Any, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, UserWarning):
            usual(message, category, *where)
            return
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the line of a progress bar
        click.echo(f"{clear}warning: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = tell_of  # type: ignore[assignment]
        yield


class _Program(click.Group):
    """Turns whatever ends a command early into a line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which people meet them

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Not every terminal can write an arrow or every file name; that is no reason to stop.
            sys.stdout.reconfigure(errors="replace")
        try:
            with _terminated_as_interrupted(), _warnings_in_a_line():
                return super().invoke(ctx)
        except KeyboardInterrupt as end:
            kept = "; the pictures written so far are kept"
            kept = kept if ctx.invoked_subcommand in _DRAWING else ""
            click.echo(f"\nInterrupted{kept}.", err=True)
            ctx.exit(143 if isinstance(end, _Terminated) else 130)
        except HowYouSeeMeError as error:
            complain(None, error)
            ctx.exit(2)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read our output has left; click ends quietly
            complain(None, error)
            ctx.exit(1)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="howyouseeme")
def main() -> None:
    """Show which pixels made a convolutional network answer what it answered."""


def as_one(argument: str, kind: type[Any], options: Sequence[Callable[..., Any]]) -> Command:
    """Options that a command gets as one argument, a dataclass whose fields have their names."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def given(**values: Any) -> Any:
            mine = {field.name: values.pop(field.name) for field in fields(kind)}
            return command(**{argument: kind(**mine)}, **values)

        wrapped: Callable[..., Any] = given
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


#: How the names of what is written end.
_WRITTEN = EXPLANATIONS | {".csv", ".mp4"}


class Named(click.Path):
    """A path that is named: a variable that isn't set would else mean the current folder."""

    def __init__(self, what: str, **options: Any) -> None:
        super().__init__(**options)
        self.what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail(f"It is empty: name {self.what}.", param, ctx)
        if is_address(str(value)):
            what = "name a folder here" if self.writable else "download it first, and give the file"
            self.fail(f"{value} is an address: {what}.", param, ctx)
        path = Path(value)
        if self.writable and path.suffix.lower() in _WRITTEN and not path.is_dir():
            self.fail(
                f"{value} is named as a file, and files are written into it: name a folder.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def verbose_option(command: Callable[..., Any]) -> Callable[..., Any]:
    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_VERBOSE] = value

    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Say what is going on, and show the traceback of an error.",
    )(command)


def _verbose() -> bool:
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(_VERBOSE))


def tell(line: str) -> None:
    """Say what is going on, if asked to."""
    if _verbose():
        click.echo(line, err=True)


def show(line: str) -> None:
    """Say what is going on: on a terminal in the place of what was said before, or a line each, if asked to."""
    if _verbose() and line:
        tell(line)
    elif sys.stderr.isatty():
        click.echo(f"\r\x1b[K{line}", nl=False, err=True)


def complain(file: Path | None, error: Exception) -> None:
    """One line about an error on stderr: what was wrong, or that it is our mistake."""
    if isinstance(error, HowYouSeeMeError):
        # One line, also of those that list what is wrong.
        sentence = " ".join(str(error).replace(":\n", ": ").replace("\n", "; ").split())
    elif isinstance(error, OSError):
        sentence = reason(error)
        if error.filename is not None and str(error.filename) != str(file):
            sentence += f": {error.filename}"
    else:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        sentence = f"unexpected error, please report it ({what})"
    if file is not None and not sentence.startswith((str(file), f"There is no file {file};")):
        sentence = f"{file}: {sentence}"
    click.echo(sentence if file else f"Error: {sentence}", err=True)
    if _verbose():
        click.echo("".join(traceback.format_exception(error)).rstrip(), err=True)


def reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
