import sys

from wandb import tell

tell("sync", arguments=sys.argv[1:])
sys.exit("no network" if "--fail" in sys.argv else 0)
