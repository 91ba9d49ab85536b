"""`portico completion SHELL`: the script that makes a shell complete commands, options and the tunnels of portico.yml."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from portico.cli import output

# The shell asks `portico` itself, by environment variables that typer reads before any command runs.
_BASH = """\
_portico_completion() {
    local IFS=$'\\n'
    COMPREPLY=($(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD _PORTICO_COMPLETE=complete_bash "$1" 2>/dev/null))
}
complete -o default -F _portico_completion portico"""

_ZSH = """\
#compdef portico
_portico_completion() {
    eval "$(_TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _PORTICO_COMPLETE=complete_zsh portico 2>/dev/null)"
}
compdef _portico_completion portico"""

_FISH = """\
function __portico_complete
    set -lx _PORTICO_COMPLETE complete_fish
    set -lx _TYPER_COMPLETE_FISH_ACTION $argv[1]
    set -lx _TYPER_COMPLETE_ARGS (commandline -cp)
    portico 2>/dev/null
end
complete --command portico --no-files --condition "__portico_complete is-args" --arguments "(__portico_complete get-args)\""""


class Shell(enum.StrEnum):
    """Shells that have a script."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


SCRIPTS = {Shell.bash: _BASH, Shell.zsh: _ZSH, Shell.fish: _FISH}


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="The shell that will read it.")],
) -> None:
    """Print the completion script of a shell.

    bash: eval "$(portico completion bash)" in ~/.bashrc. zsh: the same with zsh in ~/.zshrc, below compinit. fish:
    portico completion fish > ~/.config/fish/completions/portico.fish
    """
    output.echo(SCRIPTS[shell])


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(completion)
