"""Landing on a budget: properties on random actions and real costs."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Network, images

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.envs.landing import land, refill, round_widths
from gnnrl_gym.zoo import load_model


@pytest.fixture(scope="module")
def network() -> Network:
    return PrunableNetwork(load_model("resnet20"), images(1, 3, 32, 32))


class Case:
    """A random landing on the network: some start in the middle of an episode, some groups are left alone."""

    def __init__(self, network: Network, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.full, size = network.widths, len(network.widths)
        self.cost = network.macs if seed % 2 else network.params
        self.floors = np.maximum(np.ceil(rng.choice([0, 0.1, 0.3]) * self.full).astype(np.int64), 1)
        self.share = rng.uniform(0.6, 1, size) if seed % 3 == 0 else np.ones(size)
        self.action = rng.uniform(0, 1, size) ** rng.choice([0.3, 1, 3])
        self.action[rng.random(size) < rng.choice([0, 0.4])] = 0
        self.start = round_widths(self.share, self.full, self.floors)
        self.end = round_widths(self.share * (1 - self.action), self.full, self.floors)
        self.limit = rng.uniform(0.05, 1) * self.cost(self.full)
        self.reachable = self.cost(self.end) <= self.limit
        self.new_share, self.widths = land(self.share, self.action, self.full, self.floors, self.cost, self.limit)


SEEDS = range(60)


@pytest.fixture(params=SEEDS)
def case(network: Network, request: pytest.FixtureRequest) -> Case:
    return Case(network, request.param)


def test_seeds_hold_every_kind_of_case(network: Network) -> None:
    cases = [Case(network, seed) for seed in SEEDS]
    crossing = [c for c in cases if c.reachable and c.cost(c.start) > c.limit]
    assert len(crossing) > 15
    assert sum(not c.reachable for c in cases) > 5
    assert sum(c.cost(c.start) <= c.limit for c in cases) > 2
    assert any((c.widths < c.start).any() for c in crossing)


def test_the_share_is_where_the_ray_crosses_the_limit(case: Case) -> None:
    """Rounded it is the plan, but for units that came back into a gap."""
    assert (case.new_share <= case.share).all() and (case.new_share >= case.share * (1 - case.action) - 1e-12).all()
    rounded = round_widths(case.new_share * (1 + 1e-9), case.full, case.floors)
    assert (case.widths >= rounded - 1).all()  # at the very moment a width may be rounded either way
    if case.cost(case.start) <= case.limit:
        np.testing.assert_array_equal(case.new_share, case.share)
    elif case.reachable:
        just_before = round_widths(case.new_share + 1e-6 * case.share * case.action, case.full, case.floors)
        assert case.cost(just_before) > case.limit


def test_limit_is_kept_where_it_can_be(case: Case) -> None:
    if case.reachable:
        assert case.cost(case.widths) <= case.limit
    else:
        np.testing.assert_array_equal(case.widths, case.end)  # plain rounding
        np.testing.assert_allclose(case.new_share, case.share * (1 - case.action))


def test_widths_are_integers_between_the_ends_of_the_ray(case: Case) -> None:
    assert case.widths.dtype == np.int64
    assert (case.widths >= case.floors).all()
    assert (case.widths <= case.start).all()
    assert (case.widths >= case.end).all()
    assert (case.widths[case.action == 0] == case.start[case.action == 0]).all()
    assert (case.new_share <= case.share + 1e-12).all()


def test_nothing_that_left_fits_back(case: Case) -> None:
    if not case.reachable:
        return
    for group in np.flatnonzero(case.widths < case.start):
        more = case.widths + (np.arange(len(case.full)) == group)
        assert case.cost(more) > case.limit


def test_bigger_ratio_never_keeps_more(network: Network, case: Case) -> None:
    if (case.share < 1).any():
        return
    share, unit = case.widths / case.full, 1.0 / case.full
    for i, j in np.argwhere(case.action[:, None] > case.action[None, :]):
        if case.widths[i] > case.floors[i]:  # a floor holds a group above its ratio
            assert share[i] <= share[j] + 1.5 * unit[i] + 0.5 * unit[j]


def test_zero_action_changes_nothing(network: Network) -> None:
    full = network.widths
    for limit in (0.5, 2.0):
        share, widths = land(
            np.ones(len(full)), np.zeros(len(full)), full, full // 4 + 1, network.macs, limit * network.macs(full)
        )
        np.testing.assert_array_equal(widths, full)
        np.testing.assert_array_equal(share, 1)


def test_within_the_limit_already_nothing_leaves(network: Network) -> None:
    full = network.widths
    _, widths = land(
        np.ones(len(full)), np.full(len(full), 0.5), full, np.ones_like(full), network.macs, network.macs(full)
    )
    np.testing.assert_array_equal(widths, full)


def test_arguments_are_not_written_to(network: Network) -> None:
    full = network.widths
    share, action, floors = np.ones(len(full)), np.full(len(full), 0.5), np.ones_like(full)
    land(share, action, full, floors, network.macs, 0.5 * network.macs(full))
    assert (share == 1).all() and (action == 0.5).all() and (floors == 1).all()


def test_equal_ratios_land_close_to_the_limit(network: Network) -> None:
    full, dense = network.widths, network.macs(network.widths)
    for budget in np.linspace(0.1, 0.9, 9):
        _, widths = land(np.ones(len(full)), np.ones(len(full)), full, np.ones_like(full), network.macs, budget * dense)
        assert budget - 0.01 <= network.macs(widths) / dense <= budget


def test_what_left_in_earlier_calls_comes_back_last_first(network: Network) -> None:
    """As many calls as it takes are one, but for units that an early one took for nothing."""
    full = network.widths
    floors, dense = np.ones_like(full), network.macs(full)
    rng = np.random.default_rng(0)
    for _ in range(20):
        limit, shares = rng.uniform(0.3, 0.7) * dense, [np.ones(len(full))]
        while True:
            share, widths = land(shares[-1], rng.uniform(0, 0.3, len(full)), full, floors, network.macs, limit)
            if network.macs(widths) <= limit:
                break
            shares.append(share)
        again = refill(widths, shares, full, floors, network.macs, limit)
        assert (again >= widths).all() and (again <= full).all() and network.macs(again) <= limit
        for group in np.flatnonzero(again < full):
            assert network.macs(again + (np.arange(len(full)) == group)) > limit
    free = refill(floors, [np.ones(len(full)), floors / full], full, floors, lambda widths: 0.0, 0.0)
    assert (free == full).all()
    one_by_one = [np.array(share) for share in ([1.0, 1.0], [0.5, 1.0], [0.5, 0.5])]  # one group, then the other
    two, one = np.array([2, 2]), np.array([1, 1])
    assert refill(one, one_by_one, two, one, lambda widths: float(widths.sum()), 3.0).tolist() == [1, 2]
