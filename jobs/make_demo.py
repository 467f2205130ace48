"""Make the demo's inputs: a small teacher with a planted habit, its number rows, and texts for attribution."""

from lib.base.errors import exit_with
from lib.demo.make import main

if __name__ == "__main__":
    exit_with(main)
