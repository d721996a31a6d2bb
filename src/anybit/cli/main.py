"""The command `anybit`: its sub-commands, and how every way to end becomes an exit code.

0 ok, 1 a check failed, 2 refused input or usage, 70 a bug of ours, 130 interrupted; a closed pipe is 0. typer's own
handling is bypassed because it ends with 1 in the last cases.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import typer

from anybit import __version__
from anybit.cli import bench, chat, doctor, eval, explain, fit, inspect, prove, run, tune
from anybit.cli.output import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED, Output, make_output
from anybit.errors import AnybitError, DeviceProblem, Unsupported

# typer brings its own copy of click from some version on: its base class is found through what typer exports
_USAGE_ERROR: Final[type[Exception]] = typer.BadParameter.__mro__[2]

COMMANDS: Final[tuple[tuple[str, Callable[..., Any]], ...]] = (
    ("run", run.run),
    ("chat", chat.chat),
    ("inspect", inspect.inspect),
    ("explain", explain.explain),
    ("fit", fit.fit_command),
    ("prove", prove.prove),
    ("tune", tune.tune),
    ("bench", bench.bench),
    ("eval", eval.evaluate),
    ("doctor", doctor.doctor),
)


def _version(wanted: bool) -> None:
    if wanted:
        make_output().line(f"anybit {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Any quantized LLM checkpoint, on any chip, proven right."""


def make_app() -> typer.Typer:
    """The typer application."""
    app = typer.Typer(
        name="anybit", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    for name, command in COMMANDS:
        app.command(name)(command)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(make_app())
    if "_ANYBIT_COMPLETE" in os.environ:
        command(args=words, prog_name="anybit")
    output = make_output("json" if "--json" in words[: _end_of_options(words)] else "human")
    try:
        code = _guarded(lambda: _invoke(command, words), output)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        code = EXIT_OK
    return code


def _end_of_options(words: list[str]) -> int:
    return words.index("--") if "--" in words else len(words)


def _invoke(command: Any, words: list[str]) -> int:
    with command.make_context("anybit", words) as context:
        return command.invoke(context) or EXIT_OK


def _guarded(work: Callable[[], int], output: Output) -> int:
    """The exit code of `work`, with whatever it raised said in the house's form."""
    try:
        return work()
    except BrokenPipeError:
        raise
    except (typer.Exit, SystemExit) as end:
        return int(getattr(end, "exit_code", getattr(end, "code", 0)) or 0)
    except (KeyboardInterrupt, typer.Abort):
        output.remark("interrupted")
        return EXIT_INTERRUPTED
    except AnybitError as error:
        output.error(error)
    except _USAGE_ERROR as error:
        return _usage(error, output)
    except Exception as error:
        known = _as_refusal(error)
        if known is None:
            output.bug(error)
            return EXIT_BUG
        output.error(known)
    return EXIT_REFUSED


def _usage(error: Exception, output: Output) -> int:
    """A misused command line; `anybit` without a word is a question for help, already answered."""
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "anybit")
    if type(error).__name__ == "NoArgsIsHelpError":
        output.stderr.file.write(str(getattr(error, "message", "")) + "\n")
        return EXIT_REFUSED
    said = str(getattr(error, "format_message", lambda: str(error))()).rstrip(".")
    output.error(Unsupported(said[:1].lower() + said[1:], remedy=f"{path} --help"))
    return EXIT_REFUSED


def _as_refusal(error: Exception) -> AnybitError | None:
    """What the machine, not anybit, ran out of."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return DeviceProblem(
            "not enough memory", found=str(error).split("\n")[0], wanted="what `anybit explain MODEL` predicts",
            remedy="a smaller --max-new-tokens or --window, a --quantization of fewer bits, or another --device",
        )
    if isinstance(error, OSError) and error.filename is not None:
        return AnybitError(str(error.strerror or error).lower(), where=os.fspath(error.filename)
                           if not isinstance(error.filename, int) else str(error.filename))
    return None


def _silence_stdout() -> None:
    """After the reader has gone: what is still buffered goes nowhere, without a message at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
