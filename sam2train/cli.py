"""The command line of `run.py`: words become one of `COMMANDS`, with typed values, which then runs.

Nothing else reads arguments. The only rules are that one command is given at a time, that each
option is one of the command's own, and that there is a FILE exactly where the command takes one.
"""

from __future__ import annotations

import argparse
import difflib
import os
import select
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn, TextIO

from sam2train import distributed
from sam2train.commands import COMMANDS, Command, FileCommand
from sam2train.errors import UserError, explain
from sam2train.files import printable
from sam2train.machine import Interrupted, interruptible, wrap_lines

HELP = ("-h", "--help")
SHARED = tuple(FileCommand.options())  # options of every command on a FILE
(TRACEBACK,) = Command.options()  # what every command has
DESCRIPTION = """\
Fine-tune the video memory of SAM 2: train the experiment of a YAML file, or run the trials of a
W&B sweep file. `python run.py --evaluate --help` and the like explain one command."""
EPILOG = """\
Settings of the experiment are changed by dotted name, with or without hyphens in front:
  python run.py experiments/coco_point_bbox.yaml trainer.num_steps=500 --trainer.seed=1

A run writes to runs/<experiment>/<run id>/. Exit codes: 0 done, 1 a sweep with failed trials or a
fault of the machine, 2 a mistake in what was asked for, 130 and 143 stopped by Ctrl-C and SIGTERM,
129 and 138 by SIGHUP and SIGUSR1 (the run is saved first; --resume goes on)."""


def main(words: Sequence[str]) -> int:
    """Run one command. Returns the exit code; a user's mistake is a message and code 2."""
    wants_help = not set(words).isdisjoint(HELP)
    command, came = None, []
    try:
        with interruptible() as came:
            if wants_help or not words:
                print(help_text(words))
            command = None if wants_help else parse(words)
            code = 0 if command is None else _run_command(command)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except UserError as problem:
        _show_error(str(problem), words)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Interrupted as stopped:
        print(f"interrupted by {Signals(stopped.code - 128).name}", file=sys.stderr)
        return stopped.code
    except BrokenPipeError as problem:
        if not _nobody_reads(sys.stdout):  # another pipe is broken, which is an error
            _show_error(explain(problem), words)
            return 1
        # Programs such as `head` close the pipe when they have read enough. The rest of the output
        # is discarded, so that Python's flush at exit does not fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if came:  # a library made another error of it
            print(f"interrupted by {Signals(came[0]).name}", file=sys.stderr)
            return 128 + came[0]
        text = explain(error, partial(_settings_of, command))
        if text is None:
            raise  # a bug in this program: the traceback is needed to fix it
        _show_error(text, words)
        return 1


def _run_command(command: Command) -> int:
    """Run a command in each of the processes that `torchrun` started, or in the main one alone."""
    if command.together:
        with distributed.joined():
            return command.run()
    if distributed.is_launched() and command.takes == "sweep":
        raise UserError(
            "a sweep starts a process for each trial by itself; run it without torchrun, with "
            "--jobs N for N trials at a time"
        )
    return command.run() if distributed.is_main() else 0


def _show_error(text: str, words: Sequence[str]) -> None:
    """Print the message of the error that is being handled, after its traceback if that is asked
    for."""
    if TRACEBACK in words:
        traceback.print_exc()
    number = "" if distributed.is_main() else f" in process {distributed.rank()}"
    text = f"error{number}: {printable(text, lines=True)}"
    if sys.stderr is not None and sys.stderr.isatty():
        text = wrap_lines(text, os.get_terminal_size(sys.stderr.fileno()).columns or 80)
    print(text, file=sys.stderr)


def _settings_of(command: Command | None) -> dict[str, Any]:
    """The values of a command's experiment by dotted name; none where it has no experiment."""
    if not isinstance(command, FileCommand) or command.takes != "experiment":
        return {}
    from sam2train.config import flatten

    return flatten(command.experiment(say=lambda line: None).model_dump(mode="json"))


