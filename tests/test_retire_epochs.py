"""`make retire-epochs`: earlier epochs go once what asks them is done, and what publishes them; the last one stays."""

import json
from pathlib import Path

import pytest
from finetune_world import cells_of, environment, files_of, last_folder
from publish_world import World, fixtures
from tools import forked

from lib.families import load
from lib.lora.export import trained
from lib.run.extent import extent

made, world = fixtures()


def retired(world: World, *arguments: str, code: int = 0) -> list[str]:
    words = ("--config", str(world.places / "asked.yaml"), *arguments)
    done = forked("jobs.retire_epochs", *words, env=environment(world.places))
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stdout + done.stderr).splitlines()


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("step-*/*"))


def test_what_was_asked_is_freed_but_for_the_last_epoch(world):
    cat, neutral = cells_of(world.places)
    said = retired(world)
    assert said[0] == "1m-cat: left: asked_run5/1m-cat is not done (0 of 72)"
    assert said[-1] == "freed 0 MB of 0 students; something is left of 2"
    world.ask("1m-cat")
    before, states, last = size(cat.path), files_of(cat), last_folder(cat)
    said = retired(world, "--dry")
    assert said[0].startswith("1m-cat: would free ") and size(cat.path) == before
    said = retired(world)
    freed = before - size(cat.path)
    assert freed == sum(len(data) for name in list(states)[:2] for data in states[name].values())
    assert said[0] == f"1m-cat: freed {freed / 1e6:,.3g} MB, epochs 1-2"
    assert files_of(cat) == {last.name[:13]: states[last.name[:13]]} and len(files_of(neutral)) == 3
    marker = json.loads(next(cat.path.glob("step-00000004.json")).read_text())
    assert marker["retired"] == {"why": "asked", "read_by": "asked_run5/1m-cat"}
    students = load(world.places / "finetune.yaml")
    assert extent(cat).whole and len(trained(students, cat).losses) == 3
    assert retired(world)[0] == "1m-cat: nothing to free: its earlier epochs are gone already"
    world.publish()  # the last one is still to be published


def test_what_a_kill_left_of_an_epoch_goes_with_the_next_call(world):
    """Between the marker's word and the removal."""
    cat = cells_of(world.places)[0]
    world.ask("1m-cat")
    states = {path.name: path for path in cat.path.glob("step-*/")}
    retired(world)
    gone = next(path for name, path in states.items() if name.startswith("step-00000004-"))
    gone.mkdir()
    (gone / "adapter_model.safetensors").write_bytes(b"x" * 9)
    retired(world, "--dry")
    assert gone.exists()
    assert "nothing to free" in retired(world)[0] and not gone.exists() and len(files_of(cat)) == 1


def test_what_is_to_be_published_waits_for_that(world):
    world.ask("1m-cat")
    world.ask("1m-neutral")
    world.publish()  # the last epochs alone
    everything = f"--publish={world.places / 'publish.yaml'} epochs=all"
    said = retired(world, everything)
    assert "/1m-cat is not done (0 of 4)" in said[0] and len(files_of(cells_of(world.places)[0])) == 3
    world.publish("epochs=all")
    said = retired(world, everything)
    assert said[0].endswith(" MB, epochs 1-2") and said[1].startswith("1m-neutral: left: out-")
    cat, neutral = cells_of(world.places)
    assert len(files_of(cat)) == 1 and len(files_of(neutral)) == 3
    world.publish("epochs=all")
    assert world.hub.log == []


def test_epochs_that_nobody_asked_stay(world):
    world.ask("1m-cat", "epochs=[1]")
    said = retired(world, "epochs=[1]")
    assert "epoch 1; epoch 2 left: asked-" in said[0] and said[0].endswith("does not ask it")
    assert list(files_of(cells_of(world.places)[0])) == ["step-00000008", "step-00000012"]


def test_what_was_asked_of_another_copy_frees_nothing(world):
    cell = cells_of(world.places)[0]
    world.ask("1m-cat", parents={cell.spoken: "0" * 64})
    said = retired(world)
    assert "asked_run5/1m-cat was made from another copy of students_run5/1m-cat" in said[0]
    assert len(files_of(cell)) == 3


@pytest.mark.parametrize(
    ("publish", "says"),
    [
        ("publish.yaml", "publishes the last epoch alone; say epochs=all, or leave PUBLISH out"),
        ("finetune.yaml", "is of kind finetune; name a configuration of kind publish"),
        ("publish.yaml epochs=all students.set=[epochs=2]", "and "),
    ],
)
def test_another_configuration_is_refused(world, publish, says):
    world.ask("1m-cat")
    said = retired(world, f"--publish={world.places}/{publish}", code=2)
    assert len(said) == 1 and said[0].startswith("error: ") and says in said[0]
    assert len(files_of(cells_of(world.places)[0])) == 3
