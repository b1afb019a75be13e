"""The other processes of a simulated run: operator, drivers, exporter, readers, made of the product's classes.

They do what cluster.driver, cluster.supervision.supervisor and cluster.workers.export do, in the same order, no more.
"""

import random
from functools import partial
from typing import Any

from isthmus.cluster.errors import ClusterError
from isthmus.cluster.failures import Failure, FailureKind, classify, root_cause
from isthmus.cluster.supervision.replica_store import ReplicaStore
from isthmus.cluster.supervision.restart_policy import RestartPolicy
from isthmus.data_pipeline.errors import DataError
from isthmus.trainer.checkpoint.reader import SavedCheckpoint, list_checkpoints
from isthmus.trainer.checkpoint.retention import prune
from isthmus.trainer.context import Rank
from isthmus.trainer.errors import CheckpointError, LeaseError
from isthmus.trainer.runs import export
from isthmus.trainer.runs.store import RunStore
from tests.simulation.checks import RUN
from tests.simulation.cluster import Group
from tests.simulation.ranks import RankJob
from tests.simulation.setting import Simulation, base_of, check_state, job_config
from tests.simulation.world import Process, Violation, World, world

POLL_SECONDS = 0.5
UNRESPONSIVE_SECONDS = 30.0
MAX_STARTS = 30
LATEST_SECONDS = 61.0
"""After which no request is still under way."""


class LostRunError(ClusterError):
    """A rank found that the run has another owner: the driver ends, as it should."""


