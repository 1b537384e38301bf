"""The signed-rank test against stored results of scipy 1.17.1 and against the crack paper's own tables; Holm and spread by hand."""
import pytest

from minidamage.metrics.statistics import holm, mean_std, wilcoxon

# Context-CrackNet, Table 3: IoU on CFD, CRACK500, CrackTree200, DeepCrack, Eugen Miller, Forest, GAPs, Rissbilder, Sylvie, Volker
CONTEXT_CRACKNET = (.5668, .6733, .5375, .7401, .6627, .5699, .4743, .6553, .6846, .7668)
UNET_PLUS_PLUS = (.5257, .6444, .4257, .7168, .7060, .5457, .3927, .6568, .6718, .7641)
UNET = (.1562, .6397, .4857, .7061, .6323, .5390, .3837, .6456, .6577, .7464)
TWENTY_FIVE = ([.7789, .6437, .6096, .4137, .5723, .5645, .5917, .5373, .5956, .5523, .4686, .6885, .6881, .771, .605, .5595, .5455, .4454,
                .6982, .4899, .4815, .5794, .7486, .6237, .4976],
               [.7803, .6049, .5944, .4168, .5592, .5221, .5124, .5546, .5944, .5564, .5212, .6962, .6988, .7173, .589, .5882, .5061, .4361,
                .7305, .4878, .4792, .5856, .7277, .6711, .4856])
TIED = (list(range(1, 17)), [1, 1, 5, 2, 2, 9, 4, 4, 6, 12, 7, 8, 8, 9, 19, 10])


@pytest.mark.parametrize("a, b, statistic, p, method", [
    (*TWENTY_FIVE, 133.0, 0.4418373703956604, "exact"),
    (*TIED, 23.0, 0.03467516529494914, "normal"),                             # a zero and ties among 16 pairs
    (TIED[0][:9], TIED[1][:9], 8.0, 0.1953125, "exact"),                      # the same among 9: every sign pattern
    (CONTEXT_CRACKNET, UNET_PLUS_PLUS, 9.0, 0.064453125, "exact"),
])
def test_equal_to_scipy(a, b, statistic, p, method):
    found = wilcoxon(a, b)
    assert found.statistic == statistic and found.p == pytest.approx(p, rel=1e-12) and found.method == method
    assert wilcoxon(b, a).p == found.p


def test_the_crack_paper_s_table_5():
    assert round(wilcoxon(CONTEXT_CRACKNET, UNET_PLUS_PLUS).p, 4) == 0.0645
    assert round(wilcoxon(CONTEXT_CRACKNET, UNET).p, 4) == 0.0020


def test_by_hand():
    assert wilcoxon([1, 2, 3], [0, 0, 0]).p == 2 / 8                          # one sign pattern of eight, on either side
    assert wilcoxon([1, -2, 3], [0, 0, 0]).p == 2 * 3 / 8                     # rank sums 0, 1, 2 are at most 2: {}, {1}, {2}
    assert wilcoxon([1, 2], [1, 2]) .p == 1
    assert wilcoxon([1.0], [0.0]).p == 1


@pytest.mark.parametrize("a, b, message", [([1, 2], [1], "shapes .2. and .1."), ([], [], "paired values"),
                                           ([1, float("nan")], [1, 2], "finite")])
def test_mistakes_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        wilcoxon(a, b)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])         # 3 x .01, 2 x .03, then never smaller than that
    assert holm([0.5, 0.9]).tolist() == [1, 1] and len(holm([])) == 0


def test_mean_and_spread():
    assert mean_std([1, 2, 3, float("nan")]) == (2, 1)
    assert mean_std([4]) == pytest.approx((4, float("nan")), nan_ok=True)
    mean, std = mean_std(CONTEXT_CRACKNET)
    assert round(mean, 4) == 0.6331 and round(std, 4) == 0.0929               # the paper's Table 4 prints .6331 +- .0945
