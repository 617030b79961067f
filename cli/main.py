"""The `ridgeplan` program: commands, and one line for every error a user can mend."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from cli import __version__
from cli.quantity import shown
from cli.show import width
from hwmodels.errors import InfeasibleError, InputError

COMMANDS: Final = (
    "devices",
    "clusters",
    "collective",
    "systems",
    "estimate",
    "sweep",
    "scaling",
    "roofline",
    "plan",
    "plan memory",
    "plan sequences",
    "plan tiles",
    "simulate",
    "serve",
    "predict",
    "validate",
    "calibrate",
    "profile",
    "records show",
    "records merge",
    "records check",
    "records import",
    "claims",
    "kernels list",
    "kernels inspect",
    "kernels estimate",
    "kernels rank",
)
"""Each is a function of that name in the module `cli.commands.<name>`, light to import; a space
in a name is an underscore there. `plan memory` is a command of its own beside `plan`."""

DONE, BAD_INPUT, INFEASIBLE, INTERRUPTED, BROKEN_PIPE = 0, 2, 3, 130, 141

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

# The base of usage errors, wherever this version of typer keeps it.
_ClickException: Final = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


class _Commands(TyperGroup):
    """Finds commands of two words before those of one: `plan memory` is not `plan` of a file."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command, its name, and the arguments that are left for it."""
        two = " ".join(args[:2])
        return (two, self.commands[two], args[2:]) if two in self.commands and args[1:] else (
            super().resolve_command(ctx, args)
        )  # fmt: skip


app = typer.Typer(
    name="ridgeplan",
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it pipes, and keeps to the width it is told
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ridgeplan {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Predict what GPU work costs before anyone runs it.

    \b
    Examples:
      ridgeplan plan examples/llama3-8b.json -c hgx-h100 -n 8 --seq 128k -b 64
      ridgeplan estimate flash_attention_2 -d h100-sxm -p heads=32 -p seq=8k -p dim=128
      ridgeplan roofline matmul -d h100-sxm --over m=16:8k:x2 -p n=8k -p k=8k --out r.html

    `ridgeplan COMMAND --help` shows more. Sizes: 4k is 4096, 1M is 1048576.
    """


for _name in COMMANDS:
    _function = _name.replace(" ", "_")
    app.command(_name)(getattr(import_module(f"cli.commands.{_function}"), _function))


def run(argv: Sequence[str] | None = None) -> None:
    """The console entry point: run one command and exit with its code."""
    sys.exit(main(sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str]) -> int:
    """Run one command; its exit code. Errors a user can mend are one line on stderr."""
    try:
        result = typer.main.get_command(app).main(
            args=list(argv) or ["--help"],
            prog_name="ridgeplan",
            standalone_mode=False,
            terminal_width=width(),
        )
        sys.stdout.flush()
    except InputError as error:
        return _fail(str(error), BAD_INPUT)
    except InfeasibleError as error:
        return _fail(str(error), INFEASIBLE)
    except (BrokenPipeError, SystemExit):  # typer turns the first into the second
        _silence_stdout()  # the reader went away
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _silence_stdout()
        return _fail(f"cannot write the answer: {error.strerror}", BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except _ClickException as error:
        return _usage_error(error)
    return result if isinstance(result, int) else DONE


def _silence_stdout() -> None:
    """Keep the interpreter's own flush at exit from failing a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_error(error: Exception) -> int:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "ridgeplan"
    return _fail(f"{message.rstrip('.')} (see `{command} --help`)", BAD_INPUT)


def _fail(message: str, code: int) -> int:
    print(f"ridgeplan: error: {shown(message, 2000)}", file=sys.stderr)
    return code
