"""Pieces of rational-quadratic splines against what defines them."""

import pytest
import torch

from skebm.bases._spline import Piece


def pieces(n=1000, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)

    def draw(scale):
        return torch.randn(n, generator=rng, dtype=dtype).mul(scale).exp()

    return Piece(draw(1.0), -draw(1.0), draw(2.0), draw(2.0), draw(2.0), draw(2.0))


def slope(piece, t):
    t = t.clone().requires_grad_()
    y, _ = piece.at(t)
    return torch.autograd.grad(y.sum(), t)[0] / piece.width


def test_ends_and_slopes_there():
    piece = pieces()
    zero, one = torch.zeros(1000).double(), torch.ones(1000).double()
    torch.testing.assert_close(piece.at(zero)[0], piece.bottom)
    torch.testing.assert_close(piece.at(one)[0], piece.bottom + piece.height)
    torch.testing.assert_close(piece.at(zero)[1], piece.first.log())
    torch.testing.assert_close(piece.at(one)[1], piece.last.log())


@pytest.mark.parametrize("t", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_slope_is_the_derivative_and_the_inverse_goes_back(t):
    piece, t = pieces(), torch.full((1000,), t, dtype=torch.float64)
    y, log_slope = piece.at(t)
    torch.testing.assert_close(log_slope, slope(piece, t).log(), rtol=1e-6, atol=1e-6)
    assert log_slope.isfinite().all()  # monotone
    share = (y - piece.bottom) / piece.height
    # an error of the share is one of t, divided by the slope; sums of slopes are rounded, too
    mean = piece.height / piece.width
    bound = 1e-14 * (1 + mean / log_slope.exp()) * (1 + (piece.first + piece.last) / mean)
    assert ((piece.share_of_width(share) - t).abs() < bound).all()


def test_equal_slopes_give_a_straight_line():
    piece = pieces()
    mean = piece.height / piece.width
    piece = piece._replace(first=mean, last=mean)
    t = torch.linspace(0, 1, 1000).double()
    torch.testing.assert_close(piece.at(t)[0], piece.bottom + t * piece.height)
    torch.testing.assert_close(piece.share_of_width(t), t)


def test_inverse_has_no_unit():
    piece, r = pieces(), torch.linspace(0, 1, 1000).double()
    small = piece._replace(height=1e-30 * piece.height, first=1e-30 * piece.first,
                           last=1e-30 * piece.last)  # fmt: skip
    torch.testing.assert_close(small.share_of_width(r), piece.share_of_width(r))
