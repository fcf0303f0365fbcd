"""`python -m quantplug` is the command `quantplug`, also where no script of that name is on the path."""

from quantplug.cli import app

if __name__ == "__main__":
    app(prog_name="quantplug")
