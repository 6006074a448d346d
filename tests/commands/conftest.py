"""Running a command in this process."""

import pytest

from bfpo.commands.app import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a command in this process and gives exit code, output and errors."""

    def run_command(*arguments):
        monkeypatch.setattr("sys.argv", ["bfpo", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run_command