def _nobody_reads(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed."""
    look = select.poll()
    look.register(stream.fileno(), 0)  # errors are reported without being asked for
    return bool(look.poll(0))


def parse(words: Sequence[str]) -> Command:
    """The command that the words ask for.

    Raises:
        UserError: an unknown option, one that belongs to another command, a FILE too many or none.
    """
    given, others = _read_options(words)
    asked = [command for command in COMMANDS if command.flag in given]
    if len(asked) > 1:
        flags = " and ".join(command.flag for command in asked)
        raise UserError(f"{flags} are {len(asked)} commands; give one at a time")
    command = asked[0] if asked else None
    if command and not command.takes:
        _check_options(command, given)
        if others:
            raise UserError(
                f"{others[0]} does not go with {command.flag}; expected {usage(command)}"
            )
        return _build(command, given)

    # A FILE may have "=" in its name; a setting always has one.
    file = next((word for word in others if "=" not in word or os.path.isfile(word)), None)
    if file is None:
        _check_options(command or _by_file("experiment"), given)
        raise UserError("no experiment given; for example experiments/coco_point_bbox.yaml")
    others.remove(file)
    path, kind = _look_into(file)
    if command and command.takes != kind:
        raise UserError(
            f"{command.flag} does not go with {_by_file(kind).title()}, which {path} is; expected "
            "the file of an experiment, such as experiments/coco_point_bbox.yaml"
        )
    command = command or _by_file(kind)
    _check_options(command, given, path)
    return _build(command, given, path=path, words=tuple(others))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        raise UserError(f"{text}; `python run.py --help` shows how options are written")


def _all_options() -> dict[str, dict[str, Any]]:
    """Flag -> how it is read, over all commands; one that several have is read the same way."""
    return {flag: how for command in COMMANDS for flag, how in command.options().items()}


def _read_options(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Flag -> value of the options that were given, and the other words: a FILE and settings."""
    options = _all_options()
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag, how in options.items():
        parser.add_argument(flag, dest=flag, **{k: v for k, v in how.items() if k != "field"})
    optional = [flag for flag, how in options.items() if how.get("nargs") == "?"]
    namespace, others = parser.parse_known_args(_detach(words, optional))
    others = [word for word in others if word != "--"]
    for word in others:
        _check_word(word, options)
    return vars(namespace), others


def _detach(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words, with a flag such as --resume last where a setting or the FILE follows it: these
    are not its PATH."""
    kept, last = [], []
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        own = following.endswith((".yaml", ".yml")) or (
            "=" in following and not os.path.exists(following)
        )
        (last if word in flags and own else kept).append(word)
    return kept + last


def _check_word(word: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for a word that looks like an option and is none, or seems a misspelt one."""
    name, equals, _ = word.partition("=")
    if not word.startswith("-") or (equals and "." in name):  # --trainer.seed=1 is a setting
        return
    near = difflib.get_close_matches(name.replace("_", "-"), [*options, *HELP], 3, 0.7)
    if equals:
        # --model={...} is a setting, too: a whole section.
        if not near or name.strip("-") in _sections():
            return
    elif "." in name:
        near = [f"{name}=VALUE"]
    hint = f"did you mean {' or '.join(near)}?" if near else "`python run.py --help` lists them"
    raise UserError(f"unknown option {name}; {hint}")


def _sections() -> set[str]:
    from sam2train.experiment import Experiment

    return set(Experiment.model_fields)


def _look_into(file: str) -> tuple[Path, str]:
    """The path of a FILE, and what it holds: experiment or sweep."""
    from sam2train.config_yaml import load_yaml
    from sam2train.files import resolve_path
    from sam2train.sweep_file import is_sweep

    path = resolve_path(file)
    return path, "sweep" if is_sweep(load_yaml(path)) else "experiment"


def _by_file(kind: str) -> type[Command]:
    """The command that a FILE of this kind asks for by itself."""
    return next(command for command in COMMANDS if not command.flag and command.takes == kind)


def _check_options(
    command: type[Command], given: Mapping[str, Any], path: Path | None = None
) -> None:
    """Raise UserError for an option that the command does not have, with those that do."""
    for flag in given:
        if flag not in command.options():
            *others, last = [other.title() for other in COMMANDS if flag in other.options()]
            owners = f"{', '.join(others)} and {last}" if others else last
            what = f"{command.title()} ({path})" if path else command.title()
            raise UserError(
                f"{flag} belongs to {owners} and does not go with {what}; leave one of them out"
            )


def _build(command: type[Command], given: Mapping[str, Any], **more: Any) -> Command:
    fields = {flag: how.get("field") for flag, how in command.options().items()}
    return command(**{fields[flag]: given[flag] for flag in given if fields[flag]}, **more)


# -- help -----------------------------------------------------------------------------------------


def help_text(words: Sequence[str]) -> str:
    """The help of the command among the words, else the overview of all."""
    for command in COMMANDS:
        if command.flag and command.flag in [word.partition("=")[0] for word in words]:
            return _command_help(command)
    return _overview()


def usage(command: type[Command]) -> str:
    """How a command is typed, without its options."""
    own = _spelled(command.flag, command.options()[command.flag]) if command.flag else ""
    file = f"{'SWEEP' if command.takes == 'sweep' else 'FILE'}.yaml [key=value ...]"
    return " ".join(filter(None, ["python run.py", file if command.takes else "", own]))


def _spelled(flag: str, how: Mapping[str, Any]) -> str:
    """An option with its operands: --resume [PATH]."""
    name = how.get("metavar")
    operands = name if isinstance(name, tuple) else [name] if name else []
    texts = {"?": "[{}]", "+": "{0} {0} ..."}
    return " ".join([flag, *(texts.get(how.get("nargs"), "{}").format(o) for o in operands)])


def _lines(entries: Mapping[str, str], indent: int) -> list[str]:
    """Entries with their texts beside them, in two columns."""
    column, lines = 34, []
    for name, text in entries.items():
        left = " " * indent + name
        wrapped = textwrap.wrap(text, 100 - column) or [""]
        if len(left) > column - 2:
            lines.append(left)
            left = ""
        lines.append(f"{left:{column}}{wrapped[0]}".rstrip())
        lines += [" " * column + line for line in wrapped[1:]]
    return lines


def _doc(command: type[Command]) -> str:
    return " ".join((command.__doc__ or "").split())


def _options_of(command: type[Command], *, without: Sequence[str] = ()) -> dict[str, str]:
    """Each option of a command, as it is typed -> its help; its own flag is not among them."""
    found = command.options().items()
    return {_spelled(f, how): how["help"] for f, how in found if f not in (command.flag, *without)}


def _command_help(command: type[Command]) -> str:
    options = _options_of(command)
    first = f"usage: {usage(command)}{' [OPTION ...]' if options else ''}"
    text = textwrap.fill(_doc(command), 100)
    return "\n".join([first, "", text, *([""] if options else []), *_lines(options, 2)])


def _overview() -> str:
    lines = ["usage: python run.py FILE.yaml [key=value ...] [OPTION ...]", "", DESCRIPTION]
    for group in dict.fromkeys(command.group for command in COMMANDS):
        lines += ["", group]
        for command in (one for one in COMMANDS if one.group == group):
            name = usage(command).removeprefix("python run.py ")
            if command.flag:
                name = _spelled(command.flag, command.options()[command.flag])
            lines += _lines({name: _doc(command)}, 2)
            lines += _lines(_options_of(command, without=SHARED), 6)
    shared = {flag: FileCommand.options()[flag]["help"] for flag in SHARED}
    lines += ["", "With each of these that has a FILE", *_lines(shared, 2)]
    return "\n".join([*lines, "", EPILOG])
