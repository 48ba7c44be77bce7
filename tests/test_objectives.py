import pytest

from lightning_nas.objectives import Maximize, Minimize


class Macs:
    name, unit = "macs", "MAC"

    def __call__(self, architecture):
        return 100.0 * architecture["width"]


MACS = Macs()


def test_an_objective_takes_name_and_unit_from_a_cost():
    assert (Minimize(MACS).name, Minimize(MACS).unit, Minimize(MACS).label) == ("macs", "MAC", "macs [MAC]")
    assert Maximize("accuracy").label == "accuracy"
    assert (Minimize("x").direction, Maximize("x").direction) == ("minimize", "maximize")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Maximize(""), ValueError, "a name is needed"),
        (lambda: Maximize(3), TypeError, "name of a value or a cost.*got 3"),
        (lambda: Minimize(lambda architecture: 1.0), TypeError, "with .name and .unit"),
        (lambda: Minimize(MACS, unit="GMAC"), ValueError, "is in 'MAC', not 'GMAC'"),
    ],
)
def test_what_cannot_be_an_objective_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
