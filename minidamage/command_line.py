"""What the scripts at the top read their flags with, and how they end where their output is read no further."""
import argparse
import difflib
import os
import select
import sys

from minidamage.ops._extension import kernels_mode

CLOSED_PIPE = 141                                             # as a shell has it: 128 + SIGPIPE


def ended(main):
    """main()'s exit code, with all that was printed written out; where the reader has closed the pipe (| head), a quiet CLOSED_PIPE."""
    try:
        try:
            return main()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError as error:
        if not _reader_is_gone():                             # a worker's pipe, say
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
            return 1
        for stream in (sys.stdout, sys.stderr):               # Python flushes them once more at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return CLOSED_PIPE


def _reader_is_gone():
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))


class Parser(argparse.ArgumentParser):
    """argparse's, whose mistakes are one line that names the flag meant, without a page of usage above it; flags are typed in full."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def parse_args(self, *arguments):
        """As argparse's; an unknown MINIDAMAGE_KERNELS is a mistake as an unknown flag is. From here on a file's name that is no UTF-8 is
        printed with escapes, where it would end the program; what is printed without an output (a daemon's, closed) goes nowhere."""
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        parsed = super().parse_args(*arguments)
        try:
            kernels_mode()
        except ValueError as error:
            self.exit(2, f"{self.prog}: {error}\n")
        return parsed

    def error(self, message):
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")] * message.startswith("unrecognized")
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0], flags, n=1, cutoff=0.7) if unknown else []
        self.exit(2, f"{self.prog}: {message}{f'; did you mean {near[0]}?' if near else ''} (--help lists every flag)\n")
