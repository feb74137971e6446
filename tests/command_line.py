"""`fp8fx ARGUMENTS` inside of a test's process."""

from __future__ import annotations

from typer.testing import CliRunner

from fp8fx import cli


def run(*args: str, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of `fp8fx <args>`, which must exit with `code` and without a traceback."""
    result = CliRunner().invoke(cli.app, list(args))
    assert result.exit_code == code, result.output + repr(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def refused(*args: str) -> str:
    """The message of a call that must fail."""
    stdout, stderr = run(*args, code=2)
    assert stdout == ""
    assert stderr.startswith("error: ")
    return stderr
