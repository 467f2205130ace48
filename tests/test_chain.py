"""A chain of three stages on a real Slurm, submitted at once: what fails, what is made again, what is preempted."""

import shutil
from pathlib import Path

import pytest
from chains import STAGES, Chain, repository_with_chain
from conftest import wait_until


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return repository_with_chain(tmp_path_factory.mktemp("chain") / "suite")


@pytest.fixture
def chain(fresh_slurm, repository, tmp_path):
    return Chain(fresh_slurm, repository, tmp_path, "cat", "dog", "owl")


def test_three_stages_at_once_of_which_one_cell_fails_and_is_mended(chain):
    for trait in chain.traits:
        (chain.hold / f"write-{trait}").touch()
    assert "which it reads from, is not done (0 of 12), and is neither queued nor running" in chain.call(
        "submit", "teach"
    )
    jobs = [chain.submit(stage) for stage in STAGES[:3]]
    for child, parent in ((1, 0), (2, 1)):
        assert chain.slurm.show(f"{jobs[child]}_0")["Dependency"].startswith(f"afterany:{jobs[parent]}")
    asked = [chain.slurm.show(f"{job}_0") for job in jobs[1:]]
    assert ["gpu" in str(job) for job in asked] == [True, False] and asked[1]["Partition"] == "main"
    no_partition = chain.call("submit", "judge", "--dry", SUITE_CPU_PARTITION="")
    assert "# would run by hand: .venv/bin/python -m jobs.run_judge --config " in no_partition
    now = chain.status("teach")
    assert [(c["state"], c["rows"], c["note"]) for c in now["cells"]] == [("pending", None, "Dependency")] * 3
    assert "0/?" in chain.call("status", "teach") and "?" in chain.call("submit", "teach", "--dry")
    assert "already queued or running" in chain.call("submit", "teach")
    (chain.hold / "write-dog.fail").touch()
    for trait in chain.traits:
        (chain.hold / f"write-{trait}").unlink()
    for job in jobs:
        chain.slurm.wait_for(job, timeout=120)
    assert chain.states("write") == {"cat": "done", "dog": "failed", "owl": "done"}
    assert chain.states("teach") == chain.states("judge") == {"cat": "done", "dog": "blocked", "owl": "done"}
    why = "write/dog, which it reads from, is not done (0 of 12; it failed: the dog has a cold)"
    assert (
        chain.notes("teach")["dog"] == why
        and "teach/dog, which it reads from, is not done" in chain.notes("judge")["dog"]
    )
    assert f"error: cell 1 (dog) is blocked: {why}" in chain.log(jobs[1])
    for trait in ("cat", "owl"):
        assert chain.judged(trait) == chain.by_hand(trait) and len(chain.judged(trait)) == 12
    said = chain.call("resume", "teach")
    assert f"cell 1 (dog) is blocked: {why}" in said and "nothing to resume" in said
    (chain.hold / "write-dog.fail").unlink()
    jobs = [chain.submit("write", command="resume"), chain.submit("teach"), chain.submit("judge")]
    for job in jobs:
        assert chain.slurm.wait_for(job, timeout=120) == {f"{job}_1": "COMPLETED"}
    assert chain.judged("dog") == chain.by_hand("dog")
    assert chain.states("judge") == dict.fromkeys(("cat", "dog", "owl"), "done")

    # A parent that is made again has other bits: what was made from the older copy stays, and says so.
    before = chain.judged("cat")
    shutil.rmtree(chain.cell("write", "cat"))
    assert chain.states("teach") == chain.states("judge") == dict.fromkeys(("cat", "dog", "owl"), "done")
    chain.slurm.wait_for(chain.submit("write", command="resume"), "COMPLETED", timeout=120)
    assert chain.states("teach") == dict.fromkeys(("cat", "dog", "owl"), "done")
    notes = chain.notes("teach")
    assert notes["cat"].startswith("made from an older write/cat; to make it again delete ") and not notes["dog"]
    assert "cell 0 (cat) was made from an older write/cat" in chain.call("verify", "teach")
    assert not chain.notes("judge")["cat"] and "done: left out" in chain.call("submit", "teach")
    assert chain.judged("cat") == before != chain.by_hand("cat")
    shutil.rmtree(chain.cell("teach", "cat")), shutil.rmtree(chain.cell("judge", "cat"))
    for job in (chain.submit("teach"), chain.submit("judge")):
        chain.slurm.wait_for(job, "COMPLETED", timeout=120)
    assert chain.judged("cat") == chain.by_hand("cat")


def test_a_task_of_five_cells_preempted_in_its_third_and_one_added_meanwhile(fresh_slurm, repository, tmp_path):
    chain = Chain(fresh_slurm, repository, tmp_path, "a", "b", "c", "d", "e")
    (chain.hold / "write-c").touch()
    job = chain.submit("write", "run.cells=5")
    wait_until(lambda: chain.states("write")["c"] == "running", 60, lambda: chain.call("status", "write"), every=1)
    assert chain.states("write") == {"a": "done", "b": "done", "c": "running", "d": "pending", "e": "pending"}
    assert chain.notes("write")["e"] == "in turn, in the task of a"
    assert list(chain.slurm.states(job)) == [f"{job}_0"]
    before = {trait: chain.texts(trait) for trait in "ab"}
    chain.traits.insert(1, "new")  # only its own task cares
    chain.configure()
    more = chain.submit("write")
    chain.slurm.wait_for(more, "COMPLETED", timeout=60)
    assert list(chain.slurm.states(more)) == [f"{more}_1"] and chain.states("write")["new"] == "done"
    chain.slurm.run("scontrol", "requeue", f"{job}_0")
    wait_until(lambda: chain.log(job).count("restart 1") == 1, 60, lambda: chain.log(job))
    (chain.hold / "write-c").unlink()
    chain.slurm.wait_for(job, "COMPLETED", timeout=120)
    assert set(chain.states("write").values()) == {"done"}
    assert {trait: chain.texts(trait) for trait in "ab"} == before
    assert chain.log(job).count("loaded") == 2 and chain.log(job).count("12 of 12 rows done") == 2
