"""Job shops: schedules that can be carried out, the environment's rules, and agents that plug in."""

from __future__ import annotations

import pickle
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO, SAC
from strategies import deterministic

from agents import GraphPolicy, GraphSACPolicy, make_sb3_env
from benchmarks import job_shop as benchmark
from benchmarks.registry import Options
from gnnrl_gym.envs.job_shop import JobShopEnv
from gnnrl_gym.scheduling import RULES, JobShop, Schedule, follow
from gnnrl_gym.scheduling.graph import EDGE_FEATURES, NODE_FEATURES, graph_sizes, observe

ID = "GNNRL-JobShop-v0"
# Fisher and Thompson (1963), 6 jobs and 6 machines; no schedule is shorter than 55
FT06 = """
6 6
2  1 0  3 1  6 3  7 5  3 4  6
1  8 2  5 4 10 5 10 0 10 3  4
2  5 3  4 5  8 0  9 1  1 4  7
1  5 0  5 2  5 3  3 4  8 5  9
2  9 1  3 4  5 5  4 0  3 3  1
1  3 3  3 5  9 0 10 4  4 2  1
"""
# the jobs in an order that reaches it
OPTIMUM = [2, 1, 0, 0, 2, 3, 1, 5, 2, 3, 5, 0, 4, 1, 4, 2, 3, 2, 5, 3, 4, 1, 0, 3, 5, 0, 2, 4, 1, 5, 5, 4, 1, 4, 3, 0]

# what happens before the first choice makes the bound of the makespan larger
RAISED_AT_ONCE = JobShop(np.array([[0, 1, 1], [2, 1, 1]]), np.array([[1, 1, 1], [2, 1, 1]]))


