"""The federated standardisation is that of the pooled data, whatever the division."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedxmr.scaling import Moments, Scaler, combine_moments, scale
from fedxmr.types import Items


@given(st.integers(0, 2**31), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.sampled_from([0.0, 1e4]))
def test_combined_moments_are_those_of_all_rows(seed, sizes, offset):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, 3, size=(n, 2)) for n in sizes]
    pooled = np.concatenate(parts)
    got = combine_moments([Moments.of(torch.tensor(part)) for part in parts])
    assert got.count == len(pooled)
    if len(pooled):
        np.testing.assert_allclose(got.mean.numpy(), pooled.mean(0), rtol=1e-9)
        np.testing.assert_allclose(got.centred.numpy(), ((pooled - pooled.mean(0)) ** 2).sum(0), rtol=1e-6, atol=1e-6)


def test_standardised_rows_have_zero_mean_and_unit_deviation_and_a_constant_column_stays_finite():
    x = torch.randn(50, 3) * 7 + 100
    x[:, 1] = 4.0
    scaler = Scaler.of({"image": Moments.of(x)})
    got = scale(Items.paired({"image": x}, torch.ones(50, 1, dtype=torch.bool)), {"image": "standardise"}, scaler)
    np.testing.assert_allclose(got.features["image"].mean(0).numpy(), 0, atol=1e-4)
    np.testing.assert_allclose(got.features["image"].std(0, unbiased=False).numpy(), [1, 0, 1], atol=1e-5)


@pytest.mark.parametrize("tiny", [1.4e-45, 1e-40, 1e-30])
def test_a_column_that_hardly_varies_stays_finite(tiny):
    x = torch.zeros(200, 1)
    x[0] = tiny
    scaler = Scaler.of({"image": Moments.of(x)})
    got = scale(Items.paired({"image": x}, torch.ones(200, 1, dtype=torch.bool)), {"image": "standardise"}, scaler)
    assert got.features["image"].isfinite().all()


def test_isotropic_features_keep_the_proportions_of_their_columns_and_have_a_mean_square_of_one():
    x = torch.randn(50, 3) * torch.tensor([7.0, 0.0, 0.01]) + 100
    scaler = Scaler.of({"image": combine_moments([Moments.of(x[:13]), Moments.of(x[13:])])})
    got = scale(Items.paired({"image": x}, torch.ones(50, 1, dtype=torch.bool)), {"image": "isotropic"}, scaler)
    expected = x.double().numpy() - x.double().numpy().mean(0)
    expected /= np.sqrt((expected**2).mean())
    np.testing.assert_allclose(got.features["image"].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("how", ["standardise", "isotropic"])
def test_features_that_never_change_stay_finite_where_they_do_in_the_end(how):
    scaler = Scaler.of({"image": Moments.of(torch.full((50, 3), 0.1))})
    got = scale(
        Items.paired({"image": torch.full((2, 3), 4.1)}, torch.ones(2, 1, dtype=torch.bool)), {"image": how}, scaler
    )
    assert got.features["image"].flatten().tolist() == pytest.approx([4.0] * 6)


def test_norm_scaling_gives_every_row_length_ten_and_leaves_a_zero_row():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    got = scale(Items.paired({"text": x}, torch.ones(2, 1, dtype=torch.bool)), {"text": "norm"}, Scaler({}, {}))
    assert got.features["text"].tolist() == [[pytest.approx(6), pytest.approx(8)], [0, 0]]


def test_scalers_are_equal_by_content():
    one, two = (Scaler.of({"image": Moments.of(torch.arange(6.0).reshape(3, 2))}) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != Scaler({}, {})
    assert Scaler.from_state(one.to_state()) == one
