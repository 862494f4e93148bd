import pytest
import torch

from bench.rng import Rng


def test_a_draw_is_a_function_of_its_address():
    like = torch.empty(3, 2)
    one, two = Rng(0, "pgd", 1), Rng(0, "pgd").at(1)
    assert torch.equal(one.uniform(like), two.uniform(like))
    assert torch.equal(one.uniform(like), one.uniform(like))


@pytest.mark.parametrize("other", [(1, "pgd", 0), (0, "pgd", 1), (0, "ms", 0), (0, "pgd")])
def test_another_address_draws_other_numbers(other):
    like = torch.empty(64)
    assert not torch.equal(Rng(0, "pgd", 0).uniform(like), Rng(*other).uniform(like))


def test_an_image_is_given_the_same_start_in_any_batch():
    whole = Rng(0, images=[4, 7, 9]).uniform(torch.empty(3, 5))
    alone = Rng(0, images=[7]).uniform(torch.empty(1, 5))
    assert torch.equal(whole[1:2], alone)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_taking_rows_keeps_each_image_its_stream(rows):
    rng, like = Rng(3, images=[4, 7, 9]), torch.empty(3, 5)
    assert torch.equal(rng.take(rows).uniform(like[rows]), rng.uniform(like)[rows])


def test_uniform_numbers_fill_the_unit_interval():
    u = Rng(0).uniform(torch.empty(100_000))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002


def test_normal_numbers_have_mean_zero_and_variance_one():
    z = Rng(0).normal(torch.empty(100_000))
    assert abs(z.mean()) < 0.02 and abs(z.var() - 1) < 0.02


def test_choices_cover_their_values():
    values = (10, 20, 30)
    assert {Rng(0, i).choice(values) for i in range(50)} == set(values)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    Rng(0).uniform(torch.empty(9))
    Rng(0).permutation(9)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_numbers_are_the_same_on_every_machine_and_release():
    drawn = Rng(0, "pgd", "ce", 0, images=[0]).at("start").uniform(torch.empty(1, 3))
    assert drawn.flatten().tolist() == pytest.approx(GOLDEN, abs=1e-7)


GOLDEN = [0.04747748374938965, 0.10352569818496704, 0.027205288410186768]