@st.composite
def problems(draw: st.DrawFn, jobs: int = 5, operations: int = 5) -> JobShop:
    """Jobs that may come to a machine twice, or never."""
    jobs, operations, machines = (draw(st.integers(1, most)) for most in (jobs, operations, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (jobs, operations)
    return JobShop(generator.integers(0, machines, shape), generator.integers(1, 10, shape))


def random_schedule(problem: JobShop, seed: int, delay: bool = True) -> Schedule:
    generator = np.random.default_rng(seed)
    return follow(lambda schedule: generator.random(len(schedule.done)), problem, delay)


def shortest(schedule: Schedule, active: bool) -> int:
    """The smallest makespan of all completions: of the candidates' choices, or of all orders there are."""
    if schedule.complete:
        return schedule.bound
    open_jobs = np.flatnonzero(schedule.done < schedule.starts.shape[1])
    makespans = []
    for job in schedule.candidates() if active else open_jobs:
        longer = pickle.loads(pickle.dumps(schedule))
        longer.dispatch(int(job))
        makespans.append(shortest(longer, active))
    return min(makespans)


# ---- schedules ------------------------------------------------------------------------------------------------


@deterministic
@given(problems(), st.integers(0, 1000), st.booleans())
def test_a_schedule_can_be_carried_out(problem: JobShop, seed: int, delay: bool) -> None:
    schedule = random_schedule(problem, seed, delay)
    starts, ends = schedule.starts, schedule.starts + problem.durations
    assert (starts[:, 0] >= 0).all() and (starts[:, 1:] >= ends[:, :-1]).all()
    for machine, order in enumerate(schedule.order):
        assert {(int(j), int(k)) for j, k in np.argwhere(problem.machines == machine)} == set(order)
        assert all(ends[before] <= starts[after] for before, after in pairwise(order))
    assert schedule.bound == ends.max() >= problem.lower_bound


@deterministic
@given(problems(), st.integers(0, 1000))
def test_nothing_fits_into_an_earlier_gap(problem: JobShop, seed: int) -> None:
    schedule = random_schedule(problem, seed)
    starts, ends = schedule.starts, schedule.starts + problem.durations
    for order in schedule.order:
        for place, (job, position) in enumerate(order):
            ready = ends[job, position - 1] if position else 0
            gaps = pairwise([(0, 0), *((starts[at], ends[at]) for at in order[:place])])
            for (_, begin), (end, _) in gaps:
                assert max(begin, ready) + problem.durations[job, position] > end
            last = ends[order[place - 1]] if place else 0
            assert starts[job, position] == max(last, ready)


@settings(deterministic, max_examples=25)
@given(problems(jobs=4, operations=2))
def test_choosing_among_the_candidates_loses_no_optimum(problem: JobShop) -> None:
    best = shortest(Schedule(problem), active=True)
    assert best == shortest(Schedule(problem), active=False)
    assert Schedule(problem).bound == problem.lower_bound <= best


@deterministic
@given(problems(), st.integers(0, 1000))
def test_without_delay_no_machine_waits_for_a_job_while_another_could_begin(problem: JobShop, seed: int) -> None:
    schedule = random_schedule(problem, seed, delay=False)
    starts, ends = schedule.starts, schedule.starts + problem.durations
    for order in schedule.order:
        for place, (job, position) in enumerate(order):
            ready, free = ends[job, position - 1] if position else 0, ends[order[place - 1]] if place else 0
            assert starts[job, position] == max(ready, free)
            for other, later in order[place + 1 :]:  # none of them could have begun before
                assert (ends[other, later - 1] if later else 0) >= starts[job, position] or free == starts[
                    job, position
                ]


@deterministic
@given(problems(), st.integers(0, 1000))
def test_the_bound_never_falls_and_ends_at_the_makespan(problem: JobShop, seed: int) -> None:
    schedule, generator = Schedule(problem), np.random.default_rng(seed)
    bounds = [schedule.bound]
    while not schedule.complete:
        schedule.dispatch(int(generator.choice(schedule.candidates())))
        bounds.append(schedule.bound)
    assert bounds == sorted(bounds) and bounds[-1] == schedule.ready.max()


def test_a_known_optimum() -> None:
    problem = JobShop.parse(FT06)
    assert problem.shape == (6, 6, 6) and problem.lower_bound == 47
    assert min(random_schedule(problem, seed).bound for seed in range(300)) >= 55
    schedule = Schedule(problem)
    for job in OPTIMUM:
        assert job in schedule.candidates()
        schedule.dispatch(job)
    assert schedule.complete and schedule.bound == 55


def test_rules_rank_what_their_names_say() -> None:
    schedule = Schedule(JobShop(np.zeros((3, 2), int), np.array([[5, 9], [2, 1], [7, 2]])))
    first = {name: int(rule(schedule).argmax()) for name, rule in RULES.items()}
    assert first == {"spt": 1, "lpt": 2, "mwkr": 0, "mopnr": 0, "fcfs": 0}
    schedule.dispatch(0)
    assert (
        RULES["fcfs"](schedule).argmax() == RULES["mopnr"](schedule).argmax() == 1
        and RULES["mwkr"](schedule).argmax() == 0
    )  # 9 left of each
    assert follow(RULES["spt"], schedule.problem).order[0][:2] == [(1, 0), (1, 1)]


def test_a_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ft06.txt"
    path.write_text(f"instance ft06\n+++\n{FT06}")
    problem, words = JobShop.load(path), FT06.split()[2:]
    again = np.stack([problem.machines, problem.durations], axis=2).ravel().tolist()
    assert again == [int(word) for word in words]


@pytest.mark.parametrize(
    "text", ["", "2 2\n0 1 1 2", "1 1\n1 5", "1 2\n0 1 1", "1 1\n0 x", "2 3\n0 1 1 2\n1 2 0 3", "2 2\n0 1 1 2\n0 1"]
)
def test_another_format_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="a line for every job"):
        JobShop.parse(text)


@pytest.mark.parametrize(
    ("machines", "durations", "named"),
    [([[0]], [[0]], "durations"), ([[-1]], [[1]], "machines"), ([[0.5]], [[1]], "machines"), ([0], [[1]], "machines"),
     ([[0, 1]], [[1]], r"\(1, 2\).*\(1, 1\)"), (np.zeros((0, 2), int), np.zeros((0, 2), int), "machines")],
)  # fmt: skip
def test_what_is_no_problem_is_named(machines: Any, durations: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        JobShop(machines, durations)


# ---- the environment --------------------------------------------------------------------------------------------


def job_shop(**arguments: Any) -> JobShopEnv:
    env = gym.make(ID, **arguments).unwrapped
    assert isinstance(env, JobShopEnv)
    return env


def episode(env: JobShopEnv, seed: int | None, generator: np.random.Generator, **reset: Any) -> list[Any]:
    trace: list[Any] = [env.reset(seed=seed, **reset)]
    while not (len(trace) > 1 and trace[-1][2]):
        trace.append(env.step(generator.random(env.action_space.shape, np.float32)))
    return trace


@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_gymnasium_check(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(job_shop(jobs=3, machines=2, render_mode=mode))


@deterministic
@given(problems(), st.integers(0, 1000), st.booleans())
@example(RAISED_AT_ONCE, 0, True)
def test_an_episode_is_a_schedule(problem: JobShop, seed: int, delay: bool) -> None:
    env, generator = job_shop(problem=problem, delay=delay), np.random.default_rng(seed)
    trace = episode(env, seed, generator)
    returned, info = sum(step[1] for step in trace[1:]), trace[-1][-1]
    assert returned == pytest.approx(1 - info["makespan"] / info["lower_bound"]) and info["makespan"] > 0
    assert all(step[1] <= 0 for step in trace[1:])
    assert len(trace) == 2 or {info["makespan"] for *_, info in trace[:-1]} == {-1}  # one step where there is no choice
    for observation, *_ in trace:
        assert observation in env.observation_space and len(observation.nodes) <= env.max_nodes
        assert len(observation.edge_links) <= env.max_edges
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(env.action_space.shape))


def test_equal_seeds_give_equal_episodes() -> None:
    def runs() -> list[Any]:
        generator, env = np.random.default_rng(0), job_shop()
        return [episode(env, seed, generator) for seed in (3, None)]

    first, second = runs(), runs()
    assert all(data_equivalence(one, other) for one, other in zip(first, second, strict=True))
    assert not data_equivalence(first[0][0], first[1][0])  # a new problem every time


def test_an_observation_knows_no_unit_and_no_names() -> None:
    generator = np.random.default_rng(0)
    problem, names = JobShop.random(4, 3, generator), generator.permutation(4)
    schedule, longer, renamed = (
        Schedule(each)
        for each in (
            problem,
            JobShop(problem.machines, 60 * problem.durations),
            JobShop(problem.machines[names], problem.durations[names]),
        )
    )
    while not schedule.complete:
        job = int(schedule.candidates()[-1])
        schedule.dispatch(job)
        longer.dispatch(job)
        renamed.dispatch(int(np.flatnonzero(names == job)[0]))
        plain, other, third = observe(schedule), observe(longer), observe(renamed)
        np.testing.assert_allclose(plain.nodes, other.nodes, rtol=1e-5)
        np.testing.assert_array_equal(plain.edge_links, other.edge_links)
        np.testing.assert_allclose(plain.nodes[:4][names], third.nodes[:4], rtol=1e-5)


@deterministic
@given(problems(), st.integers(0, 1000), st.data())
def test_node_features_are_what_their_names_say(problem: JobShop, seed: int, data: st.DataObject) -> None:
    schedule = random_schedule(problem, seed)
    order = sorted((int(schedule.starts[at]), at) for machine in schedule.order for at in machine)
    placed, schedule = data.draw(st.integers(0, len(order))), Schedule(problem)
    for _, (job, _) in order[:placed]:
        schedule.dispatch(job)
    jobs, operations, machines = problem.shape
    next_up = {int(job) for job in ([] if schedule.complete else schedule.candidates())}
    begin = {job: int(schedule.earliest()[job]) for job in next_up}
    now, unit = min(begin.values(), default=schedule.bound), problem.durations.mean()
    contended = {int(problem.machines[job, schedule.done[job]]) for job in next_up}

    def row(candidate: bool, duration: float, start: int, left: int, count: float) -> list[float]:
        slack = (schedule.bound - start - left) / unit
        return [candidate, duration / unit, max(start - now, 0) / unit, slack, left / problem.lower_bound, count]

    of_jobs, of_operations = [], []
    for job in range(jobs):
        done, durations = int(schedule.done[job]), problem.durations[job].tolist()
        start = int(schedule.ready[job])
        if done < operations:
            start = max(start, int(schedule.free[problem.machines[job, done]]))
        length = durations[done] if done < operations else 0
        of_jobs.append(row(job in next_up, length, start, sum(durations[done:]), (operations - done) / operations))
        for position in range(done, operations):
            first = start + sum(durations[done:position])
            now_next = job in next_up and position == done
            of_operations.append(row(now_next, durations[position], first, sum(durations[position:]), 0))
    of_machines = []
    for machine in range(machines):
        mine, left = problem.machines == machine, np.arange(operations) >= schedule.done[:, None]
        work, count = int(problem.durations[mine & left].sum()), (mine & left).sum() / max(mine.sum(), 1)
        of_machines.append(row(machine in contended, 0, int(schedule.free[machine]), work, count))
    nodes = observe(schedule).nodes
    np.testing.assert_allclose(nodes[:, 3:], of_jobs + of_operations + of_machines, rtol=1e-5, atol=1e-6)
    assert nodes[:, :3].sum(axis=0).tolist() == [jobs, len(of_operations), machines]


@deterministic
@given(problems())
def test_the_sizes_are_those_of_the_largest_graph(problem: JobShop) -> None:
    graph, (jobs, operations, machines) = observe(Schedule(problem)), problem.shape
    links = 0 if graph.edge_links is None else len(graph.edge_links)
    assert (len(graph.nodes), links) == graph_sizes(jobs, operations, machines)


def test_random_problems_are_as_asked() -> None:
    problem = JobShop.random(50, 3, np.random.default_rng(0), shortest=3, longest=5)
    assert (np.sort(problem.machines, axis=1) == np.arange(3)).all() and len(np.unique(problem.machines, axis=0)) == 6
    assert set(problem.durations.ravel().tolist()) == {3, 4, 5}
    env = job_shop(jobs=50, machines=4, shortest=3, longest=5)
    env.reset(seed=0)
    assert env.schedule is not None and set(env.schedule.problem.durations.ravel().tolist()) == {3, 4, 5}


def test_the_graph_is_what_is_left() -> None:
    env = job_shop(problem=JobShop.parse(FT06))
    (graph, _), schedule = env.reset(), env.schedule
    assert schedule is not None
    assert graph.edges is not None and graph.edge_links is not None
    column = {name: graph.nodes[:, index] for index, name in enumerate(NODE_FEATURES)}
    assert np.flatnonzero(column["candidate"][:6]).tolist() == schedule.candidates().tolist()
    assert column["operation"].sum() == 36 - schedule.done.sum() and column["machine"].sum() == 6
    kinds = dict(zip(EDGE_FEATURES, graph.edges.T, strict=True))
    operations = int(column["operation"].sum())
    assert kinds["on"].sum() == kinds["of"].sum() == operations
    assert kinds["order"].sum() == operations - 6 and kinds["next"].sum() == kinds["at"].sum() == 6
    for source, target in graph.edge_links[kinds["at"] == 1]:
        assert problem_machine(schedule, target) == source - 6 - operations


def problem_machine(schedule: Schedule, job: int) -> int:
    return int(schedule.next_of(schedule.problem.machines)[job])


def test_the_highest_priority_goes_first() -> None:
    env = job_shop(problem=JobShop(np.zeros((3, 1), int), np.array([[5], [2], [7]])))
    env.reset()
    env.step(np.array([0.1, 0.2, 0.9]))
    assert env.schedule is not None and env.schedule.order[0] == [(2, 0)]
    env.step(np.array([0.5, 0.5, 0.0]))  # then only one is left
    assert env.schedule.order[0] == [(2, 0), (0, 0), (1, 0)]


@pytest.mark.parametrize("action", [np.zeros(5), np.full(6, np.nan), np.array([0.0] * 5 + [np.inf])])
def test_a_wrong_action_changes_nothing(action: Any) -> None:
    env = job_shop()
    env.reset(seed=0)
    before = pickle.dumps(env.schedule)
    with pytest.raises(ValueError, match="6 jobs"):
        env.step(action)
    assert pickle.dumps(env.schedule) == before


def test_wrong_arguments_are_named() -> None:
    for arguments, named in (
        ({"jobs": 0}, "jobs"), ({"shortest": 5, "longest": 4}, "longest"), ({"problem": "ft06"}, "JobShop"),
        ({"render_mode": "video"}, "render_mode"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            JobShopEnv(**arguments)
    env = job_shop()
    for options, named in (({"size": 3}, "size"), ({"problem": JobShop([[0]], [[1]])}, r"\(1, 1, 1\)")):
        with pytest.raises(ValueError, match=named):
            env.reset(options=options)


def test_one_episode_may_have_a_problem_of_its_own() -> None:
    problem, env, generator = JobShop.parse(FT06), job_shop(), np.random.default_rng(0)
    trace = episode(env, 0, generator, options={"problem": problem})
    assert trace[-1][-1]["lower_bound"] == 47
    assert episode(env, 0, generator)[-1][-1]["lower_bound"] != 47


def test_charts_show_every_operation() -> None:
    env = job_shop(jobs=3, machines=2, render_mode="ansi")
    with pytest.raises(RuntimeError, match="reset"):
        env.render()
    trace = episode(env, 0, np.random.default_rng(0))
    lines = env.render().splitlines()
    assert len(lines) == 3 and all(set("012") <= set(line) for line in lines[:2])
    assert str(trace[-1][-1]["makespan"]) in lines[2]


# ---- agents -----------------------------------------------------------------------------------------------------


def test_problems_of_several_sizes_share_a_space_of_one_size() -> None:
    largest = graph_sizes(5, 2, 2)
    sizes = {"max_nodes": largest[0], "max_edges": largest[1], "max_decisions": 5}
    makers = [lambda jobs=jobs: make_sb3_env(gym.make(ID, jobs=jobs, machines=2), **sizes) for jobs in (3, 5)]
    envs = gym.vector.SyncVectorEnv(makers)  # which refuses other spaces
    assert envs.reset(seed=0)[0]["decision_mask"].sum(1).tolist() == [3, 5]
    agent = PPO(GraphPolicy, makers[0](), n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(16)
    agent.set_env(makers[1]())
    agent.learn(16)


def test_agents_plug_in_and_move_to_larger_problems() -> None:
    small, large = (make_sb3_env(gym.make(ID, jobs=jobs, machines=2)) for jobs in (3, 5))
    agent = PPO(GraphPolicy, small, n_steps=32, batch_size=16, n_epochs=1, seed=0, device="cpu").learn(32)
    other = PPO(GraphPolicy, large, device="cpu")
    other.policy.load_state_dict(agent.policy.state_dict())
    assert other.predict(large.reset(seed=0)[0], deterministic=True)[0].shape == (5,)
    SAC(GraphSACPolicy, small, buffer_size=64, batch_size=8, learning_starts=8, seed=0, device="cpu").learn(16)


def test_the_benchmark_trains_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_after_the_other(work: Any, jobs: Any, workers: int, unit: str) -> None:
        trained.extend(seed for _, seed, delay in jobs if delay)
        for job in jobs:
            work(*job)

    trained: list[int] = []
    monkeypatch.setattr(benchmark, "side_by_side", one_after_the_other)
    monkeypatch.setattr(benchmark, "SETTINGS", benchmark.SETTINGS | {"steps": 16, "n_steps": 2, "batch_size": 16})
    monkeypatch.setattr(benchmark, "SIZES", {2: 3, 3: 2})
    one, two = (benchmark.run(Options(seeds=seeds, runs=tmp_path)) for seeds in (1, 2))
    assert trained == [0, 1]
    assert [row for row in two["rows"] if row["seed"] in (None, 0)] == one["rows"]
    assert len(one["rows"]) == 2 * 2 * len(benchmark.METHODS)  # sizes, with and without delay
    assert {row["method"] for row in two["rows"]} == set(benchmark.METHODS)
    assert all(row["ratio"] >= 1 for row in two["rows"])
    assert all(f"| ppo{of} (2 seeds) |" in benchmark.table(two) for of in ("", ", no delay"))
    monkeypatch.setattr(benchmark, "SETTINGS", benchmark.SETTINGS | {"steps": 32})
    with pytest.raises(ValueError, match=r"steps=16, not 32.*--runs"):
        benchmark.run(Options(seeds=1, runs=tmp_path))