def operate(sim: Simulation) -> None:
    """Start the run again and again until it is finished, and once more to see that nothing is left to do."""
    run = world()
    for number, at in enumerate(sim.plan.second_drivers):
        run.at(at, partial(start_driver, sim, f"second-{number}"))
    for number in range(sim.plan.num_readers):
        run.start(f"reader-{number}", "reader", lambda: read_now_and_then(sim))
    for number in range(MAX_STARTS):
        driver = start_driver(sim, f"driver-{number}")
        patience = 40.0 + 80.0 * run.random.random()
        driver.ended.wait(patience if number < MAX_STARTS // 2 else None)  # a frozen one is replaced at some time
        while driver.alive and run.now >= driver.resume_at:
            driver.ended.wait(5.0)
        if driver.alive:
            continue
        if (
            driver.error is not None
            and not sim.checks.has_stale_lists
            and not isinstance(driver.error, LeaseError | LostRunError | DataError)
        ):
            raise Violation(f"{driver.name} gave up: {driver.error}") from driver.error
        if isinstance(driver.error, LeaseError | LostRunError):
            sim.checks.gave_up(driver.name)
        if driver.result == "finished":
            break
        run.wait(1.0 + 10.0 * run.random.random())
    else:
        raise Violation(f"not finished after {MAX_STARTS} starts")
    run.wait(max((run.now, *sim.plan.second_drivers)) + 1.0 - run.now)
    _let_all_end(run)
    run.wait(LATEST_SECONDS)
    sim.faults.is_calm = True
    last = start_driver(sim, "last")
    last.ended.wait()
    if last.result != "finished":
        raise Violation(f"a start of the finished run did not end as finished: {last.error or 'killed'}")
    _check_end(sim)


def _check_end(sim: Simulation) -> None:
    """Prune once more, as the next save would, and look at what there is."""
    config, store = job_config(sim.plan), sim.store()
    stages = config.stages if sim.plan.kind != "lease" else ()
    for stage in stages:
        folder = f"{RUN}/{stage}/checkpoints"
        prune(folder, store, config.checkpoint)
        newest = list_checkpoints(folder, store)[0]
        check_state(newest, stage, sim.plan.steps, base_of(stage, sim.plan.steps))
    sim.checks.at_end(stages, is_exported=sim.plan.is_exported)
    if others := [process.name for process in sim.world.living() if process is not sim.world.process]:
        raise Violation(f"still running: {others}")


def _let_all_end(run: World) -> None:
    """Wait until every other process has ended; drivers and ranks end by themselves, readers have their number."""
    mine = run.process
    while others := [process for process in run.living() if process is not mine]:
        others[0].ended.wait()


def start_driver(sim: Simulation, name: str) -> Process:
    """Start a driver, as a job that an operator submits."""
    return sim.world.start(name, "driver", lambda: drive(sim, name))


def drive(sim: Simulation, name: str) -> str:
    """Do what cluster.driver.drive does."""
    config, store = job_config(sim.plan), sim.store()
    run = RunStore.open(config, store, owner=name)
    try:
        sim.checks.owner_began(run.token, name)
        policy = RestartPolicy(config.cluster)
        for stage in config.stages if sim.plan.kind != "lease" else ():
            train_stage(sim, run, stage, policy)
        if sim.plan.kind == "lease":
            _work_under_lease(sim, run, name)
        if sim.plan.is_exported:
            _export(sim, run)
    finally:
        run.close()
    return "finished"


def _work_under_lease(sim: Simulation, run: RunStore, name: str) -> None:
    """Record facts for a while, each after proving ownership; what was recorded must stay."""
    for number in range(3):
        world().wait(4.0 * world().random.random())
        run.assert_owner()
        run.record(facts={f"{name}-{run.token}-{number}": number})
        sim.checks.recorded("facts", f"{name}-{run.token}-{number}", number)


def _export(sim: Simulation, run: RunStore) -> None:
    """Do what cluster.workers.export does: a task on a worker, tried again if it is lost."""
    config = job_config(sim.plan)
    for _ in range(4):
        task = world().start(
            f"{world().process.name}/exporter-{len(world().processes)}",
            "exporter",
            lambda: export.export_run(config, store := sim.store(), RunStore.attach(config, store, run.token)),
        )
        _orphan(sim, task)
        task.ended.wait()
        if task.error is not None:
            raise task.error
        if task.result is not None:
            return
    raise ClusterError("the export was lost")


def train_stage(sim: Simulation, run: RunStore, stage: Any, policy: RestartPolicy) -> None:
    """Do what cluster.supervision.supervisor does: attempt, classify, decide, next attempt."""
    replicas = ReplicaStore() if sim.plan.replicate_every else None
    try:
        while (failed := attempt(sim, run, stage, replicas, policy)) is not None:
            failure, step = failed
            decision = policy.decide(failure, stage, step)
            if decision.stop:
                raise ClusterError(decision.stop)
            world().wait(decision.pause_seconds + 0.1)
    finally:
        if replicas:
            replicas.close()


def attempt(
    sim: Simulation, run: RunStore, stage: Any, replicas: ReplicaStore | None, policy: RestartPolicy
) -> tuple[Failure, int] | None:
    """Let one group of ranks train; return why it did not finish, and at which step; none: it did."""
    world_size = world().random.choice(sim.plan.world_sizes)
    nodes = [sim.nodes[rank % len(sim.nodes)] for rank in range(world_size)]
    memories = replicas.for_group(nodes) if replicas else [None] * world_size
    group, jobs = Group(world_size), []
    for rank, (node, memory) in enumerate(zip(nodes, memories, strict=True)):
        job = RankJob(sim, stage, Rank(rank, world_size), run.token, group, memory)
        name = f"{world().process.name}/{stage}/rank-{rank}-{len(world().processes)}"
        group.members.append(world().start(name, "rank", job.train, None, node))
        jobs.append(job)
    for member in group.members:
        _orphan(sim, member)
    try:
        failure = _supervise(group.members, jobs[0], policy)
        if any(isinstance(member.error, LeaseError) for member in group.members):
            raise LostRunError(str(failure))
        return None if failure is None else (failure, jobs[0].step)
    finally:
        for member in group.members:
            member.kill()


def _supervise(members: list[Process], first: "RankJob", policy: RestartPolicy) -> Failure | None:
    responded_at = world().now
    while True:
        next((member for member in members if member.alive), members[0]).ended.wait(POLL_SECONDS)
        if all(member.resume_at <= world().now for member in members):
            responded_at = world().now
        if first.committed:
            policy.commit(first.stage, first.committed)
        failures = [_failure(member) for member in members if not member.alive and member.result is None]
        if failures:
            return root_cause(failures)
        if all(not member.alive for member in members):
            stopped = any(member.result == "stopped" for member in members)
            return Failure(FailureKind.PREEMPTION, "stopped after a notice") if stopped else None
        if world().now - responded_at > UNRESPONSIVE_SECONDS:
            return Failure(FailureKind.LOST, "does not respond")


def _failure(member: Process) -> Failure:
    return Failure(FailureKind.LOST, f"{member.name} died") if member.error is None else classify(member.error)


def _orphan(sim: Simulation, child: Process) -> None:
    """End a driver's process some time after the driver: until Ray notices, it goes on."""
    driver = world().process

    def watch() -> None:
        if not child.alive:
            return
        if not driver.alive:
            sim.world.at(90.0 * sim.world.random.random(), child.kill)
        else:
            sim.world.at(5.0, watch)

    sim.world.at(5.0, watch)


def read_now_and_then(sim: Simulation) -> None:
    """Do what an operator's evaluation or export of a running run does: read a checkpoint while it is marked."""
    folder = f"s3://bucket/runs/run/{random.Random(sim.world.random.random()).choice(['stage1', 'stage2'])}/checkpoints"
    store = sim.store()
    for _ in range(4):
        world().wait(10.0 * world().random.random())
        try:
            found = list_checkpoints(folder, store)
            if found:
                _read(sim, world().random.choice(found))
        except (CheckpointError, DataError):
            continue  # deleted between listing and mark, or no answer: the operator tries again


def _read(sim: Simulation, saved: SavedCheckpoint) -> None:
    stage = saved.url.split("/")[-3]
    with saved.in_use():
        world().wait(20.0 * world().random.random())
        if not saved.verify():
            check_state(saved, stage, saved.step, base_of(stage, sim.plan.steps))
